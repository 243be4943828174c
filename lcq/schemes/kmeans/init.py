"""A cold start for k-means: a histogram stands in for the data, and the best partition of its bins, or for many levels
its density^(1/3) quantiles, for a random start.

The levels of an optimal codebook have a density proportional to f^(1/3), f the density of the data. Bins are equal in
y = sign(u) log(1 + |u|), u = (x - mean) / s, s four times the mean of |x - mean|: nearly equal in x where the data are,
in ratio far out.

Source: Panter & Dite 1951; Gersho & Gray 1992, section 5.6.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

from lcq.forms.blocks import blocks, explicit_sharding
from lcq.forms.meshes import is_shared
from lcq.schemes.grouped import Cut
from lcq.schemes.kmeans.lloyd import Centres, cell_sum, count_cells, lloyd_pass, move_level
from lcq.schemes.kmeans.partition import best_partition

_BINS = 8192
"""Bins of one histogram; 16 per level where that is more."""

_COARSE = 64
"""Bins from which the density is estimated."""

EXACT = 64
"""Levels up to which the best partition of bins is found."""

_RUNS = 512
"""Runs of bins that are parted at a cold start, at most, 16 per level where that is more."""

_WORTH = 256
"""Steps of that search for each number."""

_LITTLE = 144
"""The same where some passes over the data follow at once."""

_FREE = 1 << 22
"""Steps that are affordable for all blocks together."""

_EACH = 12
"""Runs for each level, at least."""

_ROOM = 1 << 21
"""Bins of all fine histograms of short blocks."""

_AT_ONCE = 1 << 15
"""Errors that the search keeps at a time: a cache's worth."""

_SPREAD = 4.0
"""s over the mean of |x - mean|."""


Fixed = tuple[float | Array, ...]
"""Levels that are given."""


def summarise(cut: Cut, k: int, fixed: Fixed = ()) -> tuple[Cut, Float[Array, "*stat k"]]:
    """The data as weighted centres of bins, and k levels to start from.

    Args:
        cut: leaves that share the levels.
        k: how many levels.
        fixed: levels that are given beside these.

    Returns:
        One leaf of points, [*counts of the first leaf, bins], each as heavy as what it stands for; `cut` itself where
        blocks are too short for a histogram to be shorter. Ascending levels for every block of these points.
    """
    size, many = _size(cut), math.prod(cut.counts[0])
    fine = max(_BINS, 16 * k)
    each = fine // 2
    few = many * each <= _ROOM and k <= EXACT
    runs = _few_runs(k, size, many)
    bins = fine if size > 2 * fine else each if few else _few_bins(k, size, runs)
    seen = _histogram(cut, bins)
    if k <= EXACT:
        levels = _partition(seen, size, k, min(runs, max(k, size)), fixed)
    else:
        levels = seen.mean + seen.scale * _quantiles(seen.mass, k, seen.reach)
    if size <= 2 * fine:
        return cut, levels.reshape(*cut.blocks[0].stat, k)
    x = (seen.mean + seen.scale * _stretch(_middles(bins), seen.reach))[..., 0, :]
    counts = (*cut.counts[0], 1)
    return Cut((x,), (blocks(x.shape, counts),), (counts,), (seen.mass[..., 0, :],)), levels


