"""Blocks as columns that lie side by side, a few hundred at a time: loops over rows, which XLA makes vectors of.

A pass of Lloyd's algorithm adds what is in each cell, and how far it is from its level, row by row to arrays of one
number for each cell and block. That takes a tenth of the time of an index for each number.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt

from lcq.forms.blocks import Blocks
from lcq.forms.meshes import most_parts, placed_like, shared_mesh
from lcq.schemes.grouped import Cut
from lcq.schemes.kmeans.lloyd import midpoints
from lcq.schemes.nearest import code_dtype
from lcq.schemes.scales import power_of_two

_LANES = 264
"""Blocks side by side, at most: what they need lies in a cache, rows not a power of two apart."""

_ROWS = 16
"""Rows in one turn of a loop."""

FEW = 32
"""Levels up to which it is fast to compare each number with all of them."""

_LARGE = 1 << 20
"""Numbers from which another program is worth its compilation."""

Numbers = Float[Array, "n *lanes"]
Levels = Float[Array, "k *lanes"]


def are_many(cut: Cut) -> bool:
    """Whether blocks fill the columns that lie side by side."""
    return math.prod(cut.blocks[0].stat) >= _LANES


def is_large(cut: Cut, k: int) -> bool:
    """Whether there are many numbers in many blocks, and few levels."""
    return k <= FEW and are_many(cut) and sum(x.size for x in cut.leaves) >= _LARGE


def by_columns(
    cut: Cut, levels: Float[Array, "*stat k"] | None, solve: Callable[..., tuple[Array, Levels, Array]]
) -> tuple[tuple[UInt[Array, "..."], ...], Float[Array, "*stat k"], Array]:
    """Codes of every leaf, levels, and what their cells weigh, from a function of columns.

    Each column is in units of a power of two near its largest magnitude: squares neither overflow nor vanish. On a mesh
    columns stay where their blocks lie; a block that is cut is brought together, a turn's at a time.

    Args:
        cut: the blocks.
        levels: levels of every block.
        solve: codes [n, *lanes], levels and weights [k, *lanes] of numbers [n, *lanes], their importance or None, and
            of the columns of `levels` or None.
    """
    side = _lanes(cut)
    arrays = [side.laid(cut.leaves, cut.blocks)]
    if cut.importance is not None:
        each = zip(cut.importance, cut.leaves, strict=True)
        arrays.append(side.laid([jnp.broadcast_to(h, x.shape).astype(arrays[0].dtype) for h, x in each], cut.blocks))
    if levels is not None:
        arrays.append(side.beside(jnp.moveaxis(levels, -1, 0).astype(arrays[0].dtype)))

    def turn(i: Array) -> tuple[Array, Levels, Array]:
        here = [side.of_turn(a, i) for a in arrays]
        h = None if cut.importance is None else here[1]
        counted = here[0] if h is None else jnp.where(h > 0, here[0], 0)  # what weighs nothing is of any size
        unit = power_of_two(jnp.max(jnp.abs(counted), 0))
        codes, found, mass = solve(here[0] / unit, h, None if levels is None else here[-1] / unit)
        return codes, found * unit, mass

    codes, found, mass = map(side.joined, lax.map(turn, jnp.arange(side.turns, dtype=jnp.int32)))
    found, mass = (jnp.moveaxis(a, 0, -1).reshape(*cut.blocks[0].stat, len(a)) for a in (found, mass))
    return tuple(map(placed_like, _apart(codes, cut.blocks), cut.leaves)), found, mass


class _Lanes(NamedTuple):
    """How blocks lie side by side, and which of them are taken in one turn.

    Attributes:
        lengths: blocks along the axes that tell them apart, or all of them as one axis.
        along: the axis of these that turns run along.
        parts: of this axis, in each of which a turn takes some; on a mesh each lies on one device.
        wide: blocks of a part in one turn.
    """

    lengths: tuple[int, ...]
    along: int
    parts: int
    wide: int

    @property
    def turns(self) -> int:
        return -(-self.lengths[self.along] // (self.parts * self.wide))

    @property
    def others(self) -> tuple[int, ...]:
        return tuple(n for i, n in enumerate(self.lengths) if i != self.along)

    def laid(self, leaves: Sequence[Array], how: Sequence[Blocks]) -> Float[Array, "n parts most *others"]:
        """The numbers of all leaves, a column for every block."""
        return self.beside(
            jnp.concatenate(
                [x.transpose(_order(b)).reshape(b.size, *self.lengths) for x, b in zip(leaves, how, strict=True)]
            )
        )

    def beside(self, rows: Array) -> Float[Array, "n parts most *others"]:
        """One number per block in each row, those of a part in turns of equal length."""
        rows = jnp.moveaxis(rows.reshape(len(rows), *self.lengths), 1 + self.along, 1)
        rows = rows.reshape(len(rows), self.parts, -1, *self.others)
        more = self.turns * self.wide - rows.shape[2]
        return jnp.pad(rows, ((0, 0), (0, 0), (0, more), *((0, 0),) * len(self.others)))

    def of_turn(self, rows: Float[Array, "n parts most *others"], i: Array) -> Numbers:
        some = lax.dynamic_slice_in_dim(rows, i * self.wide, self.wide, 2)
        return some if self.parts > 1 else some.reshape(len(rows), self.wide, *self.others)

    def joined(self, made: Float[Array, "turns n *lanes"] | UInt[Array, "turns n *lanes"]) -> Array:
        """Rows of what turns made, of the shape [n, *lengths]."""
        turns, size = made.shape[:2]
        rows = jnp.moveaxis(made.reshape(turns, size, self.parts, self.wide, *self.others), 0, 2)
        rows = rows.reshape(size, self.parts, turns * self.wide, *self.others)
        rows = rows[:, :, : self.lengths[self.along] // self.parts]
        return jnp.moveaxis(rows.reshape(size, -1, *self.others), 1, 1 + self.along)


def _lanes(cut: Cut) -> _Lanes:
    """A few hundred blocks in a turn, on every device."""
    mesh, stat = shared_mesh(cut.leaves), cut.blocks[0].stat
    if mesh is None:
        blocks = math.prod(stat)
        wide = next((n for n in range(_LANES, _LANES // 2, -1) if blocks % n == 0), min(blocks, _LANES))
        return _Lanes((blocks,), 0, 1, wide)
    lengths = tuple(n for n in stat if n > 1) or (1,)
    along = max(range(len(lengths)), key=lambda i: (lengths[i] // most_parts(lengths[i], mesh), lengths[i]))
    parts = most_parts(lengths[along], mesh)
    each = lengths[along] // parts
    others = math.prod(lengths) // lengths[along]
    turns = -(-each // max(_LANES * mesh.size // (parts * others), 1))
    return _Lanes(lengths, along, parts, -(-each // turns))


def _order(block: Blocks) -> list[int]:
    """The axes within a block, then the others."""
    return [*block.axes, *(i for i in range(len(block.split)) if i not in block.axes)]


def _apart(rows: UInt[Array, "n *lengths"], how: Sequence[Blocks]) -> tuple[Array, ...]:
    """Leaves of these rows."""
    leaves, begin = [], 0
    for b in how:
        order = _order(b)
        split = rows[begin : begin + b.size].reshape([b.split[i] for i in order])
        leaves.append(split.transpose(np.argsort(order)))
        begin += b.size
    return tuple(leaves)


def turns_of(size: int) -> tuple[int, int]:
    """How many turns a loop over so many rows takes, and rows in each: XLA makes vectors of a turn, and keeps what a
    loop has made, where it would make it again for everything that it fuses it into."""
    rows = next(n for n in range(min(_ROWS, max(size // 2, 1)), 0, -1) if size % n == 0)
    return size // rows, rows


def middles(levels: Levels) -> Float[Array, "k-1 *lanes"]:
    """Where cells are cut."""
    return jnp.moveaxis(midpoints(jnp.moveaxis(levels, 0, -1)), -1, 0)


def _cells(x: Numbers, h: Numbers | None, levels: Levels) -> tuple[Levels, Array]:
    """The means of the cells around levels, and what they weigh; the level of one that weighs nothing."""
    (turns, rows), middle, none = turns_of(len(x)), middles(levels), jnp.full_like(levels[:1], jnp.inf)
    above, upto = jnp.concatenate([-none, middle]), jnp.concatenate([middle, none])

    def turn(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, mass = state
        numbers = lax.dynamic_slice_in_dim(x, i * rows, rows)
        weights = None if h is None else lax.dynamic_slice_in_dim(h, i * rows, rows)
        for j in range(rows):
            inside = (numbers[j] > above) & (numbers[j] <= upto)
            weight = 1 if weights is None else weights[j]
            if weights is not None:
                inside &= weights[j] > 0
            rest = rest + jnp.where(inside, (numbers[j] - levels) * weight, 0)
            mass = mass + jnp.where(inside, weight, 0)
        return rest, mass

    rest, mass = lax.fori_loop(0, turns, turn, (jnp.zeros_like(levels), jnp.zeros_like(levels)))
    mean = levels + rest / jnp.where(mass > 0, mass, 1)
    mean = jnp.clip(mean, above, upto)  # rounding must not swap two levels
    return jnp.where(mass > 0, mean, levels), mass


def _codes(x: Numbers, levels: Levels) -> UInt[Array, "n *lanes"]:
    """The nearest levels."""
    (turns, rows), middle = turns_of(len(x)), middles(levels)

    def turn(i: Array, codes: Array) -> Array:
        numbers = lax.dynamic_slice_in_dim(x, i * rows, rows)
        code = jnp.zeros(numbers.shape, jnp.int32)
        for cut in middle:
            code = code + (numbers > cut)
        return lax.dynamic_update_slice_in_dim(codes, code.astype(codes.dtype), i * rows, 0)

    return lax.fori_loop(0, turns, turn, jnp.zeros(x.shape, code_dtype(len(levels))))


def column_pass(
    x: Numbers, h: Numbers | None, levels: Levels, passes: int = 0
) -> tuple[UInt[Array, "n *lanes"], Levels, Array]:
    """Codes of the nearest levels after so many passes, the means of these cells, and what they weigh."""
    levels = lax.fori_loop(0, passes, lambda _, now: _cells(x, h, now)[0], levels) if passes else levels
    return _codes(x, levels), *_cells(x, h, levels)
