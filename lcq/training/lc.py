"""LC: model compression as constrained optimization, as an optax gradient transformation.

    minimise L(w)  subject to  w = Delta(Theta)

by an augmented Lagrangian whose penalty weight mu grows:

    L step   w <- argmin L(w) + mu/2 ||w - Delta(Theta) - lambda/mu||^2     by any optax optimizer
    C step   Theta <- Pi(w - lambda/mu),   lambda <- lambda - mu (w - Delta(Theta))

Source: Carreira-Perpinan, arXiv 1707.01209; Carreira-Perpinan & Idelbayev, arXiv 1707.04319.
"""

import functools
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Array, Int, PyTree

from lcq.forms.base import Form, is_form
from lcq.forms.dtypes import native_tree
from lcq.training.augmented_lagrangian import (
    Info,
    Lagrangian,
    Problem,
    check_shapes,
    check_slopes,
    coupling_term,
    pull,
    solve,
    start,
)
from lcq.training.given import RESTORED, OptimizerOrFactory, Schedule, abstract, check_rules, check_state, start_inner
from lcq.training.objective import add_term, keeps_value, refuse_used, take_term
from lcq.training.penalty import linear_step
from lcq.training.placeholders import NO_PARAMETER, has_placeholders, is_placeholder, placeholder_trees
from lcq.training.schedules import Geometric, Penalty, Scheduled, as_schedule, same_schedule
from lcq.tree.aliases import OptState, Params
from lcq.tree.compress import check_finite
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Rules, Task, check_same_rules, checked, resolve

_LARGE_GAP = 0.01

_PROXIMAL = (
    "with a proximal coupling it sees the loss alone, and is pulled to Theta after its step, which is not one along a "
    "function that could be searched; use coupling='gradient'"
)


class LCState(NamedTuple):
    """State of `lc`.

    Attributes:
        inner: State of the wrapped optimizer.
        steps: Updates made, int32.
        lagrangian: Theta, lambda and mu, and what a C step needs.
    """

    inner: PyTree
    steps: Int[Array, ""]
    lagrangian: Lagrangian


