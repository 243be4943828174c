"""The k largest of many numbers, without a sort: bisection on the bits of the threshold.

Sorting 10^6 numbers takes XLA on a CPU a fifth of a second, and a sort of a sharded array gathers it. Counting those
above a threshold is one pass; floats >= 0 are ordered as their bits are, so as many passes as a float has bits find the
k-th largest number exactly.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcq.forms.blocks import explicit_sharding


def largest(scores: Sequence[Float[Array, "..."]], count: Any) -> list[Bool[Array, "..."]]:
    """Marks the `count` largest of all scores, by their magnitude; of equal ones those that come first, in row-major
    order.

    Args:
        scores: arrays of one dtype that compete, of either sign, so that nobody has to keep |x| beside x.
        count: how many, at most as many as there are.
    """
    width = 8 * scores[0].dtype.itemsize
    unsigned = jnp.dtype(f"uint{width}")
    count = jnp.asarray(count, jnp.uint32)
    starts = list(itertools.accumulate((s.size for s in scores[:-1]), initial=0))

    def keys(threshold: Array) -> tuple[list[Array], Array]:
        """Scores as unsigned numbers; made again for every threshold, or they would be kept beside the scores."""
        here, threshold = jax.lax.optimization_barrier((list(scores), threshold))
        return [jax.lax.bitcast_convert_type(jnp.abs(s), unsigned) for s in here], threshold

    def above(threshold: Array) -> list[Array]:
        many, threshold = keys(threshold)
        return [key > threshold for key in many]

    def equal_before(threshold: Array, end: Array) -> list[Array]:
        """Marks what equals the threshold among the first `end` scores."""
        many, threshold = keys(threshold)
        return [(key == threshold) & _before(key, end, start) for key, start in zip(many, starts, strict=True)]

    def bit(i: Any, threshold: Array) -> Array:
        raised = threshold | (jnp.ones([], unsigned) << (width - 1 - i).astype(unsigned))
        return jnp.where(_number(above(raised - 1)) >= count, raised, threshold)

    threshold = jax.lax.fori_loop(0, width, bit, jnp.zeros([], unsigned))
    whole = jnp.uint32(sum(s.size for s in scores))
    wanted = count - _number(above(threshold))

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = _number(equal_before(threshold, middle)) >= wanted
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    low = jnp.where(_number(equal_before(threshold, whole)) > wanted, jnp.uint32(0), whole)
    _, end = jax.lax.while_loop(lambda bounds: bounds[0] < bounds[1], halve, (low, whole))
    return [a | e for a, e in zip(above(threshold), equal_before(threshold, end), strict=True)]


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


def _number(marks: Sequence[Bool[Array, "..."]]) -> Array:
    """How many marks are set. Along the longest axis that allows it they are counted in 16 bits: counts start as
    numbers of the marks' shape, and of 32 bits those would be as large as the scores."""
    total = jnp.uint32(0)
    for mark in marks:
        short = [axis for axis, length in enumerate(mark.shape) if length < 1 << 16]
        axis = max(short, key=lambda axis: mark.shape[axis], default=None)
        part = mark if axis is None else jnp.sum(mark, axis, dtype=jnp.uint16)
        total += jnp.sum(part, dtype=jnp.uint32)
    return total


def _before(x: Array, end: Array, start: int) -> Bool[Array, "..."]:
    """Marks what comes before the place `end`, in row-major order, x[0] being at `start`; laid out as x is.

    Axis by axis, because the places themselves would be as large as the scores.
    """
    end = jnp.minimum(end - jnp.minimum(end, jnp.uint32(start)), jnp.uint32(x.size))
    before = jnp.zeros([], bool)
    for axis in reversed(range(x.ndim)):
        stride = jnp.uint32(math.prod(x.shape[axis + 1 :]))
        last = end // stride if axis == 0 else end // stride % jnp.uint32(x.shape[axis])
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=explicit_sharding(x))
        before = (place < last) | ((place == last) & before)
    return before if x.ndim else end > 0
