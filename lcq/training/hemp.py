"""HEMP: training towards weights that an entropy coder makes short.

    min over w of L(w) + lambda_H H_n(w) + lambda_E/2 ||w - Q(w)||^2

where H_n is `block_entropy` and Q(w) the nearest level of each weight.

Source: Tartaglione, Lathuiliere, Fiandrotti, Cagnazzo & Grangetto, arXiv 2107.05298.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from lcq.forms import Codes
from lcq.forms.base import is_form, join_leafwise, split_leafwise
from lcq.forms.blocks import compute_dtype, cut_axes, join_axes
from lcq.forms.dtypes import native_tree, nearest_number, wider
from lcq.schemes.base import Quantizer
from lcq.schemes.nearest import code_dtype
from lcq.training.augmented_lagrangian import first_forms
from lcq.training.baselines import Tasks
from lcq.training.block_entropy import (
    Layout,
    block_entropy,
    blocks_of,
    check_bins,
    check_order,
    codes_of,
    levels_of,
    nearest,
)
from lcq.training.collapse import Reading, largest_share
from lcq.training.given import (
    RESTORED,
    Optimizer,
    Schedule,
    abstract,
    check_one_run,
    check_rules,
    check_state,
    slope_of,
    start_inner,
    weights_of,
)
from lcq.training.objective import refuse_used
from lcq.training.placeholders import NO_PARAMETER, has_placeholders
from lcq.tree.aliases import Leaves, OptState, Params
from lcq.tree.compress import check_finite, take
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Rules, Task, checked, resolve

_NO_FUNCTION = (
    "hemp adds terms to its step that depend on the loss's own slopes and are the gradient of no function, so none can "
    "be searched or judged; take one that needs none, such as optax.adam, or put what reads the loss behind it, as "
    "optax.chain(lcq.hemp(...), optax.contrib.reduce_on_plateau())"
)


class HempState(NamedTuple):
    """State of `hemp`.

    Attributes:
        inner: State of the wrapped optimizer.
        steps: Updates made, int32.
        tasks: What the rules select, static.
        codebooks: The codebook of every task and leaf: forms without codes.
        entropy: H_n of the parameters that the last update was given, in bits per weight; before the first update its
            bound, log2 of the largest codebook.
        reading: In which blocks the entropy reads a leaf, static.
        shares: By task and leaf, the share of the weights that are nearest to the most common level of their codebook,
            the mean over codebooks, or of the blocks of n weights that are alike in their levels, if it is larger; 0
            before the first update.
    """

    inner: PyTree
    steps: Int[Array, ""]
    tasks: Tasks
    codebooks: PyTree
    entropy: Float[Array, ""]
    reading: Reading
    shares: tuple[tuple[Float[Array, ""], ...], ...]


def hemp(
    inner: Optimizer,
    rules: Rules,
    *,
    order: int = 3,
    entropy_weight: Schedule = 1.0,
    error_weight: Schedule = 0.1,
    learning_rate: Schedule = 1.0,
    every: int | None = None,
    small: float = 10,
    pooled: bool = True,
    layout: Layout = "jax",
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the quantized weights have few bits of n-th order entropy.

        w <- w + u,    w <- w - eta S (lambda_H dH_n/dw + lambda_E (w - Q(w))),    S = relu(1 - |dL/dw|)

    then w is clipped to the outermost levels; u is what the inner optimizer makes of the loss gradient, and every term
    is taken at the parameters before the update. It needs the gradients of the loss as they are, and so goes around
    other methods, `hemp(lc(sgd))`, and before anything that scales gradients.

    The levels are those of the schemes' projections of the first parameters (`lcq.KMeans(4)`: Lloyd-Max), so hemp
    starts from trained ones, and stay until they are estimated again. H_n and its slope are taken at clipped weights
    too, as rounding may leave one just outside. So none comes near the empty centres that `entropy_centres` adds, and
    H_n is taken without them.

    Args:
        inner: any optax optimizer that needs the gradient alone. Extra arguments are passed on, but if it uses one that
            describes the loss (`value`, `grad`, `value_fn`, `obj_fn`, `grad_fn`) that is refused: the terms are the
            gradient of no function. lambda_H is easier to choose with Adam: its steps, in units of a weight's own
            gradients, hold the weights that matter and let the others go, where those of SGD let all go or none
            (`benchmarks/experiments/hemp.py`).
        rules: which leaves, and the codebook of each: `KMeans`, `Levels`, `Uniform` and their like. Weights cannot grow
            beyond the outermost levels, so these are better wide than few.
        order: n; a file of blocks of n weights has about H_n bits per weight.
        entropy_weight: lambda_H, a number or a schedule of the number of updates. dH_n/dw is of the size 1/(#weights
            (c_b - c_{b-1})): what does not move within a run needs more, and leaves of small weights go first; give
            those that a batch norm follows weights of one size. A code that becomes rare becomes dear, so that H_n
            falls faster and faster: a schedule that falls in time, with an eye on `entropy` of the state, ends before
            all weights have one code. `lcq.training.largest_weight` finds one, see docs/guides/entropy_weight.md.
        error_weight: lambda_E, likewise: how fast weights go to their levels, by this part of the way an update. Where
            lambda_E |w - Q(w)| exceeds what the other terms can do, no weight changes its level any more.
        learning_rate: eta, likewise: a factor of both. 1 is the paper's update, which does not depend on the rate of
            the loss; give the optimizer's own rate or schedule to have both terms scale and fall with it.
        every: updates between two estimates of the levels, each a warm C step at the start of an update; None to keep
            the first ones.
        small: leaves of at most `small` times as many weights as levels do not count in H_n; they are pulled and
            clipped as others are. 0 counts all.
        pooled: one histogram for all leaves, as `block_entropy`.
        layout: as for `block_entropy`.

    Returns:
        A `GradientTransformationExtraArgs` whose `update` needs `params`. Its state holds codebooks and nothing of a
        leaf's shape. `lcq.extract(opt_state, params)` is the compressed net, `lcq.metrics(opt_state)` says how far
        the run is, and whether leaves lost their weights to one level. Under `optax.inject_hyperparams` name
        static_args=("inner", "order", "every", "small", "pooled", "layout"); under vmap, as for `lcq.lc`, levels would
        be estimated at every update.

    Raises:
        ValueError: at construction for settings out of range and schemes without codebooks; in `init` for rules that do
            not fit the parameters, codebooks of a single level, and weights that are not finite; in `update` for a leaf
            without a gradient, a state that lost its types, and an optimizer that uses `value` and the like.

    Example:
        >>> import lcq
        >>> w = {"kernel": jnp.array([0.1, 0.9, 0.2, 1.1, 0.0, 1.0, 0.45, 1.3])}
        >>> tx = hemp(optax.sgd(0.0), [lcq.Rule("kernel", lcq.KMeans(2))], order=2, entropy_weight=0.05, small=0)
        >>> state, update = tx.init(w), jax.jit(tx.update)
        >>> for _ in range(50):
        ...     updates, state = update({"kernel": jnp.zeros(8)}, state, w)
        ...     w = optax.apply_updates(w, updates)
        >>> float(state.entropy) < 0.3
        True

    Source: arXiv 2107.05298, section 3; S: Tartaglione et al., "LOBSTER", arXiv 2011.09905.
    """
    rules, inner = checked(rules), optax.with_extra_args_support(inner)
    _check_settings(rules, order, every, small, layout)
    reading = Reading(check_order(order), layout)
    numbers = {"entropy_weight": entropy_weight, "error_weight": error_weight, "learning_rate": learning_rate}
    for name, number in numbers.items():
        if isinstance(number, int | float) and not 0 <= number < float("inf"):
            raise ValueError(f"expected {name}= a number >= 0, or a schedule, got {number}")

    def first_state(params: Params, blank: bool) -> HempState:
        inner_state = start_inner(inner, params)
        if has_placeholders(params):
            return HempState(inner_state, *(NO_PARAMETER,) * 6)
        tasks, leaves = Tasks(resolve(rules, params)), flatten(params)[0]
        for task in tasks:
            for path in task.paths:
                check_finite(path, leaves[path])
        forms = [first_forms(task, take(leaves, task), blank) for task in tasks]
        codebooks = tuple(tuple(split_leafwise(form)[1] for form in of_task) for of_task in forms)
        levels = _levels_by_path(tasks, codebooks)
        for path, table in levels.items():
            if table.shape[-1] < 2:
                raise ValueError(f"{path}: expected a codebook of two or more levels, got one; exclude the leaf")
        counted = _counted(leaves, levels, small, order)
        if not counted:
            raise ValueError(
                f"expected a leaf of more than {small} weights for each of its levels, and at least {order}, got only "
                "smaller ones; lower small="
            )
        check_bins(max(levels[path].shape[-1] for path in counted), order)
        codebooks = jax.tree.map(lambda a: jnp.array(a, copy=True), codebooks)
        wide = wider(*(table.dtype for table in levels.values()))
        bound = jnp.full([], math.log2(max(levels[path].shape[-1] for path in counted)), wide)
        shares = tuple(tuple(jnp.zeros([], jnp.float32) for _ in task.paths) for task in tasks)
        return HempState(inner_state, jnp.zeros([], jnp.int32), tasks, codebooks, bound, reading, shares)

    def init(params: Params) -> PyTree:
        if abstract(params):
            return jax.eval_shape(functools.partial(first_state, blank=True), params)
        return first_state(native_tree(params), blank=False)

    def update(
        grads: optax.Updates, state: PyTree, params: Params = None, **extra: object
    ) -> tuple[optax.Updates, HempState]:
        if params is None:
            raise ValueError("hemp moves the parameters to their levels: call update(grads, state, params)")
        check_state(state, HempState, "hemp", sound=is_sound(state))
        check_one_run(state.steps, "hemp")
        grads, params = native_tree((grads, params))
        refuse_used(functools.partial(inner.update, grads, state.inner, params), extra, _NO_FUNCTION)
        leaves, slopes, codebooks = flatten(params)[0], flatten(grads)[0], state.codebooks
        for path in (path for task in state.tasks for path in task.paths):
            slope_of(slopes, path, weights_of(leaves, path, "hemp"))
        check_rules(state.tasks, rules, params, "hemp")
        if every is not None:
            due = (state.steps > 0) & (state.steps % every == 0)
            codebooks = jax.lax.cond(due, lambda t: _estimate(state.tasks, leaves, t), lambda t: t, codebooks)
        levels = _levels_by_path(state.tasks, codebooks)
        ws = {path: jnp.asarray(leaves[path], compute_dtype(leaves[path].dtype)) for path in levels}
        counted = _counted(leaves, levels, small, order)
        entropy, pushes = jax.value_and_grad(
            lambda some: block_entropy(some, {p: levels[p] for p in some}, order, pooled=pooled, layout=layout)
        )({path: _clip(ws[path], levels[path]) for path in counted})
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        moves, structure = flatten(updates)
        eta, of_entropy, of_error = (
            value(state.steps) if callable(value) else value for value in (learning_rate, entropy_weight, error_weight)
        )
        shares = {}
        for path, w in ws.items():
            ranks, goal = nearest(w, levels[path])
            shares[path] = largest_share(ranks, levels[path], reading)
            step = of_error * (w - goal) + of_entropy * pushes.get(path, 0)
            insensitive = jax.nn.relu(1 - jnp.abs(slopes[path].astype(w.dtype)))
            moved = _clip(w + moves[path].astype(w.dtype) - eta * insensitive * step, levels[path])
            moves[path] = nearest_number(moved - w, moves[path].dtype)
        updates = jax.tree.unflatten(structure, moves.values())
        steps, entropy = optax.safe_increment(state.steps), entropy.astype(state.entropy.dtype)
        by_task = tuple(tuple(shares[path] for path in task.paths) for task in state.tasks)
        return updates, HempState(inner_state, steps, state.tasks, codebooks, entropy, reading, by_task)

    return optax.GradientTransformationExtraArgs(init, update)