def lc(
    inner: OptimizerOrFactory,
    rules: Rules,
    *,
    mu: Penalty,
    every: int | tuple[int, int] | None,
    learning_rate: Schedule | None = None,
    coupling: str | Callable[..., PyTree] = "gradient",
    multipliers: bool = True,
    multipliers_dtype: str | None = None,
    narrow_codes: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the parameters converge to compressed ones.

    minimise L(w) subject to w = Delta(Theta), see the module's docstring. The training loop stays as it is:
    `update` adds the coupling's gradient mu (w - Delta(Theta)) - lambda to the gradients of the selected leaves,
    and at the start of the update that follows an L step it makes a C step on the parameters it is given. `init`
    is direct compression, Theta = Pi(w) and lambda = 0: start from trained parameters.

    Args:
        inner: an optax optimizer; or, with `learning_rate`, a function from a learning rate to one.
        rules: which leaves are compressed, and how.
        mu: penalty weights: `lcq.geometric(...)`, a constant number, or a function of the number of C steps made, as
            optax's schedules are. `lcq.penalty_schedule(updates)` gives this and `every` for a run of that length.
        every: updates per L step, or (first, rest); None leaves C steps to `lcq.training.c_step`, as an ensemble under
            vmap wants: there a C step would be computed at every update. With s the step per unit of gradient (for SGD
            with momentum beta the learning rate over 1 - beta), s mu `every` should stay above 3: in fewer updates
            w cannot follow its multipliers and oscillates about Delta(Theta), codes flip back and forth, and the gap
            remains. So mu grows faster than the learning rate falls.
        learning_rate: number, or schedule of the number of updates. With coupling="gradient" the inner optimizer
            runs at min(learning_rate, 1/mu), which keeps SGD stable as mu grows.
        coupling: "gradient", or "proximal": the inner optimizer sees the loss gradient alone, and its result v is
            pulled to t = Delta(Theta) + lambda/mu by w <- (v + s mu t)/(1 + s mu), stable for every mu. s is the
            step per unit of gradient that the inner optimizer makes in the long run, and with a wrong s the fixed
            point is wrong: "proximal" finds it for optimizers linear in the gradient (SGD, momentum, Nesterov);
            for Adam pass `lcq.training.adam_step(b2, eps)`, for others a function (inner state, learning rate) -> s, a
            scalar or a tree like the parameters.
        multipliers: False for the quadratic-penalty method, lambda = 0: larger gap at the same mu.
        multipliers_dtype: "bfloat16" keeps lambda in half the memory, rounded up or down at random so that no small
            step is lost; None for the dtype that sums have, float32 or wider.
        narrow_codes: whether the state keeps codes of at most 16 levels, and masks, in JAX's integers of 4 bits,
            which accelerators pack: half a byte for a weight. Not every checkpoint format has them.

    What `update` is given beside the gradients to describe the loss (`value`, `grad`, `value_fn`, `obj_fn`, `grad_fn`)
    it hands on with the coupling mu/2 ||w - Delta(Theta) - lambda/mu||^2 or its gradient added, so that line searches
    search what is minimised. docs/guides/optax_wrappers.md says which optimizers go inside, which outside.

    Returns:
        A `GradientTransformationExtraArgs` whose `update` needs `params`. Its state holds one copy of the selected
        weights (lambda) and their codes. Under `optax.inject_hyperparams` name static_args=("inner", "mu",
        "every", "coupling"). Under `optax.MultiSteps(tx, k)` updates that are not emitted are undone, so each C step
        is computed k times and counts once.

    Raises:
        ValueError: at construction for settings that do not fit together; in `init` for rules that do not fit the
            parameters and for weights that are not finite; in `update` for a leaf without a gradient, or of another
            shape than in `init`, a state that lost its types or was made for other rules or penalty weights, and an
            optimizer that uses `value` and the like under a proximal coupling.

    Example:
        >>> import jax, lcq, optax
        >>> w = {"kernel": jnp.array([0.0, 1.0, 2.0, 5.0])}
        >>> mu = lcq.geometric(0.1, 1.2, steps=20)
        >>> tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("kernel", lcq.Binary())], mu=mu, every=10)
        >>> state, grad = tx.init(w), jax.jit(jax.grad(lambda w: jnp.sum((w["kernel"] - 3) ** 2)))
        >>> update = jax.jit(tx.update)
        >>> for _ in range(200):
        ...     updates, state = update(grad(w), state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> lcq.extract(state, w)["kernel"].dense().round(2)
        Array([3., 3., 3., 3.], dtype=float32)

    Source: arXiv 1707.01209, fig. 3 (augmented Lagrangian); clipped learning rate: arXiv 1707.04319, section 3.3.
    """
    rules = checked(rules)
    schedule, (first, rest) = as_schedule(mu), _periods(every)
    _check_settings(inner, rules, every, learning_rate, coupling)
    kept = _check_dtype(multipliers_dtype, multipliers)
    step_size: Any = linear_step(inner) if coupling == "proximal" else coupling

    def optimizer_at(eta: ArrayLike | None) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(inner if learning_rate is None else inner(eta))

    def learning_rate_at(steps: ArrayLike) -> ArrayLike | None:
        return learning_rate(steps) if callable(learning_rate) else learning_rate

    def first_state(params: Params, blank: bool) -> LCState:
        steps = jnp.zeros([], jnp.int32)
        inner_state = start_inner(optimizer_at(learning_rate_at(steps)), params)
        if has_placeholders(params):
            return LCState(inner_state, NO_PARAMETER, _placeholder(params, rules, multipliers))
        if learning_rate is not None:
            _check_learning_rate_is_not_kept(inner_state)
        check_same_rules(rules, params)
        problem = Problem(resolve(rules, params), schedule)
        return LCState(inner_state, steps, start(params, problem, multipliers, blank, kept, narrow_codes))

    def init(params: Params) -> PyTree:
        if abstract(params):
            return jax.eval_shape(functools.partial(first_state, blank=True), params)
        return first_state(native_tree(params), blank=False)

    def update(
        grads: optax.Updates, state: PyTree, params: Params = None, **extra: object
    ) -> tuple[optax.Updates, LCState]:
        if params is None:
            raise ValueError("lc couples the gradients to the parameters: call update(grads, state, params)")
        grads, params = native_tree((grads, params))
        check_state(state, LCState, "lc", sound=_is_sound(getattr(state, "lagrangian", None)))
        inner_state, steps, lagrangian = state
        check_shapes(lagrangian, params)
        check_rules(lagrangian.problem.tasks, rules, params, "lc")
        _check_schedule(lagrangian.problem.mu, schedule)
        if every is not None:
            due = (steps >= first) & ((steps - first) % rest == 0)
            lagrangian = jax.lax.cond(due, lambda: solve(lagrangian, params)[1], lambda: lagrangian)
            lagrangian = jax.lax.optimization_barrier(lagrangian)  # or wide copies of it would be made in both branches
        weight, eta = schedule.at(lagrangian.c_steps), learning_rate_at(steps)
        if coupling == "gradient":
            term = coupling_term(lagrangian, weight)
            coupled = term.add(grads, params)
            optimizer = optimizer_at(None if eta is None else jnp.minimum(eta, 1 / weight))
            updates, inner_state = optimizer.update(coupled, inner_state, params, **add_term(extra, params, term))
            if keeps_value(inner_state):
                inner_state = take_term(inner_state, optax.apply_updates(params, updates), term)
        else:
            check_slopes(grads, lagrangian, params)
            optimizer = optimizer_at(eta)
            refuse_used(functools.partial(optimizer.update, grads, inner_state, params), extra, _PROXIMAL)
            updates, inner_state = optimizer.update(grads, inner_state, params, **extra)
            updates = pull(updates, lagrangian, params, weight, step_size(inner_state, eta))
        return updates, LCState(inner_state, optax.safe_increment(steps), lagrangian)

    return optax.GradientTransformationExtraArgs(init, update)


def c_step(opt_state: OptState, params: Params) -> OptState:
    """Makes a C step by hand: Theta <- Pi(w - lambda/mu), lambda <- lambda - mu (w - Delta(Theta)), the next mu.

    For `lc(every=None)`: own schedules, exact solvers on the host (called outside jit), ensembles under vmap.

    Args:
        opt_state: an optimizer state with one LC state anywhere inside.
        params: the parameters, as given to `update`.

    Returns:
        The optimizer state after the C step. That of an `nnx.Optimizer` comes without variables: put it back by
        nnx.update(optimizer.opt_state, nnx.state(result)).

    Raises:
        ValueError: no LC state in `opt_state`, or several; parameters of another shape than in `init`.
    """
    check_shapes(find_lagrangian(opt_state), params)
    return jax.tree.map(
        lambda node: solve(node, params)[1] if _is_lagrangian(node) else node,
        nnx.as_pure(opt_state),
        is_leaf=_is_lagrangian,
    )


def lc_forms(state: Lagrangian, params: Params) -> tuple[tuple[Task, ...], list[tuple[Form, ...]]]:
    """The tasks of a run of `lc`, and their forms after one more C step on a copy.

    Raises:
        ValueError: weights of another shape than in `init`, or not finite, now or at an earlier C step.

    Warns:
        UserWarning: ||w - Delta(Theta)||^2 > 1 % of ||w||^2.
    """
    check_shapes(state, params)
    leaves, _ = flatten(params)
    for task in state.problem.tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
    if skipped := int(state.info.skipped):
        raise ValueError(
            f"expected finite weights at every C step; {skipped} were skipped for NaN or infinite ones: the run "
            "diverged; use a smaller learning rate, learning_rate= to clip it at 1/mu, or a slower mu"
        )
    forms, after = solve(state, params)
    if (gap := float(after.info.gap)) > _LARGE_GAP:
        warnings.warn(
            f"the weights are {gap:.1%} (squared) away from the compressed ones: let mu grow further, as "
            "lcq.penalty_schedule(updates) does for a run of that many updates",
            stacklevel=4,
        )
    return state.problem.tasks, forms


def _is_lagrangian(node: PyTree) -> bool:
    return isinstance(node, Lagrangian)


def lagrangians(opt_state: OptState) -> list[Lagrangian]:
    """Every Lagrangian in an optimizer state, without nnx variables."""
    nodes = jax.tree.leaves(nnx.as_pure(opt_state), is_leaf=_is_lagrangian)
    return [node for node in nodes if _is_lagrangian(node)]


def find_lagrangian(opt_state: OptState) -> Lagrangian:
    """The one Lagrangian in an optimizer state, without nnx variables.

    Raises:
        ValueError: none, several, or one that lost its types.
    """
    found = lagrangians(opt_state)
    if len(found) != 1:
        nothing = f"was the optimizer made by lcq.lc? {RESTORED}"
        remedy = "pass the part that holds one of them" if found else nothing
        raise ValueError(f"expected one LC state in the optimizer state, got {len(found)}: {remedy}")
    check_state(found[0], Lagrangian, "lc", sound=_is_sound(found[0]))
    return found[0]


def _is_sound(lagrangian: PyTree) -> bool:
    """Whether a state's types are there, which a checkpoint may have lost at any depth."""
    if not _is_lagrangian(lagrangian) or not isinstance(lagrangian.problem, Problem):
        return False
    forms = jax.tree.leaves(lagrangian.codebooks, is_leaf=is_form)
    return isinstance(lagrangian.info, Info) and isinstance(lagrangian.codes, tuple) and all(map(is_form, forms))


def _periods(every: Any) -> tuple[int, int]:
    """Updates before the first C step, and between two."""
    periods = every if isinstance(every, tuple) else (every, every)
    if every is None:
        return 1, 1
    if len(periods) != 2 or not all(isinstance(n, numbers.Integral) and int(n) > 0 for n in periods):
        raise ValueError(
            f"expected every= a positive int, a pair (first, rest) of them, or None, got {every!r}; "
            "under optax.inject_hyperparams name it in static_args"
        )
    return int(periods[0]), int(periods[1])


def _check_settings(
    inner: object, rules: tuple[Rule, ...], every: object, learning_rate: object, coupling: object
) -> None:
    schemes = [rule.scheme for rule in rules if isinstance(rule, Rule) and rule.scheme is not None]
    if not schemes:
        raise ValueError("lc wants a rule with a scheme, such as lcq.Rule('(.*/)?kernel', lcq.Ternary())")
    for scheme in schemes:
        if every is not None and scheme.host:
            raise ValueError(
                f"{scheme} is solved on the host, not in update: pass every=None, call lcq.training.c_step"
            )
    if coupling not in ("gradient", "proximal") and not callable(coupling):
        raise ValueError(f"expected coupling='gradient', 'proximal' or a function, got {coupling!r}")
    transformation = hasattr(inner, "init") and hasattr(inner, "update")
    if transformation and learning_rate is not None:
        raise ValueError(
            "with learning_rate= the optimizer is a function of it: pass optax.sgd or "
            "lambda eta: optax.sgd(eta, momentum=0.9), not optax.sgd(0.1)"
        )
    if coupling != "gradient" and learning_rate is None:
        raise ValueError(
            "a proximal coupling needs the step size: pass learning_rate= and the optimizer as a function of it"
        )
    if not transformation and learning_rate is None:
        raise ValueError(
            f"expected an optax optimizer, or a function of the learning rate and learning_rate=, got {inner!r}; "
            "call it, such as optax.adam(1e-3)"
        )


def _check_dtype(dtype: str | None, multipliers: bool) -> jnp.dtype | None:
    """The format of multipliers, None for that of sums."""
    if dtype is None:
        return None
    if not multipliers or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"expected multipliers_dtype='bfloat16' or 'float32' of multipliers that there are, got {dtype!r} and "
            f"multipliers={multipliers}; drop it"
        )
    return jnp.dtype(dtype)


