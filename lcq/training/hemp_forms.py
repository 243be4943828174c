"""What a run of `hemp` ends with: forms with the levels that it trained with, and a warning where weights were lost."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.blocks import blocks, compute_dtype, cut_axes
from lcq.training.baselines import Tasks
from lcq.training.block_entropy import codes_of, levels_of
from lcq.training.collapse import largest_share, warn_of_lost
from lcq.training.given import weights_of
from lcq.training.hemp import HempState, nearest_forms
from lcq.tree.aliases import Params
from lcq.tree.compress import check_finite, take
from lcq.tree.paths import flatten
from lcq.tree.rules import Task


def hemp_forms(state: HempState, params: Params, levels: str) -> tuple[Tasks, list[tuple[Codes, ...]]]:
    """The tasks of a run of `hemp`, and their forms: every weight at the nearest of the levels it was trained with.

    Training paid for few bits in these codes, and they stay. A codebook fitted anew to weights that have gathered on
    few levels would split them again: bytes come back that the loss was raised for, and what was judged while the net
    trained is not what is in the file. `lcq.compress(params, rules)` does that, where it is wanted.

    Args:
        state: of `hemp`.
        params: the parameters, or a running mean of them.
        levels: "trained" or "fitted", see `lcq.extract`.

    Raises:
        ValueError: weights that are not finite.

    Warns:
        UserWarning: more than 99 % of a leaf's weights are on one level, or of its blocks alike; names it.

    Source: arXiv 2107.05298, section 3: the quantizer of the training is that of the file.
    """
    leaves, _ = flatten(params)
    all_forms, shares = [], {}
    for task, codebooks in zip(state.tasks, state.codebooks, strict=True):
        for path in task.paths:
            check_finite(path, weights_of(leaves, path, "hemp"))
        forms = nearest_forms(task, leaves, codebooks)
        for path, form in zip(task.paths, forms, strict=True):
            shares[path] = largest_share(codes_of(form, form.codes), levels_of(path, form), state.reading)
        all_forms.append(_fit(task, take(leaves, task), forms) if levels == "fitted" else forms)
    warn_of_lost(shares, stacklevel=5)
    return state.tasks, all_forms


def _fit(task: Task, ws: tuple[Array | np.ndarray, ...], forms: tuple[Codes, ...]) -> tuple[Codes, ...]:
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
