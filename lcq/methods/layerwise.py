"""One product of a net: statistics of its inputs, an alphabet, its scale by the exact residual, and codes."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lcq.blocks import compute_dtype, explicit_sharding
from lcq.forms import Codes
from lcq.methods.alphabet import scaled
from lcq.methods.following import alive, cheaper, follow
from lcq.methods.moments import Moments, Statistics, finish, gather
from lcq.methods.rounding import GPFQ, Rounding, correction, sweep
from lcq.methods.walk import Structure
from lcq.products import Product
from lcq.rules import Rule, Task

Recursion = Literal["auto", "blocked", "follow"]

_COARSE = np.float32(1.15) ** np.arange(-4, 5, dtype=np.float32)
"""Factors of the scale that are tried first, 1 among them, .."""

_FINE = np.float32(1.018) ** np.arange(-4, 5, dtype=np.float32)
""".. and then around the best of them: as many, for one compilation."""

_ROWS = 4096
"""Rows of a convolution's inputs that are made at a time."""


class Rounded(NamedTuple):
    """The outcome at one product.

    Attributes:
        form: codes [G, N, n], and an alphabet for every group.
        correction: [G, n], what the bias is to take up; None if not centred.
        recursion: blocked or follow.
        factor: of the scheme's scale, the median over neurons.
        dead: inputs that are always zero.
    """

    form: Codes
    correction: Array | None
    recursion: str
    factor: float
    dead: int


def round_product(
    product: Product,
    w: Float[Array, "G N n"],
    inputs: Sequence[tuple[Any, Any]],
    rule: Rule,
    method: Rounding,
    *,
    centred: bool,
    search: bool,
    recursion: Recursion,
    key: Any,
) -> Rounded:
    """Rounds the weights of one product.

    Args:
        product: which.
        w: its weights in the canonical layout.
        inputs: the data operand for every batch in the original and in the quantized net.
        rule: its scheme gives the alphabet.
        method: how to round.
        centred: whether a bias is free to follow.
        search: whether to search the scale.
        recursion: see `lcq.quantize`.
        key: for methods that draw.

    Raises:
        ValueError: NaN or infinite activations, or `recursion="follow"` for another method than GPFQ.
    """
    form, tied = _alphabet(product.path, w, rule)
    search = search and not (form.scale is None and form.levels is None)
    if recursion == "follow" and not isinstance(method, GPFQ):
        raise ValueError(f"wanted recursion='blocked' for {method}, which needs statistics; only GPFQ follows inputs")
    if recursion == "auto":
        _, rows, many, neurons = product.shape
        runs = len(_COARSE) + len(_FINE) + 1 if search else 1
        count = rows * len(inputs)
        recursion = cheaper(count, many, neurons, runs) if isinstance(method, GPFQ) else "blocked"
    problem = (_Inputs if recursion == "follow" else _Sums).of(product, inputs, centred)
    if not bool(jnp.isfinite(problem.squares).all()):
        _, where = next(_not_finite(inputs), (None, "in either net, but too large to square"))
        raise ValueError(
            f"{product.path}: wanted finite inputs; got NaN or infinite activations {where} at {product.source}; "
            "look at the batches, or at the weights before"
        )
    factor = jnp.ones((1, 1))
    for factors in (_COARSE, _FINE) if search else ():
        tried = jnp.asarray(factors)[:, None, None] * factor
        tried = jnp.broadcast_to(tried, (len(factors), w.shape[0], w.shape[2]))
        losses = problem.losses(method, w, form, tried, key).sum(tied, keepdims=True)
        factor = factor * jnp.asarray(factors)[losses.argmin(0)]
    if search:
        form = jax.vmap(scaled)(form, jnp.broadcast_to(factor, (w.shape[0], factor.shape[1])))
    form = problem.codes(method, w, form, key)
    shift = problem.correction(w, form) if centred else None
    dead = int((~jax.vmap(alive)(problem.squares)).sum())
    return Rounded(form, shift, recursion, float(np.median(factor)), dead)


def _alphabet(path: str, w: Array, rule: Rule) -> tuple[Codes, tuple[int, ...]]:
    """The scheme's projection of w [G, N, n] with an alphabet for every group, and the axes of losses [F, G, n] over
    which one scale is shared."""
    assert rule.scheme is not None
    groups, many, neurons = w.shape
    if rule.stacked:
        (form,) = Task((path,), rule.scheme, 1).project((w,))
        assert isinstance(form, Codes)
        return form, (2,) if _columns(form) == 1 else ()
    (merged,) = Task((path,), rule.scheme).project((w.swapaxes(0, 1).reshape(many, groups * neurons),))
    assert isinstance(merged, Codes)

    def split(a: Array | None) -> Array | None:
        if a is None:
            return None
        if a.shape[1] == 1:
            return jnp.broadcast_to(a, (groups, *a.shape))
        return a.reshape(a.shape[0], groups, neurons, *a.shape[2:]).swapaxes(0, 1)

    fields: dict[str, Any] = {name: split(getattr(merged, name)) for name in ("codes", "levels", "scale", "zero")}
    return dataclasses.replace(merged, **fields), (1, 2) if _columns(merged) == 1 else ()


def _columns(form: Codes) -> int:
    """How many neurons of a group have an alphabet of their own; 1 if they share it."""
    if form.levels is not None:
        return form.levels.shape[-2]
    return 1 if form.scale is None else form.scale.shape[-1]


