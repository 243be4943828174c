"""Lloyd's algorithm in one dimension without a sort: cut at midpoints, average each cell.

    t_k = (c_k + c_{k+1}) / 2,    c_k <- mean{ x : t_{k-1} < x <= t_k },    until no centre moves

Legal under jit, vmap and sharding: elementwise operations and sums over whole axes, no flattening, so that a sharded
array stays where it is and the sums over cells become a psum. Levels ascend throughout. A centre moves by the mean of
x - c_k over its cell: the rounding error of a float32 sum then shrinks with the correction.

The centre of an empty cell is spent on splitting the cell with the largest squared error. With at most K distinct
values, a cell that holds two of them leaves another one empty, so the repair ends with every value met exactly.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped, UInt

from lcq.base import Cut
from lcq.schemes.levels import code_dtype

_UNROLL = 4
"""Comparisons in one step of the loop that assigns; a longer chain is fused into code that XLA does not vectorise."""

Stat = tuple[int, ...]


class Points(NamedTuple):
    """Numbers in blocks, every block with its own centres.

    Attributes:
        cut: the numbers.
        weights: how often each counts, one array per leaf; None for once.
    """

    cut: Cut
    weights: tuple[Int[Array, "..."], ...] | None = None


class Centres(NamedTuple):
    """Ascending levels of every block of the first leaf, and which of them may move."""

    levels: Float[Array, "*stat k"]
    free: Bool[Array, "*stat k"]


def descend(points: Points, centres: Centres, passes: int) -> Centres:
    """Repairs empty cells, then makes up to `passes` Lloyd passes; the squared error never rises.

    Args:
        points: leaves that share the centres: their statistics are added up, never concatenated.
        centres: where to start.
        passes: an upper bound; it stops when no centre moves.
    """
    _, centres, count = lloyd_pass(points, centres)
    limit = 2 * centres.levels.shape[-1] + 8

    def repair(state: tuple) -> tuple:
        return *split_worst(points, state[0]), state[2] + 1

    empty = jnp.any(centres.free & (count == 0))
    start = (centres, empty, jnp.int32(0))
    centres, _, _ = lax.while_loop(lambda state: state[1] & (state[2] < limit), repair, start)

    def improve(state: tuple) -> tuple:
        _, moved, _ = lloyd_pass(points, state[0])
        return moved, jnp.any(moved.levels != state[0].levels), state[2] + 1

    start = (centres, jnp.bool_(True), jnp.int32(0))
    return lax.while_loop(lambda state: state[1] & (state[2] < passes), improve, start)[0]


def lloyd_pass(
    points: Points, centres: Centres
) -> tuple[tuple[UInt[Array, "..."], ...], Centres, Int[Array, "*stat k"]]:
    """Assigns every number to its nearest level, then moves free levels to the means of their cells.

    Returns:
        Codes of every leaf, the new centres, and how many numbers each cell holds. The level of an empty cell stays.
    """
    levels, free = centres
    codes = tuple(assign(x, level) for x, level in _pairs(points, levels))
    rest = _residuals(points, levels, codes)
    count = _cell_sums(points, codes, [jnp.ones_like(x, jnp.int32) for x in points.cut.leaves], levels)
    total = _cell_sums(points, codes, rest, levels)
    mean = levels + total / jnp.maximum(count, 1).astype(total.dtype)
    middle = midpoints(levels)
    mean = mean.at[..., 1:].max(middle).at[..., :-1].min(middle)  # rounding must not swap two levels
    return codes, Centres(jnp.where(free & (count > 0), mean, levels), free), count


def split_worst(points: Points, centres: Centres) -> tuple[Centres, Bool[Array, ""]]:
    """A Lloyd pass, then in every block with an empty cell splits the cell with the largest squared error.

    A free cell is cut in the middle of its range and both levels become means; beside a frozen level the empty cell's
    centre takes what is nearer to the farthest number than to the level.

    Returns:
        The centres, and whether any block still had both an empty cell and an error.
    """
    codes, (levels, free), count = lloyd_pass(points, centres)
    leaves, one = points.cut.leaves, lambda stat: jnp.expand_dims(stat, -1)
    rest = _residuals(points, levels, codes)
    largest = points.cut.max([jnp.abs(r) * w for r, w in zip(rest, _present(points), strict=True)])
    unit = jnp.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
    squares = [(r / u) ** 2 for r, u in zip(rest, points.cut.spread(unit), strict=True)]
    worst = one(jnp.argmax(_cell_sums(points, codes, squares, levels), -1))
    empty = free & (count == 0)
    active = jnp.any(empty, -1) & (largest > 0)

    at = points.cut.spread(worst[..., 0])
    inside = [(c == k) & (w > 0) for c, k, w in zip(codes, at, _present(points), strict=True)]
    high = points.cut.max([jnp.where(i, x, -jnp.inf) for i, x in zip(inside, leaves, strict=True)])
    low = -points.cut.max([jnp.where(i, -x, -jnp.inf) for i, x in zip(inside, leaves, strict=True)])
    level = jnp.take_along_axis(levels, worst, -1)[..., 0]
    movable = jnp.take_along_axis(free, worst, -1)[..., 0]
    stay = jnp.where(movable, low, level)
    leave = jnp.where(movable | (high - level > level - low), high, low)
    nearer = [
        jnp.abs(x - p) < jnp.abs(x - q)
        for x, p, q in zip(leaves, points.cut.spread(leave), points.cut.spread(stay), strict=True)
    ]
    moved = _mean(points, [i & n for i, n in zip(inside, nearer, strict=True)], leave)
    kept = _mean(points, [i & ~n for i, n in zip(inside, nearer, strict=True)], stay)

    where = jnp.arange(levels.shape[-1])
    split = jnp.where((where == worst) & free, one(kept), levels)
    split = jnp.where(where == one(jnp.argmax(empty, -1)), one(moved), split)
    levels = jnp.where(one(active), split, levels)
    levels, free = lax.sort((levels, free), num_keys=2)
    return Centres(levels, free), jnp.any(active)


def assign(x: Float[Array, "*split"], levels: Float[Array, "*stat k"]) -> UInt[Array, "*split"]:
    """Index of the nearest level, the lower one on ties: the number of midpoints below x.

    Args:
        x: numbers; `stat` broadcasts against their shape.
        levels: ascending.

    Returns:
        uint8, or uint16 above 256 levels.
    """
    size = levels.shape[-1]
    steps = -(-(size - 1) // _UNROLL)
    middle = jnp.moveaxis(midpoints(levels), -1, 0)
    fill = jnp.full((steps * _UNROLL - (size - 1), *middle.shape[1:]), jnp.inf, middle.dtype)
    middle = jnp.concatenate([middle, fill]).reshape(steps, _UNROLL, *middle.shape[1:])

    def compare(step: Array, codes: Array) -> Array:
        for i in range(_UNROLL):
            codes += (x > middle[step, i]).astype(codes.dtype)
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

    A scatter-add on CPU, where it costs a nanosecond per element; masked sums elsewhere, because a scatter is slow on TPU
    and adds in no fixed order on GPU.
    """
    axes = tuple(i + 1 for i, n in enumerate(stat) if n == 1)

    def scatter(values: Array, codes: Array) -> Array:
        shape = (*(n for n in stat if n > 1), size)
        return jnp.zeros(shape, values.dtype).at[_index(codes, stat)].add(values).reshape(*stat, size)

    def masked(values: Array, codes: Array) -> Array:
        hit = codes == jnp.arange(size, dtype=codes.dtype).reshape(-1, *(1,) * codes.ndim)
        sums = jnp.sum(jnp.where(hit, values, 0), axes, values.dtype, keepdims=True)
        return jnp.moveaxis(sums, 0, -1)

    return lax.platform_dependent(values, codes, cpu=scatter, default=masked)


