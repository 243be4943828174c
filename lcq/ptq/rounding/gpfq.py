"""GPFQ: greedy path following, plain and with more zeros."""

import dataclasses
import itertools
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.blocks import compute_dtype
from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding, ordered
from lcq.ptq.rounding.codebook import choose, spaced
from lcq.ptq.rounding.sequential import Recursion, dot, recurse
from lcq.ptq.statistics import Statistics

_PANELS = 8


@ROUNDING_METHODS.register("gpfq")
@dataclasses.dataclass(frozen=True)
class GPFQ(Rounding):
    """Greedy path following: q_t = Q of what makes ||X w_{<=t} - Y q_{<=t}|| least, w as it was.

    Attributes:
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first, instead of as they come.
        recursion: "blocked" on H and D, or "follow" the inputs themselves, which `lcq.quantize` can; "auto" takes what
            costs less, by operations and bytes.

    Raises:
        ValueError: another recursion.

    Source: Lybrand & Saab, arXiv 2010.15979, equation 6; here in terms of H and D.
    """

    act_order: bool = False
    recursion: Literal["auto", "blocked", "follow"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recursion not in ("auto", "blocked", "follow"):
            raise ValueError(f"expected recursion='auto', 'blocked' or 'follow', got {self.recursion!r}")

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Recursion:
        return follow_path(w, statistics, self.act_order)

    def solve(self, prepared: Recursion, form: Codes, key: Array | None = None) -> Codes:
        del key
        return recurse(prepared, form, lambda z, row, _: choose(z, row))


@dataclasses.dataclass(frozen=True)
class SparseGPFQ(Rounding):
    """GPFQ with more zeros: z is thresholded before it is rounded, lambda = threshold times the form's scale's size.

        soft    Q(sign(z) max(|z| - lambda, 0))
        hard    0 if |z| <= lambda, else sign(z) (lambda + scale * round((|z| - lambda) / scale))

    Attributes:
        threshold: Threshold lambda in units of the form's scale, of 1 where it has none.
        kind: "soft" or "hard"; hard needs an integer grid around 0, and its codebook becomes 0, +-(threshold + k), of
            the same length.
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first, instead of as they come.

    Raises:
        ValueError: a threshold below 0, or of 0 and hard.

    Source: Zhang, Zhou & Saab, arXiv 2201.11113, section 5.
    """

    threshold: float
    kind: Literal["soft", "hard"] = "soft"
    act_order: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threshold < 0 or (self.kind == "hard" and not self.threshold > 0):
            raise ValueError(f"expected a threshold above 0, got {self.threshold}")

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Recursion:
        return follow_path(w, statistics, self.act_order)

    def solve(self, prepared: Recursion, form: Codes, key: Array | None = None) -> Codes:
        del key
        if self.kind == "soft":
            return recurse(prepared, form, lambda z, row, _: choose(_shrink(z, self._limit(row)), row))
        form = spaced(form, self.threshold)
        assert form.values is not None
        zero = form.values.index(0.0)

        def far(z: Array, row: Codes, _: Array | None) -> Array:
            codes = choose(z, row)
            return jnp.where(jnp.abs(z) <= self._limit(row), jnp.asarray(zero, codes.dtype), codes)

        return recurse(prepared, form, far)

    def _limit(self, row: Codes) -> Array | float:
        if row.scale is None:
            return self.threshold
        return self.threshold * jnp.abs(row.scale.astype(compute_dtype(row.scale.dtype)))


def follow_path(w: Array, statistics: Statistics, act_order: bool) -> Recursion:
    """GPFQ."""
    w, gram, drift, by_size, lives = ordered(w, statistics, act_order)
    inverse = jnp.where(lives, 1 / jnp.where(lives, jnp.diagonal(gram), 1), 0)
    start = w if drift is None else w + inverse[:, None] * _lower_product(drift, w)
    return Recursion(by_size, start, w, gram, inverse)


def _lower_product(a: Array, w: Array) -> Array:
    """tril(a) w, leaving out most of the upper triangle."""
    size = len(a)
    edges = [size * i // _PANELS for i in range(_PANELS + 1)] if size >= 64 * _PANELS else [0, size]
    panels = [jnp.tril(a[low:high, :high], low) for low, high in itertools.pairwise(edges)]
    return jnp.concatenate([dot(panel, w[: panel.shape[1]]) for panel in panels])


def _shrink(z: Array, limit: Array | float) -> Array:
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - limit, 0)
