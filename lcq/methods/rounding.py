"""GPFQ and its family on statistics: which level each weight gets, so that the product changes least.

Neurons are the columns of w [N, n]; inputs t = 1..N are rounded one after another, each with regard to the errors
e = w - q before it. All methods are one recursion,

    z_t = b_t + (1/F_tt) sum_{s<t} F_ts (v_s - q_s),    q_t = Q(z_t),

    GPFQ      F = H                            v = w                                      b = w + tril(D) w / diag(H)
    GPTQ      F = R', R R' = H + damp I        v = w                                      b = v
    Qronos    F = R' of H without input 1,     v = w + (H_22 + damp I)^{-1} (D w)_2       b = v,
              F_21 = R^{-1} H_21               v_1 = w_1                                  b_1 = w_1 + (D w)_1 / H_11

with R upper triangular and H, D of `lcq.methods.moments`. GPFQ's minimises ||X w_{<=t} - Y q_{<=t}|| over q_t. That of
GPTQ is commonly written as w_{>t} -= (z_t - q_t) L_{>t,t} / L_tt with L = R^{-T}: then L diag(L)^{-1} (z - q) = w - q,
so no inverse is needed. Qronos rounds input 1, re-solves the rest by least squares, and goes on as GPTQ.

A column of H with H_tt <= 1e-10 max H_ss is dead: its weights go to the nearest level.

Source: Lybrand & Saab, arXiv 2010.15979; Zhang, Zhou & Saab, arXiv 2201.11113; SPFQ: arXiv 2309.10975; GPTQ: arXiv
2210.17323; Qronos: arXiv 2505.11695. The recursions on H and D are lcq's.
"""

import abc
import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.blocks import compute_dtype
from lcq.dtypes import wider
from lcq.forms import Codes
from lcq.methods.alphabet import choose, choose_all, draw, scaled, spaced
from lcq.methods.following import Order, Recursion, alive, dot, falling, recurse
from lcq.methods.moments import Statistics

_PANELS = 8


@dataclasses.dataclass(frozen=True)
class Rounding(abc.ABC):
    """A way to choose the codes of weights w [N, n]; final subclasses have hashable settings, static under jit."""

    def codes(self, w: Float[Array, "N n"], statistics: Statistics, form: Codes, key: Any = None) -> Codes:
        """Chooses codes for the alphabet of a form.

        Args:
            w: weights, a column for each neuron.
            statistics: of the product's N inputs.
            form: of w, in the working layout: its levels and scales are the alphabet, its codes do not count.
            key: a random key, for methods that draw.

        Returns:
            The form with new codes, and with a new table if the method has its own.

        Raises:
            ValueError: no key where one is needed, an alphabet that the method cannot use, or statistics that it cannot
                factorise; inside a transformation, where nothing can be looked at, these give the nearest levels.

        Example:
            >>> from lcq.methods.moments import gather, finish
            >>> from lcq.methods.rounding import GPFQ
            >>> from lcq.schemes.levels import Levels
            >>> w, y = jnp.array([[0.4], [0.4]]), jnp.array([[1.0, 1.0], [2.0, 2.0]])
            >>> form = Levels((0, 1)).project(w)
            >>> GPFQ().codes(w, finish(gather(y)), form).dense()
            Array([[0.],
                   [1.]], dtype=float32)
        """
        chosen, damp = solved(self, w, statistics, form, key)
        if damp is not None and not isinstance(damp, jax.core.Tracer) and not jnp.isfinite(damp):
            raise ValueError(
                f"wanted H + damp I with a root; got none with {self}: "
                "raise damp=, or most= up to which it may grow by itself"
            )
        return chosen

    @abc.abstractmethod
    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        """What does not depend on the alphabet, computed once for many."""

    @abc.abstractmethod
    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        """`codes`, from what `prepare` gave."""

    def damped(self, prepared: Any) -> Array | None:
        """What H was damped by, in units of the mean of its diagonal, infinite if that failed; None without damping."""
        del prepared
        return None


