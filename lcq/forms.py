"""What is stored in place of an array."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq import packing
from lcq.base import Form, leafwise, register_form, static
from lcq.blocks import blocks, compute_dtype, explicit_sharding

_SELECT = 8
"""Up to this many levels a lookup is a chain of selects, which vectorises; above, a gather."""
_FLOATS = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2")


@register_form
class Codes(Form):
    """Indices into a short table: Delta = scale * (table[codes] - zero), the table learned or fixed.

    Blocks: `levels`, `scale` and `zero` have one entry per block of the leaf, their leading axes giving the
    number of equal blocks along each axis of the leaf; all ones is a single block.

    Attributes:
        codes: uint8 or uint16 of the leaf's shape; packed uint32 words in the stored layout.
        levels: learned table, [*blocks, K], ascending; None if `values` is given.
        scale: [*blocks] or None for 1.
        zero: [*blocks] or None for 0, in units of the table.
        values: fixed table, ascending; None if `levels` is given.
        packed: the leaf's shape if `codes` are words, None in the working layout.
    """

    codes: Any = leafwise()
    levels: Any = None
    scale: Any = None
    zero: Any = None
    values: tuple[float, ...] | None = static(default=None)
    packed: tuple[int, ...] | None = static(default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape if self.packed is None else self.packed

    @property
    def size_of_table(self) -> int:
        """K, the number of levels."""
        if self.values is not None:
            return len(self.values)
        return self.levels.shape[-1]

    @property
    def bits(self) -> int:
        return math.prod(self.shape) * packing.width(self.size_of_table) + self.shared_bits

    @property
    def shared_bits(self) -> int:
        return sum(a.size * a.dtype.itemsize * 8 for a in (self.levels, self.scale, self.zero) if a is not None)

    def pack(self) -> Self:
        if self.packed is not None:
            return self
        host = jax.device_get(self)
        words = packing.pack(host.codes, packing.width(self.size_of_table))
        return dataclasses.replace(host, codes=words, packed=tuple(self.codes.shape))

    def unpack(self) -> Self:
        if self.packed is None:
            return self
        codes = packing.unpack(jnp.asarray(self.codes), packing.width(self.size_of_table), self.packed)
        return dataclasses.replace(self, codes=codes, packed=None)

    def dense(self) -> Array:
        codes = self.unpack().codes
        per_block = next(
            (a.shape[: codes.ndim] for a in (self.scale, self.levels, self.zero) if a is not None),
            (1,) * codes.ndim,
        )
        cut = blocks(codes.shape, per_block)
        levels = jax.tree.map(jnp.asarray, self.levels)
        value = _lookup(codes.reshape(cut.split), levels, self.values, cut.stat)
        if self.zero is not None:
            value = value - self.zero.reshape(cut.stat)
        if self.scale is not None:
            value = value * self.scale.reshape(cut.stat)
        return value.reshape(codes.shape).astype(self.dtype)

    def check_stored(self) -> None:
        if self.packed is None:
            raise ValueError("wanted packed codes with the leaf's shape; got the working layout")
        check_shape(self.packed)
        check_float("dtype", self.dtype)
        if (self.levels is None) == (self.values is None):
            raise ValueError("wanted either learned levels or fixed values")
        _check_blocks(self.packed, {"levels": self.levels, "scale": self.scale, "zero": self.zero})
        if not 1 <= self.size_of_table <= 65536:
            raise ValueError(f"wanted 1 to 65,536 levels; got {self.size_of_table}")
        if self.values is not None and max(map(abs, self.values)) > float(np.finfo(np.float32).max):
            raise ValueError("wanted fixed values that float32 can hold")
        size, width = math.prod(self.packed), packing.width(self.size_of_table)
        words = packing.word_count(size, width)
        if self.codes.dtype != np.uint32 or self.codes.shape != (words,):
            raise ValueError(
                f"codes: wanted uint32[{words}] for {size} codes of {width} bits; "
                f"got {self.codes.dtype}{list(self.codes.shape)}"
            )
        if isinstance(self.codes, np.ndarray) and _largest(self.codes, width, size) >= self.size_of_table:
            raise ValueError(f"codes: wanted codes below {self.size_of_table}; got a larger one")


def _lookup(codes: Array, levels: Array | None, values: tuple[float, ...] | None, stat: tuple[int, ...]) -> Array:
    """table[codes]; codes are cut into blocks, `stat` is the shape of one number per block."""
    if values is not None and values == tuple(range(int(values[0]), int(values[0]) + len(values))):
        return codes.astype(jnp.float32) + values[0]
    if values is not None:
        table = jnp.asarray(np.asarray(values, np.float32)).reshape((1,) * codes.ndim + (-1,))
    else:
        assert levels is not None
        table = levels.reshape((*stat, -1)).astype(compute_dtype(levels.dtype))
    if table.shape[-1] > _SELECT:
        if table.ndim == codes.ndim + 1 and all(n == 1 for n in table.shape[:-1]):
            return table.reshape(-1).at[codes].get(out_sharding=explicit_sharding(codes))
        return jnp.take_along_axis(table, codes[..., None].astype(jnp.int32), axis=-1)[..., 0]
    value = jnp.broadcast_to(table[..., 0], codes.shape)
    for k in range(1, table.shape[-1]):
        value = jnp.where(codes == k, table[..., k], value)
    return value


def _check_blocks(shape: tuple[int, ...], arrays: dict[str, Any]) -> None:
    """Of what has one entry per block: floats, the same blocks in all, and these divide the leaf's axes."""
    seen = None
    for name, array in arrays.items():
        if array is None:
            continue
        check_float(name, str(array.dtype))
        counts = array.shape[:-1] if name == "levels" else array.shape
        rank = len(shape) + (name == "levels")
        if len(array.shape) != rank or any(c < 1 or n % c for c, n in zip(counts, shape, strict=True)):
            raise ValueError(f"{name}: wanted block counts that divide {list(shape)}; got {list(array.shape)}")
        if seen not in (None, counts):
            raise ValueError(f"{name}: wanted the same blocks in all of {', '.join(arrays)}; got {counts} and {seen}")
        seen = counts