def _clip(w: Float[Array, "*leaf"], levels: Float[Array, "*counts k"]) -> Float[Array, "*leaf"]:
    """The weights inside of the outermost levels."""
    counts, stat = blocks_of(w, levels)
    x = jnp.clip(cut_axes(w, counts), levels[..., 0].reshape(stat), levels[..., -1].reshape(stat))
    return join_axes(x, w.shape)


def is_sound(state: PyTree) -> bool:
    """Whether a state's types are there, which a checkpoint may have lost at any depth."""
    if not isinstance(state, HempState) or not isinstance(state.tasks, Tasks):
        return False
    return all(map(is_form, jax.tree.leaves(state.codebooks, is_leaf=is_form)))


def find_hemp(opt_state: OptState) -> HempState:
    """The one HEMP state in an optimizer state, without nnx variables.

    Raises:
        ValueError: none, several, or one that lost its types.
    """
    found = hemp_states(opt_state)
    if len(found) != 1:
        nothing = f"was the optimizer made by lcq.hemp? {RESTORED}"
        remedy = "pass the part that holds one of them" if found else nothing
        raise ValueError(f"expected one HEMP state in the optimizer state, got {len(found)}: {remedy}")
    check_state(found[0], HempState, "hemp", sound=is_sound(found[0]))
    return found[0]


