"""LC: model compression as constrained optimization, as an optax gradient transformation.

    minimise L(w)  subject to  w = Delta(Theta)

by an augmented Lagrangian whose penalty weight mu grows:

    L step   w <- argmin L(w) + mu/2 ||w - Delta(Theta) - lambda/mu||^2     by any optax optimizer
    C step   Theta <- Pi(w - lambda/mu),   lambda <- lambda - mu (w - Delta(Theta))

Source: Carreira-Perpinan, arXiv 1707.01209; Carreira-Perpinan & Idelbayev, arXiv 1707.04319.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lcq.base import Form, compute_dtype, join_leafwise, split_leafwise
from lcq.methods import coupling as couplings
from lcq.methods.coupling import Geometric, geometric, linear_step
from lcq.rules import Rule, Task, flatten, resolve
from lcq.tree import check_finite, replace, take


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """What is fixed when an LC state is initialised; a pytree node without leaves.

    Attributes:
        tasks: the C steps.
        mu: the penalty schedule.
        multipliers: augmented Lagrangian (True) or quadratic penalty (False).
    """

    tasks: tuple[Task, ...] = dataclasses.field(metadata={"static": True})
    mu: Geometric = dataclasses.field(metadata={"static": True})
    multipliers: bool = dataclasses.field(metadata={"static": True})


class LCState(NamedTuple):
    """State of `lc`.

    Attributes:
        inner: state of the wrapped optimizer.
        plan: tasks and settings, static.
        steps: updates made, int32.
        c_steps: C steps made, int32; mu = plan.mu.at(c_steps).
        lagrange: multipliers lambda, shaped like the parameters; `optax.MaskedNode()` at leaves under no rule.
        codes: leaf-shaped arrays of the forms, a tuple of trees shaped like the parameters, masked likewise.
        tables: what else the forms hold (codebooks, scales), per task and leaf.
        info: scalars of the last C step, see `metrics`.
    """

    inner: Any
    plan: Any
    steps: Any
    c_steps: Any
    lagrange: Any
    codes: tuple[Any, ...]
    tables: Any
    info: Any


class Info(NamedTuple):
    """Scalars of the last C step; see `metrics`."""

    gap: Any
    distortion: Any
    multiplier_norm: Any
    kept_back: Any
    skipped: Any


Coupling = str | Callable[[Any, Any], Any]
_PLACEHOLDER: list[type] = []  # the type that optax.tree.map_params passes for "all parameters"
optax.tree.map_params(lambda p: _PLACEHOLDER.append(type(p)) or p, lambda p: p, 0.0)


def lc(
    inner: optax.GradientTransformation | Callable[[Any], optax.GradientTransformation],
    rules: Sequence[Rule],
    *,
    mu: Geometric | float,
    every: int | tuple[int, int] | None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    coupling: Coupling = "gradient",
    multipliers: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the parameters converge to compressed ones.

    minimise L(w) subject to w = Delta(Theta), see the module's docstring. The training loop stays as it is: `update` adds
    the coupling gradient mu (w - Delta(Theta)) - lambda to the gradients of the selected leaves, and at the start of the
    update that follows an L step it makes a C step on the parameters it is given. `init` is direct compression, Theta =
    Pi(w), lambda = 0: start from trained parameters.

    Args:
        inner: an optax optimizer; or, with `learning_rate`, a function from a learning rate to one.
        rules: which leaves are compressed, and how.
        mu: penalty weights, `lcq.geometric(...)`; a number is constant.
        every: updates per L step, or (first, rest); None leaves C steps to `c_step`. Under `optax.MultiSteps(k)` an inner
            update that is not emitted is undone, a C step with it.
        learning_rate: number or schedule of the number of updates. With coupling="gradient" the inner optimizer runs at
            min(learning_rate, 1/mu), which keeps SGD stable as mu grows.
        coupling: "gradient", or "proximal": the inner optimizer sees the loss gradient alone, and its result v is pulled to
            t = Delta(Theta) + lambda/mu by w <- (v + s mu t)/(1 + s mu), stable for every mu. s is the step per unit of
            gradient that the inner optimizer makes in the long run, and a wrong s has a wrong fixed point: "proximal" finds
            it for optimizers linear in the gradient (SGD, momentum, Nesterov); for Adam pass `lcq.adam_step(b2, eps)`, for
            others a function (inner state, learning rate) -> s, a scalar or a tree like the parameters.
        multipliers: False for the quadratic-penalty method, lambda = 0; needs a larger mu and ends with a larger gap.

    Returns:
        A `GradientTransformationExtraArgs` whose `update` needs `params`. Its state holds one copy of the selected weights
        (lambda) and their codes.

    Raises:
        ValueError: at construction for settings that do not fit together; in `init` for rules that do not fit the
            parameters and for weights that are not finite.

    Example:
        >>> import jax, lcq, optax
        >>> w = {"kernel": jnp.array([0.0, 1.0, 2.0, 5.0])}
        >>> tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(k=2))], mu=lcq.geometric(0.1, 1.2, steps=20), every=10)
        >>> state = tx.init(w)
        >>> for _ in range(200):
        ...     grads = jax.tree.map(lambda w: 0.1 * (w - 3.0), w)
        ...     updates, state = tx.update(grads, state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> lcq.extract(state, w)["kernel"].dense().round(2)
        Array([3., 3., 3., 3.], dtype=float32)

    Source: arXiv 1707.01209, fig. 3 (augmented Lagrangian); clipped learning rate: arXiv 1707.04319, section 3.3.
    """
    rules = tuple(rules)
    schedule = mu if isinstance(mu, Geometric) else geometric(mu, 1.0, steps=0)
    first, rest = _periods(every)
    by_rate = _check_settings(inner, rules, every, learning_rate, coupling)
    step_size = linear_step(inner) if coupling == "proximal" else coupling

    def at_rate(eta: Any) -> optax.GradientTransformationExtraArgs:
        return optax.with_extra_args_support(inner(eta) if by_rate else inner)

    def rate(state: LCState) -> Any:
        return learning_rate(state.steps) if callable(learning_rate) else learning_rate

    def init(params: Any) -> LCState:
        eta = (learning_rate(jnp.zeros([], jnp.int32)) if callable(learning_rate) else learning_rate) if by_rate else None
        inner_state = at_rate(eta).init(params)
        if isinstance(params, tuple(_PLACEHOLDER)):
            trees = max(rule.scheme.leafwise for rule in rules if rule.scheme is not None)
            return LCState(inner_state, 0, 0, 0, params, (params,) * trees, 0, Info(0, 0, 0, 0, 0))
        return _init(inner_state, params, Plan(resolve(rules, params), schedule, multipliers))

    def update(grads: Any, state: LCState, params: Any = None, **extra: Any) -> tuple[Any, LCState]:
        if params is None:
            raise ValueError("lc couples the gradients to the parameters: call update(grads, state, params)")
        if every is not None:
            due = (state.steps >= first) & ((state.steps - first) % rest == 0)
            state = jax.lax.cond(due, _c_step, lambda s, p: s, state, params)
        weight = schedule.at(state.c_steps)
        if coupling == "gradient":
            eta = jnp.minimum(rate(state), 1.0 / weight) if by_rate else None
            grads = _add_gradient(grads, state, params, weight)
            updates, inner_state = at_rate(eta).update(grads, state.inner, params, **extra)
        else:
            eta = rate(state)
            updates, inner_state = at_rate(eta).update(grads, state.inner, params, **extra)
            updates = _pull(updates, state, params, weight, step_size(inner_state, eta))
        return updates, state._replace(inner=inner_state, steps=optax.safe_increment(state.steps))

    return optax.GradientTransformationExtraArgs(init, update)


