"""Uniform grids of b bits, with the scale that minimises the squared error."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcq.base import Form, Per, Scheme, block_counts, blocks, compute_dtype
from lcq.forms import Codes
from lcq.schemes.levels import Levels, code_dtype

_SHRINKS = 64
_POLISH = 8


@dataclasses.dataclass(frozen=True)
class Uniform(Scheme):
    """Pi(x) = argmin_{q, a, z} sum_i (x_i - a (q_i - z))^2 over integers q of b bits: Delta = a (q - z).

    Without a zero point z = 0 and q runs from -2^(b-1) to 2^(b-1) - 1; the scale is that of `Levels`. With one, q
    and z run from 0 to 2^b - 1, z is an integer, so that 0 is represented exactly, and (a, z) is found by shrinking the
    range [min x, max x] (64 steps), then a = <x, q - z>/<q - z, q - z> alternates with the codes.

    Attributes:
        bits: 2 to 16; with a zero point 1 to 16.
        per: what shares one scale, see `lcq.base.block_counts`.
        zero_point: whether the grid may be shifted.

    Raises:
        ValueError: bits out of range.

    Example:
        >>> Uniform(2).project(jnp.array([-2.0, 1.0, 0.1, -1.0])).dense()
        Array([-2.,  1.,  0., -1.], dtype=float32)

    Source: grids by least squares instead of by the largest weight, e.g. Choukroun et al., arXiv 1902.06822.
    """

    bits: int
    per: Per = None
    zero_point: bool = False

    def __post_init__(self) -> None:
        least = 1 if self.zero_point else 2
        if not isinstance(self.bits, int) or not least <= self.bits <= 16:
            raise ValueError(
                f"wanted {least} to 16 bits; got {self.bits!r}; for 1 bit take lcq.Binary() or zero_point=True"
            )

    def check(self, shape: tuple[int, ...]) -> None:
        block_counts(self.per, shape)

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any) -> tuple[Form, ...]:
        if not self.zero_point:
            half = 1 << (self.bits - 1)
            grid = Levels(tuple(map(float, range(-half, half))), scale=True, per=self.per)
            return grid.solve(xs, previous, mu)
        if len(xs) > 1 and self.per is not None:
            raise ValueError(f"a joint task has one scale; got per={self.per!r}")
        counts = [block_counts(self.per, x.shape) for x in xs]
        cuts = [blocks(x.shape, n) for x, n in zip(xs, counts, strict=True)]
        cut = [x.astype(compute_dtype(x.dtype)).reshape(c.split) for x, c in zip(xs, cuts, strict=True)]
        warm = None
        if previous is not None:
            warm = (previous[0].scale.reshape(cuts[0].stat), previous[0].zero.reshape(cuts[0].stat))
        a, z = _search_grid(cut, [c.axes for c in cuts], (1 << self.bits) - 1, warm)
        return tuple(
            Codes(
                _codes(w, a.reshape(c.stat), z.reshape(c.stat), (1 << self.bits) - 1).reshape(x.shape),
                scale=a.reshape(n),
                zero=z.reshape(n),
                values=tuple(map(float, range(1 << self.bits))),
                dtype=str(x.dtype),
            )
            for x, w, c, n in zip(xs, cut, cuts, counts, strict=True)
        )


def _codes(x: Array, a: Array, z: Array, last: int) -> Array:
    """Nearest q in 0..last to x/a + z."""
    safe = jnp.where(a > 0, a, 1)
    return jnp.clip(jnp.round(x / safe) + z, 0, last).astype(code_dtype(last + 1))


def _search_grid(xs: Any, axes: Any, last: int, warm: Any) -> tuple[Array, Array]:
    """The best scale a and zero z per block among shrunk ranges, polished; at least as good as `warm`."""

    def over(reduce: Any, combine: Any, arrays: Any) -> Array:
        parts = [reduce(x, axis, keepdims=True) for x, axis in zip(arrays, axes, strict=True)]
        return jax.tree.reduce(combine, [p.reshape(parts[0].shape) for p in parts])

    low = jnp.minimum(over(jnp.min, jnp.minimum, xs), 0)
    high = jnp.maximum(over(jnp.max, jnp.maximum, xs), 0)

    def better(a: Array, z: Array, best: Any) -> Any:
        """Codes at (a, z), the best scale for these codes, kept if its error is the least so far."""
        here = [
            tuple(s.reshape(tuple(1 if i in axis else n for i, n in enumerate(x.shape))) for s in (a, z))
            for x, axis in zip(xs, axes, strict=True)
        ]
        steps = [_codes(x, b, y, last).astype(x.dtype) - y for x, (b, y) in zip(xs, here, strict=True)]
        numerator = over(jnp.sum, jnp.add, [x * q for x, q in zip(xs, steps, strict=True)])
        denominator = over(jnp.sum, jnp.add, [q * q for q in steps])
        fine = (numerator > 0) & (denominator > 0)
        safe = jnp.where(fine, denominator, 1)
        gain = jnp.where(fine, numerator**2 / safe, 0)
        win = gain > best[2]
        new = (numerator / safe, z, gain)
        return tuple(jnp.where(win, n, b) for n, b in zip(new, best, strict=True))

    def shrunk(i: Any, best: Any) -> Any:
        a = (high - low) * ((i + 1) / _SHRINKS) / last
        z = jnp.clip(jnp.round(-low * ((i + 1) / _SHRINKS) / jnp.where(a > 0, a, 1)), 0, last)
        return better(a, z, best)

    best = (jnp.zeros_like(low), jnp.zeros_like(low), jnp.zeros_like(low))
    if warm is not None:
        best = better(warm[0], warm[1], best)
    best = jax.lax.fori_loop(0, _SHRINKS, shrunk, best)
    a, z, _ = jax.lax.fori_loop(0, _POLISH, lambda _, best: better(best[0], best[1], best), best)
    return a, z
