"""The one verb for the end of a run: whatever trained the parameters, `extract` gives the forms to ship."""

import dataclasses
from collections.abc import Sequence

import jax
from jaxtyping import PyTree

from lcq.forms.base import Form, is_form
from lcq.forms.processes import shared_by_processes
from lcq.training.baselines import baseline_forms, baseline_states, find_baseline
from lcq.training.given import RESTORED
from lcq.training.hemp import find_hemp, hemp_states
from lcq.training.hemp_forms import hemp_forms
from lcq.training.lc import find_lagrangian, lagrangians, lc_forms
from lcq.training.smooth_binary import SmoothBinary
from lcq.tree.aliases import Forms, Leaves, OptState, Params
from lcq.tree.paths import flatten
from lcq.tree.rules import Task, check_same_rules


def extract(
    state: OptState,
    params: Params,
    *,
    levels: str = "trained",
    alphas: Leaves | None = None,
) -> Forms:
    """The compressed net that a run ends with, packed: what `lcq.save` writes. Right at any moment of a run.

        lc                          Theta = Pi(w - lambda/mu), one more C step on a copy
        hemp                        every weight at the nearest of the levels that it was trained with
        iterated_direct,
        straight_through_training   Theta = Pi(w), from the last Theta on
        smooth_binary               alpha_G sign(x), see `SmoothBinary.compress`

    Of `hemp(lc(...))` it is the leaves of both; those that both select are lc's.

    Args:
        state: an optimizer state with the state of one of these methods anywhere inside; for `smooth_binary`, which has
            none, what `lcq.smooth_binary` returned.
        params: the parameters, as given to `update`, or a running mean of them.
        levels: of `hemp`: "trained", those of the training; or "fitted", moved to where they serve the same codes best:
            a learned level to the mean of its weights, a scale to that of least squares. Codes, and so bits, are the
            same; fixed levels, zero points and levels without a weight stay.
        alphas: of `smooth_binary`: the learned scales by path, if they were learned.

    Returns:
        `params` with stored forms, of the leaves' dtypes, at the selected leaves. Where a leaf lies on the devices of
        several processes its form stays in the working layout, and lies likewise: `lcq.save` packs one after another.

    Raises:
        ValueError: no such state, several of one method, or one that lost its types; weights that are not finite, now
            or at an earlier C step; settings of another method.

    Warns:
        UserWarning: ||w - Delta(Theta)||^2 > 1 % of ||w||^2 in `lc`: the penalty schedule ended early, and the
            compressed net is not the trained one. More than 99 % of a leaf's weights on one level in `hemp`.

    Example:
        >>> import jax.numpy as jnp, lcq, optax
        >>> w = {"kernel": jnp.array([0.0, 0.0, 1.0, 1.0])}
        >>> tx = lcq.hemp(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(2))], order=1, small=0)
        >>> state, moved = tx.init(w), {"kernel": jnp.array([0.0, 0.2, 0.7, 0.9])}
        >>> lcq.extract(state, moved)["kernel"].dense()
        Array([0., 0., 1., 1.], dtype=float32)
        >>> lcq.extract(state, moved, levels="fitted")["kernel"].dense().round(3)
        Array([0.1, 0.1, 0.8, 0.8], dtype=float32)

    Source: arXiv 1707.01209, fig. 3; arXiv 2107.05298, section 3; arXiv 2107.01400.
    """
    if levels not in ("trained", "fitted"):
        raise ValueError(f"expected levels='trained' or 'fitted', got {levels!r}")
    if isinstance(state, SmoothBinary):
        tree = state.compress(params, alphas)
        return jax.tree.map(lambda leaf: _stored(leaf) if is_form(leaf) else leaf, tree, is_leaf=is_form)
    if alphas is not None:
        raise ValueError("expected alphas= with what lcq.smooth_binary returned, got another state; drop it")
    if levels != "trained" and not hemp_states(state):
        raise ValueError(f"expected levels={levels!r} with a state of hemp, got none in the optimizer state; drop it")
    leaves, structure = flatten(params)
    stored = dict(leaves)
    for path, form in _forms(state, params, levels).items():
        stored[path] = _stored(dataclasses.replace(form, dtype=str(leaves[path].dtype)))
    return jax.tree.unflatten(structure, stored.values())


def _stored(form: Form) -> Form:
    """The form packed, if one process can read it."""
    return form if shared_by_processes(form) else form.pack()


def _forms(state: PyTree, params: Params, levels: str) -> dict[str, Form]:
    """The forms of every method in an optimizer state, by path; the inner method's at a leaf that two select."""
    found: list[tuple[Sequence[Task], Sequence[tuple[Form, ...]]]] = []
    if shared_by_processes(params):
        states = [*(node.problem for node in lagrangians(state)), *baseline_states(state), *hemp_states(state)]
        check_same_rules([task for node in states for task in node.tasks], params)
    if baseline_states(state):
        found.append(baseline_forms(find_baseline(state), params))
    if hemp_states(state):
        found.append(hemp_forms(find_hemp(state), params, levels))
    if lagrangians(state):
        found.append(lc_forms(find_lagrangian(state), params))
    if not found:
        raise ValueError(
            "expected a state of lc, hemp, iterated_direct or straight_through_training in the optimizer state, or "
            "what lcq.smooth_binary returned, got none: the order is extract(state, params); was the optimizer made by "
            f"one of them? {RESTORED}"
        )
    return {
        path: form
        for tasks, forms in found
        for task, of_task in zip(tasks, forms, strict=True)
        for path, form in zip(task.paths, of_task, strict=True)
    }
