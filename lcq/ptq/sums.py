"""A product's rounding on statistics: sums over folds of the rows, then what is made of them, for each group."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lcq.ptq import shrinkage
from lcq.ptq.gathering import LastMoments
from lcq.ptq.rounding.base import Rounding, correction, residual
from lcq.ptq.rounding.codebook import scaled, with_data
from lcq.ptq.rounding.coded import Coded, codes_of, has_scale, tables
from lcq.ptq.rounding.sequential import alive, dot
from lcq.ptq.shrinkage import Folds
from lcq.ptq.statistics import Moments, Statistics, column_sums, finish
from lcq.ptq.two_stream import Use
from lcq.tree.mapped import mapped


class Sums(NamedTuple):
    """Statistics of one product.

    Attributes:
        method: How to round.
        w: The weights [G, N, n].
        folds: Sums over parts of the rows, [G, K, ...]; of the moments counts and means alone once settled.
        centred: Whether the mean is taken off.
        noise: Which parts of H and of the mean are noise, [G, 2], see `lcq.ptq.shrinkage`.
        finite: Whether all sums are finite.
        statistics: Those of all rows, shrunk, once settled.
        squares: Diagonal of H [G, N], once settled.
        prepared: What the method makes of them.
        shares: The shares p and p' of each group, once settled.
        careful: Whether the correction leaves out what is noise.
    """

    method: Rounding
    w: Array
    folds: Folds
    centred: bool
    noise: Any = None
    finite: bool = True
    statistics: Any = None
    squares: Any = None
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
        judges: Float[np.ndarray, "G N j"] | None = None,
        last: LastMoments | None = None,
    ) -> "Sums":
        """The sums of a product; `last` may have the moments already, and `judges` are the neurons on which errors will
        be asked for."""
        return cls(method, w, (last or LastMoments()).of(uses, judges), centred).looked()

    def looked(self) -> "Sums":
        """With its noise, and whether it is finite."""
        noise, finite = _looked(self.folds.moments, self.centred)
        return self._replace(noise=np.asarray(noise), finite=bool(finite))

    @property
    def counts(self) -> np.ndarray:
        """Rows that count, of every group."""
        return np.asarray(self.folds.moments.count).sum(1)

    def of_neurons(self, w: Float[np.ndarray, "G N j"]) -> "Sums":
        """The same rows for other neurons."""
        return self._replace(w=jax.device_put(w), prepared=None)

    def held(
        self, form: Coded, c: Float[np.ndarray, "G"], key: Array | None
    ) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
        """Of codes from all folds but one, with c for each group, the errors on that one, and ||X w||^2 there; both
        summed over the folds that judge."""
        counts = np.asarray(self.folds.moments.count)
        many, judges = counts.shape[1], shrinkage.judges(counts)
        shares = shrinkage.shares(self.noise, c.astype(np.float32)[:, None], np.float32(many / (many - 1)))
        found = np.zeros((2, len(self.w)))
        for fold in range(judges.max()):
            statistics, _ = _statistics(self.folds.moments, shares, np.arange(many) != fold, self.centred)
            prepared = _prepared(self.method, self.w, statistics)
            codes, _ = _tried(self.method, self.w, statistics, prepared, form, unchanged(form), key)
            found += np.where(fold < judges, _judged(self.w, self.folds, codes, fold, self.centred), 0)
        return found[0], found[1]

    def settled(self, shares: Any, careful: bool) -> "Sums":
        """With these shares; the sums of folds are no longer held."""
        moments = self.folds.moments
        given, every = np.asarray(shares, moments.shift.dtype), np.ones(moments.count.shape[1], bool)
        statistics, squares = _statistics(moments, given, every, self.centred)
        means = Folds(moments._replace(gram=None, drift=None), None)
        return self._replace(folds=means, statistics=statistics, squares=squares, shares=given, careful=careful)

    def ready(self) -> "Sums":
        """With what the method makes of the statistics."""
        return self._replace(prepared=_prepared(self.method, self.w, self.statistics))

    def tried(self, form: Coded, factor: Any, key: Array | None) -> tuple[Coded, Array]:
        """The form with new codes, and ||X w - Y q||^2 [G, n] but for what is the same for all.

        Args:
            form: the codebook.
            factor: what its scale is multiplied by where there are data, [G, 1] or [G, n]; None of a fixed table.
            key: for methods that draw.
        """
        return _tried(self.method, self.w, self.statistics, self.prepared, form, factor, key)

    def sketched(
        self, form: Coded, factors: Float[np.ndarray, "F"], directions: Any, rest: Any
    ) -> Float[np.ndarray, "F G n"]:
        """`tried` of methods that round every weight for itself, for factors in turn, with U'U + diag(rest) for H."""
        return np.asarray(_sketched(self.method, self.w, self.statistics, directions, rest, form, factors))

    @property
    def damping(self) -> float:
        """The damping that the method took, the most of all groups."""
        damping = self.method.damped(self.prepared)
        return 0.0 if damping is None else float(np.asarray(damping).max())

    def correction(self, form: Coded) -> Array:
        if self.careful:
            return _steady(self.w, form, self.folds.moments, self.squares)
        return _correction(self.w, self.statistics.mean_x, self.statistics.mean_y, form)


