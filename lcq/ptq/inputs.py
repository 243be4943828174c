"""GPFQ on the inputs of a product themselves: rows held back, noise and shrinkage as in `lcq.ptq.shrinkage`.

Rows that do not count are zeros, so that all programs are of one shape.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcq.forms import Codes
from lcq.ptq import shrinkage
from lcq.ptq.gathering import fold_count, matrices
from lcq.ptq.rounding.base import Rounding, correction
from lcq.ptq.rounding.codebook import scaled, with_data
from lcq.ptq.rounding.coded import Coded
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.sequential import alive, dot, follow
from lcq.ptq.two_stream import Use

_PROBES = 64
"""Vectors by which noise is measured, as H is not made; with no more inputs than that it is exact."""


class Inputs(NamedTuple):
    """A product's rounding on the inputs of all uses and batches, vmapped over groups, by the literal recursion.

    Attributes:
        x: The inputs in the original net, [G, M, N].
        y: The inputs in the quantized net, [G, M, N].
        rows: Which rows count, [G, M].
        fold: The fold of each row, [M], in 0..folds - 1.
        folds: The number of folds.
        method: The method, which is GPFQ.
        w: The weights, [G, N, n].
        centred: Whether the mean is taken off, which x and y show once settled.
        noise: Which parts of H and of the mean are noise, [G, 2].
        finite: Whether all inputs are finite.
        squares: Sums of squares of the inputs, [G, N], once settled.
        shares: The shares p and p' of each group, once settled, see `lcq.ptq.shrinkage`.
        means: The means of x and of y, once settled.
        raw: The inputs x and y as they were, once settled, if the correction leaves out what is noise.
    """

    x: Array
    y: Array
    rows: Array
    fold: Array
    folds: int
    method: GPFQ
    w: Array
    centred: bool
    noise: Any = None
    finite: bool = True
    squares: Any = None
    shares: Any = None
    means: Any = None
    raw: Any = None

    @classmethod
    def of(
        cls,
        uses: Sequence[Use],
        method: Rounding,
        w: Float[Array, "G N n"],
        centred: bool,
    ) -> "Inputs":
        assert isinstance(method, GPFQ)
        folds = fold_count(w.shape[1])
        x, y, rows, fold = matrices(uses, folds)
        rows = jnp.ones(y.shape[:2], bool) if rows is None else rows
        return cls(x, y, rows, jnp.asarray(fold), folds, method, w, centred).looked()

    def looked(self) -> "Inputs":
        """With its noise, and whether it is finite."""
        found, finite = _looked(self.x, self.y, self.rows, self.fold, self.folds)
        return self._replace(noise=np.asarray(found), finite=bool(finite))

    @property
    def counts(self) -> np.ndarray:
        """Rows that count, of every group."""
        return np.asarray(self.rows).sum(1)

    def of_neurons(self, w: Float[np.ndarray, "G N j"]) -> "Inputs":
        """The same rows for other neurons."""
        return self._replace(w=jax.device_put(w))

    def held(
        self, form: Codes, c: Float[np.ndarray, "G"], key: Array | None
    ) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
        """As of `lcq.ptq.sums`, which have the same methods; all folds judge."""
        del key
        given = (self.w, self.x, self.y, self.rows, form, self.noise, np.asarray(c[:, None], self.y.dtype))
        errors, sizes = _held(*given, self.fold, self.folds, self.method.act_order, self.centred)
        return np.asarray(errors[:, 0], np.float64), np.asarray(sizes, np.float64)

    def settled(self, shares: Any, careful: bool) -> "Inputs":
        """With these shares, means taken off."""
        x, y, squares, *means = _settled(self.x, self.y, self.rows, self.centred)
        raw = (self.x, self.y) if careful else None
        given = np.asarray(shares, y.dtype)
        return self._replace(x=x, y=y, squares=squares, means=means, raw=raw, shares=given)

    def ready(self) -> "Inputs":
        """As it is: the recursion needs nothing made before."""
        return self

    def tried(self, form: Coded, factor: Any, key: Array | None) -> tuple[Codes, Array]:
        del key
        assert self.shares is not None and isinstance(form, Codes)
        shares = self.shares if self.shares.any() else None
        return _tried(self.method.act_order, self.w, self.x, self.y, form, factor, self.squares, shares, self.rows)

    @property
    def damping(self) -> float:
        """The method has none."""
        return 0.0

    def correction(self, form: Codes) -> Array:
        if self.raw is None:
            return jax.vmap(correction)(self.w, self.means[0], self.means[1], form)
        return _steady(self.w, *self.raw, form, self.rows, self.fold, self.folds)


@functools.partial(jax.jit, static_argnums=4)
def _looked(x: Array, y: Array, rows: Array, fold: Array, folds: int) -> tuple[Array, Array]:
    sums = (y**2).sum(1, where=rows[..., None]) + 0 * x.sum(1, where=rows[..., None])
    return jax.vmap(lambda y, rows: noise(y, rows, fold, folds))(y, rows), jnp.isfinite(sums).all()


@functools.partial(jax.jit, static_argnums=3)
def _settled(x: Array, y: Array, rows: Array, centred: bool) -> tuple[Array, ...]:
    x, y, mean_x, mean_y = jax.vmap(functools.partial(taken, centred=centred))(x, y, rows)
    return x, y, (y**2).sum(1), mean_x, mean_y


@functools.partial(jax.jit, static_argnums=0)
def _tried(
    act_order: bool,
    w: Array,
    x: Array,
    y: Array,
    form: Codes,
    factor: Array | None,
    squares: Array,
    shares: Array | None,
    rows: Array,
) -> tuple[Codes, Array]:
    def one(w: Array, x: Array, y: Array, form: Any, factor: Any, squares: Array, share: Any, use: Array) -> Any:
        if factor is not None:
            form = with_data(alive(squares), scaled(form, factor), form)
        return follow(w, x, y, form, act_order, share, None if share is None else use)

    return jax.vmap(one)(w, x, y, form, factor, squares, shares, rows)


@functools.partial(jax.jit, static_argnums=6)
def _steady(w: Array, x: Array, y: Array, form: Codes, rows: Array, fold: Array, folds: int) -> Array:
    return jax.vmap(functools.partial(steady, fold=fold, folds=folds))(w.astype(y.dtype), x, y, form, rows)


@functools.partial(jax.jit, static_argnums=(8, 9, 10))
def _held(
    w: Array,
    x: Array,
    y: Array,
    rows: Array,
    form: Codes,
    noise: Array,
    c: Array,
    fold: Array,
    folds: int,
    act_order: bool,
    centred: bool,
) -> tuple[Array, Array]:
    def one(w: Array, x: Array, y: Array, rows: Array, form: Codes, noise: Array, c: Array) -> tuple[Array, Array]:
        return held(w, x, y, rows, form, fold, folds, noise, c, act_order, centred)

    return jax.vmap(one)(w, x, y, rows, form, noise, c)


def taken(
    x: Float[Array, "m N"], y: Float[Array, "m N"], use: Bool[Array, "m"], centred: bool
) -> tuple[Array, Array, Array, Array]:
    """The rows in use, the mean taken off where it is centred, zeros for the others; and the means of X and of Y.

    An input that does not vary but by rounding errors is zero where it is centred.
    """
    count = jnp.maximum(use.sum(), 1).astype(y.dtype)
    x, y = (jnp.where(use[:, None], a, 0) for a in (x, y))
    mean_x, mean_y = x.sum(0) / count, y.sum(0) / count
    if centred:
        x, y = (jnp.where(use[:, None], a - mean, 0) for a, mean in ((x, mean_x), (y, mean_y)))
    if centred:
        lives = shrinkage.varies((y * y).sum(0), mean_y, count)
        x, y = (jnp.where(lives, a, 0) for a in (x, y))
    return x, y, mean_x, mean_y


def noise(y: Float[Array, "m N"], rows: Bool[Array, "m"], fold: Int[Array, "m"], folds: int) -> Float[Array, "2"]:
    """`lcq.ptq.shrinkage.noise` by products with some vectors, without H."""
    many = y.shape[1]
    if many == 1:
        return jnp.zeros(2, y.dtype)
    signs = np.eye(many) if many <= _PROBES else np.sign(np.random.default_rng(0).normal(size=(many, _PROBES)))
    probes = jnp.asarray(signs, y.dtype)
    counts = ((fold == jnp.arange(folds)[:, None]) & rows).sum(1).astype(y.dtype)
    around, _, _, mean = taken(y, y, rows, True)
    total = jnp.maximum(counts.sum(), 1)
    squares = (around**2).sum(0)
    unit = jnp.where(squares > 0, jax.lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    around, middle = around * unit, mean * unit
    reach = dot(around, probes)

    def off(k: Array) -> Array:
        part = jnp.where((fold == k)[:, None], around, 0)
        return dot(part.T, reach) - (part**2).sum(0)[:, None] * probes

    whole = dot(around.T, reach) - (around**2).sum(0)[:, None] * probes

    def apart(k: Array) -> Array:
        away = (jnp.where((fold == k)[:, None], around, 0)).sum(0)
        return jnp.stack([((off(k) - counts[k] / total * whole) ** 2).sum(), (away**2).sum()])

    often = 1 if many <= _PROBES else _PROBES  # each column of off(C) is seen so many times
    spread = jax.lax.map(apart, jnp.arange(folds)).sum(0)
    size = jnp.stack([(whole**2).sum() / often, ((total * middle) ** 2).sum()])
    return shrinkage.part_of_noise(spread / jnp.array([often, 1.0], y.dtype), size, counts, (unit > 0).sum())


def steady(
    w: Float[Array, "N n"],
    x: Float[Array, "m N"],
    y: Float[Array, "m N"],
    form: Codes,
    rows: Bool[Array, "m"],
    fold: Int[Array, "m"],
    folds: int,
    leave: Any = -1,
) -> Float[Array, "n"]:
    """What the bias is to take up, less by the part of it that is noise, over all folds but one."""
    q, rows = form.dense().astype(w.dtype), rows & (fold != leave)
    left = jnp.where(rows[:, None], dot(x, w) - dot(y, q), 0)
    use = ((fold == jnp.arange(folds)[:, None]) & rows).astype(left.dtype)
    squares = (taken(y, y, rows, True)[0] ** 2).sum(0)
    return shrinkage.less_noise(dot(use, left), use.sum(1), (squares[:, None] * (w - q) ** 2).sum())


def held(
    w: Float[Array, "N n"],
    x: Float[Array, "m N"],
    y: Float[Array, "m N"],
    rows: Bool[Array, "m"],
    form: Codes,
    fold: Int[Array, "m"],
    folds: int,
    noise: Float[Array, "2"],
    c: Float[Array, "S"],
    act_order: bool,
    centred: bool,
) -> tuple[Float[Array, "S"], Float[Array, ""]]:
    """Errors for each c of codes from all folds but one on that one, summed over folds and neurons, and ||X w||^2."""
    w = w.astype(y.dtype)

    def one(k: Array, c: Array) -> Array:
        use = rows & (fold != k)
        a, b, _, _ = taken(x, y, use, centred)
        share = shrinkage.shares(noise, c, folds / (folds - 1))
        chosen = follow(w, a, b, form, act_order, share, use)[0]
        left = dot(x, w) - dot(y, chosen.dense().astype(w.dtype))
        if centred:
            left = left - steady(w, x, y, chosen, rows, fold, folds, k)
        return jnp.where((rows & ~use)[:, None] & use.any(), left**2, 0).sum()

    def of(c: Array) -> Array:
        return jax.lax.map(lambda k: one(k, c), jnp.arange(folds)).sum()

    filled = ((fold == jnp.arange(folds)[:, None]) & rows).any(1).sum()
    size = jnp.where(rows[:, None], dot(x, w) ** 2, 0).sum()
    return jax.lax.map(of, c), jnp.where(filled > 1, size, 0)
