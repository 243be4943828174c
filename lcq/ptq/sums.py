"""A product's rounding on statistics: sums over folds of the rows, then what is made of them, vmapped over groups."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.ptq import shrinkage
from lcq.ptq.gathering import LastMoments, differences
from lcq.ptq.rounding.base import Rounding, correction, residual
from lcq.ptq.rounding.codebook import every_scaled
from lcq.ptq.shrinkage import Folds
from lcq.ptq.statistics import Moments, Statistics, finish
from lcq.ptq.two_stream import Use


class Sums(NamedTuple):
    """Statistics of one product.

    Attributes:
        method: How to round.
        w: The weights [G, N, n].
        folds: Sums over parts of the rows, [G, K, ...]; of the moments counts and means alone once settled.
        centred: Whether the mean is taken off.
        statistics: Those of all rows, shrunk, once settled.
        prepared: What the method makes of them.
        shares: The shares p and p' of each group, once settled, see `lcq.ptq.shrinkage`.
        careful: Whether the correction leaves out what is noise.
    """

    method: Rounding
    w: Array
    folds: Folds
    centred: bool
    statistics: Any = None
    prepared: Any = None
    shares: Any = None
    careful: bool = False

    @classmethod
    def of(
        cls,
        uses: Sequence[Use],
        method: Rounding,
        w: Float[Array, "G N n"],
        centred: bool,
        *,
        last: LastMoments | None = None,
        judged: bool = True,
    ) -> "Sums":
        """The sums of a product; `last` may have the moments already, and `judged` is whether errors are asked for."""
        moments = (last or LastMoments()).of(uses)
        return cls(method, w, Folds(moments, differences(uses, w) if judged else None), centred)

    @property
    def finite(self) -> bool:
        return bool(_finite(self.folds.moments, self.centred))

    @property
    def counts(self) -> Array:
        """Rows that count, of every group."""
        return self.folds.moments.count.sum(1)

    @property
    def noise(self) -> Array:
        return _noise(self.folds.moments)

    @property
    def squares(self) -> Array:
        """Diagonal of H [G, N], once settled."""
        return jnp.diagonal(self.statistics.gram, axis1=1, axis2=2)

    def held(self, form: Codes, tried: tuple[float, ...], key: Array | None) -> tuple[Array, Array]:
        """`lcq.ptq.shrinkage.held` of every group: errors [S, G] for each c, and sizes [G]."""
        noise, folds = self.noise, self.folds.moments.count.shape[1]

        def one(c: float, fold: int) -> Array:
            rest = _prepared(
                self.method, self.w, _without(self.folds.moments, noise, np.float32(c), fold, self.centred)
            )
            chosen = _solved(self.method, rest, form, key)
            return _judged(self.w, self.folds, chosen, fold, self.centred)

        errors = [functools.reduce(jnp.add, [one(c, fold) for fold in range(folds)]) for c in tried]
        return jnp.stack(errors), _sizes(self.w, self.folds)

    def settled(self, shares: Any, careful: bool) -> "Sums":
        """With these shares, ready for its method."""
        return self.shrunk(shares, careful).ready()

    def shrunk(self, shares: Any, careful: bool) -> "Sums":
        """With these shares; the sums of folds are no longer held."""
        moments = self.folds.moments
        statistics = _shrunk(moments, jnp.asarray(shares, moments.shift.dtype), self.centred)
        means = Folds(moments._replace(gram=None, drift=None), None)
        return self._replace(folds=means, statistics=statistics, shares=np.asarray(shares), careful=careful)

    def ready(self) -> "Sums":
        """With what the method makes of the statistics."""
        return self._replace(prepared=_prepared(self.method, self.w, self.statistics))

    def losses(self, form: Codes, factors: Float[Array, "F G n"], key: Array | None) -> Array:
        """||X w - Y q||^2 [F, G, n] of codes with the form's scale times each factor, one after another."""

        def one(factor: Array) -> Array:
            chosen = _solved(self.method, self.prepared, every_scaled(form, factor), key)
            return _residuals(self.w, self.statistics, chosen)

        return jnp.stack([one(factor) for factor in factors])

    def codes(self, form: Codes, key: Array | None) -> tuple[Codes, float]:
        """Codes, and the damping that they took."""
        damping = self.method.damped(self.prepared)
        form = _solved(self.method, self.prepared, form, key)
        return form, 0.0 if damping is None else float(damping.max())

    def correction(self, form: Codes) -> Array:
        if self.careful:
            return _steady(self.w, form, self.folds.moments, self.squares)
        return _correction(self.w, self.statistics.mean_x, self.statistics.mean_y, form)


_noise = jax.jit(jax.vmap(shrinkage.noise))
_residuals = jax.jit(jax.vmap(residual))
_sizes = jax.jit(jax.vmap(shrinkage.size))
_steady = jax.jit(jax.vmap(shrinkage.steady))
_correction = jax.jit(jax.vmap(correction))


@functools.partial(jax.jit, static_argnums=0)
def _prepared(method: Rounding, w: Array, statistics: Statistics) -> Any:
    return jax.vmap(method.prepare)(w, statistics)


@functools.partial(jax.jit, static_argnums=0)
def _solved(method: Rounding, prepared: Any, form: Codes, key: Array | None) -> Codes:
    return jax.vmap(method.solve, (0, 0, None))(prepared, form, key)


@functools.partial(jax.jit, static_argnums=4)
def _without(moments: Moments, noise: Array, c: Array, fold: Array, centred: bool) -> Statistics:
    one = functools.partial(shrinkage.without, c=c, fold=fold, centred=centred)
    return jax.vmap(one)(moments, noise)


@functools.partial(jax.jit, static_argnums=4)
def _judged(w: Array, folds: Folds, form: Codes, fold: Array, centred: bool) -> Array:
    one = functools.partial(shrinkage.judged, fold=fold, centred=centred)
    return jax.vmap(one)(w, folds, form)


@functools.partial(jax.jit, static_argnums=1)
def _finite(moments: Moments, centred: bool) -> Array:
    statistics = jax.vmap(lambda m: finish(shrinkage.together(m), centred))(moments)
    squares = jnp.diagonal(statistics.gram, axis1=1, axis2=2)
    return jnp.isfinite(squares + 0 * statistics.mean_x).all()


@functools.partial(jax.jit, static_argnums=2)
def _shrunk(moments: Moments, shares: Array, centred: bool) -> Statistics:
    return jax.vmap(lambda m, s: shrinkage.shrunk(shrinkage.together(m), s, centred))(moments, shares)
