"""Columns: a matrix of codes as kernels read it, packed down its columns."""

import dataclasses
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt, UInt32

from lcq.forms import bitpack
from lcq.forms.base import Decoding, own, static, tree_form
from lcq.forms.blocks import of_each
from lcq.forms.column_words import fields, pack_columns
from lcq.forms.prepacked import Prepacked

SELECT = 16
"""Up to this many levels a lookup is a tree of selects, which vectorises; above, a gather, which does not on CPUs."""


@tree_form
class Columns(Prepacked):
    """Codes prepacked for products, packed down the columns of the matrix.

        Delta[k, n] = first[n] + step[n] code[k, n]  if levels are equally far apart,  else levels[code[k, n], n]

    The rows of the matrix are cut into b equal blocks, each with words and numbers of its own. Of a grid with a scale
    first = (lowest - zero) step is not kept: step has the scale's dtype and zero that of codes, 16 and 8 bits a block.

    Attributes:
        words: uint32 [*stacked, b, w, n], see `column_words.fields`; a block's last word is filled with zeros.
        first: [*stacked, b, 1 or n]; None if there are `levels`, or a `lowest`.
        step: [*stacked, b, 1 or n]; None if there are `levels`.
        levels: [*stacked, b, K, 1 or n]; None if they are equally far apart.
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
    column_axes = MappingProxyType({"words": -1, "first": -1, "step": -1, "levels": -1, "zero": -1})

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

    @property
    def decoding(self) -> Decoding:
        return "many rows" if self.levels is None or self.levels.shape[-2] <= SELECT else "always"

    def lines(self) -> tuple[Array, Array]:
        """(first, step) in float32, of levels that are equally far apart."""
        step = self.step.astype(jnp.float32)
        if self.lowest is None:
            return self.first, step
        return (self.lowest if self.zero is None else self.lowest - self.zero.astype(jnp.float32)) * step, step

    def matrix(self) -> Float[Array, "*stacked k n"]:
        codes = fields(self.words, self.width)[..., : self.block, :]
        if self.levels is None:
            first, step = (a[..., None, :] for a in self.lines())
            one_bit = self.width == 1  # two levels are chosen faster than made
            steps = step * codes.astype(jnp.int32).astype(jnp.float32)
            values = by_bits(codes, [first, first + step]) if one_bit else first + steps
        else:
            values = _lookup(codes, self.levels)
        return values.reshape(*self.words.shape[:-3], -1, self.words.shape[-1])

    def take_columns(self, numbers: Int[Array, " m"]) -> "Columns":
        def some(a: Any, axis: int) -> Any:
            return a if a is None or a.shape[axis] == 1 else jnp.take(a, numbers, axis)

        return dataclasses.replace(
            self,
            words=jnp.take(self.words, numbers, -1),
            first=some(self.first, -1),
            step=some(self.step, -1),
            zero=some(self.zero, -1),
            levels=some(self.levels, -1),
            tail=(self.rows, numbers.shape[0]),
            axes=(0, 1),
        )


def columns(
    codes: UInt[Array, "*g k n"],
    levels: Any,
    values: tuple[float, ...] | None,
    scale: Any,
    zero: Any,
) -> Columns:
    """Prepacks codes of a matrix [K, n], or of stacked ones, with the tables of `Codes`. Works under jit."""
    *stacked, rows, n = codes.shape
    tables = [a for a in (levels, scale, zero) if a is not None]
    *shared, b, across = tables[0].shape[: codes.ndim] if tables else (1,) * codes.ndim

    def each(numbers: Any, dtype: Any = jnp.float32) -> Any:
        """Numbers for each block of each matrix, and for each column if columns differ."""
        numbers = jnp.broadcast_to(numbers.astype(dtype), (*shared, b, across, numbers.shape[-1]))
        numbers = of_each(numbers, stacked)
        return numbers if across in (1, n) else jnp.repeat(numbers, n // across, axis=-2)

    table = jnp.asarray(values) if levels is None else levels
    zeros, scales = (
        jnp.asarray(n if a is None else a).astype(jnp.float32)[..., None] for n, a in ((0.0, zero), (1.0, scale))
    )
    width = next(bits for bits in (1, 2, 4, 8, 16) if bits >= bitpack.width(table.shape[-1]))
    words = pack_columns(codes.reshape(*stacked, b, rows // b, n), width)
    made = Columns(words=words, width=width, tail=(rows, n), axes=(0, 1))
    if not equal_steps(values, table.shape[-1]):
        return dataclasses.replace(made, levels=each((table - zeros) * scales).swapaxes(-1, -2))
    if (grid := _short_spacing(values, scale, zero)) is not None:
        spacing, lowest = grid
        kept = None if zero is None else each(jnp.asarray(zero)[..., None], zero.dtype)[..., 0]
        step = each(spacing * jnp.asarray(scale)[..., None], scale.dtype)[..., 0]
        return dataclasses.replace(made, step=step, zero=kept, lowest=lowest)
    second = table[..., 1:2] if table.shape[-1] > 1 else table
    first, step = (table[..., :1] - zeros) * scales, (second - table[..., :1]) * scales
    return dataclasses.replace(made, first=each(first)[..., 0], step=each(step)[..., 0])


def equal_steps(values: tuple[float, ...] | None, count: int) -> bool:
    """Whether `count` levels, learned ones if there are no values, are known to be equally far apart."""
    if values is None:
        return count <= 2
    spacings = np.diff(values)
    return bool((spacings == spacings[:1]).all())


def _short_spacing(values: tuple[float, ...] | None, scale: Any, zero: Any) -> tuple[float, float] | None:
    """The spacing of a fixed grid, and its lowest level in units of it, if spacing times scale needs no more bits than
    the scale: a power of two, of what has none of float16's overflow, and 1 where zeros count levels. Else None.
    """
    if values is None or scale is None or len(values) < 2:
        return None
    spacing = values[1] - values[0]
    short = math.frexp(spacing)[0] == 0.5 and scale.dtype != jnp.float16 and zero is None
    return (spacing, values[0] / spacing) if spacing == 1 or short else None


def by_bits(code: UInt32[Array, "*#a"], levels: Sequence[Float[Array, "*#a"]]) -> Float[Array, "*a"]:
    """The level of each code, by K - 1 selects on the lowest bits of the code; what is above them is ignored."""
    for bit in range((len(levels) - 1).bit_length()):
        on = ((code >> jnp.uint32(bit)) & jnp.uint32(1)).astype(bool)
        pairs = zip(levels[::2], levels[1::2], strict=False)
        levels = [*(jnp.where(on, b, a) for a, b in pairs), *levels[len(levels) & ~1 :]]
    return levels[0]


def _lookup(codes: UInt32[Array, "*g k n"], levels: Float[Array, "*g levels across"]) -> Float[Array, "*g k n"]:
    """levels[code]; codes beyond the table, of columns that only fill a tile, stand for some entry."""
    count = levels.shape[-2]
    if count <= SELECT:
        return by_bits(codes, [levels[..., k : k + 1, :] for k in range(count)])
    if math.prod(levels.shape) == count:
        return levels.reshape(-1)[codes]
    return jnp.take_along_axis(levels, codes.astype(jnp.int32), axis=-2)
