"""Codebooks that trade the squared error against the length of an entropy code.

    min_{c, z} sum_i h_i (x_i - c_{z_i})^2 + rate sum_i len_{z_i},    len_k = log2(n / n_k),  n_k = #{i: z_i = k}

The lengths add up to n times the entropy of the codes. A pass chooses codes for the lengths of the last one, counts
them, and averages each cell: no step raises the objective, since -log2 of the shares are the best lengths. A level
without numbers has no length and stays unused.

For fixed lengths code k costs a line in x, c_k^2 - 2 c_k x + rate len_k, beside x^2: the cheapest codes are intervals,
cut where the lower envelope of the lines has its corners,

    T_k = max_{i <= k} min_{j > k} t_ij,    t_ij = (c_i + c_j) / 2 + rate (len_j - len_i) / (2 (c_j - c_i)),

so the data are compared with K - 1 numbers as in Lloyd's algorithm. Where the h_i differ each x_i has an envelope of
its own, rate / h_i in the place of the rate, and its costs are compared.

Source: Chou, Lookabaugh & Gray, IEEE Trans. ASSP 37, 1989; steps for a rate: Gish & Pierce, IEEE Trans. IT 14, 1968.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, UInt

from lcq.forms.blocks import Per, block_counts, blocks
from lcq.schemes.grouped import Cut
from lcq.schemes.kmeans.lloyd import assign, cell_counts, count_below, level_of, means, residuals
from lcq.schemes.nearest import code_dtype

MOST = 1e30
"""What a bit may be worth in units of the largest square: all of them, without an overflow."""


class Coded(NamedTuple):
    """Ascending levels of every block of the first leaf, which may move, and how many numbers have each."""

    levels: Float[Array, "*stat k"]
    free: Bool[Array, "*stat k"]
    number: Float[Array, "*stat k"]


class Price(NamedTuple):
    """What a bit is worth.

    Attributes:
        rate: squared distance per bit, in units of the weights; one for each block.
        each: whether the importance says how much a number counts; if not, it says how many of it there are.
    """

    rate: Float[Array, "*stat 1"]
    each: bool


def descend_coded(points: Cut, start: Coded, price: Price, passes: int) -> Coded:
    """At most so many passes; fewer when nothing changes."""

    def improve(state: tuple) -> tuple:
        before, _, count = state
        _, after = coded_pass(points, before, price)
        after = Coded(*lax.sort(tuple(after), num_keys=2))
        changed = jnp.any(after.levels != before.levels) | jnp.any(after.number != before.number)
        return after, changed, count + 1

    state = (start, jnp.bool_(True), jnp.int32(0))
    return lax.while_loop(lambda state: state[1] & (state[2] < passes), improve, state)[0]


def conclude(points: Cut, last: Coded, price: Price) -> tuple[tuple[UInt[Array, "..."], ...], Float[Array, "*stat k"]]:
    """One more pass: the codes of every leaf, and ascending levels."""
    codes, (levels, free, _) = coded_pass(points, last, price)
    place = lax.broadcasted_iota(jnp.int32, levels.shape, levels.ndim - 1)
    levels, _, place = lax.sort((levels, free, place), num_keys=3)
    rank = jnp.argsort(place, axis=-1)  # a level may have passed one that is unused
    pairs = zip(codes, points.blocks, strict=True)
    return tuple(level_of(rank.reshape(*b.stat, -1), c).astype(c.dtype) for c, b in pairs), levels


def coded_pass(points: Cut, before: Coded, price: Price) -> tuple[tuple[UInt[Array, "..."], ...], Coded]:
    """The cheapest codes for the lengths of `before`, then the means of their cells and their number.

    The levels are as they come out, with the codes, in no order: a level may pass another that is unused.
    """
    levels, free, number = before
    used = number > 0
    total = jnp.sum(number, -1, keepdims=True)
    lengths = jnp.where(used, jnp.log2(total / jnp.where(used, number, 1)), jnp.inf)
    codes = _cheapest(points, levels, lengths, price)
    mean, weight = means(points, codes, levels)
    number = cell_counts(points._replace(importance=None), codes, levels) if price.each else weight
    return codes, Coded(jnp.where(free & (weight > 0), mean, levels), free, number.astype(levels.dtype))


def objective(points: Cut, codes: Sequence[Array], coded: Coded, price: Price) -> Float[Array, "*stat"]:
    """The sum that is minimised, in every block, with the numbers of `coded` for these codes."""
    used = coded.number > 0
    shares = jnp.where(used, coded.number / jnp.sum(coded.number, -1, keepdims=True), 1)
    bits = jnp.sum(-coded.number * jnp.log2(shares), -1)
    return points.sum([r**2 for r in residuals(points, coded.levels, codes)]) + price.rate[..., 0] * bits


def code_bits(codes: Sequence[UInt[Array, "..."]], levels: Float[Array, "..."], per: Per) -> Float[Array, ""]:
    """sum_i len_{z_i} of the codes of all leaves that share levels, [*blocks, k]."""
    counts = tuple(block_counts(per, c.shape) for c in codes)
    how = tuple(blocks(c.shape, count) for c, count in zip(codes, counts, strict=True))
    split = tuple(c.reshape(b.split) for c, b in zip(codes, how, strict=True))
    number = cell_counts(Cut(split, how, counts), split, levels.reshape(*how[0].stat, -1)).astype(levels.dtype)
    total = jnp.sum(number, -1, keepdims=True)
    return jnp.sum(number * jnp.log2(total / jnp.where(number > 0, number, total)))


def even_levels(points: Cut, k: int, rate: Float[Array, "*stat 1"]) -> Float[Array, "*stat k"]:
    """k levels at the distance that is best for a rate where the density is flat, around the mean or over the range.

    A step d leaves the error d^2 / 12 and costs -log2 d bits: d^2 = 6 rate / ln 2.
    """
    step = jnp.sqrt(6 / math.log(2) * rate)
    size = points.sum([jnp.ones_like(x) for x in points.leaves])
    mean = (points.sum(points.leaves) / size)[..., None]
    low = jnp.ceil((mean + points.max([-x for x in points.leaves])[..., None]) / step)
    high = jnp.ceil((points.max(points.leaves)[..., None] - mean) / step)
    below = jnp.minimum(jnp.maximum(k // 2, k - 1 - high), low)
    return mean + step * (jnp.arange(k) - below)


def merged_levels(points: Cut, many: Float[Array, "*stat m"], k: int, price: Price) -> Float[Array, "*stat k"]:
    """At most k levels out of many: cells are merged with a neighbour, those first that this costs least.

    Two cells of weights a, b and numbers n_a, n_b become one: the objective rises by

        a b / (a + b) (c_a - c_b)^2 + rate (n len(n) - n_a len(n_a) - n_b len(n_b)),    n = n_a + n_b.

    The best on the way, of those with k levels or fewer; unused ones repeat the last.

    Source: Equitz 1989; with lengths: Chou, Lookabaugh & Gray, IEEE Trans. IT 35, 1989.
    """
    codes = tuple(assign(x, many.reshape(*b.stat, -1)) for x, b in zip(points.leaves, points.blocks, strict=True))
    means_of, weight = means(points, codes, many)
    number = cell_counts(points._replace(importance=None), codes, many) if price.each else weight
    weight, number = (a.astype(many.dtype) for a in (weight, number))
    _, levels, weight, number = lax.sort((number <= 0, means_of, weight, number), num_keys=2)
    total, place = jnp.sum(number, -1, keepdims=True), jnp.arange(many.shape[-1])

    def bits(n: Array) -> Array:
        return n * jnp.log2(total / jnp.where(n > 0, n, total))

    def note(levels: Array, number: Array, cost: Array, best: Array, least: Array) -> tuple[Array, Array]:
        last = jnp.max(jnp.where(number > 0, levels, -jnp.inf), -1, keepdims=True)
        better = ((number > 0).sum(-1, keepdims=True) <= k) & (cost < least)
        return jnp.where(better, jnp.where(number > 0, levels, last)[..., :k], best), jnp.where(better, cost, least)

    def merge(_: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        levels, weight, number, cost, best, least = state
        (c, d), (a, b), (n, m) = ((x[..., :-1], x[..., 1:]) for x in (levels, weight, number))
        both = jnp.where(a + b > 0, a + b, 1)
        rise = a / both * b * (d - c) ** 2 + price.rate * (bits(n + m) - bits(n) - bits(m))
        rise = jnp.where(m > 0, rise, jnp.inf)
        j = jnp.argmin(rise, -1)[..., None]
        more = jnp.take_along_axis(rise, j, -1)
        here = jnp.minimum(place + (place > j), many.shape[-1] - 1)
        behind = place == many.shape[-1] - 1

        def joined(x: Array, pairs: Array, end: Any) -> Array:
            moved = jnp.where(behind, end, jnp.take_along_axis(x, here, -1))
            return jnp.where(place == j, jnp.take_along_axis(pairs, j, -1), moved)

        after = joined(levels, c + b / both * (d - c), levels), joined(weight, a + b, 0), joined(number, n + m, 0)
        levels, weight, number, cost = (
            jnp.where(jnp.isfinite(more), x, y) for x, y in zip((*after, cost + more), state[:4], strict=True)
        )
        return levels, weight, number, cost, *note(levels, number, cost, best, least)

    nothing = jnp.zeros_like(total)
    first = note(levels, number, nothing, levels[..., :k], jnp.full_like(total, jnp.inf))
    state = (levels, weight, number, nothing, *first)
    return jnp.sort(lax.fori_loop(0, len(place) - 1, merge, state)[4], -1)


def corners(levels: Float[Array, "*stat k"], costs: Float[Array, "*stat k"]) -> Float[Array, "*stat k-1"]:
    """T_k of every code but the last: ascending, and equal on both sides of a code that is never the cheapest.

    Args:
        levels: ascending.
        costs: rate len of each; infinite for levels that are not used, but not for all.
    """
    used = jnp.isfinite(costs)
    costs = jnp.where(used, costs, 0)
    place = jnp.arange(levels.shape[-1])

    def against(i: Array, best: Array) -> Array:
        """Level i against those above it: its interval ends at the nearest of t_ij."""
        level, cost, here = (lax.dynamic_index_in_dim(a, i, -1) for a in (levels, costs, used))
        away, more = levels - level, costs - cost
        cut = 0.5 * levels + 0.5 * level + 0.5 * more / jnp.where(away > 0, away, 1)
        cut = jnp.where(away > 0, cut, jnp.where(more >= 0, jnp.inf, -jnp.inf))
        cut = jnp.where(here, jnp.where(used & (place > i), cut, jnp.inf), -jnp.inf)
        nearest = lax.cummin(cut, axis=levels.ndim - 1, reverse=True)[..., 1:]
        return jnp.where(place[:-1] >= i, jnp.maximum(best, nearest), best)

    return lax.fori_loop(0, len(place), against, jnp.full_like(levels[..., 1:], -jnp.inf))


def _cheapest(points: Cut, levels: Array, lengths: Array, price: Price) -> tuple[UInt[Array, "..."], ...]:
    """The codes of least h (x - c)^2 + rate len, the lower one on ties."""
    if not price.each or points.importance is None:
        cuts = corners(levels, jnp.where(jnp.isfinite(lengths), price.rate * lengths, jnp.inf))
        pairs = zip(points.leaves, points.blocks, strict=True)
        return tuple(count_below(cuts.reshape(*b.stat, -1), x) for x, b in pairs)
    largest = points.max([jnp.abs(x) for x in points.leaves])
    unit = jnp.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
    worth = jnp.minimum(price.rate / unit[..., None] / unit[..., None], MOST)
    costs = jnp.where(jnp.isfinite(lengths), worth * lengths, jnp.inf)
    leaves = zip(points.leaves, points.importance, points.spread(unit), points.blocks, strict=True)
    return tuple(_least(x, h, u, levels.reshape(*b.stat, -1), costs.reshape(*b.stat, -1)) for x, h, u, b in leaves)


def _least(
    x: Float[Array, "*split"],
    h: Float[Array, "..."],
    unit: Float[Array, "*stat"],
    levels: Float[Array, "*stat k"],
    costs: Float[Array, "*stat k"],
) -> UInt[Array, "*split"]:
    """argmin_k h ((x - c_k) / unit)^2 + cost_k; of least cost alone where h is zero, whatever x is."""

    def compare(k: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        least, codes = state
        level, cost = (lax.dynamic_index_in_dim(a, k, -1, keepdims=False) for a in (levels, costs))
        here = jnp.where(h > 0, h * ((x - level) / unit) ** 2, 0) + cost
        return jnp.minimum(least, here), jnp.where(here < least, k.astype(codes.dtype), codes)

    size = levels.shape[-1]
    start = jnp.full_like(x, jnp.inf), jnp.zeros_like(x, code_dtype(size))
    return lax.fori_loop(0, size, compare, start)[1]