def _periods(every: Any) -> tuple[int, int]:
    first, rest = every if isinstance(every, tuple) else (every, every)
    if every is not None and not all(isinstance(n, int) and n > 0 for n in (first, rest)):
        raise ValueError(f"wanted every= a positive int, a pair (first, rest) of them, or None; got {every!r}; "
                         "under optax.inject_hyperparams name it in static_args")
    return first, rest


def _check_settings(inner: Any, rules: Any, every: Any, learning_rate: Any, coupling: Any) -> bool:
    """Whether `inner` is a function of the learning rate; raises for settings that do not fit together."""
    if not any(isinstance(rule, Rule) and rule.scheme is not None for rule in rules):
        raise ValueError("lc wants at least one rule with a scheme, such as lcq.Rule('(.*/)?kernel', lcq.KMeans(4))")
    for rule in rules:
        if every is not None and rule.scheme is not None and rule.scheme.host:
            raise ValueError(f"{rule.scheme} is solved on the host, not inside update: pass every=None and call lcq.c_step")
    if coupling != "gradient" and coupling != "proximal" and not callable(coupling):
        raise ValueError(f"wanted coupling='gradient', 'proximal' or a function; got {coupling!r}")
    transformation = hasattr(inner, "init") and hasattr(inner, "update")
    if transformation and learning_rate is not None:
        raise ValueError("with learning_rate=, pass the optimizer as a function of it: lc(optax.sgd, ...), not optax.sgd(0.1)")
    if not transformation and learning_rate is None:
        raise ValueError("wanted an optax transformation; to pass a function of the learning rate give learning_rate= too")
    if coupling != "gradient" and learning_rate is None:
        raise ValueError("a proximal coupling needs the step size: pass learning_rate= and the optimizer as a function of it")
    return not transformation


