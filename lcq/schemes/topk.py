"""The k largest of many numbers, without a sort: bisection on the bits of the threshold.

Sorting 10^6 numbers takes XLA on a CPU a fifth of a second, and a sort of a sharded array gathers it. Counting those
above a threshold is one pass; floats >= 0 are ordered as their bits are, so as many passes as a float has bits find the
k-th largest number exactly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lcq.forms.blocks import explicit_sharding
from lcq.schemes.counts import Count, at_least, count_marks, count_of, minus, smaller


def largest(scores: Sequence[Float[Array, "..."]], count: Any) -> list[Bool[Array, "..."]]:
    """Marks the `count` largest of all scores, by their magnitude; of equal ones those that come first, in row-major
    order.

    Args:
        scores: arrays of one dtype that compete, of either sign, so that nobody has to keep |x| beside x.
        count: how many, at most as many as there are: an int, an array of below 2^32, or limbs.
    """
    width = 8 * scores[0].dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    wanted = count if isinstance(count, Count) else count_of(count)

    def keys(threshold: Array, some: Sequence[Array]) -> tuple[list[Array], Array]:
        """Scores as unsigned numbers; made again for every threshold, or they would be kept beside the scores."""
        here, threshold = jax.lax.optimization_barrier((list(some), threshold))
        return [jax.lax.bitcast_convert_type(jnp.abs(s), unsigned) for s in here], threshold

    def above(threshold: Array) -> list[Array]:
        many, threshold = keys(threshold, scores)
        return [key > threshold for key in many]

    def bit(i: Any, threshold: Array) -> Array:
        raised = threshold | (jnp.ones([], unsigned) << (width - 1 - i).astype(unsigned))
        return jnp.where(at_least(count_marks(above(raised - 1)), wanted), raised, threshold)

    threshold = jax.lax.fori_loop(0, width, bit, jnp.zeros([], unsigned))
    left, marks = minus(wanted, count_marks(above(threshold))), above(threshold)

    def equal(x: Array) -> Array:
        (key,), here = keys(threshold, [x])
        return key == here

    for i, x in enumerate(scores):
        ties = count_marks([equal(x)])
        mine = smaller(left, ties)
        marks[i] |= equal(x) & (at_least(mine, ties) | _first(functools.partial(equal, x), mine, ties, x))
        left = minus(left, mine)
    return marks


def largest_in_runs(scores: Float[Array, "... run n"], count: int) -> Bool[Array, "... run n"]:
    """Marks the `count` largest along the last axis but one; of equal ones those that come first."""
    place = jnp.arange(scores.shape[-2])[:, None]

    def ahead(j: Any, rank: Array) -> Array:
        other = jax.lax.dynamic_slice_in_dim(scores, j, 1, -2)
        return rank + ((other > scores) | ((other == scores) & (j < place)))

    return jax.lax.fori_loop(0, scores.shape[-2], ahead, jnp.zeros_like(scores, jnp.int32)) < count


def shrinkage(
    sizes: Sequence[Float[Array, "..."]], radius: Any, spread: Sequence[Float[Array, "..."]] | None = None
) -> Float[Array, ""]:
    """The tau >= 0 with sum max(u - tau s, 0) = radius over all sizes u >= 0; zero if they sum to less.

    Newton's method on this convex, falling, piecewise linear function of tau: from zero it rises to the root and ends
    there after finitely many passes, without a sort.

    Args:
        sizes: u.
        radius: >= 0.
        spread: s > 0, ones by default.

    Source: Michelot, "A finite algorithm for finding the projection of a point onto the canonical simplex", 1986.
    """
    spread = [jnp.ones_like(u) for u in sizes] if spread is None else spread

    def total(arrays: Sequence[Array]) -> Array:
        return sum((jnp.sum(a) for a in arrays), jnp.zeros([], sizes[0].dtype))

    def newton(tau: Array) -> Array:
        active = [u > tau * s for u, s in zip(sizes, spread, strict=True)]
        over = total([jnp.where(a, u, 0) for a, u in zip(active, sizes, strict=True)]) - radius
        slope = total([jnp.where(a, s, 0) for a, s in zip(active, spread, strict=True)])
        return jnp.where(slope > 0, jnp.maximum(tau, over / jnp.where(slope > 0, slope, 1)), tau)

    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return state[1], newton(state[1])

    start = jnp.zeros([], sizes[0].dtype)
    return jax.lax.while_loop(lambda s: s[0] < s[1], step, (start - 1, newton(start)))[1]


def _first(equal: Callable[[], Array], number: Count, all_of_them: Count, x: Array) -> Bool[Array, "..."]:
    """Marks the places of an array before which so many are equal, if these are not all: those before the place whose
    index is found digit by digit, each from its highest bit down."""
    if x.size == 1:
        return jnp.zeros([], bool)
    if max(x.shape) >= 1 << 32:
        raise ValueError(f"expected axes shorter than 2^32, got {list(x.shape)}; reshape the leaf")
    digits = [(axis, bit) for axis, n in enumerate(x.shape) for bit in reversed(range((n - 1).bit_length()))]
    axes, bits = jnp.asarray(np.array(digits, np.uint32).T)
    lengths, place = jnp.asarray(np.array(x.shape, np.uint32)), jnp.arange(x.ndim, dtype=jnp.uint32)

    def raise_digit(state: tuple[Array, Array]) -> tuple[Array, Array]:
        step, end = state
        more = end + jnp.where(place == axes[step], jnp.uint32(1) << bits[step], jnp.uint32(0))
        fits = jnp.all(more < lengths) & at_least(number, count_marks([equal() & _before(x, more)]))
        return step + 1, jnp.where(fits, more, end)

    start = jnp.where(at_least(number, all_of_them), len(digits), 0)
    _, end = jax.lax.while_loop(lambda s: s[0] < len(digits), raise_digit, (start, jnp.zeros_like(lengths)))
    return _before(x, end)


def _before(x: Array, end: Array) -> Bool[Array, "..."]:
    """Marks what comes before the place with the index `end`, in row-major order; laid out as x is.

    Axis by axis, because the places themselves would be as large as the scores.
    """
    before = jnp.zeros([], bool)
    for axis in reversed(range(x.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=explicit_sharding(x))
        before = (place < end[axis]) | ((place == end[axis]) & before)
    return before
