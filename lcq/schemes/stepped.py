"""Shifted grids in groups whose scales and least values are themselves quantized.

    E(q, a, m) = sum_i h_i (x_i - (a q_i - m))^2,    a = A s,  m = M u,  s and u whole numbers of few bits

q runs from 0 to 2^b - 1; A and M are shared by the groups of a neuron, see `lcq.forms.steps`. First each group for
itself: of shrunk and shifted ranges the codes are fitted by least squares,

    a = cov(x, q) / var(q),    m = a mean(q) - mean(x), at least 0,

means weighted by h, and the best is polished. Then scales are rounded to their steps, m is fitted to what became of
them and rounded too, and the codes are those nearest to what is stored.

Source: scales of scales as in the K-quants of llama.cpp, and Dettmers et al., arXiv 2305.14314, section 3; the search:
lcq's.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcq.forms import Codes
from lcq.forms.steps import in_steps
from lcq.schemes.grouped import Cut
from lcq.schemes.nearest import code_dtype
from lcq.schemes.scales import power_of_two

_SHRINKS = 16
_LEAST = 0.4
"""The shortest range that is tried, over that of the weights."""

_SHIFTS = 3
"""Least values that are tried for each, a third of a step apart."""

_POLISH = 8


def solve(whole: Cut, xs: tuple[Array, ...], last: int, bits: int, previous: Any) -> tuple[Codes, ...]:
    """The form of one leaf, in groups; at least as good as `previous`, neuron by neuron.

    Args:
        whole: the leaf cut into its groups.
        xs: the leaf.
        last: the largest code.
        bits: of scales and of least values.
        previous: an earlier form.
    """
    (x,), (blocks,) = xs, whole.counts
    along = tuple(i - x.ndim for i, (count, length) in enumerate(zip(blocks, x.shape, strict=True)) if count < length)
    size = whole.max([jnp.abs(w) for w in whole.leaves]).reshape(blocks).max(along, keepdims=True)
    unit = jnp.broadcast_to(power_of_two(size), blocks)  # squares neither overflow nor vanish
    (scaled,) = (w / one for w, one in zip(whole.leaves, whole.spread(unit), strict=True))
    grid = _Grid(whole._replace(leaves=(scaled,)), last)
    scale, zero = _stored(*grid.searched(), blocks, bits, along)
    scale, zero = _stored(scale, grid.least(scale, grid.codes(scale, scale * zero)), blocks, bits, along)
    if previous is not None:
        warm = previous.scale.astype(scale.dtype) / unit, previous.zero.astype(scale.dtype)
        errors = [grid.error(*number).reshape(blocks).sum(along, keepdims=True) for number in ((scale, zero), warm)]
        scale, zero = (jnp.where(errors[0] < errors[1], n, w) for n, w in zip((scale, zero), warm, strict=True))
    codes, scale = grid.codes(scale, scale * zero).reshape(x.shape), scale * unit.astype(scale.dtype)
    values = tuple(map(float, range(last + 1)))
    how: dict[str, Any] = {"scale_bits": bits, "along": along, "dtype": str(x.dtype)}
    return (Codes(codes, None, scale, zero, values=values, **how),)


def _stored(a: Array, m: Array, blocks: tuple[int, ...], bits: int, along: tuple[int, ...]) -> tuple[Array, Array]:
    """Scales and zeros in steps, of the shape of the form."""
    a, m = a.reshape(blocks), m.reshape(blocks)
    return in_steps(a, jnp.where(a > 0, m / jnp.where(a > 0, a, 1), 0), bits, along)


class _Grid:
    """The sums over groups, one number each."""

    def __init__(self, whole: Cut, last: int) -> None:
        self.whole, self.last, (self.x,) = whole, last, whole.leaves
        self.stat = whole.blocks[0].stat

    def codes(self, a: Array, m: Array) -> Array:
        """The nearest q to (x + m) / a."""
        a, m = (number.reshape(self.stat).astype(self.x.dtype) for number in (a, m))
        q = jnp.round((self.x + m) / jnp.where(a > 0, a, 1))
        return jnp.clip(jnp.where(a > 0, q, 0), 0, self.last).astype(code_dtype(self.last + 1))

    def mean(self, x: Array) -> Array:
        one = self.whole.sum([jnp.ones_like(self.x)])
        return self.whole.sum([x]) / one

    def least(self, a: Array, q: Array) -> Array:
        """The best m for scales and codes."""
        return jnp.maximum(self.mean(a.reshape(self.stat) * q.astype(self.x.dtype) - self.x), 0)

    def error(self, scale: Array, zero: Array) -> Array:
        """E of each group, with the nearest codes."""
        a, m = scale.reshape(self.stat), (scale * zero).reshape(self.stat)
        return self.whole.sum([(self.x - (a * self.codes(a, m) - m)) ** 2])

    def fit(self, q: Array, given: Array) -> tuple[Array, Array]:
        """The best scales and least values for codes; `given` scales where all codes of a group are one."""
        q = q.astype(self.x.dtype)
        level, centre = self.mean(q), self.mean(self.x)
        square, product = self.mean(q * q), self.mean(q * self.x)
        var = square - level**2
        a = jnp.where(var > 0, (product - level * centre) / jnp.where(var > 0, var, 1), given)
        m = a * level - centre
        through = product / jnp.where(square > 0, square, 1)
        return jnp.where(m >= 0, a, through), jnp.maximum(m, 0)

    def searched(self) -> tuple[Array, Array]:
        """The best of each group."""
        low, high = (jnp.maximum(self.whole.max([sign * self.x]), 0) for sign in (-1, 1))

        def better(a: Array, m: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
            """The best numbers for the codes at (a, m), kept if their error is the least so far."""
            q = self.codes(a, m)
            a, m = self.fit(q, a)
            rest = self.whole.sum([(self.x - (a * q.astype(self.x.dtype) - m)) ** 2])
            return tuple(jnp.where(rest < best[-1], n, b) for n, b in zip((a, m, rest), best, strict=True))

        def shrunk(i: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
            part = _LEAST + (1 - _LEAST) * (i // _SHIFTS) / (_SHRINKS - 1)
            a = (high + low) * part / self.last
            return better(a, jnp.maximum(low * part + (i % _SHIFTS - _SHIFTS // 2) / _SHIFTS * a, 0), best)

        start = (jnp.zeros_like(low), jnp.zeros_like(low), jnp.full_like(low, jnp.inf))
        best = jax.lax.fori_loop(0, _SHRINKS * _SHIFTS, shrunk, start)
        return jax.lax.fori_loop(0, _POLISH, lambda _, best: better(best[0], best[1], best), best)[:2]
