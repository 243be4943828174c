"""Codes: indices into a short table."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lcq.forms import bitpack
from lcq.forms.axes import shares
from lcq.forms.base import Decoding, Form, leafwise, register_form, static
from lcq.forms.blocks import blocks, compute_dtype, cut_axes, join_axes
from lcq.forms.columns import SELECT, columns, equal_steps
from lcq.forms.dtypes import nearest_number, wider
from lcq.forms.lookup import level_of
from lcq.forms.processes import on_host
from lcq.forms.relayout import MatrixView, Relayout, take_from_tables, unstack_tables
from lcq.forms.steps import Steps, from_steps, in_steps, steps_of
from lcq.forms.validate import check_axes, check_blocks, check_counts, check_float, check_shape, check_words


@register_form
class Codes(Form):
    """Indices into a short table: Delta = scale * (table[codes] - zero), the table learned or fixed.

    Blocks: `levels`, `scale` and `zero` have one entry per block of the leaf, their leading axes giving the
    number of equal blocks along each axis of the leaf; all ones is a single block.

    Attributes:
        codes: uint8 or uint16 of the leaf's shape; packed uint32 words in the stored layout.
        levels: learned table, [*blocks, K], ascending; None if `values` is given.
        scale: [*blocks], of either sign and often in 16 bits; None for 1.
        zero: [*blocks] or None for 0, in units of the table. Whole numbers below K are uint8 or uint16, and in the
            stored layout uint32 words, packed as wide as the codes.
        values: fixed table, ascending; None if `levels` is given.
        packed: the leaf's shape if `codes` are words, None in the working layout.
        units: in the stored layout of scales in steps their units, see `lcq.forms.steps`; None otherwise.
        scale_bits: of scales, and of scale * zero, that are multiples of units, which `scale` and `zero` are as words
            in the stored layout; None for scales of their own.
        along: the axes along which blocks share units, counted from the end; None for scales of their own.
        blocks: in the stored layout of scales in steps how many blocks there are along each axis; None otherwise.
    """

    codes: Any = leafwise()
    levels: Any = None
    scale: Any = None
    zero: Any = None
    values: tuple[float, ...] | None = static(default=None)
    packed: tuple[int, ...] | None = static(default=None)
    units: Any = None
    scale_bits: int | None = static(default=None)
    along: tuple[int, ...] | None = static(default=None)
    blocks: tuple[int, ...] | None = static(default=None)

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
        return math.prod(self.shape) * bitpack.width(self.size_of_table) + self.shared_bits

    @property
    def shared_bits(self) -> int:
        if self.scale_bits is not None:
            return 2 * math.prod(self._blocks) * self.scale_bits + 2 * 32 * math.prod(self._units)
        wide = [a for a in (self.levels, self.scale, None if self._whole else self.zero) if a is not None]
        zeros = self._zeros * bitpack.width(self.size_of_table)
        return sum((a.size * a.dtype.itemsize * 8 for a in wide), zeros)

    @property
    def _whole(self) -> bool:
        """Whether zeros are whole numbers, or words of such."""
        return self.zero is not None and jnp.issubdtype(self.zero.dtype, jnp.integer)

    @property
    def _blocks(self) -> tuple[int, ...]:
        """How many blocks there are along each axis, of a form with scales."""
        return self.scale.shape if self.blocks is None else self.blocks

    @property
    def _units(self) -> tuple[int, ...]:
        """How many units there are along each axis."""
        rank = len(self._blocks)
        return tuple(1 if axis - rank in (self.along or ()) else n for axis, n in enumerate(self._blocks))

    @property
    def _zeros(self) -> int:
        """How many whole zeros there are."""
        if not self._whole:
            return 0
        return math.prod(self.scale.shape if self.zero.dtype == jnp.uint32 else self.zero.shape)

    def pack(self) -> Self:
        if self.packed is not None:
            return self
        host, width = jax.device_get(on_host(self)), bitpack.width(self.size_of_table)
        if host.scale_bits is not None:
            steps = jax.device_get(steps_of(host.scale, host.zero, host.scale_bits, host.along or ()))
            scale, zero = (bitpack.pack(a, host.scale_bits) for a in steps[:2])
            host = dataclasses.replace(host, scale=scale, zero=zero, units=steps.units, blocks=self.scale.shape)
            return dataclasses.replace(host, codes=bitpack.pack(host.codes, width), packed=self.codes.shape)
        zero = bitpack.pack(host.zero, width) if self._whole and self.scale is not None else host.zero
        return dataclasses.replace(host, codes=bitpack.pack(host.codes, width), zero=zero, packed=self.codes.shape)

    def unpack(self) -> Self:
        if self.packed is None:
            return self
        codes = bitpack.unpack(jnp.asarray(self.codes), bitpack.width(self.size_of_table), self.packed)
        numbers = self.plain()
        return dataclasses.replace(numbers, codes=codes, packed=None, scale_bits=self.scale_bits, along=self.along)

    def plain(self) -> Self:
        """The form with a scale and a zero of its own for every block, in either layout."""
        if self.scale_bits is not None:
            scale, zero = self.scale, self.zero
            if self.units is not None:
                words = (jnp.asarray(a) for a in (scale, zero))
                scale, zero = (bitpack.unpack(a, self.scale_bits, self._blocks) for a in words)
                scale, zero = from_steps(Steps(scale, zero, self.units))
            own = dataclasses.replace(self, scale=scale, zero=zero, scale_bits=None, along=None)
            return dataclasses.replace(own, units=None, blocks=None)
        if self.zero is None or self.zero.dtype != jnp.uint32:
            return self
        zero = bitpack.unpack(jnp.asarray(self.zero), bitpack.width(self.size_of_table), self.scale.shape)
        return dataclasses.replace(self, zero=zero)

    def in_steps(self) -> Self:
        """The working form with scales and zeros that can be stored, where these are in steps."""
        if self.scale_bits is None:
            return self
        scale, zero = in_steps(self.scale, self.zero, self.scale_bits, self.along or ())
        return dataclasses.replace(self, scale=scale, zero=zero)

    @property
    def alphabets(self) -> dict[str, tuple[int, int]]:
        codes = {"codes": (self.size_of_table, math.prod(self.shape))}
        if self.scale_bits is not None:
            return codes | dict.fromkeys(("scale", "zero"), (1 << self.scale_bits, math.prod(self._blocks)))
        words = self.zero is not None and self.zero.dtype == jnp.uint32
        return codes | ({"zero": (self.size_of_table, self._zeros)} if words else {})

    @property
    def ranges(self) -> dict[str, int]:
        return {"codes": self.size_of_table}

    def dense(self) -> Array:
        form = self.unpack()
        codes = form.codes
        per_block = next(
            (a.shape[: codes.ndim] for a in (form.scale, form.levels, form.zero) if a is not None),
            (1,) * codes.ndim,
        )
        cut = blocks(codes.shape, per_block)
        levels = jax.tree.map(jnp.asarray, self.levels)
        value = _lookup(cut_axes(codes, per_block), levels, self.values, cut.stat)
        if form.zero is not None:
            value = value - jnp.asarray(form.zero, value.dtype).reshape(cut.stat)
        if form.scale is not None:
            wide = wider(value.dtype, form.scale.dtype)
            value = value.astype(wide) * jnp.asarray(form.scale, wide).reshape(cut.stat)
        return nearest_number(join_axes(value, codes.shape), self.dtype)

    def describe(self) -> str:
        words = [f"codes K={self.size_of_table}"]
        if self.values is not None:
            words.append("fixed")
        elif (many := self.levels.size // self.levels.shape[-1]) > 1:
            words.append(f"{many} tables")
        if self.scale is not None:
            many = math.prod(self._blocks)
            words.append(f"{many} scales" if many > 1 else "scaled")
        if self.scale_bits is not None:
            words[-1] += f" of {self.scale_bits} bits"
        if self.zero is not None:
            words.append("shifted")
        return ", ".join(words)

    def one_per(self) -> str:
        if self.blocks is not None:
            return shares(self.shape, self.blocks)
        counts = [a.shape[: len(self.shape)] for a in (self.scale, self.levels, self.zero) if a is not None]
        return shares(self.shape, counts[0]) if counts else ""

    def relayout(self, change: Relayout) -> Form | None:
        if change.idle:
            return self
        plain = self.plain()
        tables = change.tables(plain._tables())
        if tables is None:
            return None
        if plain.packed is not None and change.in_order:
            return plain._replaced(packed=change.result, **tables)
        form = plain.unpack()
        return form._replaced(codes=change.function(form.codes), **tables)

    def take_rows(self, rows: Int[Array, " R"]) -> Form:
        """Of packed codes whole words are taken, if no word holds codes of two rows."""
        plain = self.plain()
        tables, count = take_from_tables(plain._tables(), rows, self.shape[0]), rows.shape[0]
        if (words := plain._words()) is None:
            form = plain.unpack()
            return form._replaced(codes=form.codes[rows], **tables)
        rest = self.shape[1:]
        if jax.export.is_symbolic_dim(count):  # words of a number of rows that is not known are nobody's to unpack
            width = bitpack.width(self.size_of_table)
            codes = jax.vmap(lambda row: bitpack.unpack(row, width, rest))(words[rows])
            return plain._replaced(codes=codes, packed=None, **tables)
        return plain._replaced(codes=words[rows].reshape(-1), packed=(count, *rest), **tables)

    def unstack(self) -> Form:
        plain = self.plain()
        tables = unstack_tables(plain._tables(), self.shape[0])
        if (words := plain._words()) is not None:
            return plain._replaced(codes=words, packed=self.shape[1:], **tables)
        form = plain.unpack()
        return form._replaced(codes=form.codes, **tables)

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Form:
        """As `Columns`.

        Raises:
            ValueError: codes of a vector.

        Example:
            >>> import lcq
            >>> lcq.KMeans(2).project(jnp.array([[-1.0, -3.0], [1.0, 3.0]])).prepack().words.tolist()
            [[[2, 2]]]
        """
        del traced
        matrix: Any = self if view is None else self.relayout(view.of(self.shape))
        if matrix is None:
            return self
        form = matrix.unpack()
        if form.codes.ndim < 2:
            raise ValueError(f"expected codes of a matrix [K, n], or stacked ones, got {list(form.shape)}")
        made = columns(form.codes, form.levels, form.values, form.scale, form.zero)
        return dataclasses.replace(made, dtype=form.dtype, shared=form.shared).seen_as(self.shape, view)

    @property
    def decoding(self) -> Decoding:
        short = equal_steps(self.values, self.size_of_table) or self.size_of_table <= SELECT
        return "many rows" if short else "always"

    def _tables(self) -> dict[str, Array]:
        form = self.plain()
        given = {"levels": form.levels, "scale": form.scale, "zero": form.zero}
        return {name: jnp.asarray(a) for name, a in given.items() if a is not None}

    def _words(self) -> Array | None:
        """Packed codes, the words of each row of the leaf apart, if no word holds codes of two rows."""
        if self.packed is None:
            return None
        bits = bitpack.width(self.size_of_table) * math.prod(self.packed[1:])
        return jnp.asarray(self.codes).reshape(self.packed[0], -1) if bits and bits % 32 == 0 else None

    def _replaced(self, **changes: Any) -> "Codes":
        return dataclasses.replace(self, **changes)

    def check_stored(self) -> None:
        if self.packed is None:
            raise ValueError("expected packed codes with the leaf's shape, got the working layout")
        check_shape(self.packed)
        check_float("dtype", self.dtype)
        if (self.levels is None) == (self.values is None):
            raise ValueError("expected either learned levels or fixed values")
        words = self.scale_bits is None and self.zero is not None and self.zero.dtype == np.uint32
        if self.scale_bits is not None:
            self._check_steps()
        else:
            zero = None if words else self.zero
            check_blocks(self.packed, {"levels": self.levels, "scale": self.scale, "zero": zero})
        if not 1 <= self.size_of_table <= 65536:
            raise ValueError(f"expected 1 to 65,536 levels, got {self.size_of_table}")
        if self.values is not None and max(map(abs, self.values)) > float(np.finfo(np.float32).max):
            raise ValueError("expected fixed values that float32 can hold")
        if words and self.scale is None:
            raise ValueError("zero: expected a scale beside packed zeros, which says how many there are, got none")
        check_words("codes", self.codes, math.prod(self.packed), self.size_of_table)
        if words:
            check_words("zero", self.zero, self._zeros, self.size_of_table)

    def _check_steps(self) -> None:
        """The rest of `check_stored` of a form with scales in steps."""
        assert self.packed is not None and self.scale_bits is not None
        if not 1 <= self.scale_bits <= 8 or self.values is None or self.blocks is None:
            raise ValueError(f"expected scales of 1 to 8 bits, fixed values and blocks, got {self.scale_bits} bits")
        check_counts("blocks", self.packed, self.blocks)
        check_axes("along", self.packed, self.along or ())
        got = None if self.units is None else (str(self.units.dtype), tuple(self.units.shape))
        if got != ("float32", (2, *self._units)):
            raise ValueError(f"units: expected float32[2, {', '.join(map(str, self._units))}], got {got}")
        for name, words in (("scale", self.scale), ("zero", self.zero)):
            check_words(name, words, math.prod(self.blocks), 1 << self.scale_bits)


def _lookup(codes: Array, levels: Array | None, values: tuple[float, ...] | None, stat: tuple[int, ...]) -> Array:
    """table[codes]; codes are cut into blocks, `stat` is the shape of one number per block."""
    if values is not None and values == tuple(range(int(values[0]), int(values[0]) + len(values))):
        return codes.astype(jnp.float32) + values[0]
    if values is not None:
        table = jnp.asarray(np.asarray(values, np.float32)).reshape((1,) * codes.ndim + (-1,))
    else:
        assert levels is not None
        table = levels.reshape((*stat, -1)).astype(compute_dtype(levels.dtype))
    return level_of(table, codes)
