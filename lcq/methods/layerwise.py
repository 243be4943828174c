"""One product of a net: statistics of its inputs, an alphabet, its scale by the exact residual, and codes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.methods.alphabet import scaled
from lcq.methods.following import alive, cheaper, follow
from lcq.methods.gathering import matrices, statistics
from lcq.methods.moments import Statistics, counted, mean
from lcq.methods.rounding import GPFQ, Rounding, correction, sweep
from lcq.methods.walk import Use
from lcq.rules import Rule, Task
from lcq.schemes.levels import mirrored

Recursion = Literal["auto", "blocked", "follow"]

_COARSE = np.float32(1.15) ** np.arange(-4, 5, dtype=np.float32)
"""Factors of the scale that are tried first, 1 among them, .."""

_FINE = np.float32(1.018) ** np.arange(-4, 5, dtype=np.float32)
""".. and then around the best of them: as many, for one compilation."""


class Rounded(NamedTuple):
    """The outcome at one product.

    Attributes:
        form: codes [G, N, n], and an alphabet for every group.
        correction: [G, n], what the bias is to take up; None if not centred.
        recursion: blocked or follow.
        factor: of the scheme's scale, the median of its size over neurons.
        dead: inputs that are always zero.
        rows: that counted, of the group with the most.
    """

    form: Codes
    correction: Array | None
    recursion: str
    factor: float
    dead: int
    rows: int


def round_product(
    uses: Sequence[Use],
    w: Float[Array, "G N n"],
    rule: Rule,
    method: Rounding,
    *,
    centred: bool,
    search: bool,
    recursion: Recursion,
    key: Any,
) -> Rounded:
    """Rounds the weights of one product, or of several with the same weights.

    Args:
        uses: all products with these weights, and for every batch their inputs in the original and in the quantized
            net; the statistics of all are summed.
        w: the weights in the canonical layout.
        rule: its scheme gives the alphabet.
        method: how to round.
        centred: whether a bias is free to follow.
        search: whether to search the scale.
        recursion: see `lcq.quantize`.
        key: for methods that draw.

    Raises:
        ValueError: NaN or infinite activations, or `recursion="follow"` for another method than GPFQ.
    """
    product = uses[0].product
    form, tied = _alphabet(product.path, w, rule)
    search = search and not (form.scale is None and form.levels is None)
    if recursion == "follow" and not isinstance(method, GPFQ):
        raise ValueError(f"wanted recursion='blocked' for {method}, which needs statistics; only GPFQ follows inputs")
    if recursion == "auto":
        _, _, many, neurons = product.shape
        runs = sum(map(len, (*_coarse(form), _FINE))) + 1 if search else 1
        count = sum(use.product.shape[1] * len(use.inputs) for use in uses)
        able = isinstance(method, GPFQ) and product.kind != "ragged"  # each expert would follow the rows of all
        recursion = cheaper(count, many, neurons, runs) if able else "blocked"
    problem = (_Inputs if recursion == "follow" else _Sums).of(uses, centred)
    if not bool(jnp.isfinite(problem.squares).all()):
        _, where = next(_not_finite(uses), (None, "in either net, but too large to square"))
        raise ValueError(
            f"{product.path}: wanted finite inputs; got NaN or infinite activations {where} at {product.source}; "
            "look at the batches, or at the weights before"
        )
    factor = jnp.ones((1, 1))
    for sets in (_coarse(form), (_FINE,)) if search else ():
        losses = []
        for factors in sets:
            tried = jnp.asarray(factors)[:, None, None] * factor
            tried = jnp.broadcast_to(tried, (len(factors), w.shape[0], w.shape[2]))
            losses.append(problem.losses(method, w, form, tried, key).sum(tied, keepdims=True))
        factor = factor * jnp.concatenate(sets)[jnp.concatenate(losses).argmin(0)]
    if search:
        form = jax.vmap(scaled)(form, jnp.broadcast_to(factor, (w.shape[0], factor.shape[1])))
    form = problem.codes(method, w, form, key)
    shift = problem.correction(w, form) if centred else None
    dead = int((~jax.vmap(alive)(problem.squares)).sum())
    return Rounded(form, shift, recursion, float(np.median(np.abs(factor))), dead, int(problem.counts.max()))


def _coarse(form: Codes) -> tuple[np.ndarray, ...]:
    """The factors that are tried first; of both signs where the mirrored table is another one."""
    one_sign = form.scale is None or form.zero is not None or (form.values is not None and mirrored(form.values))
    return (_COARSE,) if one_sign else (_COARSE, -_COARSE)


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


def _not_finite(uses: Sequence[Use]) -> Iterator[tuple[int, str]]:
    for use in uses:
        for batch, pair in enumerate(use.inputs):
            for operand, net in zip(pair, ("original", "quantized"), strict=True):
                if not bool(jnp.isfinite(operand.x).all()):
                    yield batch, f"in the {net} net, batch {batch},"


class _Sums(NamedTuple):
    """A product's rounding on statistics, vmapped over groups."""

    statistics: Statistics

    @classmethod
    def of(cls, uses: Sequence[Use], centred: bool) -> "_Sums":
        return cls(statistics(uses, centred))

    @property
    def counts(self) -> Array:
        """Rows that count, of every group."""
        return self.statistics.count

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


class _Inputs(NamedTuple):
    """The same on the inputs of all batches, [G, M, N], by the literal recursion."""

    x: Array
    y: Array
    mean_x: Array
    mean_y: Array
    counts: Array

    @classmethod
    def of(cls, uses: Sequence[Use], centred: bool) -> "_Inputs":
        x, y, rows = matrices(uses)
        mean_x, mean_y = (jax.vmap(mean)(a, rows) for a in (x, y))
        if centred:
            x, y = x - mean_x[:, None], y - mean_y[:, None]
        count = jnp.int32(x.shape[1]) if rows is None else rows.sum(1)
        return cls(jax.vmap(counted)(x, rows), jax.vmap(counted)(y, rows), mean_x, mean_y, count)

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
