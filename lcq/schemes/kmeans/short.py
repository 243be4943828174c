"""Codebooks of short blocks: the best partition of the sorted numbers, by dynamic programming for many blocks at once.

Optimal cells are runs of the sorted numbers. With S_b and N_b the sums of h x and of h over the first b of n numbers,

    F_1(b) = S_b^2 / N_b,    F_i(b) = max_{a < b} F_{i-1}(a) + (S_b - S_a)^2 / (N_b - N_a)

is the most that i cells of these numbers take off sum h x^2. As no cell is empty, i of k cells end at one of i, .., i +
n - k: a step is elementwise in arrays of that length times the blocks, which lie side by side in vectors. Blocks are
taken a few hundred at a time, so that all of this stays in a cache.

Sums are in float32, about the mean: F is rounded by 1e-7 of the sum of squares. Of at most k distinct numbers each is a
level, and levels of an earlier solution are kept where they are better.

Source: Wu 1991, as in `exact`; sorting by odd-even transposition: Habermann 1972.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt

from lcq.schemes.grouped import Cut
from lcq.schemes.kmeans.columns import Levels, Numbers, are_many, by_columns, column_pass, middles, turns_of

LONGEST = 64
"""Numbers of a block, at most: the steps of a block grow with the square of what it has beyond its levels."""


def is_short(cut: Cut) -> bool:
    """Whether blocks are short enough, and many."""
    return are_many(cut) and sum(b.size for b in cut.blocks) <= LONGEST


def fit_short(
    cut: Cut, warm: Float[Array, "*stat k"] | None, k: int
) -> tuple[tuple[UInt[Array, "..."], ...], Float[Array, "*stat k"]]:
    """The best codes of every leaf and ascending levels.

    Args:
        cut: short blocks, that `is_short` is true of.
        warm: an earlier solution; the result is no worse.
        k: how many levels.
    """
    codes, levels, _ = by_columns(cut, warm, lambda x, h, levels: _solve(x, h, levels, k))
    return codes, levels


def _solve(x: Numbers, h: Numbers | None, warm: Levels | None, k: int) -> tuple[Array, Levels, Array]:
    """Codes, levels, and what they weigh."""
    low = jnp.min(x if h is None else jnp.where(h > 0, x, jnp.inf), 0)
    numbers = [x] if h is None else [jnp.where(h > 0, x, low), h]  # what weighs nothing is nowhere of its own
    ordered, *weights = _sorted(numbers)
    levels, distinct = _distinct(ordered, k)
    if len(x) > k:
        centre = jnp.mean(ordered, 0)
        reach = jnp.maximum(ordered[-1] - centre, centre - ordered[0])
        unit = jnp.where(reach > jnp.finfo(x.dtype).tiny, reach, 1)
        best = _best_levels((ordered - centre) / unit, *weights, k=k) * unit + centre
        levels = jnp.where(distinct <= k, levels, best)
    if warm is not None:
        errors = _errors(x, h, (levels, warm))
        levels = jnp.where(errors[1] < errors[0], warm, levels)
    return column_pass(x, h, levels)


def _sorted(arrays: list[Numbers]) -> list[Numbers]:
    """The first ascending, the others in its order."""
    size = len(arrays[0])

    def exchanged(arrays: list[Array]) -> list[Array]:
        """Neighbours, from the first two on, in order."""
        pairs = [a[: len(a) // 2 * 2].reshape(len(a) // 2, 2, *a.shape[1:]) for a in arrays]
        falls = pairs[0][:, 0] > pairs[0][:, 1]
        both = [
            jnp.stack([jnp.where(falls, p[:, 1], p[:, 0]), jnp.where(falls, p[:, 0], p[:, 1])], 1).reshape(
                2 * len(p), *p.shape[2:]
            )
            for p in pairs
        ]
        rest = [a[len(a) // 2 * 2 :] for a in arrays]
        return [jnp.concatenate([b, r]) if len(r) else b for b, r in zip(both, rest, strict=True)]

    def transposed(_: Array, arrays: list[Array]) -> list[Array]:
        arrays = exchanged(arrays)
        later = exchanged([a[1:] for a in arrays])
        return [jnp.concatenate([a[:1], b]) for a, b in zip(arrays, later, strict=True)]

    return lax.fori_loop(0, (size + 1) // 2, transposed, arrays) if size > 1 else arrays


def _distinct(ordered: Numbers, k: int) -> tuple[Levels, Array]:
    """The first k distinct numbers, the last of them again and again where there are fewer; how many there are."""
    first, (turns, rows) = ordered[0], turns_of(len(ordered))
    place = jnp.arange(k, dtype=jnp.int32).reshape(k, *(1,) * first.ndim)

    def turn(i: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
        before, rank, levels = state
        for x in lax.dynamic_slice_in_dim(ordered, i * rows, rows):
            rank = rank + (x > before)
            before, levels = x, jnp.where(place >= rank, x, levels)
        return before, rank, levels

    start = (first, jnp.zeros(first.shape, jnp.int32), jnp.broadcast_to(first, (k, *first.shape)))
    _, rank, levels = lax.fori_loop(0, turns, turn, start)
    return levels, rank + 1


def _running(rows: Numbers) -> Float[Array, "n+1 *lanes"]:
    """0, x_0, x_0 + x_1, .."""
    zero = jnp.zeros_like(rows[0])
    return jnp.concatenate([zero[None], lax.scan(lambda so_far, x: (so_far + x,) * 2, zero, rows)[1]])


def _best_levels(ordered: Numbers, weights: Numbers | None = None, *, k: int) -> Levels:
    """The means of the best k cells of more than k numbers; one that weighs nothing repeats the level above."""
    kind, slack = ordered.dtype, len(ordered) - k
    sums = _running(ordered if weights is None else ordered * weights)
    over_lanes = (...,) + (None,) * (ordered.ndim - 1)
    counts = jnp.broadcast_to(jnp.arange(len(ordered) + 1, dtype=kind)[over_lanes], sums.shape)
    mass = counts if weights is None else _running(weights)
    ahead = np.arange(slack + 1)[None] - np.arange(slack + 1)[:, None]
    even = jnp.asarray(np.where(ahead >= 0, 1 / (np.maximum(ahead, 0) + 1), 0), kind)[over_lanes]
    barred = jnp.asarray(np.where(ahead >= 0, 0, -np.inf), kind)[over_lanes]

    def over(a: Array, weight: Array, none: Array | float = 0.0) -> Array:
        return jnp.where(weight > 0, a / jnp.where(weight > 0, weight, 1), none)

    def advance(most: Array, i: Array) -> tuple[Array, Array]:
        """F of one cell more, for every place where it may stop."""
        here, whole = (lax.dynamic_slice_in_dim(rows, i, slack + 2) for rows in (sums, mass))
        best = jnp.full_like(most, -jnp.inf)
        for s in range(slack + 1):
            square = (here[1:] - here[s]) ** 2
            gain = square * even[s] if weights is None else over(square, whole[1:] - whole[s])
            gain = most[s] + gain + barred[s]
            best = jnp.where(gain > best, gain, best)
        return best, most

    def back(state: tuple[Array, Array, Array, Array], turn: tuple[Array, Array]) -> tuple[Any, Array]:
        """Where the cell that stops at a place best starts, and its level."""
        (beyond, total, whole, above), (most, i) = state, turn
        start, least = (lax.dynamic_slice_in_dim(rows, i, slack + 1) for rows in (sums, mass))
        best, at = jnp.full_like(total, -jnp.inf), jnp.zeros_like(beyond)
        for s in range(slack + 1):
            gain = most[s] + over((total - start[s]) ** 2, whole - least[s])
            better = (gain > best) & (s <= beyond)
            best, at = jnp.where(better, gain, best), jnp.where(better, s, at)
        below, weight = start[0], least[0]
        for s in range(1, slack + 1):
            below, weight = jnp.where(at == s, start[s], below), jnp.where(at == s, least[s], weight)
        level = over(total - below, whole - weight, above)
        return (at, below, weight, level), level

    first = over(sums[1 : slack + 2] ** 2, mass[1 : slack + 2])
    turns = jnp.arange(1, k, dtype=jnp.int32)
    _, path = lax.scan(advance, first, turns)
    end = (jnp.full(ordered.shape[1:], slack, jnp.int32), sums[-1], mass[-1], ordered[-1])
    (_, total, whole, above), levels = lax.scan(back, end, (path, turns), reverse=True)
    return jnp.concatenate([over(total, whole, above)[None], levels])


def _errors(x: Numbers, h: Numbers | None, several: Sequence[Levels]) -> list[Array]:
    """sum h (x - c)^2 for several codebooks."""
    turns, rows = turns_of(len(x))
    cuts = [middles(levels) for levels in several]

    def turn(i: Array, errors: list[Array]) -> list[Array]:
        here = lax.dynamic_slice_in_dim(x, i * rows, rows)
        weight = 1 if h is None else lax.dynamic_slice_in_dim(h, i * rows, rows)
        sums = []
        for error, middle, levels in zip(errors, cuts, several, strict=True):
            level = jnp.broadcast_to(levels[0], here.shape)
            for cut, onward in zip(middle, levels[1:], strict=True):
                level = jnp.where(here > cut, onward, level)
            squares = jnp.where(weight > 0, (here - level) ** 2 * weight, 0)
            sums.append(functools.reduce(jnp.add, squares, error))
        return sums

    return lax.fori_loop(0, turns, turn, [jnp.zeros_like(x[0])] * len(several))