def few_levels(cut: Cut, k: int) -> Float[Array, "*stat k"]:
    """k levels to start from, of many blocks of hundreds of numbers: fewer runs of fewer bins, so that all of it takes
    no longer than some passes over the data."""
    size = _size(cut)
    runs = min(_RUNS, max(_EACH * k, math.isqrt(_LITTLE * size // k)))
    seen = _histogram(cut, 1 << (min(4 * runs, max(size, k)) - 1).bit_length())
    return _partition(seen, size, k, min(runs, max(k, size))).reshape(*cut.blocks[0].stat, k)


class _Histogram(NamedTuple):
    """What lies in bins of equal length in y.

    Attributes:
        mass: how many numbers, or what they weigh, [*counts, 1, bins].
        mean: of the numbers, [*counts, 1, 1].
        scale: s.
        reach: the largest log(1 + |u|).
    """

    mass: Shaped[Array, "*counts 1 bins"]
    mean: Float[Array, "*counts 1 1"]
    scale: Float[Array, "*counts 1 1"]
    reach: Float[Array, "*counts 1 1"]


def _size(cut: Cut) -> int:
    """Numbers of a block."""
    return sum(b.size for b in cut.blocks)


def _histogram(cut: Cut, bins: int) -> _Histogram:
    size = _size(cut)
    ones = [jnp.ones(x.shape, jnp.int32) for x in cut.leaves]
    whole: Any = [float(size)] * len(ones)
    if cut.importance is not None and not jnp.issubdtype(cut.importance[0].dtype, jnp.floating):
        some = ones if size <= jnp.iinfo(ones[0].dtype).max else [o.astype(jnp.float32) for o in ones]
        whole = cut.spread(cut.sum(some))  # floats have a mean of one
    mean = cut.sum([x / n for x, n in zip(cut.leaves, whole, strict=True)])
    pairs = zip(cut.leaves, cut.spread(mean), whole, strict=True)
    scale = _SPREAD * cut.sum([jnp.abs(x - m) / n for x, m, n in pairs])
    safe = _positive(scale)
    largest = cut.max([jnp.abs(x - m) for x, m in zip(cut.leaves, cut.spread(mean), strict=True)])
    reach = jnp.log1p(largest / safe)
    bin_of = []
    places = map(cut.spread, (mean, safe, jnp.where(reach > 0, reach, 1)))
    for x, m, s, r in zip(cut.leaves, *places, strict=True):
        y = jnp.sign(x - m) * jnp.log1p(jnp.abs(x - m) / s) / r
        bin_of.append(jnp.clip((y + 1) * (bins / 2), 0, bins - 1).astype(jnp.uint16))
    mass = _mass(cut, ones, bin_of, bins)
    return _Histogram(mass, *(a.reshape(*cut.counts[0], 1, 1) for a in (mean, scale, reach)))


def _positive(scale: Array) -> Array:
    return jnp.where(scale > jnp.finfo(scale.dtype).tiny, scale, 1)


def _mass(cut: Cut, ones: Sequence[Array], bin_of: Sequence[Array], bins: int) -> Shaped[Array, "..."]:
    """What is in every bin: how many numbers, or, of numbers with an importance in floats, how much they weigh."""
    shape = (*cut.counts[0], 1, bins)
    members = list(cut.weighted(ones))
    if jnp.issubdtype(members[0].dtype, jnp.integer):
        return count_cells(members, bin_of, bins, cut.blocks, shape)
    pieces = zip(members, bin_of, cut.blocks, strict=True)
    return functools.reduce(jnp.add, (cell_sum(m, p, bins, b.stat).reshape(shape) for m, p, b in pieces))


def _few_bins(k: int, size: int, runs: int) -> int:
    """Bins of a block that is too short for a fine histogram: hardly more than it has numbers."""
    if k > EXACT:
        return min(_COARSE, 1 << (size // 8).bit_length())
    return max(k, min(1 << (size - 1).bit_length(), 1 << (runs.bit_length() - 1)))


def _few_runs(k: int, size: int, blocks: int) -> int:
    """Runs that are parted for k levels: the fewer the shorter a block, as the steps grow with their square."""
    affordable = math.isqrt(max(_WORTH * size, _FREE // blocks) // k)
    return min(max(_RUNS, 16 * k), max(_EACH * k, min(size // 2, affordable)))


def _partition(seen: _Histogram, size: int, k: int, runs: int, fixed: Fixed = ()) -> Float[Array, "*counts 1 k"]:
    """The best levels whose cells are runs of bins; of a fine histogram's bins those are joined that lie between
    quantiles of f^(1/3) du, where f is what a bin holds over the step before it, or else are empty."""
    mass, mean, scale, reach = seen
    held = [(v - mean) / _positive(scale) for v in fixed]
    given = jnp.concatenate(held, -1) if held else None
    mass = mass.astype(mean.dtype)
    mass = mass / jnp.sum(mass, -1, keepdims=True)
    bins, blocks = mass.shape[-1], math.prod(mass.shape[:-1])
    u = _stretch(_middles(bins).astype(reach.dtype), reach)
    total = mass * u
    if bins > runs:
        if size <= runs:  # every number may be a run
            run = jnp.maximum(jnp.cumsum(mass > 0, -1, dtype=jnp.int32) - 1, 0)
        else:
            run = _dense_runs(mass, u, runs)
        stat = (*run.shape[:-1], 1)
        mass, total = (cell_sum(a, run, runs, stat)[..., 0, :] for a in (mass, total))
    most = max(_AT_ONCE // ((k + 1) * mass.shape[-1]), 1)
    if blocks <= most or explicit_sharding(mass) is not None or is_shared():  # blocks stay where they are
        return mean + scale * best_partition(mass, total, k, given)
    flat = [a.reshape(blocks, -1) for a in (mass, total, given) if a is not None]
    levels = lax.map(
        lambda each: best_partition(each[0], each[1], k, None if given is None else each[2]), flat, batch_size=most
    )
    return mean + scale * levels.reshape(*mass.shape[:-1], k)


def _dense_runs(mass: Float[Array, "*stat bins"], u: Float[Array, "*stat bins"], runs: int) -> Array:
    """The run of every bin, between quantiles of f^(1/3) du."""
    last = lax.cummax(jnp.where(mass > 0, u, u[..., :1]), axis=u.ndim - 1)
    step = u - jnp.concatenate([u[..., :1], last[..., :-1]], -1)
    upto = jnp.cumsum(jnp.cbrt(mass * step**2), -1)
    end = upto[..., -1:]
    return jnp.minimum(upto * ((runs - 1) / jnp.where(end > 0, end, 1)), runs - 1).astype(jnp.int32)


def explore(points: Cut, centres: Centres, passes: int) -> Centres:
    """Lloyd passes that also move the least useful level to the cell with the largest error, if that seems to pay.

    Escapes from local minima that are far from the best. Returns the best centres of at most `passes` passes.

    Source: Fritzke 1997 (LBG-U).
    """

    def improve(state: tuple) -> tuple:
        before, best, least, _, count = state
        codes, now, members = lloyd_pass(points, before)
        onward, _, error = move_level(points, codes, now, _losses(now, members))
        better = (error < least)[..., None]
        best = Centres(*(jnp.where(better, a, b) for a, b in zip(now, best, strict=True)))
        return onward, best, jnp.minimum(error, least), jnp.any(onward.levels != before.levels), count + 1

    least = jnp.full_like(centres.levels[..., 0], jnp.inf)
    start = (centres, centres, least, jnp.bool_(True), jnp.int32(0))
    return lax.while_loop(lambda state: state[3] & (state[4] < passes), improve, start)[1]


def _losses(centres: Centres, count: Array) -> Array:
    """How much the squared error would rise without a level, its numbers going to one neighbour and its mean."""
    levels, n = centres.levels, jnp.where(centres.free, count, jnp.inf)  # a frozen level does not give way
    away = (levels[..., 1:] - levels[..., :-1]) ** 2
    left, right = n[..., :-1], n[..., 1:]
    weight = 1 / (1 / jnp.where(left > 0, left, 0.5) + 1 / jnp.where(right > 0, right, 0.5))
    none = jnp.full_like(levels[..., :1], jnp.inf)
    pair = jnp.concatenate([none, away * weight, none], -1)
    loss = jnp.where(count > 0, jnp.minimum(pair[..., 1:], pair[..., :-1]), 0)
    return jnp.where(centres.free, loss, jnp.inf)


def _quantiles(count: Shaped[Array, "*stat bins"], k: int, reach: Float[Array, "*stat 1"]) -> Float[Array, "*stat k"]:
    """Quantiles (i + 1/2)/k of the measure f^(1/3) du, f from at most 64 bins, in units of u."""
    bins = min(_COARSE, count.shape[-1])
    mass = jnp.sum(count.reshape(*count.shape[:-1], bins, -1), -1).astype(reach.dtype)
    mass = jnp.cbrt(mass * _width(bins, reach) ** 2)
    below = jnp.cumsum(mass, -1)
    target = (jnp.arange(k, dtype=below.dtype) + 0.5) / k * below[..., -1:]
    at = jnp.minimum(jnp.sum(below[..., None, :] < target[..., None], -1), bins - 1)
    rest = (jnp.take_along_axis(below, at, -1) - target) / jnp.take_along_axis(mass, at, -1)
    return _stretch(2 * (at + 1 - jnp.clip(rest, 0, 1)) / bins - 1, reach)


def _middles(bins: int) -> Float[Array, " bins"]:
    """y in the middle of every bin."""
    return (2 * jnp.arange(bins, dtype=jnp.float32) + 1) / bins - 1


def _width(bins: int, reach: Float[Array, "*stat 1"]) -> Float[Array, "*stat bins"]:
    """du / dy of every bin, but for a factor."""
    return jnp.exp(jnp.abs(_middles(bins)) * reach)


def _stretch(y: Array, reach: Array) -> Array:
    """u for y in [-1, 1]."""
    return jnp.sign(y) * jnp.expm1(jnp.abs(y) * reach)
