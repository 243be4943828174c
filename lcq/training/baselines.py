"""What LC is compared with, on the same schemes: iterated direct compression and straight-through training.

Direct compression itself, Theta = Pi(w) of a trained net, is `lcq.compress`. `lcq.extract(state, params)` ends a run of
either wrapper.
"""

import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Int, PyTree

from lcq.forms.base import Form, cast_masks, is_form
from lcq.forms.dtypes import native_tree
from lcq.forms.serialization import register_empty
from lcq.training.augmented_lagrangian import first_forms
from lcq.training.given import (
    Optimizer,
    abstract,
    check_arrays,
    check_one_run,
    check_rules,
    check_state,
    slope_of,
    start_inner,
    weights_of,
)
from lcq.training.objective import at, forget
from lcq.training.straight_through import straight_through
from lcq.tree.aliases import Forms, Leaves, OptState, Params
from lcq.tree.compress import check_finite, take
from lcq.tree.paths import flatten
from lcq.tree.rules import Rules, Task, checked, resolve


@register_empty
@jax.tree_util.register_static
class Tasks(tuple[Task, ...]):
    """Tasks as a node of a state without arrays."""


class IteratedState(NamedTuple):
    """State of `iterated_direct`: the inner state, updates made, tasks, Theta of each task."""

    inner: PyTree
    steps: Int[Array, ""]
    tasks: Tasks
    forms: tuple[tuple[Form, ...], ...]


def iterated_direct(inner: Optimizer, rules: Rules, *, every: int) -> optax.GradientTransformationExtraArgs:
    """Iterated direct compression: w <- Delta(Pi(w)) after every `every` updates, and plain training in between.

    Nothing couples the two, so that training moves away what the projection did: it sticks near direct compression.

    Extra arguments of `update` reach the inner optimizer as they are, for it minimises the loss; what a line search
    keeps for `optax.value_and_grad_from_state` is dropped when a projection moves the parameters away from there.

    Args:
        inner: any optax optimizer.
        rules: which leaves are projected, and how.
        every: updates between two projections.

    Source: "iDC" of arXiv 1707.04319, section 5; Han et al., arXiv 1510.00149.
    """
    if not isinstance(every, int) or every < 1:
        raise ValueError(f"expected every= a positive int, got {every!r}")
    inner, rules = optax.with_extra_args_support(inner), checked(rules)

    def first_state(params: Params, blank: bool) -> IteratedState:
        tasks, inner_state = Tasks(resolve(rules, params)), start_inner(inner, params)
        return IteratedState(inner_state, jnp.zeros([], jnp.int32), tasks, _first(tasks, params, blank))

    def init(params: Params) -> PyTree:
        if abstract(params):
            return jax.eval_shape(functools.partial(first_state, blank=True), params)
        return first_state(native_tree(params), blank=False)

    def update(
        grads: optax.Updates, state: PyTree, params: Params = None, **extra: object
    ) -> tuple[optax.Updates, IteratedState]:
        _check(grads, state, params, IteratedState, "iterated_direct")
        grads, params = native_tree((grads, params))
        check_rules(state.tasks, rules, params, "iterated_direct")
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        steps = state.steps + 1
        moved = optax.apply_updates(params, updates)
        due = steps % every == 0
        forms = jax.lax.cond(due, lambda p, f: _project(state.tasks, p, f), lambda p, f: f, moved, state.forms)
        there = _put(state.tasks, moved, forms)
        moved = jax.tree.map(lambda a, b: jnp.where(due, a, b), there, moved)
        updates = jax.tree.map(jnp.subtract, moved, params)
        return updates, IteratedState(forget(inner_state, due), steps, state.tasks, forms)

    return optax.GradientTransformationExtraArgs(init, update)


class StraightThroughState(NamedTuple):
    """State of `straight_through_training`: the inner state, latent weights, tasks, Theta of each task."""

    inner: PyTree
    latent: Params
    tasks: Tasks
    forms: tuple[tuple[Form, ...], ...]


def straight_through_training(inner: Optimizer, rules: Rules) -> optax.GradientTransformationExtraArgs:
    """Straight-through training: v <- v - eta dL/dw at w = Delta(Pi(v)), with latent weights v in the state.

    The parameters of the loop are the compressed ones from the first update on (pass them through `lcq.decompress(
    lcq.compress(params, rules))` to have them so before it), and the gradient with respect to them moves v. Each
    projection starts from the last.

    Functions among the extra arguments of `update` (`value_fn` and the like) are handed on as functions of v, with the
    gradient of w = Delta(Pi(v)) as that of v: what a line search then looks at is constant between flips of codes.

    Args:
        inner: any optax optimizer.
        rules: which leaves are projected, and how.

    Source: Courbariaux, Bengio & David, arXiv 1511.00363; learned codebooks as in arXiv 1707.04319.
    """
    inner, rules = optax.with_extra_args_support(inner), checked(rules)

    def first_state(params: Params, blank: bool) -> StraightThroughState:
        tasks, inner_state = Tasks(resolve(rules, params)), start_inner(inner, params)
        check_arrays(params)
        latent = jax.tree.map(lambda w: jnp.array(w, copy=True), params)
        return StraightThroughState(inner_state, latent, tasks, _first(tasks, params, blank))

    def init(params: Params) -> PyTree:
        if abstract(params):
            return jax.eval_shape(functools.partial(first_state, blank=True), params)
        return first_state(native_tree(params), blank=False)

    def update(
        grads: optax.Updates, state: PyTree, params: Params = None, **extra: object
    ) -> tuple[optax.Updates, StraightThroughState]:
        _check(grads, state, params, StraightThroughState, "straight_through_training")
        grads, params = native_tree((grads, params))
        check_rules(state.tasks, rules, params, "straight_through_training")

        def compressed(latent: Params) -> Params:
            return _put(state.tasks, latent, _project(state.tasks, latent, state.forms), straight_through)

        updates, inner_state = inner.update(grads, state.inner, state.latent, **at(extra, compressed))
        latent = optax.apply_updates(state.latent, updates)
        forms = _project(state.tasks, latent, state.forms)
        updates = jax.tree.map(jnp.subtract, _put(state.tasks, latent, forms), params)
        return updates, StraightThroughState(inner_state, latent, state.tasks, forms)

    return optax.GradientTransformationExtraArgs(init, update)


