"""One product of a net: statistics of its inputs, a codebook, its scale by the exact residual, and codes.

How far the statistics are believed is chosen first, on rows held back, see `lcq.ptq.shrinkage`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.dtypes import own_promotion
from lcq.ptq import shrinkage
from lcq.ptq.gathering import LastMoments
from lcq.ptq.inputs import Inputs
from lcq.ptq.neurons import apart, mesh_of, on
from lcq.ptq.rounding.base import Rounding
from lcq.ptq.rounding.codebook import block_count, every_scaled
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.sequential import alive, cheaper
from lcq.ptq.sums import Sums
from lcq.ptq.two_stream import Use
from lcq.schemes.levels import mirrored
from lcq.tracing.contraction import Product
from lcq.tree.rules import Rule, Task

_COARSE = np.float32(1.15) ** np.arange(-4, 5, dtype=np.float32)
"""Factors of the scale that are tried first, 1 among them, .."""

_FINE = np.float32(1.018) ** np.arange(-4, 5, dtype=np.float32)
""".. and then around the best of them: as many, for one compilation."""

_ONE = len(_COARSE) // 2
"""Where 1 is among them."""

_SAME = 1e-5
"""A factor whose residual is less by no more than this part of that of factor 1 is no better."""


class Rounded(NamedTuple):
    """The outcome at one product.

    Attributes:
        form: The codes [G, N, n], with a codebook for every group.
        correction: What the bias is to take up, [G, n]; None if not centred.
        recursion: Which of the two was run: "blocked" or "follow".
        factor: What the scheme's scale was multiplied by, the median of its size over neurons.
        dead: How many inputs are always zero.
        rows: How many rows counted, in the group with the most.
        silent: The numbers of the groups without an input that is not zero, or that varies where a bias takes their
            mean; they keep their scale.
        shrink: How much smaller what is between two inputs was made, the median over groups.
        held_out: The error ||X w - Y q||^2 / ||X w||^2 on rows that did not choose; None if it was not measured.
        damping: The most that the method damped H by, in units of the mean of its diagonal; 0 if it does not.
    """

    form: Codes
    correction: Array | None
    recursion: str
    factor: float
    dead: int
    rows: int
    silent: tuple[int, ...]
    shrink: float
    held_out: float | None
    damping: float


@own_promotion()
def round_product(
    uses: Sequence[Use],
    w: Float[Array, "G N n"],
    rule: Rule,
    method: Rounding,
    *,
    centred: bool,
    last: LastMoments | None = None,
) -> Rounded:
    """Rounds the weights of one product, or of several with the same weights.

    Args:
        uses: all products with these weights, and for every batch their inputs in the original and in the quantized
            net; the statistics of all are summed.
        w: the weights in the canonical layout.
        rule: its scheme gives the codebook.
        method: how to round, and how the scale and the shrinkage are chosen.
        centred: whether a bias is free to follow.
        last: the statistics of the product before, which serve this one if its inputs are the same.

    Raises:
        ValueError: NaN or infinite activations, or statistics that the method cannot factorise.
    """
    product = uses[0].product
    form, tied = _codebook(product.path, w, rule)
    search = method.search and not (form.scale is None and form.levels is None)
    recursion = _recursion(uses, method, sum(map(len, (*_coarse(form), _FINE))) + 1 if search else 1)
    alike = dataclasses.replace(method, search=True, shrink=None)  # what programs do not depend on
    mesh = None
    problem: Any
    if recursion == "follow":
        problem = Inputs.of(uses, alike, w, centred)
    else:
        problem = Sums.of(uses, alike, w, centred, last=last, judged=method.shrink is None)
        mesh = mesh_of([use.inputs for use in uses], w)
        if mesh is not None:
            problem, form = apart(problem, form, mesh)
    with on(mesh):
        finite = problem.finite
        if finite:
            key = method.random_key(product.number)
            problem, held_out = _settled(problem, form, method.shrink, key)  # and the sums of folds are gone
            rounded = _rounded(problem.ready(), form, tied, method, search, product)
    if not finite:
        _, where = next(_not_finite(uses), (None, "in either net, but too large to square"))
        raise ValueError(
            f"{product.path}: expected finite inputs, got NaN or infinite activations {where} at {product.source}; "
            "look at the batches, or at the weights before"
        )
    if mesh is not None:  # the programs of the net may be of another one
        shift = None if rounded.correction is None else jnp.asarray(jax.device_get(rounded.correction))
        rounded = rounded._replace(form=jax.device_get(rounded.form), correction=shift)
    return rounded._replace(recursion=recursion, held_out=held_out)


def _rounded(
    problem: Any, form: Codes, tied: tuple[int, ...], method: Rounding, search: bool, product: Product
) -> Rounded:
    """The outcome of a settled problem."""
    key = method.random_key(product.number)
    groups, _, neurons = problem.w.shape
    factor, columns = jnp.ones((1, 1)), 1 if tied else neurons
    for sets in (_coarse(form), (_FINE,)) if search else ():
        losses = []
        for factors in sets:
            tried = jnp.asarray(factors)[:, None, None] * factor
            tried = jnp.broadcast_to(tried, (len(factors), groups, columns))
            losses.append(problem.losses(form, tried, key).sum(tied, keepdims=True))
        factor = factor * jnp.concatenate(sets)[_best(jnp.concatenate(losses))]
    lives = jax.vmap(alive)(problem.squares)
    if search:
        wider = every_scaled(form, jnp.broadcast_to(factor, (groups, columns)))
        form = _where_data(lives, wider, form)
    form, damping = problem.codes(form, key)
    if not np.isfinite(damping):
        raise ValueError(
            f"{product.path}: expected H + delta I with a root at {product.source}, got none with {method}: "
            "raise damping=, or max_damping= up to which it may grow by itself"
        )
    shift = problem.correction(form) if problem.centred else None
    silent = tuple(np.flatnonzero(~np.asarray(lives.any(1))).tolist())
    share = float(np.median(problem.shares[:, 0]))
    median, dead = float(np.median(np.abs(factor))), int((~lives).sum())
    rows = int(problem.counts.max())
    return Rounded(form, shift, "", median, dead, rows, silent, share, None, damping)


def _recursion(uses: Sequence[Use], method: Rounding, runs: int) -> str:
    """blocked, or follow; `runs` is how many codes are chosen."""
    if not isinstance(method, GPFQ):
        return "blocked"
    if method.recursion != "auto":
        return method.recursion
    product, count = uses[0].product, sum(use.product.shape[1] * len(use.inputs) for use in uses)
    if product.kind == "ragged":  # each expert would follow the rows of all
        return "blocked"
    _, _, many, neurons = product.shape
    return cheaper(count, many, neurons, runs)


def _coarse(form: Codes) -> tuple[np.ndarray, ...]:
    """The factors that are tried first; of both signs where the mirrored table is another one."""
    one_sign = form.scale is None or form.zero is not None or (form.values is not None and mirrored(form.values))
    return (_COARSE,) if one_sign else (_COARSE, -_COARSE)


def _best(losses: Float[Array, "F G n"]) -> Array:
    """The place of the least loss; that of factor 1 unless another is better by more than rounding errors."""
    better = losses.min(0) < losses[_ONE] - _SAME * jnp.abs(losses[_ONE])
    return jnp.where(better, losses.argmin(0), _ONE)


def _where_data(lives: Array, found: Codes, given: Codes) -> Codes:
    """`found` in the blocks of inputs with data, `given` in the others."""
    groups, blocks = len(lives), jax.vmap(lambda form: jnp.zeros(block_count(form)))(given).shape[1]
    known = lives.reshape(groups, blocks, -1).any(2)

    def one(new: Array | None, old: Array | None) -> Array | None:
        if new is None or old is None:
            return new
        here = known if new.shape[1] == blocks else known.any(1, keepdims=True)
        return jnp.where(here.reshape(*here.shape, *[1] * (new.ndim - 2)), new, old)

    return dataclasses.replace(found, levels=one(found.levels, given.levels), scale=one(found.scale, given.scale))


def _settled(problem: Any, form: Codes, shrink: float | None, key: Any) -> tuple[Any, float | None]:
    """The problem with its statistics shrunk, and the error on rows held back."""
    if shrink is not None:
        return problem.shrunk(np.full((len(problem.w), 2), shrink), False), None
    noise = np.asarray(problem.noise)
    tried = shrinkage.parts(noise)
    errors, sizes = (np.asarray(a, np.float64) for a in problem.held(form, tried, key))
    chosen = shrinkage.pick(noise, tried, errors)
    shares = np.asarray(shrinkage.shares(noise, np.asarray(tried)[chosen][:, None]), noise.dtype)
    error, size = errors[chosen, np.arange(len(problem.w))].sum(), sizes.sum()
    return problem.shrunk(shares, True), (float(error / size) if size > 0 else None)


def _codebook(path: str, w: Array, rule: Rule) -> tuple[Codes, tuple[int, ...]]:
    """The scheme's projection of w [G, N, n] with a codebook for every group, and the axes of losses [F, G, n] over
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
    """How many neurons of a group have a codebook of their own; 1 if they share it."""
    if form.levels is not None:
        return form.levels.shape[-2]
    return 1 if form.scale is None else form.scale.shape[-1]


def _not_finite(uses: Sequence[Use]) -> Iterator[tuple[int, str]]:
    for use in uses:
        for batch, pair in enumerate(use.inputs):
            for operand, net in zip(pair, ("original", "quantized"), strict=True):
                if not bool(jnp.isfinite(operand.x).all()):
                    yield batch, f"in the {net} net, batch {batch},"