@functools.partial(jax.jit, static_argnums=0)
def solved(method: Rounding, w: Array, statistics: Statistics, form: Codes, key: Any) -> tuple[Codes, Array | None]:
    """Codes, and the damping that they took."""
    prepared = method.prepare(w, statistics)
    return method.solve(prepared, form, key), method.damped(prepared)


@dataclasses.dataclass(frozen=True)
class Nearest(Rounding):
    """Every weight to its nearest level, q_t = Q(w_t)."""

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        del statistics
        return w.astype(compute_dtype(w.dtype))

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        del key
        return dataclasses.replace(form, codes=choose_all(prepared, form))


@dataclasses.dataclass(frozen=True)
class GPFQ(Rounding):
    """Greedy path following: q_t = Q of what makes ||X w_{<=t} - Y q_{<=t}|| least, w as it was.

    Attributes:
        order: of the inputs: as they are, or by falling H_tt.

    Source: Lybrand & Saab, arXiv 2010.15979, equation 6; here in terms of H and D.
    """

    order: Order = "natural"

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        return _follow_path(w, statistics, self.order)

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        del key
        return recurse(prepared, form, lambda z, row, _: choose(z, row))


@dataclasses.dataclass(frozen=True)
class SparseGPFQ(Rounding):
    """GPFQ with more zeros: z is thresholded before it is rounded, lambda = threshold times the form's scale's size.

        soft    Q(sign(z) max(|z| - lambda, 0))
        hard    0 if |z| <= lambda, else sign(z) (lambda + scale * round((|z| - lambda) / scale))

    Attributes:
        threshold: in units of the form's scale, of 1 where it has none.
        kind: hard needs an integer grid around 0; its table becomes 0, +-(threshold + k), of the same length.
        order: of the inputs.

    Raises:
        ValueError: a threshold below 0, or of 0 and hard.

    Source: Zhang, Zhou & Saab, arXiv 2201.11113, section 5.
    """

    threshold: float
    kind: Literal["soft", "hard"] = "soft"
    order: Order = "natural"

    def __post_init__(self) -> None:
        if self.threshold < 0 or (self.kind == "hard" and not self.threshold > 0):
            raise ValueError(f"wanted a threshold above 0; got {self.threshold}")

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        return _follow_path(w, statistics, self.order)

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        del key
        if self.kind == "soft":
            return recurse(prepared, form, lambda z, row, _: choose(_shrink(z, self._limit(row)), row))
        form = spaced(form, self.threshold)
        assert form.values is not None
        zero = form.values.index(0.0)

        def far(z: Array, row: Codes, _: Any) -> Array:
            codes = choose(z, row)
            return jnp.where(jnp.abs(z) <= self._limit(row), jnp.asarray(zero, codes.dtype), codes)

        return recurse(prepared, form, far)

    def _limit(self, row: Codes) -> Any:
        if row.scale is None:
            return self.threshold
        return self.threshold * jnp.abs(row.scale.astype(compute_dtype(row.scale.dtype)))


@dataclasses.dataclass(frozen=True)
class SPFQ(Rounding):
    """GPFQ with stochastic rounding: q_t one of the two levels around z_t, with mean z_t inside the alphabet.

    Attributes:
        order: of the inputs.

    Source: Zhang & Saab, arXiv 2309.10975.
    """

    order: Order = "natural"

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        return _follow_path(w, statistics, self.order)

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        if key is None:
            raise ValueError("SPFQ draws at random: pass key=jax.random.key(...)")
        noise = jax.random.uniform(key, prepared.target.shape, prepared.target.dtype)
        return recurse(prepared, form, draw, noise)


def residual(w: Float[Array, "N n"], statistics: Statistics, form: Codes) -> Float[Array, "n"]:
    """||X w - Y q||^2 = w'Kw + 2 e'Dw + e'He per neuron, e = w - q, without X and Y.

    Where K is None its term is left out: it is 0 if X is Y, and else the same for every q, so that differences between
    alphabets are right, and a value may be negative.
    """
    return _measure(w, statistics)(form)