def hemp_states(opt_state: OptState) -> list[HempState]:
    """Every HEMP state in an optimizer state, without nnx variables."""
    nodes = jax.tree.leaves(nnx.as_pure(opt_state), is_leaf=lambda node: isinstance(node, HempState))
    return [node for node in nodes if isinstance(node, HempState)]


def _levels_by_path(tasks: Tasks, codebooks: PyTree) -> dict[str, Array]:
    """The levels of every selected leaf."""
    pairs = zip(tasks, codebooks, strict=True)
    return {path: levels_of(path, form) for task, forms in pairs for path, form in zip(task.paths, forms, strict=True)}


def _estimate(tasks: Tasks, leaves: Leaves, codebooks: PyTree) -> PyTree:
    """The codebooks of the leaves, from earlier ones, which stay if weights are not finite."""
    new = []
    for task, warm in zip(tasks, codebooks, strict=True):
        forms = task.project(take(leaves, task), nearest_forms(task, leaves, warm))
        rest = tuple(split_leafwise(form)[1] for form in forms)
        finite = jnp.stack([jnp.isfinite(leaves[path]).all() for path in task.paths]).all()
        new.append(jax.tree.map(lambda a, b, ok=finite: jnp.where(ok, a, b), rest, warm))
    return tuple(new)


