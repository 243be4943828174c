"""Lloyd's algorithm in one dimension without a sort: cut at midpoints, average each cell.

    t_k = (c_k + c_{k+1}) / 2,    c_k <- sum h x / sum h over t_{k-1} < x <= t_k,    until no centre moves

Legal under jit, vmap and sharding: elementwise operations and sums over whole axes, no flattening, so that a sharded
array stays where it is and the sums over cells become a psum. Levels ascend throughout. A centre moves by the mean of
x - c_k over its cell: the rounding error of a float32 sum then shrinks with the correction.

The centre of an empty cell is spent on splitting the cell with the largest squared error. With at most K distinct
values, a cell that holds two of them leaves another one empty, so the repair ends with every value met exactly.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from lcq.forms import lookup
from lcq.forms.blocks import Blocks, explicit_sharding
from lcq.forms.meshes import is_shared
from lcq.schemes import counts
from lcq.schemes.grouped import Cut
from lcq.schemes.nearest import code_dtype

_UNROLL = 4
"""Comparisons in one step of the loop that assigns; a longer chain is fused into code that XLA does not vectorise."""

_LARGEST = 2**31 - 1
"""Places of a flat table, at most, as int32 numbers them."""

Stat = tuple[int, ...]


class Centres(NamedTuple):
    """Ascending levels of every block of the first leaf, and which of them may move."""

    levels: Float[Array, "*stat k"]
    free: Bool[Array, "*stat k"]


def descend(points: Cut, centres: Centres, passes: int) -> Centres:
    """Lloyd passes, each of which also moves one unused level per block to a cell with an error.

    The squared error never rises.

    Args:
        points: leaves that share the centres: their statistics are added up, never concatenated.
        centres: where to start.
        passes: an upper bound; fewer when no centre moves, more while unused ones are needed.
    """
    limit = passes + 2 * centres.levels.shape[-1]

    def proceed(state: tuple) -> Array:
        _, moved, split, count = state
        return moved & ((count < passes) | (split & (count < limit)))

    def improve(state: tuple) -> tuple:
        codes, centres, count = lloyd_pass(points, state[0])
        losses = jnp.where(centres.free & (count == 0), 0, jnp.inf)

        def split(now: tuple) -> tuple:
            better, any_moved, _ = move_level(points, codes, now[0], losses)
            return better, jnp.bool_(False), any_moved

        # A loop of at most one turn: under vmap a cond would be computed whether it is needed or not.
        start = (centres, jnp.any(losses == 0), jnp.bool_(False))
        centres, _, any_moved = lax.while_loop(lambda now: now[1], split, start)
        return centres, jnp.any(centres.levels != state[0].levels), any_moved, state[3] + 1

    return lax.while_loop(proceed, improve, (centres, jnp.bool_(True), jnp.bool_(False), jnp.int32(0)))[0]


def lloyd_pass(
    points: Cut, centres: Centres
) -> tuple[tuple[UInt[Array, "..."], ...], Centres, Shaped[Array, "*stat k"]]:
    """Assigns every number to its nearest level, then moves free levels to the means of their cells.

    Returns:
        Codes of every leaf, the new centres, and how much each cell weighs: how many numbers it holds, an integer,
            where these have no importance. The level of a cell without weight stays.
    """
    levels, free = centres
    codes = tuple(assign(x, levels.reshape(*b.stat, -1)) for x, b in zip(points.leaves, points.blocks, strict=True))
    mean, count = means(points, codes, levels)
    middle = midpoints(levels)
    mean = mean.at[..., 1:].max(middle).at[..., :-1].min(middle)  # rounding must not swap two levels
    return codes, Centres(jnp.where(free & (count > 0), mean, levels), free), count


def means(
    points: Cut, codes: Sequence[Array], levels: Float[Array, "*stat k"]
) -> tuple[Float[Array, "*stat k"], Shaped[Array, "*stat k"]]:
    """The mean of every cell, and how much it weighs; the level where it weighs nothing."""
    count = cell_counts(points, codes, levels)
    # No other level is looked up: so the second sums wait for the counts, and take their room.
    used = jnp.where(count > 0, levels, 0)
    total = _cell_sums(points, residuals(points, used, codes), codes, levels)
    return levels + total / jnp.where(count > 0, count, 1).astype(total.dtype), count


def cell_counts(points: Cut, codes: Sequence[Array], like: Float[Array, "*stat k"]) -> Shaped[Array, "*stat k"]:
    """How much each cell weighs, in the shape of the levels `like`."""
    ones = _ones(codes, like.shape[-1])
    if points.importance is not None and jnp.issubdtype(points.importance[0].dtype, jnp.floating):
        return _cell_sums(points, ones, codes, like)
    return count_cells(points.weighted(ones), codes, like.shape[-1], points.blocks, like.shape)


def move_level(
    points: Cut, codes: Sequence[Array], centres: Centres, losses: Float[Array, "*stat k"]
) -> tuple[Centres, Bool[Array, ""], Float[Array, "*stat"]]:
    """In every block moves the level that is least missed to the cell with the largest squared error.

    Beside a level c, another one at c takes the numbers above it in the next pass; just below c, those below it.

    Args:
        points: the numbers.
        codes: their cells.
        centres: the levels of these cells.
        losses: how much the squared error rises without each level; a level moves if that is less than the error of the
            cell it moves to.

    Returns:
        The centres, whether any level moved, and the squared error of every block before that.
    """
    levels, free = centres
    largest = points.max([jnp.abs(r) for r in residuals(points, levels, codes)])
    unit = jnp.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
    rest = residuals(points, *lax.optimization_barrier((levels, codes)))  # made twice, or they would be kept
    squares = [(r / u) ** 2 for r, u in zip(rest, points.spread(unit), strict=True)]
    error, unit = _cell_sums(points, squares, codes, levels), unit[..., None]
    worst = jnp.argmax(error, -1, keepdims=True)
    inside = [c == k for c, k in zip(codes, points.spread(worst[..., 0]), strict=True)]
    level = jnp.take_along_axis(levels, worst, -1)
    top = points.max([jnp.where(i, x, -jnp.inf) for i, x in zip(inside, points.leaves, strict=True)])
    above = top > level[..., 0]
    kind = jnp.finfo(level.dtype)
    below = level - jnp.maximum(jnp.abs(level) * kind.eps, kind.tiny)
    place = jnp.arange(levels.shape[-1])
    losses = jnp.where(place == worst, jnp.inf, losses / unit / unit)
    least = jnp.argmin(losses, -1, keepdims=True)
    moves = (place == least) & (losses < jnp.max(error, -1, keepdims=True))
    moved = jnp.where(moves, jnp.where(above[..., None], level, below), levels)
    moved, free = lax.sort((moved, free), num_keys=2)  # a frozen level before a free one at the same place
    return Centres(moved, free), jnp.any(moves), (jnp.sum(error, -1, keepdims=True) * unit * unit)[..., 0]


def assign(x: Float[Array, "*split"], levels: Float[Array, "*stat k"]) -> UInt[Array, "*split"]:
    """Index of the nearest level, the lower one on ties: the number of midpoints below x.

    Args:
        x: numbers; `stat` broadcasts against their shape.
        levels: ascending.

    Returns:
        uint8, or uint16 above 256 levels.
    """
    return count_below(midpoints(levels), x)


def count_below(cuts: Float[Array, "*stat cuts"], x: Float[Array, "*split"]) -> UInt[Array, "*split"]:
    """How many of the ascending cuts are below x."""
    size = cuts.shape[-1] + 1
    steps = max(-(-(size - 1) // _UNROLL), 1)
    cuts = jnp.moveaxis(cuts, -1, 0)
    cuts = jnp.pad(cuts, ((0, steps * _UNROLL - (size - 1)), *((0, 0),) * (x.ndim)), constant_values=jnp.inf)
    cuts = cuts.reshape(steps, _UNROLL, *cuts.shape[1:])

    def compare(step: Array, codes: Array) -> Array:
        for i in range(_UNROLL):
            codes += (x > cuts[step, i]).astype(codes.dtype)
        return codes

    return lax.fori_loop(0, steps, compare, jnp.zeros_like(x, code_dtype(size)))


def midpoints(levels: Float[Array, "*stat k"]) -> Float[Array, "*stat k-1"]:
    """Where cells are cut: not below the lower level and, unless both are equal, below the upper one, so that a number
    which equals a level is always assigned to it."""
    lower, upper = levels[..., :-1], levels[..., 1:]
    middle = jnp.maximum(0.5 * lower + 0.5 * upper, lower)
    return jnp.where(middle < upper, middle, lower)


def cell_sum(
    values: Shaped[Array, "*split"], codes: Int[Array, "*split"] | UInt[Array, "*split"], size: int, stat: Stat
) -> Shaped[Array, "*stat k"]:
    """Sums of `values` over the elements of each code, in blocks.

    A scatter-add on CPU, where it costs a nanosecond per element; masked sums elsewhere, because a scatter is slow on
    TPU and adds in no fixed order on GPU.
    """
    axes = tuple(i + 1 for i, n in enumerate(stat) if n == 1)

    def scatter(values: Array, codes: Array) -> Array:
        table = jnp.zeros(math.prod(stat) * size, values.dtype)
        where = lax.ScatterDimensionNumbers((), (0,), (0,))
        index, safe = _index(codes, size, stat)[..., None], lax.GatherScatterMode.PROMISE_IN_BOUNDS
        return lax.scatter_add(table, index, values, where, mode=safe).reshape(*stat, size)

    def masked(values: Array, codes: Array) -> Array:
        hit = codes == jnp.arange(size, dtype=codes.dtype).reshape(-1, *(1,) * codes.ndim)
        sums = jnp.sum(jnp.where(hit, values, 0), axes, values.dtype, keepdims=True)
        return jnp.moveaxis(sums, 0, -1)

    many = math.prod(stat)
    if explicit_sharding(codes) is not None or (is_shared() and many > 1) or many * size > _LARGEST:
        return masked(values, codes)  # a scatter does not say where on a mesh its blocks are
    return lax.platform_dependent(values, codes, cpu=scatter, default=masked)


def count_cells(
    members: Iterable[Shaped[Array, "..."]],
    codes: Sequence[Array],
    size: int,
    how: Sequence[Blocks],
    shape: Stat,
) -> Shaped[Array, "..."]:
    """How many members each cell has in all leaves, of `shape`: integers if a block has few enough numbers, else
    float32, the nearest to integers in two limbs."""
    most, pieces = int(jnp.iinfo(counts.WHOLE).max), []
    for member, code, block in zip(members, codes, how, strict=True):
        for part, of in _pieces(member, code, block, most):
            pieces.append(cell_sum(part.astype(counts.WHOLE), of, size, block.stat).reshape(shape))
    if sum(block.size for block in how) <= most:
        return functools.reduce(jnp.add, pieces)
    return counts.as_float(counts.count_parts(pieces), jnp.float32)


def _pieces(member: Array, code: Array, block: Blocks, most: int) -> Iterable[tuple[Array, Array]]:
    """Parts of a leaf that have at most so many numbers of a block each; along its first axis that is long enough."""
    if block.size <= most:
        return [(member, code)]
    axis = next(i for i in block.axes if block.size // code.shape[i] <= most)
    length = most // (block.size // code.shape[axis])

    def part(a: Array, begin: int) -> Array:
        return lax.slice_in_dim(a, begin, min(begin + length, a.shape[axis]), axis=axis)

    return [(part(member, i), part(code, i)) for i in range(0, code.shape[axis], length)]


def _index(codes: Array, size: int, stat: Stat) -> Array:
    """Place of every element's cell in the flattened table of all blocks."""
    blocks = math.prod(stat)
    if blocks == 1:
        return codes
    kind = jnp.uint16 if blocks * size <= 1 << 16 else jnp.int32  # short, because it is as long as the leaf
    return jnp.arange(blocks, dtype=kind).reshape(stat) * size + codes.astype(kind)