def unchanged(form: Coded) -> np.ndarray | None:
    """The factor that leaves a form of groups as it is, see `Sums.tried`."""
    if not has_scale(form):
        return None
    arrays = tables(form)
    own = arrays["levels" if "levels" in arrays else "scale"]
    return np.ones((len(codes_of(form)), own.shape[2]), np.float32)


_steady = jax.jit(functools.partial(mapped, shrinkage.steady))
_correction = jax.jit(functools.partial(mapped, correction))


@functools.partial(jax.jit, static_argnums=1)
def _looked(moments: Moments, centred: bool) -> tuple[Array, Array]:
    statistics = mapped(lambda m: finish(shrinkage.together(m), centred), moments)
    squares = jnp.diagonal(statistics.gram, axis1=1, axis2=2)
    return mapped(shrinkage.noise, moments), jnp.isfinite(squares + 0 * statistics.mean_x).all()


@functools.partial(jax.jit, static_argnums=3)
def _statistics(
    moments: Moments, shares: Float[Array, "G 2"], use: Bool[Array, "K"], centred: bool
) -> tuple[Statistics, Array]:
    """Those of the folds in use, shrunk, and the diagonal of H."""
    made = mapped(lambda m, s: shrinkage.shrunk(shrinkage.together(m, use), s, centred), moments, shares)
    return made, jnp.diagonal(made.gram, axis1=1, axis2=2)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(method: Rounding, w: Array, statistics: Statistics) -> Any:
    return mapped(method.prepare, w, statistics)


@functools.partial(jax.jit, static_argnums=0)
def _tried(
    method: Rounding, w: Array, statistics: Statistics, prepared: Any, form: Coded, factor: Any, key: Array | None
) -> tuple[Coded, Array]:
    def one(w: Array, statistics: Statistics, prepared: Any, form: Coded, factor: Any) -> tuple[Coded, Array]:
        if factor is not None:
            form = with_data(alive(jnp.diagonal(statistics.gram)), scaled(form, factor), form)
        chosen = method.solve(prepared, form, key)
        return chosen, residual(w, statistics, chosen)

    return mapped(one, w, statistics, prepared, form, factor)


@functools.partial(jax.jit, static_argnums=0)
def _sketched(
    method: Rounding, w: Array, statistics: Statistics, directions: Array, rest: Array, form: Coded, factors: Array
) -> Array:
    def one(w: Array, statistics: Statistics, directions: Array, rest: Array, form: Coded) -> Array:
        wide, prepared = w.astype(rest.dtype), method.prepare(w, statistics)
        slope = 0 if statistics.drift is None else 2 * dot(statistics.drift, wide)

        def loss(factor: Array) -> Array:
            errors = wide - method.solve(prepared, scaled(form, factor)).dense().astype(wide.dtype)
            return column_sums(errors * (rest[:, None] * errors + slope)) + (dot(directions, errors) ** 2).sum(0)

        return jax.lax.map(loss, factors)

    return jnp.swapaxes(mapped(one, w, statistics, directions, rest, form), 0, 1)


@functools.partial(jax.jit, static_argnums=4)
def _judged(w: Array, folds: Folds, form: Coded, fold: Array, centred: bool) -> Array:
    one = functools.partial(shrinkage.judged, fold=fold, centred=centred)
    return jnp.stack(mapped(one, w, folds, form))