def nearest_forms(task: Task, leaves: Leaves, codebooks: PyTree) -> tuple[Codes, ...]:
    """The forms of a task with these codebooks, forms without codes, and the nearest level of each weight."""
    forms: list[Codes] = []
    for path, table in zip(task.paths, codebooks, strict=True):
        w, levels = jnp.asarray(leaves[path]), levels_of(path, table)
        codes = codes_of(table, nearest(w, levels)[0]).astype(code_dtype(levels.shape[-1]))
        forms.append(join_leafwise(table, [codes]))
    return tuple(forms)


def _counted(leaves: Leaves, levels: dict[str, Array], small: float, order: int) -> list[str]:
    """The paths of leaves that H_n is of."""
    return [p for p, c in levels.items() if leaves[p].size > small * c.shape[-1] and leaves[p].size >= order]


def _check_settings(rules: tuple[Rule, ...], order: object, every: object, small: object, layout: object) -> None:
    schemes = [rule.scheme for rule in rules if isinstance(rule, Rule) and rule.scheme is not None]
    if not schemes:
        raise ValueError("hemp wants a rule with a scheme, such as lcq.Rule('(.*/)?kernel', lcq.KMeans(4))")
    for scheme in schemes:
        if not isinstance(scheme, Quantizer):
            raise ValueError(f"expected schemes with a codebook, such as lcq.KMeans(4) or lcq.Uniform(3), got {scheme}")
        if every is not None and scheme.host:
            raise ValueError(f"{scheme} is solved on the host, not in update: pass every=None")
    if every is not None and (not isinstance(every, int) or every < 1):
        raise ValueError(f"expected every= a positive int or None, got {every!r}")
    try:
        check_order(order)
    except ValueError as error:
        raise ValueError(f"{error}; under optax.inject_hyperparams name it in static_args") from error
    if not isinstance(small, int | float) or small < 0:
        raise ValueError(
            f"expected small= a number >= 0, got {small!r}; under optax.inject_hyperparams name it in static_args"
        )
    if layout == "torch" and any(rule.stacked for rule in rules):
        raise ValueError("layout='torch' swaps the axes of whole leaves: expected rules without stacked axes")
    if layout not in ("jax", "torch"):
        raise ValueError(f"expected layout='jax' or 'torch', got {layout!r}")