def _ones(codes: Sequence[Array], size: int) -> list[Array]:
    """A one for each code. Compared, though all are below `size`: a constant XLA would keep throughout a loop."""
    return [(c <= size - 1).astype(jnp.int32) for c in codes]


def _cell_sums(points: Cut, arrays: Sequence[Array], codes: Sequence[Array], like: Array) -> Array:
    """Weighted sums over cells and leaves, in the shape of the levels `like`."""
    whole = zip(points.weighted(arrays), codes, points.blocks, strict=True)
    parts = [cell_sum(a, c, like.shape[-1], b.stat).reshape(like.shape) for a, c, b in whole]
    return functools.reduce(jnp.add, parts)


def residuals(points: Cut, levels: Array, codes: Sequence[Array]) -> list[Array]:
    """x - c of every element."""
    pieces = zip(codes, points.leaves, points.blocks, strict=True)
    return [x - level_of(levels.reshape(*b.stat, -1), c) for c, x, b in pieces]


def level_of(levels: Shaped[Array, "*stat k"], codes: UInt[Array, "*split"]) -> Shaped[Array, "*split"]:
    """The level of every code."""
    size, stat = levels.shape[-1], levels.shape[:-1]
    if math.prod(stat) * size > _LARGEST:
        return lookup.selected(levels, codes)

    def flat(levels: Array, codes: Array) -> Array:
        return levels.reshape(-1).at[_index(codes, size, stat)].get(mode="promise_in_bounds")

    return lookup.level_of(levels, codes, flat)
