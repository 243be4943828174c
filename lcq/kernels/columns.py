"""Columns: a matrix of codes as kernels read it, packed down its columns."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped, UInt, UInt32

from lcq.forms import Codes, bitpack
from lcq.forms.base import own, static, tree_form
from lcq.forms.dtypes import own_promotion
from lcq.kernels.base import Laid
from lcq.kernels.reference import fields

_SELECT = 16
"""Up to this many levels a lookup is a chain of selects, which vectorises; above, a gather."""


@tree_form
class Columns(Laid):
    """Codes laid out for products, packed down the columns of the matrix. Made by `columns`.

        Delta[k, n] = first[n] + step[n] code[k, n]  if levels are equally far apart,  else levels[n, code[k, n]]

    The rows of the matrix are cut into b equal blocks, each with words and numbers of its own. Of a grid with a scale
    first = (lowest - zero) step is not kept: step has the scale's dtype and zero that of codes, 16 and 8 bits a block.

    Attributes:
        words: uint32 [*stacked, b, w, n], see `reference.fields`; a block's last word is filled with zeros.
        first: [*stacked, b, 1 or n]; None if there are `levels`, or a `lowest`.
        step: [*stacked, b, 1 or n]; None if there are `levels`.
        levels: [*stacked, b, 1 or n, K]; None if they are equally far apart.
        zero: like `step`; None for 0.
        lowest: the lowest level of a grid, in steps.
        width: bits of a code, 1, 2, 4, 8 or 16.
    """

    words: Any = own()
    first: Any = own(default=None)
    step: Any = own(default=None)
    levels: Any = own(default=None)
    zero: Any = own(default=None)
    lowest: float | None = static(default=None)
    width: int = static(default=1)

    @property
    def stacked(self) -> tuple[int, ...]:
        return tuple(self.words.shape[:-3])

    @property
    def columns(self) -> int:
        return self.words.shape[-1]

    @property
    def block(self) -> int:
        """Rows of a block, K / b."""
        return self.rows // self.words.shape[-3]

    def lines(self) -> tuple[Array, Array]:
        """(first, step) in float32, of levels that are equally far apart."""
        step = self.step.astype(jnp.float32)
        if self.lowest is None:
            return self.first, step
        return (self.lowest if self.zero is None else self.lowest - self.zero.astype(jnp.float32)) * step, step

    def matrix(self) -> Float[Array, "*stacked k n"]:
        codes = fields(self.words, self.width)[..., : self.block, :]
        if self.levels is None:
            first, step = self.lines()
            values = first[..., None, :] + step[..., None, :] * codes.astype(jnp.int32).astype(jnp.float32)
        else:
            values = _lookup(codes, self.levels[..., None, :, :])
        return values.reshape(*self.words.shape[:-3], -1, self.words.shape[-1])

    def take(self, numbers: Int[Array, " m"]) -> "Columns":
        def some(a: Any, axis: int) -> Any:
            return a if a is None or a.shape[axis] == 1 else jnp.take(a, numbers, axis)

        return dataclasses.replace(
            self,
            words=jnp.take(self.words, numbers, -1),
            first=some(self.first, -1),
            step=some(self.step, -1),
            zero=some(self.zero, -1),
            levels=some(self.levels, -2),
            tail=(self.rows, numbers.shape[0]),
            axes=(0, 1),
        )


@own_promotion()
def columns(form: Codes) -> Columns:
    """Lays out codes [K, n], or stacked ones [G, K, n], for products. Works under jit; once, when a net is loaded, is
    enough.

    Raises:
        ValueError: codes of a vector.

    Example:
        >>> import lcq
        >>> w = jnp.array([[-1.0, -3.0], [1.0, 3.0]])
        >>> columns(lcq.KMeans(2).project(w)).words.tolist()
        [[[2, 2]]]
    """
    form = form.unpack()
    if form.codes.ndim < 2:
        raise ValueError(f"expected codes of a matrix [K, n], or stacked ones, got {list(form.shape)}")
    *stacked, rows, n = form.codes.shape
    tables = [a for a in (form.levels, form.scale, form.zero) if a is not None]
    *_, b, across = tables[0].shape[: form.codes.ndim] if tables else (1, 1)

    def each(numbers: Any, dtype: Any = jnp.float32) -> Any:
        """Numbers for each block of the matrix, and for each column if columns differ."""
        numbers = jnp.broadcast_to(numbers.astype(dtype), (*stacked, b, across, numbers.shape[-1]))
        return numbers if across in (1, n) else jnp.repeat(numbers, n // across, axis=-2)

    table = jnp.asarray(form.values) if form.levels is None else form.levels
    zero, scale = (
        jnp.asarray(n if a is None else a).astype(jnp.float32)[..., None]
        for n, a in ((0.0, form.zero), (1.0, form.scale))
    )
    width = next(bits for bits in (1, 2, 4, 8, 16) if bits >= bitpack.width(table.shape[-1]))
    words = pack_columns(form.codes.reshape(*stacked, b, rows // b, n), width)
    laid = Columns(words=words, width=width, tail=(rows, n), axes=(0, 1), dtype=form.dtype, shared=form.shared)
    if not _equal_step(form):
        return dataclasses.replace(laid, levels=each((table - zero) * scale))
    if (grid := _short_gap(form)) is not None:
        gap, lowest = grid
        zeros = None if form.zero is None else each(jnp.asarray(form.zero)[..., None], form.zero.dtype)[..., 0]
        step = each(gap * jnp.asarray(form.scale)[..., None], form.scale.dtype)[..., 0]
        return dataclasses.replace(laid, step=step, zero=zeros, lowest=lowest)
    second = table[..., 1:2] if table.shape[-1] > 1 else table
    first, step = (table[..., :1] - zero) * scale, (second - table[..., :1]) * scale
    return dataclasses.replace(laid, first=each(first)[..., 0], step=each(step)[..., 0])


def _equal_step(form: Codes) -> bool:
    """Whether the levels are known to be equally far apart, from nothing but the form's structure."""
    if form.values is None:
        return form.size_of_table <= 2
    gaps = np.diff(form.values)
    return bool((gaps == gaps[:1]).all())