def _index(codes: Array, stat: Stat) -> tuple[Array, ...]:
    """Indices of every element into an array of shape [*(n for n in stat if n > 1), k]."""
    own = tuple(lax.broadcasted_iota(jnp.int32, codes.shape, i) for i, n in enumerate(stat) if n > 1)
    return (*own, codes.astype(jnp.int32))


def _cell_sums(points: Points, codes: Sequence[Array], values: Sequence[Array], like: Array) -> Array:
    """Weighted sums over cells and leaves, in the shape of `like`."""
    weights = points.weights or (1,) * len(codes)
    parts = [
        cell_sum(v * w if points.weights else v, c, like.shape[-1], b.stat).reshape(like.shape)
        for v, w, c, b in zip(values, weights, codes, points.cut.blocks, strict=True)
    ]
    return functools.reduce(jnp.add, parts)


def _pairs(points: Points, levels: Array) -> list[tuple[Array, Array]]:
    """Every leaf with the levels in a shape that broadcasts against it."""
    pairs = zip(points.cut.leaves, points.cut.blocks, strict=True)
    return [(x, levels.reshape(*b.stat, -1)) for x, b in pairs]


def _residuals(points: Points, levels: Array, codes: Sequence[Array]) -> list[Array]:
    """x - c of every element."""
    whole = zip(points.cut.leaves, codes, points.cut.blocks, strict=True)
    return [x - levels.reshape(*(n for n in b.stat if n > 1), -1)[_index(c, b.stat)] for x, c, b in whole]


def _present(points: Points) -> list[Array]:
    """1 where a number counts, 0 where its weight is zero."""
    if points.weights is None:
        return [jnp.ones((), x.dtype) for x in points.cut.leaves]
    return [(w > 0).astype(x.dtype) for w, x in zip(points.weights, points.cut.leaves, strict=True)]


def _mean(points: Points, inside: Sequence[Array], near: Array) -> Array:
    """Weighted mean per block of the numbers inside, `near` if there are none; exact if all equal `near`."""
    weights = points.weights or (1,) * len(inside)
    count = points.cut.sum([(i * w).astype(near.dtype) for i, w in zip(inside, weights, strict=True)])
    whole = zip(points.cut.leaves, inside, weights, points.cut.spread(near), strict=True)
    total = points.cut.sum([jnp.where(i, (x - c) * w, 0) for x, i, w, c in whole])
    return near + total / jnp.maximum(count, 1)
