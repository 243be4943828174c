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
from lcq.ptq.gathering import folded
from lcq.ptq.rounding.base import Rounding, correction, solved, sweep
from lcq.ptq.shrinkage import Folds
from lcq.ptq.statistics import Moments, Statistics, finish
from lcq.ptq.two_stream import Use


class Sums(NamedTuple):
    """Statistics of one product.

    Attributes:
        folds: sums over parts of the rows, [G, K, ...]; of the moments counts and means alone once settled.
        centred: whether the mean is taken off.
        statistics: of all rows, shrunk, once settled.
        shares: p and p' of each group, once settled, see `lcq.ptq.shrinkage`.
        careful: whether the correction leaves out what is noise.
    """

    folds: Folds
    centred: bool
    statistics: Any = None
    shares: Any = None
    careful: bool = False

    @classmethod
    def of(cls, uses: Sequence[Use], centred: bool, w: Float[Array, "G N n"]) -> "Sums":
        moments, differences = folded(uses, w)
        return cls(Folds(_aligned(moments), differences), centred)

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

    def held(self, method: Rounding, w: Array, form: Codes, tried: tuple[float, ...], key: Any) -> Any:
        noise = self.noise
        return _held(method, w, self.folds, form, noise, jnp.asarray(tried, noise.dtype), key, self.centred)

    def settled(self, shares: Any, careful: bool) -> "Sums":
        moments = self.folds.moments
        statistics = _shrunk(moments, jnp.asarray(shares, moments.shift.dtype), self.centred)
        means = Folds(moments._replace(gram=None, drift=None), None)
        return Sums(means, self.centred, statistics, np.asarray(shares), careful)

    def losses(self, method: Rounding, w: Array, form: Codes, factors: Array, key: Any) -> Array:
        one = functools.partial(sweep, method)
        return jax.vmap(one, (0, 0, 0, 1, None), 1)(w, self.statistics, form, factors, key)

    def codes(self, method: Rounding, w: Array, form: Codes, key: Any) -> tuple[Codes, float]:
        """Codes, and the damping that they took."""
        one = functools.partial(solved, method)
        form, damping = jax.vmap(one, (0, 0, 0, None))(w, self.statistics, form, key)
        return form, 0.0 if damping is None else float(damping.max())

    def correction(self, w: Array, form: Codes) -> Array:
        if self.careful:
            return jax.vmap(shrinkage.steady)(w, form, self.folds.moments)
        return jax.vmap(correction)(w, self.statistics.mean_x, self.statistics.mean_y, form)


_aligned = jax.jit(jax.vmap(shrinkage.aligned))
_noise = jax.jit(jax.vmap(shrinkage.noise))


@functools.partial(jax.jit, static_argnums=1)
def _finite(moments: Moments, centred: bool) -> Array:
    statistics = jax.vmap(lambda m: finish(shrinkage.together(m), centred))(moments)
    squares = jnp.diagonal(statistics.gram, axis1=1, axis2=2)
    return jnp.isfinite(squares + 0 * statistics.mean_x).all()


@functools.partial(jax.jit, static_argnums=(0, 7))
def _held(
    method: Rounding, w: Array, folds: Folds, form: Codes, noise: Array, c: Array, key: Any, centred: bool
) -> tuple[Array, Array]:
    def one(w: Array, folds: Folds, form: Codes, noise: Array) -> tuple[Array, Array]:
        return shrinkage.held(method, w, folds, form, noise, c, key, centred)

    return jax.vmap(one, out_axes=(1, 0))(w, folds, form, noise)


@functools.partial(jax.jit, static_argnums=2)
def _shrunk(moments: Moments, shares: Array, centred: bool) -> Statistics:
    return jax.vmap(lambda m, s: shrinkage.shrunk(shrinkage.together(m), s, centred))(moments, shares)