def _short_gap(form: Codes) -> tuple[float, float] | None:
    """The gap of a fixed grid, and its lowest level in gaps, if gap times scale needs no more bits than the scale: a
    power of two, of what has none of float16's overflow, and 1 where zeros count gaps. None for all else."""
    if form.values is None or form.scale is None or len(form.values) < 2:
        return None
    gap = form.values[1] - form.values[0]
    short = math.frexp(gap)[0] == 0.5 and form.scale.dtype != jnp.float16 and form.zero is None
    return (gap, form.values[0] / gap) if gap == 1 or short else None


@own_promotion()
def pack_columns(codes: UInt[Array, "*g k n"], width: int) -> UInt32[Array, "*g w n"]:
    """Words of codes that run down the columns, see `reference.fields`; zeros fill the last.

    Example:
        >>> pack_columns(jnp.array([[1, 0], [1, 1], [0, 1]], jnp.uint8), 1)
        Array([[3, 6]], dtype=uint32)
    """
    each = 32 // width
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % each), (0, 0)])
    *lead, rows, n = codes.shape
    codes = codes.reshape(*lead, rows // each, each, n).astype(jnp.uint32)
    return (codes << jnp.arange(0, 32, width, dtype=jnp.uint32)[:, None]).sum(-2, dtype=jnp.uint32)


@own_promotion()
def pack_signs(x: Shaped[Array, "*g k"]) -> UInt32[Array, "*g w"]:
    """Signs packed along the last axis: bit j of word i is set if x[32 i + j] >= 0, for +1; zeros fill the last word.

    Example:
        >>> pack_signs(jnp.array([0.5, -2.0, 0.0, 3.0]))
        Array([13], dtype=uint32)
    """
    return pack_columns((x >= 0)[..., None].astype(jnp.uint8), 1)[..., 0]


def _lookup(codes: UInt32[Array, "*g k n"], levels: Float[Array, "*g 1 across levels"]) -> Float[Array, "*g k n"]:
    """levels[code]; codes beyond the table, of columns that only fill a tile, stand for its last entry."""
    count = levels.shape[-1]
    if count > _SELECT and math.prod(levels.shape[:-1]) == 1:
        return levels.reshape(-1)[codes]
    if count > _SELECT:
        return jnp.take_along_axis(levels, codes[..., None].astype(jnp.int32), axis=-1)[..., 0]
    value = jnp.broadcast_to(levels[..., -1], codes.shape)
    for k in range(count - 1):
        value = jnp.where(codes == k, levels[..., k], value)
    return value
