"""The cheapest integers along a path, of which each state allows every other one: distance and bits in one sum.

    min over paths of sum_i (v_i - g_i (c_i - half))^2 + len(c_i),     half = 2^(width - 1)

v and g are the numbers and their scales, each times the root of its importance; len is what an integer's code costs,
in the same units, among those of its parity. Of each of the four sets of integers, c mod 4, the best one is found
first, since all of a set lead to the same state; then with M_i[s] the least sum of a path that ends in state s, and r
the two states before it,

    M_i[s] = min_r  M_{i-1}[r] + (the cost of the set that leads from r to s)

which are two terms for each state. Paths go side by side along the last axis, where their arithmetic fills vector
registers.

Source: Fischer & Wang, IEEE Trans. IT 38 (1992), the rate in the metric; Viterbi 1967; the same in coders of images
and of nets: ISO/IEC 15444-2 and 23090-3 (VVC), 15938-17 (NNC).
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float, Int

from lcq.forms.convolution import branches, flips, is_odd

_LANES = 16
"""Paths side by side, at most: a vector register."""

_MEMORY = 1 << 26
"""Bytes of decisions, about, that one pass may keep: so many paths go side by side, but at least one."""


def cheapest_paths(
    v: Float[Array, "t p"], g: Float[Array, "t p"], lengths: Float[Array, " k"], memory: int
) -> Int[Array, "t p"]:
    """The integers c of the cheapest path for each column, from state 0 to any.

    Args:
        v: numbers, each times the root of its importance.
        g: their scales, likewise.
        lengths: what each integer's code costs, k of them; finite.
        memory: bits of a state.
    """
    return sequential_vmap(functools.partial(_in_chunks, memory=memory))(v, g, lengths)


def _in_chunks(v: Array, g: Array, lengths: Array, memory: int) -> Array:
    """`cheapest_paths`, so many at a time as there is memory for; mapped over leaves, these one after another."""
    length, count = v.shape
    lanes = max(_MEMORY // (length << memory), 1)
    lanes = min(_LANES, count, 1 << lanes.bit_length() - 1)
    chunks, rows = -(-count // lanes), _rows(v, g, lengths)

    def chunked(a: Array) -> Array:
        filled = jnp.pad(a, ((0, 0), (0, chunks * lanes - count)))
        return jnp.moveaxis(filled.reshape(-1, chunks, lanes), 1, 0)

    def some(part: tuple[Array, Array]) -> Array:
        costs, codes = _of_sets(*part, lengths, rows)
        sets = _side_by_side(costs, memory)
        return jnp.take_along_axis(codes, sets[:, None], 1)[:, 0]

    found = lax.map(some, (chunked(v), chunked(g)))
    return jnp.moveaxis(found, 0, 1).reshape(length, chunks * lanes)[:, :count]


def _rows(v: Array, g: Array, lengths: Array) -> tuple[Array, Array]:
    """Which of c div 4 can be the cheapest for any number: from the first, so many.

    The nearest integer of a set is at most 2 away; one that is further away than that and the root of the longest code
    costs more.
    """
    half = lengths.shape[0] // 2
    root = jnp.sqrt(lengths.max())
    reach = jnp.where(g > 0, (jnp.abs(v) + root) / jnp.where(g > 0, g, 1) + 2, half)
    side = jnp.minimum(jnp.ceil(reach.max() / 4), half // 4).astype(jnp.int32) + 1
    first = jnp.maximum(half // 4 - side, 0)
    return first, jnp.minimum(half // 4 + side, half // 2) - first


def _of_sets(
    v: Float[Array, "t p"], g: Float[Array, "t p"], lengths: Float[Array, " k"], rows: tuple[Array, Array]
) -> tuple[Float[Array, "t 4 p"], Int[Array, "t 4 p"]]:
    """The least cost in each of the four sets, and the integer; the lower one on ties."""
    half, (first, many) = lengths.shape[0] // 2, rows
    v, g, sets = v[:, None], g[:, None], jnp.arange(4, dtype=jnp.int32)[:, None]

    def compare(n: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        codes = 4 * (first + n) + sets
        cost = (v - g * (codes - half)) ** 2 + lax.dynamic_slice_in_dim(lengths, 4 * (first + n), 4)[:, None]
        less = cost < best[0]
        return jnp.where(less, cost, best[0]), jnp.where(less, codes, best[1])

    shape = (v.shape[0], 4, v.shape[2])
    start = jnp.full(shape, jnp.inf, v.dtype), jnp.full(shape, half, jnp.int32) + sets
    return lax.fori_loop(0, many, compare, start)


def _side_by_side(costs: Float[Array, "t 4 p"], memory: int) -> Int[Array, "t p"]:
    """The sets along the cheapest path of each column."""
    size, lanes = 1 << memory, costs.shape[2]
    odd, flip = (a.reshape(2, size // 2, 1, 1) == 1 for a in branches(memory))
    second = flip ^ (np.arange(2).reshape(1, 1, 2, 1) == 1)  # the set's other bit, by the u that the path takes

    def step(least: Array, cost: Array) -> tuple[Array, Array]:
        each = jnp.where(second, jnp.where(odd, cost[3], cost[2]), jnp.where(odd, cost[1], cost[0])) + least.reshape(
            2, size // 2, 1, lanes
        )
        less = each[1] < each[0]
        return jnp.where(less, each[1], each[0]).reshape(size, lanes), less.reshape(size, lanes)

    start = jnp.where(jnp.arange(size)[:, None] == 0, jnp.zeros((size, lanes), costs.dtype), jnp.inf)
    least, upper = lax.scan(step, start, costs)

    def back(state: Array, upper: Array) -> tuple[Array, Array]:
        before = state >> 1 | jnp.take_along_axis(upper, state[None], 0)[0].astype(jnp.int32) << (memory - 1)
        return before, is_odd(before, memory) | (flips(before, memory) ^ (state & 1)) << 1

    return lax.scan(back, jnp.argmin(least, 0).astype(jnp.int32), upper, reverse=True)[1]
