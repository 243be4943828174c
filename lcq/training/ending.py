"""How a run of `hemp` ends: forms with the levels that it trained with, and a word where weights were lost."""

import dataclasses
import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.blocks import blocks, compute_dtype, cut_axes
from lcq.training.block_entropy import levels_of
from lcq.training.given import weights_of
from lcq.training.hemp import find_hemp, nearest_forms, share_of
from lcq.tree.compress import check_finite, replace, take
from lcq.tree.paths import flatten
from lcq.tree.rules import Task

NEARLY_ALL = 0.99
"""A leaf with more of its weights on one level has lost them."""


def compress_warm(opt_state: Any, params: Any, *, levels: str = "trained") -> Any:
    """The compressed net of a run of `hemp`: every weight at the nearest of the levels that it was trained with.

    Training paid for few bits in these codes, and they stay. A codebook fitted anew to weights that have gathered on
    few levels would split them again: bytes come back that the loss was raised for, and what was judged while the net
    trained is not what is in the file. `lcq.compress(params, rules)` does that, where it is wanted.

    Args:
        opt_state: an optimizer state with one HEMP state anywhere inside.
        params: the parameters, as given to `update`, or a running mean of them.
        levels: "trained", those of the training; or "fitted", moved to where they serve these codes best: a learned
            level to the mean of its weights, a scale to that of least squares. Codes, and so bits, are the same; fixed
            levels, zero points and levels without a weight stay.

    Returns:
        `params` with forms in the working layout, of the leaves' dtypes, at the selected leaves.

    Raises:
        ValueError: no HEMP state, or several; weights that are not finite; another `levels`.

    Warns:
        UserWarning: more than 99 % of a leaf's weights are on one level; names it.

    Example:
        >>> import lcq, optax
        >>> w = {"kernel": jnp.array([0.0, 0.0, 1.0, 1.0])}
        >>> tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(2))], order=1, small=0)
        >>> state, moved = tx.init(w), {"kernel": jnp.array([0.0, 0.2, 0.7, 0.9])}
        >>> compress_warm(state, moved)["kernel"].dense()
        Array([0., 0., 1., 1.], dtype=float32)
        >>> compress_warm(state, moved, levels="fitted")["kernel"].dense().round(3)
        Array([0.1, 0.1, 0.8, 0.8], dtype=float32)

    Source: arXiv 2107.05298, section 3: the quantizer of the training is that of the file.
    """
    if levels not in ("trained", "fitted"):
        raise ValueError(f"expected levels='trained' or 'fitted', got {levels!r}")
    state = find_hemp(opt_state)
    leaves, structure = flatten(params)
    all_forms, shares = [], {}
    for task, tables in zip(state.tasks, state.tables, strict=True):
        for path in task.paths:
            check_finite(path, weights_of(leaves, path, "hemp"))
        forms = nearest_forms(task, leaves, tables)
        for path, form in zip(task.paths, forms, strict=True):
            shares[path] = share_of(form.codes, levels_of(path, form))
        if levels == "fitted":
            forms = _fit(task, take(leaves, task), forms)
        dtypes = (str(leaves[path].dtype) for path in task.paths)
        all_forms.append(tuple(dataclasses.replace(f, dtype=d) for f, d in zip(forms, dtypes, strict=True)))
    warn_of_lost(shares, stacklevel=3)
    return replace(structure, leaves, state.tasks, all_forms)


def warn_of_lost(shares: dict[str, Any], stacklevel: int) -> None:
    """Warns of leaves with nearly all weights on one level; in a trace nothing can be looked at."""
    if any(isinstance(share, jax.core.Tracer) for share in shares.values()):
        return
    lost = {path: float(np.max(share)) for path, share in shares.items()}
    lost = {path: share for path, share in lost.items() if share > NEARLY_ALL}
    if lost:
        names = ", ".join(f"{path or 'the only leaf'} ({share:.1%})" for path, share in list(lost.items())[:8])
        more = f" and {len(lost) - 8} more leaves" if len(lost) > 8 else ""
        warnings.warn(
            f"nearly all weights are on one level: {names}{more}; these leaves do nothing any more: lower "
            "entropy_weight=, or let it fall in time (docs/guides/entropy_weight.md)",
            stacklevel=stacklevel,
        )


def _fit(task: Task, ws: tuple[Any, ...], forms: tuple[Codes, ...]) -> tuple[Codes, ...]:
    """The forms with the numbers that make sum (w - Delta)^2 least for the codes as they are; leaves share them."""
    if forms[0].levels is None and forms[0].scale is None:
        return forms
    parts = [_sums(jnp.asarray(w, compute_dtype(w.dtype)), form) for w, form in zip(ws, forms, strict=True)]
    above, below = (functools.reduce(jnp.add, (p[i].reshape(parts[0][i].shape) for p in parts)) for i in (0, 1))
    fixed = np.asarray(getattr(task.scheme, "fixed", ()), np.float32)

    def new(old: Array) -> Array:
        best = jnp.where(below > 0, above / jnp.where(below > 0, below, 1), old.reshape(below.shape))
        return best.reshape(old.shape).astype(old.dtype)

    if forms[0].scale is not None:
        return tuple(dataclasses.replace(form, scale=new(jnp.asarray(form.scale))) for form in forms)
    still = [jnp.isin(jnp.asarray(form.levels), fixed.astype(form.levels.dtype)) for form in forms]
    return tuple(
        dataclasses.replace(form, levels=jnp.where(s, form.levels, new(jnp.asarray(form.levels))))
        for form, s in zip(forms, still, strict=True)
    )


def _sums(w: Float[Array, "*leaf"], form: Codes) -> tuple[Array, Array]:
    """Numerator and denominator of what is fitted, for each block: of a scale <w, c> and <c, c>, c the steps that it
    scales; of each level, last, the sum and the number of its weights."""
    numbers = form.levels[..., 0] if form.scale is None else form.scale
    counts = numbers.shape
    axes = blocks(w.shape, counts).axes
    x, codes = cut_axes(w, counts), cut_axes(form.codes, counts)
    if form.scale is None:
        marks = [(codes == k).astype(w.dtype) for k in range(form.size_of_table)]
        pairs = [(jnp.sum(x * m, axes), jnp.sum(m, axes)) for m in marks]
        above, below = (jnp.stack([pair[i].reshape(counts) for pair in pairs], -1) for i in (0, 1))
        return above, below
    steps = cut_axes(dataclasses.replace(form, scale=None, dtype=str(w.dtype)).dense(), counts)
    return jnp.sum(x * steps, axes).reshape(counts), jnp.sum(steps * steps, axes).reshape(counts)