def c_step(opt_state: Any, params: Any) -> Any:
    """Makes a C step by hand: Theta <- Pi(w - lambda/mu), lambda <- lambda - mu (w - Delta(Theta)), then the next mu.

    For `lc(every=None)`: own schedules, exact solvers on the host (called outside jit), ensembles under vmap.

    Args:
        opt_state: an optimizer state with one LC state anywhere inside.
        params: the parameters, as given to `update`.

    Returns:
        The optimizer state after the C step.

    Raises:
        ValueError: no LC state in `opt_state`, or several.
    """
    _find(opt_state)
    return jax.tree.map(
        lambda node: _c_step(node, params) if isinstance(node, LCState) else node, opt_state, is_leaf=_is_lc_state
    )


def extract(opt_state: Any, params: Any) -> Any:
    """The compressed net: one more C step on a copy, packed. Right at any moment, with averaged parameters too.

    Args:
        opt_state: an optimizer state with one LC state anywhere inside.
        params: the parameters, as given to `update`, or a running mean of them.

    Returns:
        `params` with stored forms at the selected leaves, of the leaves' dtypes.

    Raises:
        ValueError: no LC state or several; a C step was skipped because weights were not finite, or they are not now.

    Warns:
        UserWarning: ||w - Delta(Theta)||^2 > 1 % of ||w||^2: the penalty schedule ended early, and the compressed net is not
            the trained one.
    """
    state = _find(opt_state)
    leaves, structure = flatten(params)
    for task in state.plan.tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
    if int(state.info.skipped):
        raise ValueError(
            f"{int(state.info.skipped)} C steps met weights that were not finite and were skipped: the run diverged; "
            "use a smaller learning rate, learning_rate= to clip it at 1/mu, or a slower mu"
        )
    forms, after = _solve(state, leaves)
    gap = float(after.info.gap)
    if gap > 0.01:
        warnings.warn(
            f"the weights are {gap:.1%} (squared) away from the compressed ones: let mu grow further before extracting",
            stacklevel=2,
        )
    typed = [
        tuple(
            dataclasses.replace(form, dtype=str(leaves[path].dtype)).pack()
            for path, form in zip(task.paths, of_task, strict=True)
        )
        for task, of_task in zip(state.plan.tasks, forms, strict=True)
    ]
    return replace(structure, leaves, state.plan.tasks, typed)


