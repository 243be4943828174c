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

from lcq.forms import Codes, Trellis
from lcq.forms.dtypes import own_promotion
from lcq.ptq import scale_search, shrinkage
from lcq.ptq.gathering import LastMoments
from lcq.ptq.inputs import Inputs
from lcq.ptq.neurons import apart, mesh_of, on
from lcq.ptq.rounding.base import Rounding
from lcq.ptq.rounding.coded import Coded, codes_of, has_scale, tables, with_codes
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.sequential import DEAD, cheaper
from lcq.ptq.sums import Sums
from lcq.ptq.two_stream import Use
from lcq.tracing.contraction import Product
from lcq.tree.rules import Rule, Task


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

    form: Coded
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
    w: Float[Any, "G N n"],
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
    form, tied = codebook_of(product.path, w, rule)
    search = method.search and has_scale(form) and not method.fits(form)
    columns = scale_search.sample(*w.shape[1:])
    few, judges = form, np.asarray(w)
    if columns is not None:
        few, judges = _of_neurons(form, columns), judges[:, :, columns]
    w = w if isinstance(w, Array) else jax.device_put(w)
    sampled = columns is not None and not tied  # one scale for all is that of the few with the largest errors
    recursion = _recursion(uses, method, scale_search.runs(method, form, sampled) if search else 1)
    alike = dataclasses.replace(method, search=True, shrink=None)  # what programs do not depend on
    mesh = None
    problem: Any
    if recursion == "follow":
        problem = Inputs.of(uses, alike, w, centred)
    else:
        problem = Sums.of(uses, alike, w, centred, judges=judges if method.shrink is None else None, last=last)
        mesh = mesh_of([use.inputs for use in uses], w)
        if mesh is not None:
            problem, form = apart(problem, form, mesh)
    with on(mesh):
        if problem.finite:
            key, centre = method.random_key(product.number), None
            some = problem if columns is None else problem.of_neurons(judges)
            shares, held_out = _shares(some, few, method.shrink, key)
            problem = problem.settled(shares, method.shrink is None)
            del some  # and the sums of folds are gone
            if search and sampled and not method.independent:
                centre = scale_search.centre_of(problem.of_neurons(judges).ready(), few, key)
            rounded = _rounded(problem.ready(), form, tied, method, search, centre, product)
    if not problem.finite:
        _, where = next(_not_finite(uses), (None, "in either net, but too large to square"))
        raise ValueError(
            f"{product.path}: expected finite inputs, got NaN or infinite activations {where} at {product.source}; "
            "look at the batches, or at the weights before"
        )
    if mesh is not None and rounded.correction is not None:  # the programs of the net may be of another one
        rounded = rounded._replace(correction=jnp.asarray(jax.device_get(rounded.correction)))
    return rounded._replace(recursion=recursion, held_out=held_out)


def _rounded(
    problem: Any,
    form: Coded,
    tied: tuple[int, ...],
    method: Rounding,
    search: bool,
    centre: np.ndarray | None,
    product: Product,
) -> Rounded:
    """The outcome of a problem that is ready; `centre` is the factor that is best for a sample of neurons."""
    key, damping = method.random_key(product.number), problem.damping
    if not np.isfinite(damping):
        raise ValueError(
            f"{product.path}: expected H + delta I with a root at {product.source}, got none with {method}: "
            "raise damping=, or max_damping= up to which it may grow by itself"
        )
    tries = scale_search.Search(problem, form, tied, key)
    if search and centre is not None:
        tries.around(centre, method.tries)
        tries.singly()
    elif search and method.independent and not tied and scale_search.sample(*problem.w.shape[1:]) is not None:
        tries.sketched()
    elif search:
        tries.whole()
    squares = np.asarray(problem.squares)
    lives = squares > DEAD * squares.max(1, keepdims=True)
    shift = problem.correction(tries.form) if problem.centred else None
    silent = tuple(np.flatnonzero(~lives.any(1)).tolist())
    share = float(np.median(problem.shares[:, 0]))
    median, dead = float(np.median(np.abs(tries.factor))), int((~lives).sum())
    rows = int(problem.counts.max())
    return Rounded(tries.form, shift, "", median, dead, rows, silent, share, None, damping)


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


def _shares(problem: Any, form: Coded, shrink: float | None, key: Any) -> tuple[np.ndarray, float | None]:
    """By how much statistics are shrunk, and the error on rows held back."""
    if shrink is not None:
        return np.full((len(problem.w), 2), shrink), None
    sizes = np.zeros(0)

    def held(c: np.ndarray) -> np.ndarray:
        nonlocal sizes
        errors, sizes = problem.held(form, c, key)
        return errors

    c, errors = shrinkage.chosen(problem.noise, held)
    held_out = float(errors.sum() / sizes.sum()) if sizes.sum() > 0 else None
    return shrinkage.shares(problem.noise, c[:, None]), held_out


def _of_neurons(form: Coded, columns: np.ndarray) -> Coded:
    """The form of some neurons, on the host."""

    def one(a: Any) -> np.ndarray:
        return np.asarray(a) if a.shape[2] == 1 else np.asarray(a)[:, :, columns]

    return jax.tree.map(one, form)


def codebook_of(path: str, w: Any, rule: Rule) -> tuple[Coded, tuple[int, ...]]:
    """The scheme's projection of w [G, N, n] with a codebook for every group, and the axes of losses [G, n] over which
    one scale is shared. The form is on the host."""
    groups, many, neurons = w.shape

    def projected(a: Any, stacked: int = 0) -> Coded:
        assert rule.scheme is not None
        (form,) = Task((path,), rule.scheme, stacked).project((a if isinstance(a, Array) else jax.device_put(a),))
        assert isinstance(form, Codes | Trellis)
        return jax.device_get(form)

    if rule.stacked:
        form = projected(w, 1)
        return form, (1,) if _columns(form) == 1 else ()
    merged = projected(w.swapaxes(0, 1).reshape(many, groups * neurons))

    def split(a: np.ndarray) -> np.ndarray:
        if a.shape[1] == 1:
            return np.broadcast_to(a, (groups, *a.shape))
        return a.reshape(a.shape[0], groups, neurons, *a.shape[2:]).swapaxes(0, 1)

    fields: dict[str, Any] = {name: split(array) for name, array in tables(merged).items()}
    merged = dataclasses.replace(with_codes(merged, split(codes_of(merged))), **fields)
    return merged, (0, 1) if _columns(merged) == 1 else ()


def _columns(form: Coded) -> int:
    """How many neurons of a group have a codebook of their own; 1 if they share it."""
    if isinstance(form, Codes) and form.levels is not None:
        return form.levels.shape[-2]
    return 1 if form.scale is None else form.scale.shape[-1]


def _not_finite(uses: Sequence[Use]) -> Iterator[tuple[int, str]]:
    for use in uses:
        for batch, pair in enumerate(use.inputs):
            for operand, net in zip(pair, ("original", "quantized"), strict=True):
                if not bool(jnp.isfinite(operand.x).all()):
                    yield batch, f"in the {net} net, batch {batch},"