def _largest(words: np.ndarray, width: int, size: int) -> int:
    """The largest of packed codes, without unpacking them all at once. Host only."""
    if width == 0 or size == 0:
        return 0
    rows = -(-size // 32)
    grid = np.zeros((rows, width), np.uint32)
    grid.reshape(-1)[: words.size] = words
    largest = 0
    for i in range(32):
        word, shift = divmod(i * width, 32)
        code = grid[:, word] >> np.uint32(shift)
        if shift + width > 32:
            code |= grid[:, word + 1] << np.uint32(32 - shift)
        largest = max(largest, int((code & np.uint32((1 << width) - 1)).max()))
    return largest


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises ValueError unless an array could have this shape."""
    fits = len(shape) <= 64 and all(0 <= n < 1 << 63 for n in shape) and math.prod(n or 1 for n in shape) < 1 << 63
    if not fits:
        raise ValueError(f"wanted a shape of at most 64 axes and 2^63 elements; got {str(shape)[:200]}")


def check_float(name: str, dtype: str) -> None:
    """Raises ValueError unless `dtype` is the name of a floating-point dtype."""
    if dtype not in _FLOATS:
        raise ValueError(f"{name}: wanted one of {', '.join(_FLOATS)}; got {dtype[:40]!r}")


@register_form
class Cast(Form):
    """The same numbers in a shorter floating-point format: Delta = values as `dtype`.

    Attributes:
        values: the leaf, rounded to the stored dtype.
    """

    values: Any = leafwise()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def bits(self) -> int:
        return self.values.size * self.values.dtype.itemsize * 8

    def pack(self) -> Self:
        return self if isinstance(self.values, np.ndarray) else jax.device_get(self)

    def unpack(self) -> Self:
        return self

    def dense(self) -> Array:
        return jnp.asarray(self.values).astype(self.dtype)

    def check_stored(self) -> None:
        check_shape(self.values.shape)
        check_float("values", str(self.values.dtype))
        check_float("dtype", self.dtype)