def metrics(opt_state: Any) -> dict[str, Any]:
    """Scalars for a logger, of the last C step (of direct compression before the first).

    Returns:
        gap: ||w - Delta(Theta)||^2 / ||w||^2 over the selected leaves, the measure of convergence.
        distortion: ||x - Delta(Theta)||^2 with x = w - lambda/mu, what the C step minimised.
        multiplier_norm: ||lambda||.
        penalty_weight: mu of the current L step.
        c_steps: C steps made.
        kept_back: projections dropped because Theta of the C step before was at least as near.
        skipped: C steps not made because weights were not finite.
    """
    state = _find(opt_state)
    return {**state.info._asdict(), "penalty_weight": state.plan.mu.at(state.c_steps), "c_steps": state.c_steps}


def _is_lc_state(node: Any) -> bool:
    return isinstance(node, LCState)


def _find(opt_state: Any) -> LCState:
    """The one LC state in an optimizer state; arrays inside nnx variables are taken out."""
    bare = jax.tree.map(
        lambda node: node[...] if isinstance(node, nnx.Variable) else node,
        opt_state,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    found = [node for node in jax.tree.leaves(bare, is_leaf=_is_lc_state) if isinstance(node, LCState)]
    if len(found) != 1:
        raise ValueError(f"wanted one LC state in the optimizer state; got {len(found)}: was it made by lcq.lc(...)?")
    return found[0]


def _init(inner_state: Any, params: Any, plan: Plan) -> LCState:
    """Theta = Pi(w), lambda = 0."""
    leaves, structure = flatten(params)
    lagrange: dict[str, Any] = {}
    trees: list[dict[str, Any]] = [{} for _ in range(max(task.scheme.leafwise for task in plan.tasks))]
    tables, measures = [], []
    for task in plan.tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
        ws = _wide(leaves, task)
        forms = task.project(ws, mu=plan.mu.at(jnp.int32(0)))
        measures.append(_measure(ws, ws, forms))
        splits = [split_leafwise(form) for form in forms]
        tables.append(tuple(rest for _, rest in splits))
        for path, w, (arrays, _) in zip(task.paths, ws, splits, strict=True):
            if plan.multipliers:
                lagrange[path] = jnp.zeros_like(w)
            for tree, array in zip(trees, arrays, strict=False):
                tree[path] = jnp.array(array, copy=True)  # so that params and state can be donated together

    def masked(chosen: dict[str, Any]) -> Any:
        return jax.tree.unflatten(structure, [chosen.get(path, optax.MaskedNode()) for path in leaves])

    zero = jnp.zeros([], jnp.int32)
    return LCState(
        inner=inner_state,
        plan=plan,
        steps=zero,
        c_steps=zero,
        lagrange=masked(lagrange),
        codes=tuple(masked(tree) for tree in trees),
        tables=tuple(tables),
        info=_summary(measures, jnp.zeros([]), zero, zero),
    )


def _c_step(state: LCState, params: Any) -> LCState:
    """The C step, kept only if the weights are finite."""
    leaves, _ = flatten(params)
    new = _solve(state, leaves)[1]
    finite = jnp.stack([jnp.isfinite(w).all() for task in state.plan.tasks for w in take(leaves, task)]).all()
    skipped = state._replace(info=state.info._replace(skipped=state.info.skipped + 1))
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, skipped)


def _solve(state: LCState, leaves: dict[str, Any]) -> tuple[list[tuple[Form, ...]], LCState]:
    """Theta <- Pi(w - lambda/mu), lambda <- lambda - mu (w - Delta(Theta)): the forms, and the state after."""
    mu = state.plan.mu.at(state.c_steps)
    lagrange, codes = flatten(state.lagrange)[0], [flatten(tree)[0] for tree in state.codes]
    all_forms, measures, kept_back = [], [], state.info.kept_back
    for task, previous in zip(state.plan.tasks, _forms(state), strict=True):
        ws = _wide(leaves, task)
        xs = tuple(w - lagrange[p] / mu if p in lagrange else w for p, w in zip(task.paths, ws, strict=True))
        forms = task.project(xs, previous, mu=mu)
        new, old = (_distance(xs, f) + 2 / mu * task.scheme.cost(f) for f in (forms, previous))
        forms = jax.tree.map(lambda a, b, better=new <= old: jnp.where(better, a, b), forms, previous)
        kept_back += (new > old).astype(jnp.int32)
        measures.append(_measure(ws, xs, forms))
        all_forms.append(forms)
        for path, x, form in zip(task.paths, xs, forms, strict=True):
            if path in lagrange:
                lagrange[path] = mu * (form.dense() - x)
            for tree, array in zip(codes, split_leafwise(form)[0], strict=False):
                tree[path] = array
    norm = jnp.sqrt(sum((jnp.sum(value**2) for value in lagrange.values()), jnp.zeros([])))
    return all_forms, state._replace(
        c_steps=state.c_steps + 1,
        lagrange=jax.tree.unflatten(jax.tree.structure(state.lagrange), lagrange.values()),
        codes=tuple(
            jax.tree.unflatten(jax.tree.structure(old), new.values())
            for old, new in zip(state.codes, codes, strict=True)
        ),
        tables=tuple(tuple(split_leafwise(form)[1] for form in forms) for forms in all_forms),
        info=_summary(measures, norm, kept_back, state.info.skipped),
    )


