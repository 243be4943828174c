"""The best scale of a fixed codebook, without a sort: candidates of either sign, each judged with its best codes.

a = argmin_a sum_i h_i min_k (x_i - a c_k)^2
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcq.schemes.grid_search import SHORTEST, Grid, search_grid
from lcq.schemes.grouped import Cut
from lcq.schemes.nearest import is_grid, level_near, mirrored, thresholds
from lcq.schemes.scales import rounded_scale

_CANDIDATES = 64
_ZOOM = 16
_LONG = 512
"""Numbers of a block from which enough of them are not zero for the fast search of a grid."""

_SAMPLE = 1 << 15
"""Weights of a block, evenly spaced, that the first search looks at."""

_TAIL, _EVERY = 0.01, 4
"""From this part of the sample's squares on a single weight is too much to be in it by chance: then some of the
candidates, one of so many, are tried on all weights too."""


def search_scale(whole: Cut, values: tuple[float, ...], warm: Array | None = None, dtype: str | None = None) -> Array:
    """The scale a per block that minimises sum h (x - a c)^2, without a sort.

    What weighs nothing does not bound the range of scales; what weighs more counts as if it were there more often.

    Args:
        whole: leaves cut into the blocks that share a scale.
        values: the codebook.
        warm: scales to start from; the result is at least as good.
        dtype: the format of scales, see `as_scale`; only its numbers are tried.

    Returns:
        One number per block.
    """
    size, start = sum(b.size for b in whole.blocks), None
    if warm is not None:
        start = warm.reshape(whole.blocks[0].stat).astype(whole.leaves[0].dtype)

    def thoroughly(leaves: tuple[Array, ...], start: Array | None) -> Array:
        return _search_thoroughly(whole._replace(leaves=leaves), values, start, dtype)

    def fast(leaves: tuple[Array, ...], start: Array | None) -> Array:
        return search_grid(whole._replace(leaves=leaves), Grid(values[0], values[-1], dtype), start)

    if not _has_fast_search(values) or whole.importance is not None or size < SHORTEST:
        return thoroughly(whole.leaves, start)
    if size >= _LONG:
        return fast(whole.leaves, start)
    count = whole.sum([(x != 0).astype(x.dtype) for x in whole.leaves])
    few = jnp.any((count > 0) & (count < SHORTEST * 3 // 4))
    return jax.lax.cond(few, thoroughly, fast, whole.leaves, start)


def _search_thoroughly(whole: Cut, values: tuple[float, ...], warm: Array | None, dtype: str | None) -> Array:
    """The search for any codebook and block: each candidate gets its best scale before it is judged."""
    whole, unit = of_size_one(whole)
    many = _CANDIDATES if thresholds(values).any() else 1  # the codes of {-1, 1} do not depend on a
    ranges = [_range(whole, values, sign) for sign in ((1.0,) if mirrored(values) else (1.0, -1.0))]
    lows, ratios = (jnp.stack(numbers) for numbers in zip(*ranges, strict=True))
    part, around = jnp.linspace(0, 1, many, dtype=unit.dtype), jnp.linspace(-1, 1, _ZOOM, dtype=unit.dtype)

    def better(leaves: Sequence[Array], a: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        """The best scale for the codes at a, kept if its error is the least so far."""
        near = [level_near(x, values, here) for x, here in zip(leaves, whole.spread(a), strict=True)]
        return keep_better(whole, leaves, near, (), best, dtype)

    def scan(
        leaves: Sequence[Array], a: Array, ratio: Array, powers: Array, best: Any, wanted: Array | bool = True
    ) -> tuple[Array, ...]:
        """The best of a[j] ratio[j]^powers, made one by one: for small blocks all would be larger than the leaf; `best`
        itself where that is not wanted."""

        def tried(i: Any, best: Any) -> tuple[Array, ...]:
            j, k = i // len(powers), i % len(powers)
            return better(leaves, a[j] * ratio[j] ** powers[k], best)

        return jax.lax.fori_loop(0, len(a) * len(powers) * jnp.int32(wanted), tried, best)

    nothing = (jnp.zeros_like(unit), jnp.full_like(unit, jnp.inf))
    few = whole.thin(_SAMPLE)
    found = scan(few.leaves, lows, ratios, part, nothing)[0]
    best = better(whole.leaves, found, nothing)
    if sum(x.size for x in few.leaves) < sum(x.size for x in whole.leaves):
        tail = jnp.any(_TAIL * whole.sum([x * x for x in few.leaves]) < 1)  # the largest weight is from 1 to 2
        best = scan(whole.leaves, lows, ratios, part[::-_EVERY], best, tail)
    if warm is not None:
        best = better(whole.leaves, warm.reshape(unit.shape).astype(unit.dtype) / unit, best)
    for zoom in (1, _ZOOM) if many > 1 else ():  # between the neighbours of the best, then between those
        ratio = jnp.where(best[0] < 0, ranges[-1][1], ranges[0][1])
        best = scan(whole.leaves, best[0][None], ratio[None] ** (1 / many / zoom), around, best)
    return best[0] * unit


def _range(whole: Cut, values: tuple[float, ...], sign: float) -> tuple[Array, Array]:
    """The least scale of a sign that can be best, and how many times larger the largest is, per block.

    What is summed is made anew for each sum: XLA keeps an array that two sums share, one as large as the leaf.
    """
    two_sided = values[0] < 0 < values[-1]
    side = sign if values[-1] > 0 else -sign
    sides = (1.0, -1.0) if two_sided else (side,)
    total = whole.sum([jnp.abs(x) if two_sided else jnp.maximum(side * x, 0) for x in whole.leaves])
    count = whole.sum([(x != 0 if two_sided else side * x > 0).astype(x.dtype) for x in whole.leaves])
    high = functools.reduce(jnp.maximum, [whole.max([s * x for x in whole.leaves]) for s in sides])
    sizes = [abs(v) for v in values if v]
    low, high = total / jnp.maximum(count, 1) / max(sizes), jnp.maximum(high, 0) / min(sizes)
    return sign * low, jnp.where(low > 0, high / jnp.where(low > 0, low, 1), 1)


def _has_fast_search(values: tuple[float, ...]) -> bool:
    """Whether `search_grid` finds the scales of long blocks; those of three levels are exact as they are."""
    return len(values) > 3 and is_grid(values) and values[0] < 0 < values[-1]


def of_size_one(whole: Cut) -> tuple[Cut, Array]:
    """The leaves over a power of two per block, and that: the largest magnitude that counts is then from 1 to 2.

    So sums of squares neither overflow nor vanish, whatever the size of the weights.
    """
    high = whole.max([jnp.abs(x) for x in whole.leaves])
    unit = jnp.ldexp(jnp.ones_like(high), jnp.frexp(high)[1] - 1)
    return whole._replace(leaves=tuple(x / u for x, u in zip(whole.leaves, whole.spread(unit), strict=True))), unit


def keep_better(
    whole: Cut,
    xs: Sequence[Array],
    cs: Sequence[Array],
    others: tuple[Array, ...],
    best: Any,
    dtype: str | None = None,
) -> tuple[Array, ...]:
    """(a, *others, error) per block, or `best` if its error is less:

        a = sum h x c / sum h c^2, rounded to a format,    error = sum h (x - a c)^2

    The error is summed as it is, not as sum h x^2 - a sum h x c: float32 could not tell fine grids apart.
    """
    numerator = whole.sum([x * c for x, c in zip(xs, cs, strict=True)])
    denominator = whole.sum([c * c for c in cs])
    a = jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
    a = rounded_scale(a, dtype)
    error = whole.sum([(x - here * c) ** 2 for x, here, c in zip(xs, whole.spread(a), cs, strict=True)])
    win = error < best[-1]
    return tuple(jnp.where(win, n, b) for n, b in zip((a, *others, error), best, strict=True))
