"""The best path through a bit-shift trellis, by dynamic programming.

A code c of k bits moves a state s of L bits to s' = (s 2^k + c) mod 2^L, whose value is t_{s'}. Down a path

    min over codes of sum_i (v_i - g_i t_{s_i})^2

where v and g are the numbers and their scales, each times the root of its importance. A state's past matters by its
lower L - k bits alone, q; the upper k, j, are those that the next code drops. With M_i[q] the least sum of a path that
ends in some state (j, q),

    M_i[q] = min_j  M_{i-1}[(j, q) div 2^k] + (v_i - g_i t_{(j, q)})^2

one minimum over 2^k numbers for each q: 2^L terms a number. Paths go side by side along the last axis, where their
arithmetic fills vector registers, and the state (j, q) div 2^k is a matter of shapes: nothing is gathered.

Source: Viterbi 1967; the trellis: Mao & Gray, IEEE Trans. IT 56 (2010); tail-biting in two passes: Tseng et al., QTIP,
arXiv 2406.11235, algorithm 4.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int, UInt16

_LANES = 32
"""Paths side by side, at most: some vector registers."""

_MEMORY = 1 << 26
"""Bytes of back pointers, about, that one pass may keep: so many paths go side by side, but at least one."""


def best_paths(
    v: Float[Array, "t p"],
    g: Float[Array, "t p"],
    table: Float[Array, " s"],
    ends: Int[Array, "2 p"] | None,
    bits: int,
    skip: Int[Array, ""] | None = None,
) -> UInt16[Array, "t p"]:
    """The states of the best path for each column.

    Args:
        v: numbers, each times the root of its importance.
        g: their scales, likewise.
        table: the value of each state, 2^L of them.
        ends: the L - k bits that a path begins after, and those that it has to end with: of one that bites its tail the
            same; negative where it is free. None for paths that are free at both ends.
        bits: of a code, k, at most L.
        skip: how many numbers come before the path, whose states have no meaning; for paths with ends.
    """
    more = () if ends is None else (ends,) if skip is None else (ends, skip)
    return sequential_vmap(functools.partial(_in_chunks, bits=bits))(v, g, table, *more)


def _in_chunks(
    v: Array, g: Array, table: Array, ends: Array | None = None, skip: Array | None = None, *, bits: int
) -> Array:
    """`best_paths`, so many at a time as there is memory for; mapped over leaves, these one after another."""
    length, count = v.shape
    lanes = max(_MEMORY // (length * (table.shape[0] >> bits)), 1)
    lanes = min(_LANES, count, 1 << lanes.bit_length() - 1)
    chunks = -(-count // lanes)

    def chunked(a: Array) -> Array:
        filled = jnp.pad(a, ((0, 0), (0, chunks * lanes - count)))
        return jnp.moveaxis(filled.reshape(-1, chunks, lanes), 1, 0)

    parts = (chunked(v), chunked(g), *(() if ends is None else (chunked(ends),)))
    states = lax.map(lambda part: _side_by_side(*part, table=table, bits=bits, skip=skip), parts)
    return jnp.moveaxis(states, 0, 1).reshape(length, chunks * lanes)[:, :count]


def _side_by_side(v: Array, g: Array, ends: Array | None = None, *, table: Array, bits: int, skip: Any = None) -> Array:
    """`best_paths` of a few columns."""
    rest = (table.shape[0].bit_length() - 1) - bits  # L - k, the bits of q
    upper = min(bits, rest)  # of q / 2^k, those that are of j
    lower = max(rest - bits, 0)  # and those that are of q
    values = table.reshape(1 << upper, 1 << (bits - upper), 1 << lower, -1, 1)
    lanes = v.shape[1]

    def step(least: Array, row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        v, g, number = row
        if skip is not None:  # no `where`, with which the loops below would not be vectorized
            least = lax.cond(number == skip, lambda: start, lambda: least)
        before = least.reshape(1 << upper, 1 << lower, 1, lanes)
        best = before[0] + (v - g * values[0, 0]) ** 2
        where = jnp.zeros(best.shape, jnp.int32)
        for j in range(1, 1 << bits):
            high, low = divmod(j, 1 << (bits - upper))
            sums = before[high] + (v - g * values[high, low]) ** 2
            less = sums < best
            best, where = jnp.where(less, sums, best), jnp.where(less, j, where)
        return best.reshape(-1, lanes), where.astype(jnp.uint8).reshape(-1, lanes)

    start = jnp.zeros((1 << rest, lanes), v.dtype)
    if ends is not None:
        start = jnp.where((ends[0] < 0) | (jnp.arange(1 << rest)[:, None] == ends[0]), start, jnp.inf)
    least, chosen = lax.scan(step, start, (v, g, jnp.arange(len(v))))

    def back(q: Array, chosen: Array) -> tuple[Array, Array]:
        state = jnp.take_along_axis(chosen, q[None], 0)[0].astype(jnp.int32) << rest | q
        return state >> bits, state.astype(jnp.uint16)

    last = jnp.argmin(least, 0).astype(jnp.int32)
    last = last if ends is None else jnp.where(ends[1] < 0, last, ends[1])
    return lax.scan(back, last, chosen, reverse=True)[1]


def overlap_of(states: UInt16[Array, "t p"], table: Array, bits: int) -> Int[Array, " p"]:
    """The lower L - k bits of the last states: what a path that goes on, or bites its tail, begins after."""
    return states[-1].astype(jnp.int32) & ((table.shape[0] >> bits) - 1)


def tail_biting(
    v: Float[Array, "t p"], g: Float[Array, "t p"], table: Float[Array, " s"], bits: int
) -> UInt16[Array, "t p"]:
    """Good paths that bite their tails: with the overlap that a free path has in the middle of the turned numbers,
    where neither of its ends matters."""
    half = v.shape[0] // 2
    free = best_paths(jnp.roll(v, half, 0), jnp.roll(g, half, 0), table, None, bits)
    return best_paths(v, g, table, closed(overlap_of(free[: half or 1], table, bits)), bits)


def closed(overlap: Int[Array, " p"]) -> Int[Array, "2 p"]:
    """The ends of paths that bite their tails."""
    return jnp.stack([overlap, overlap])


def better_paths(
    states: UInt16[Array, "t p"], v: Float[Array, "t p"], g: Float[Array, "t p"], table: Float[Array, " s"], bits: int
) -> UInt16[Array, "t p"]:
    """Paths at least as good as given ones, which bite their tails: the best of all that pass the middle with the same
    overlap, then of all that pass the ends with that."""
    half = states.shape[0] // 2
    for turn in (half, 0) if half else (0,):
        turned = [jnp.roll(a, turn, 0) for a in (states, v, g)]
        found = best_paths(turned[1], turned[2], table, closed(overlap_of(turned[0], table, bits)), bits)
        states = jnp.roll(found, -turn, 0)
    return states