def _distance(xs: tuple[Any, ...], forms: tuple[Form, ...]) -> Any:
    """||x - Delta(Theta)||^2 over the leaves of a task."""
    return sum(jnp.sum((x - form.dense()) ** 2) for x, form in zip(xs, forms, strict=True))


def _measure(ws: tuple[Any, ...], xs: tuple[Any, ...], forms: tuple[Form, ...]) -> Any:
    """||w - Delta||^2, ||w||^2 and ||x - Delta||^2 of one task."""
    return jnp.stack([_distance(ws, forms), sum(jnp.sum(w**2) for w in ws), _distance(xs, forms)]).astype(jnp.float32)


def _summary(measures: list[Any], norm: Any, kept_back: Any, skipped: Any) -> Info:
    away, size, distortion = sum(measures)
    return Info(away / jnp.maximum(size, jnp.finfo(jnp.float32).tiny), distortion, norm, kept_back, skipped)


def _add_gradient(grads: Any, state: LCState, params: Any, mu: Any) -> Any:
    """Adds the coupling's gradient to those of the selected leaves."""
    slopes, structure = flatten(grads)
    for path, (w, delta, lagrange) in _coupled(state, params).items():
        slope = slopes[path]
        slopes[path] = (slope + couplings.gradient(w, delta, lagrange, mu)).astype(slope.dtype)
    return jax.tree.unflatten(structure, slopes.values())


def _pull(updates: Any, state: LCState, params: Any, mu: Any, s: Any) -> Any:
    """Follows the inner optimizer's updates by the proximal step at the selected leaves."""
    moves, structure = flatten(updates)
    sizes = flatten(s)[0]
    for path, (w, delta, lagrange) in _coupled(state, params).items():
        step = sizes.get(path, s)
        moved = couplings.proximal(w + moves[path], delta, lagrange, mu, step)
        moves[path] = (moved - w).astype(moves[path].dtype)
    return jax.tree.unflatten(structure, moves.values())


def _coupled(state: LCState, params: Any) -> dict[str, tuple[Any, Any, Any]]:
    """(w, Delta, lambda) of every selected leaf, by path."""
    leaves, lagrange = flatten(params)[0], flatten(state.lagrange)[0]
    return {
        path: (w, form.dense(), lagrange.get(path))
        for task, forms in zip(state.plan.tasks, _forms(state), strict=True)
        for path, w, form in zip(task.paths, _wide(leaves, task), forms, strict=True)
    }


def _wide(leaves: dict[str, Any], task: Task) -> tuple[Any, ...]:
    """The weights of a task in float32 or wider."""
    return tuple(jnp.asarray(w, compute_dtype(w.dtype)) for w in take(leaves, task))


def _forms(state: LCState) -> list[tuple[Form, ...]]:
    """Theta, put together from the state."""
    codes = [flatten(tree)[0] for tree in state.codes]
    return [
        tuple(
            join_leafwise(rest, [tree[path] for tree in codes if path in tree])
            for path, rest in zip(task.paths, tables, strict=True)
        )
        for task, tables in zip(state.plan.tasks, state.tables, strict=True)
    ]