def correction(
    w: Float[Array, "N n"], mean_x: Float[Array, "N"], mean_y: Float[Array, "N"], form: Codes
) -> Float[Array, "n"]:
    """What to add to the bias when statistics are centred: mean(X) w - mean(Y) q per neuron."""
    w = w.astype(mean_y.dtype)
    return dot(mean_x - mean_y, w) + dot(mean_y, w - form.dense().astype(w.dtype))


@functools.partial(jax.jit, static_argnums=0)
def sweep(
    method: Rounding,
    w: Float[Array, "N n"],
    statistics: Statistics,
    form: Codes,
    factors: Float[Array, "F"] | Float[Array, "F n"],
    key: Any = None,
) -> Float[Array, "F n"]:
    """Residuals after rounding with the form's scale times each factor, one after another, compiled once.

    Args:
        method: how to round.
        w: weights, a column for each neuron.
        statistics: of the inputs.
        form: the alphabet before it is scaled.
        factors: of the scale, F of them, for all neurons or for each.
        key: for methods that draw, the same for every factor.

    Returns:
        For each factor and neuron `residual`; the least is that of `method.codes` with `scaled(form, factor)`.
    """
    prepared, measure = method.prepare(w, statistics), _measure(w, statistics)
    return jax.lax.map(lambda factor: measure(method.solve(prepared, scaled(form, factor), key)), factors)


def wide(w: Array, statistics: Statistics) -> Array:
    return w.astype(wider(compute_dtype(w.dtype), statistics.gram.dtype))


def _measure(w: Array, statistics: Statistics) -> Callable[[Codes], Array]:
    """`residual` as a function of the form, the products with w made once."""
    w, drift, gap = wide(w, statistics), statistics.drift, statistics.gap
    fixed = 0 if gap is None else (w * dot(gap, w)).sum(0)
    slope = None if drift is None else 2 * dot(drift, w)

    def measure(form: Codes) -> Array:
        errors = w - form.dense().astype(w.dtype)
        moved = dot(statistics.gram, errors)
        return fixed + (errors * (moved if slope is None else moved + slope)).sum(0)

    return measure


def ordered(w: Array, statistics: Statistics, order: Order) -> tuple[Array, Array, Array | None, Array | None, Array]:
    """(w, H, D, order, which columns are not dead), in the order of rounding."""
    w, gram, drift = wide(w, statistics), statistics.gram, statistics.drift
    if order == "natural":
        return w, gram, drift, None, alive(jnp.diagonal(gram))
    by_size = falling(jnp.diagonal(gram))
    gram = gram[by_size][:, by_size]
    drift = None if drift is None else drift[by_size][:, by_size]
    return w[by_size], gram, drift, by_size, alive(jnp.diagonal(gram))


def _follow_path(w: Array, statistics: Statistics, order: Order) -> Recursion:
    """GPFQ."""
    w, gram, drift, by_size, lives = ordered(w, statistics, order)
    inverse = jnp.where(lives, 1 / jnp.where(lives, jnp.diagonal(gram), 1), 0)
    start = w if drift is None else w + inverse[:, None] * _lower_product(drift, w)
    return Recursion(by_size, start, w, gram, inverse)


def _lower_product(a: Array, w: Array) -> Array:
    """tril(a) w, leaving out most of the upper triangle."""
    size = len(a)
    edges = [size * i // _PANELS for i in range(_PANELS + 1)] if size >= 64 * _PANELS else [0, size]
    panels = [jnp.tril(a[low:high, :high], low) for low, high in itertools.pairwise(edges)]
    return jnp.concatenate([dot(panel, w[: panel.shape[1]]) for panel in panels])


def _shrink(z: Array, limit: Any) -> Array:
    return jnp.sign(z) * jnp.maximum(jnp.abs(z) - limit, 0)
