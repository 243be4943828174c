"""What LC is compared with, on the same schemes: iterated direct compression and straight-through training.

Direct compression itself, Theta = Pi(w) of a trained net, is `lcq.compress`. Both wrappers here leave parameters of
which `lcq.compress(params, rules)` is the result.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lcq.base import Form
from lcq.registry import register_empty
from lcq.rules import Rule, Task, checked, flatten, resolve
from lcq.tree import check_finite, take


@register_empty
@jax.tree_util.register_static
class Tasks(tuple[Task, ...]):
    """Tasks as a node of a state without arrays."""


class IteratedState(NamedTuple):
    """State of `iterated_direct`: the inner state, updates made, tasks, Theta of each task."""

    inner: Any
    steps: Any
    tasks: Tasks
    forms: tuple[tuple[Form, ...], ...]


def iterated_direct(
    inner: optax.GradientTransformation, rules: Sequence[Rule], *, every: int
) -> optax.GradientTransformationExtraArgs:
    """Iterated direct compression: w <- Delta(Pi(w)) after every `every` updates, and plain training in between.

    Nothing couples the two, so that training moves away what the projection did: it sticks near direct compression.

    Args:
        inner: any optax optimizer.
        rules: which leaves are projected, and how.
        every: updates between two projections.

    Source: "iDC" of arXiv 1707.04319, section 5; Han et al., arXiv 1510.00149.
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"wanted every= a positive int; got {every!r}")
    inner, rules = optax.with_extra_args_support(inner), checked(rules)

    def init(params: Any) -> IteratedState:
        tasks = Tasks(resolve(rules, params))
        return IteratedState(inner.init(params), jnp.zeros([], jnp.int32), tasks, _project(tasks, params, None))

    def update(grads: Any, state: IteratedState, params: Any = None, **extra: Any) -> tuple[Any, IteratedState]:
        params = _given(params)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        steps = state.steps + 1
        moved = optax.apply_updates(params, updates)
        due = steps % every == 0
        forms = jax.lax.cond(due, lambda p, f: _project(state.tasks, p, f), lambda p, f: f, moved, state.forms)
        there = _put(state.tasks, moved, forms)
        moved = jax.tree.map(lambda a, b: jnp.where(due, a, b), there, moved)
        updates = jax.tree.map(jnp.subtract, moved, params)
        return updates, IteratedState(inner_state, steps, state.tasks, forms)

    return optax.GradientTransformationExtraArgs(init, update)


class StraightThroughState(NamedTuple):
    """State of `straight_through_training`: the inner state, latent weights, tasks, Theta of each task."""

    inner: Any
    latent: Any
    tasks: Tasks
    forms: tuple[tuple[Form, ...], ...]


def straight_through_training(
    inner: optax.GradientTransformation, rules: Sequence[Rule]
) -> optax.GradientTransformationExtraArgs:
    """Straight-through training: v <- v - eta dL/dw at w = Delta(Pi(v)), with latent weights v in the state.

    The parameters of the loop are the compressed ones from the first update on (pass them through `lcq.decompress(
    lcq.compress(params, rules))` to have them so before it), and the gradient with respect to them moves v. Each
    projection starts from the last.

    Args:
        inner: any optax optimizer.
        rules: which leaves are projected, and how.

    Source: Courbariaux, Bengio & David, arXiv 1511.00363; learned codebooks as in arXiv 1707.04319.
    """
    inner, rules = optax.with_extra_args_support(inner), checked(rules)

    def init(params: Any) -> StraightThroughState:
        tasks = Tasks(resolve(rules, params))
        latent = jax.tree.map(lambda w: jnp.array(w, copy=True), params)
        return StraightThroughState(inner.init(params), latent, tasks, _project(tasks, params, None))

    def update(grads: Any, state: StraightThroughState, params: Any = None, **extra: Any) -> Any:
        params = _given(params)
        updates, inner_state = inner.update(grads, state.inner, state.latent, **extra)
        latent = optax.apply_updates(state.latent, updates)
        forms = _project(state.tasks, latent, state.forms)
        updates = jax.tree.map(jnp.subtract, _put(state.tasks, latent, forms), params)
        return updates, StraightThroughState(inner_state, latent, state.tasks, forms)

    return optax.GradientTransformationExtraArgs(init, update)


def _given(params: Any) -> Any:
    if params is None:
        raise ValueError("the parameters are projected: call update(grads, state, params)")
    return params


def _project(tasks: Tasks, params: Any, previous: Any) -> tuple[tuple[Form, ...], ...]:
    leaves, _ = flatten(params)
    for task in tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
    warm = previous or (None,) * len(tasks)
    return tuple(task.project(take(leaves, task), p) for task, p in zip(tasks, warm, strict=True))


def _put(tasks: Tasks, params: Any, forms: Any) -> Any:
    """The parameters with Delta(Theta) at the selected leaves."""
    leaves, structure = flatten(params)
    for task, of_task in zip(tasks, forms, strict=True):
        leaves.update((path, form.dense()) for path, form in zip(task.paths, of_task, strict=True))
    return jax.tree.unflatten(structure, leaves.values())