def _not_finite(inputs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[int, str]]:
    for batch, pair in enumerate(inputs):
        for x, net in zip(pair, ("original", "quantized"), strict=True):
            if not bool(jnp.isfinite(x).all()):
                yield batch, f"in the {net} net, batch {batch},"


class _Sums(NamedTuple):
    """A product's rounding on statistics, vmapped over groups."""

    statistics: Statistics

    @classmethod
    def of(cls, product: Product, inputs: Sequence[tuple[Any, Any]], centred: bool) -> "_Sums":
        key = Structure(product.structure, product)
        moments: Any = None
        same = all(x is y for x, y in inputs)
        alone = all(len(a.sharding.device_set) == 1 for x, y in inputs for a in (x, y) if isinstance(a, jax.Array))
        for x, y in inputs:
            moments = _gather(key, product.parts(_ROWS) if alone else 1)(y, None if same else x, moments)
        return cls(jax.vmap(functools.partial(finish, centred=centred))(moments))

    @property
    def squares(self) -> Array:
        """Diagonal of H [G, N]; NaN where X is."""
        return jnp.diagonal(self.statistics.gram, axis1=1, axis2=2) + 0 * self.statistics.mean_x

    def losses(self, method: Rounding, w: Array, form: Codes, factors: Array, key: Any) -> Array:
        one = functools.partial(sweep, method)
        return jax.vmap(one, (0, 0, 0, 1, None), 1)(w, self.statistics, form, factors, key)

    def codes(self, method: Rounding, w: Array, form: Codes, key: Any) -> Codes:
        return jax.vmap(method.codes, (0, 0, 0, None))(w, self.statistics, form, key)

    def correction(self, w: Array, form: Codes) -> Array:
        return jax.vmap(correction)(w, self.statistics.mean_x, self.statistics.mean_y, form)


@functools.lru_cache(maxsize=256)
def _gather(key: Structure, parts: int) -> Callable[..., Moments]:
    """Adds one batch of a product's inputs to its moments, compiled once for all products of this kind.

    A convolution's inputs become matrices part by part, which stay in the cache and need less memory.
    """
    product: Product = key.thing

    def one(moments: Any, part: tuple[Any, Any]) -> tuple[Any, None]:
        y, x = part
        return jax.vmap(gather)(product.inputs(y), None if x is None else product.inputs(x), moments), None

    def sums(y: Any, x: Any, moments: Any) -> Any:
        if parts == 1:
            return one(moments, (y, x))[0]
        cut = jax.tree.map(lambda a: product.cut(a, parts), (y, x))
        if moments is None:
            first = jax.tree.map(lambda a: a[0], cut)
            rows = product.inputs(first[0])
            moments = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, None, first)[0])
            moments = moments._replace(shift=rows.astype(compute_dtype(rows.dtype)).mean(1))
        return jax.lax.scan(one, moments, cut)[0]

    @jax.jit
    def add(y: Any, x: Any, moments: Any) -> Any:
        spread = explicit_sharding(y)
        if spread is None:
            return sums(y, x, moments)
        whole, axes = NamedSharding(spread.mesh, P()), spread.mesh.axis_names
        return jax.sharding.auto_axes(sums, axes=axes, out_sharding=whole)(y, x, moments)

    return add


def everywhere(a: Any) -> Any:
    """The whole array on every device, if it is spread over a mesh with explicit axes, which cannot be reshaped."""
    if not isinstance(a, jax.Array) or explicit_sharding(a) is None:
        return a
    assert isinstance(a.sharding, NamedSharding)
    return jax.device_put(a, NamedSharding(a.sharding.mesh, P()))


class _Inputs(NamedTuple):
    """The same on the inputs of all batches, [G, M, N], by the literal recursion."""

    x: Array
    y: Array
    mean_x: Array
    mean_y: Array

    @classmethod
    def of(cls, product: Product, inputs: Sequence[tuple[Any, Any]], centred: bool) -> "_Inputs":
        def whole(parts: Sequence[Any]) -> Array:
            rows = jnp.concatenate([product.inputs(jnp.asarray(everywhere(part))) for part in parts], 1)
            return rows.astype(compute_dtype(rows.dtype))

        x, y = (whole(parts) for parts in zip(*inputs, strict=True))
        mean_x, mean_y = x.mean(1), y.mean(1)
        if centred:
            x, y = x - mean_x[:, None], y - mean_y[:, None]
        return cls(x, y, mean_x, mean_y)

    @property
    def squares(self) -> Array:
        return (self.y**2).sum(1) + 0 * self.x.sum(1)

    def losses(self, method: Rounding, w: Array, form: Codes, factors: Array, key: Any) -> Array:
        def one(factor: Array) -> Array:
            return self._follow(method, w, jax.vmap(scaled)(form, factor))[1]

        return jax.lax.map(one, factors)

    def codes(self, method: Rounding, w: Array, form: Codes, key: Any) -> Codes:
        return self._follow(method, w, form)[0]

    def correction(self, w: Array, form: Codes) -> Array:
        return jax.vmap(correction)(w, self.mean_x, self.mean_y, form)

    def _follow(self, method: Rounding, w: Array, form: Codes) -> tuple[Codes, Array]:
        assert isinstance(method, GPFQ)
        return jax.vmap(functools.partial(follow, order=method.order))(w, self.x, self.y, form)
