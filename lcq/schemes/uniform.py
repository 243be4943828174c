"""Uniform grids of b bits, with the scale that minimises the squared error."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcq.forms import Codes
from lcq.forms.base import Form
from lcq.forms.blocks import Per
from lcq.schemes import stepped
from lcq.schemes.base import SCHEMES, Quantizer
from lcq.schemes.grid_search import SHORTEST
from lcq.schemes.grouped import Cut, cut
from lcq.schemes.levels import Levels
from lcq.schemes.nearest import code_dtype
from lcq.schemes.scale_search import keep_better, of_size_one
from lcq.schemes.scales import as_scale, check_float16, check_scale_dtype, scale_format
from lcq.schemes.shifted_search import search_shifted

_FINE = 256
"""Values of a grid from which few candidates are too far apart."""

_SHRINKS = 64
_POLISH = 8


@SCHEMES.register("Uniform")
@dataclasses.dataclass(frozen=True)
class Uniform(Quantizer):
    """Pi(x) = argmin_{q, a, z} sum_i h_i (x_i - a (q_i - z))^2 over integers q of b bits: Delta = a (q - z).

    Without a zero point z = 0 and q runs from -2^(b-1) to 2^(b-1) - 1; the scale is that of `Levels`, negative where
    the mirrored grid is better: in groups of 32 that saves 11 to 13 % of the squared error at 4 bits, 18 to 21 % at 3
    and 20 to 27 % at 2. With one, q and z run from 0 to 2^b - 1, z is an integer, so that 0 is represented exactly, and
    (a, z) is found by shrinking the range [min x, max x] of what has a weight, of up to 8 bits with the zeros beside
    the nearest too; then a = <x, q - z>/<q - z, q - z>, products weighted by h, alternates with the codes.

    With `scale_bits` the scales of groups are whole multiples of a unit that a neuron's groups share, and so is what
    the grid is shifted by, a z, which then need not be a multiple of a: 4 bits in groups of 32 with 6 bits for each are
    about 4.4 bits a weight, see `lcq.schemes.stepped`. Where a neuron has few weights, units cost most of it.

    Attributes:
        bits: Bits of a code, 2 to 16; with a zero point 1 to 16.
        per: What shares one scale, see `lcq.forms.blocks.block_counts`.
        zero_point: Whether the grid may be shifted.
        symmetric: Whether the grid is without -2^(b-1), so that the scale is positive; for runtimes that want it.
        scale_dtype: Format of scales, see `Levels`: None for bfloat16 in groups and float32 elsewhere. Zeros take b
            bits each: 4 bits in groups of 32 are 4.5 bits a weight, and 4.63 with zero points.
        scale_bits: 2 to 8, for grids in groups that may be shifted; None for scales of their own.

    Raises:
        ValueError: bits out of range, a symmetric grid that may be shifted, scales of few bits for others than groups
            with zero_point=True, or another format.

    Example:
        >>> Uniform(2).project(jnp.array([-2.0, 1.0, 0.1, -1.0])).dense()
        Array([-2.,  1.,  0., -1.], dtype=float32)

    Source: grids by least squares instead of by the largest weight, e.g. Choukroun et al., arXiv 1902.06822; scales in
    steps: the K-quants of llama.cpp, and double quantization, Dettmers et al., arXiv 2305.14314.
    """

    bits: int
    per: Per = None
    zero_point: bool = False
    symmetric: bool = False
    scale_dtype: str | None = None
    scale_bits: int | None = None

    def __post_init__(self) -> None:
        least = 1 if self.zero_point else 2
        if not isinstance(self.bits, int) or not least <= self.bits <= 16:
            raise ValueError(
                f"expected {least} to 16 bits, got {self.bits!r}; for 1 bit take lcq.Binary() or zero_point=True"
            )
        if self.symmetric and self.zero_point:
            raise ValueError("expected zero_point=True or symmetric=True, got both; a symmetric grid has no zero point")
        check_scale_dtype(self.scale_dtype)
        if self.scale_bits is None:
            return
        if not isinstance(self.scale_bits, int) or not 2 <= self.scale_bits <= 8:
            raise ValueError(f"scale_bits: expected 2 to 8, got {self.scale_bits!r}")
        if not self.zero_point or self.scale_dtype not in (None, "float32") or not isinstance(self.per, int | tuple):
            raise ValueError(
                f"scale_bits: expected groups that may be shifted, with units in float32, such as Uniform(4, per=32, "
                f"zero_point=True, scale_bits=6), got {self!r}"
            )

    def check_numbers(self, x: Array) -> None:
        if self.scale_dtype == "float16":
            check_float16(x, (1 << self.bits) - 1 if self.zero_point else 1 << (self.bits - 1))

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any, importance: Any = None) -> tuple[Form, ...]:
        if not self.zero_point:
            half = 1 << (self.bits - 1)
            values = tuple(map(float, range(self.symmetric - half, half)))
            grid = Levels(values, scale=True, per=self.per, scale_dtype=self.scale_dtype)
            return grid.solve(xs, previous, mu, importance)
        last = (1 << self.bits) - 1
        whole = cut(xs, self.per, importance)
        if self.scale_bits is not None:
            return stepped.solve(whole, xs, last, self.scale_bits, None if previous is None else previous[0])
        dtype = scale_format(self.per, self.scale_dtype)
        a, z = _search_grid(whole, last, None if previous is None else (previous[0].scale, previous[0].zero), dtype)
        values = tuple(map(float, range(last + 1)))
        places = zip(whole.spread(a), whole.spread(z), strict=True)
        numbers = zip(whole.numbers(as_scale(a, dtype)), whole.numbers(z.astype(code_dtype(last + 1))), strict=True)
        return tuple(
            Codes(_codes(w, *place, last).reshape(x.shape), None, *number, values, dtype=str(x.dtype))
            for x, w, place, number in zip(xs, whole.leaves, places, numbers, strict=True)
        )


def _codes(x: Array, a: Array, z: Array, last: int) -> Array:
    """Nearest q in 0..last to x/a + z."""
    safe = jnp.where(a > 0, a, 1)
    return jnp.clip(jnp.round(x / safe) + z, 0, last).astype(code_dtype(last + 1))


def _search_grid(whole: Cut, last: int, warm: tuple[Array, Array] | None, dtype: str | None) -> tuple[Array, Array]:
    """The best scale a and zero z per block among shrunk ranges, polished; at least as good as `warm`."""
    if last < _FINE and whole.importance is None and sum(block.size for block in whole.blocks) >= SHORTEST:
        stat, kind = whole.blocks[0].stat, whole.leaves[0].dtype
        start = None if warm is None else (warm[0].reshape(stat).astype(kind), warm[1].reshape(stat).astype(kind))
        return search_shifted(whole, last, start, dtype)
    whole, unit = of_size_one(whole)
    low = -jnp.maximum(whole.max([-x for x in whole.leaves]), 0)
    high = jnp.maximum(whole.max(whole.leaves), 0)

    def better(a: Array, z: Array, best: Any) -> Any:
        """The best scale for the codes at (a, z), kept if its error is the least so far."""
        here = zip(whole.leaves, whole.spread(a), whole.spread(z), strict=True)
        steps = [_codes(x, b, y, last).astype(x.dtype) - y for x, b, y in here]
        return keep_better(whole, whole.leaves, steps, (z,), best, dtype)

    def shrunk(i: Any, best: Any) -> Any:
        a = (high - low) * ((i + 1) / _SHRINKS) / last
        z = jnp.clip(jnp.round(-low * ((i + 1) / _SHRINKS) / jnp.where(a > 0, a, 1)), 0, last)
        return better(a, z, best)

    best = (jnp.zeros_like(low), jnp.zeros_like(low), whole.sum([x * x for x in whole.leaves]))
    if warm is not None:
        a, z = (number.reshape(low.shape).astype(low.dtype) for number in warm)
        best = better(a / unit, z, best)
    best = jax.lax.fori_loop(0, _SHRINKS, shrunk, best)
    a, z, _ = jax.lax.fori_loop(0, _POLISH, lambda _, best: better(best[0], best[1], best), best)
    return a * unit, z