def _check_schedule(made: Geometric | Scheduled, given: Geometric | Scheduled) -> None:
    """Refuses a state with other penalty weights: its multipliers would follow those, the coupling the new ones."""
    if not same_schedule(made, given):
        raise ValueError(
            f"the state of lc was made for mu={made}, got it in an lc with mu={given}: go on with those of the state; "
            "or keep its numbers under the new ones, which count the C steps that were made: "
            "jax.tree.unflatten(jax.tree.structure(tx.init(params)), jax.tree.leaves(state))"
        )


def _check_learning_rate_is_not_kept(inner_state: PyTree) -> None:
    kept = optax.InjectStatefulHyperparamsState
    if any(isinstance(n, kept) for n in jax.tree.leaves(inner_state, is_leaf=lambda n: isinstance(n, kept))):
        raise ValueError(
            "optax.inject_hyperparams inside lc keeps its first learning rate, and lc could not clip it: "
            'wrap lc instead, inject_hyperparams(lcq.lc, static_args=("inner", "mu", "every", "coupling"))'
        )


def _placeholder(params: Params, rules: tuple[Rule, ...], multipliers: bool) -> Lagrangian:
    """The state of `optax.tree.map_params`, with what stands for the parameters in every tree shaped like them."""
    trees = placeholder_trees(params, rules)
    lagrange = trees[0] if multipliers or is_placeholder(params) else _nothing(trees[0])
    info = Info(*(NO_PARAMETER,) * len(Info._fields))
    return Lagrangian(NO_PARAMETER, NO_PARAMETER, lagrange, tuple(trees), NO_PARAMETER, info)


def _nothing(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda _: optax.MaskedNode(), tree, is_leaf=is_placeholder)