def baseline_states(opt_state: OptState) -> list[IteratedState | StraightThroughState]:
    """Every state of the two wrappers in an optimizer state, without nnx variables."""

    def is_one(node: PyTree) -> bool:
        return isinstance(node, IteratedState | StraightThroughState)

    return [node for node in jax.tree.leaves(nnx.as_pure(opt_state), is_leaf=is_one) if is_one(node)]


def find_baseline(opt_state: OptState) -> IteratedState | StraightThroughState:
    """The one state of the two wrappers in an optimizer state, without nnx variables.

    Raises:
        ValueError: none, several, or one that lost its types.
    """
    found = baseline_states(opt_state)
    if len(found) != 1:
        raise ValueError(
            f"expected one state of iterated_direct or straight_through_training, got {len(found)}: pass the part that "
            "holds one of them"
        )
    check_state(found[0], type(found[0]), type(found[0]).__name__, sound=_is_sound(found[0]))
    return found[0]


def baseline_forms(state: IteratedState | StraightThroughState, params: Params) -> tuple[Tasks, list[tuple[Form, ...]]]:
    """The tasks of a run of either wrapper, and Pi(w) of the parameters, from the last Theta on."""
    _check_one_run(state, type(state).__name__)
    leaves, _ = flatten(params)
    for path in (path for task in state.tasks for path in task.paths):
        check_finite(path, weights_of(leaves, path, type(state).__name__))
    warm = [tuple(cast_masks(form, bool) for form in of_task) for of_task in state.forms]
    return state.tasks, [task.project(take(leaves, task), p) for task, p in zip(state.tasks, warm, strict=True)]


def _is_sound(state: PyTree) -> bool:
    """Whether a state's types are there, which a checkpoint may have lost at any depth."""
    nodes = jax.tree.leaves(getattr(state, "forms", None), is_leaf=is_form)
    return isinstance(getattr(state, "tasks", None), Tasks) and all(map(is_form, nodes))


def _check(grads: optax.Updates, state: PyTree, params: Params, kind: type, method: str) -> None:
    """Refuses an update without parameters, or a gradient for each of them, or the types of the state."""
    if params is None:
        raise ValueError("the parameters are projected: call update(grads, state, params)")
    check_state(state, kind, method, sound=_is_sound(state))
    _check_one_run(state, method)
    leaves, slopes = flatten(params)[0], flatten(grads)[0]
    selected = [path for task in state.tasks for path in task.paths]
    for path in (*selected, *(path for path in leaves if path not in slopes)):
        slope_of(slopes, path, weights_of(leaves, path, method))


def _check_one_run(state: IteratedState | StraightThroughState, method: str) -> None:
    if isinstance(state, IteratedState):
        check_one_run(state.steps, method)


def _first(tasks: Tasks, params: Params, blank: bool) -> tuple[tuple[Form, ...], ...]:
    """The first projection; masks as states hold them."""
    leaves = _finite(tasks, params)
    return _kept(first_forms(task, take(leaves, task), blank) for task in tasks)


def _project(tasks: Tasks, params: Params, previous: tuple[tuple[Form, ...], ...]) -> tuple[tuple[Form, ...], ...]:
    """A projection that starts from the last."""
    leaves = _finite(tasks, params)
    warm = (tuple(cast_masks(form, bool) for form in of_task) for of_task in previous)
    return _kept(task.project(take(leaves, task), p) for task, p in zip(tasks, warm, strict=True))


def _finite(tasks: Tasks, params: Params) -> Leaves:
    """The leaves by path, those of tasks looked at."""
    leaves, _ = flatten(params)
    for task in tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
    return leaves


def _kept(forms: Iterable[tuple[Form, ...]]) -> tuple[tuple[Form, ...], ...]:
    return tuple(tuple(cast_masks(form, jnp.uint8) for form in of_task) for of_task in forms)


Join = Callable[[Array, Array], Array]
"""(w, Delta(Theta)) -> what takes the place of w."""


def _put(tasks: Tasks, params: Params, forms: Forms, join: Join = lambda w, delta: delta) -> Params:
    """The parameters with Delta(Theta), or join(w, Delta(Theta)), at the selected leaves."""
    leaves, structure = flatten(params)
    for task, of_task in zip(tasks, forms, strict=True):
        for path, form in zip(task.paths, of_task, strict=True):
            leaves[path] = join(leaves[path], cast_masks(form, bool).dense())
    return jax.tree.unflatten(structure, leaves.values())
