"""The augmented Lagrangian of a compressed net: Theta, the multipliers lambda, and the C step on them.

    x = w - lambda/mu
    Theta <- Pi(x) = argmin ||x - Delta(Theta)||^2 + (2/mu) C(Theta)
    lambda <- lambda - mu (w - Delta(Theta)) = mu (Delta(Theta) - x)

Theta is kept in parts: leaf-shaped arrays (codes) in trees shaped like the parameters, which shard, map and
partition like them, and the rest (codebooks, scales) by task. Delta(Theta) is never kept.

Source: Carreira-Perpinan, arXiv 1707.01209, figure 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from lcq.forms.base import Form, cast_masks, join_leafwise, narrowed, split_leafwise, widened
from lcq.forms.blocks import compute_dtype
from lcq.forms.dtypes import nearest_number, own_promotion
from lcq.forms.meshes import placed_like
from lcq.forms.serialization import register_empty
from lcq.training.given import check_one_run, named, slope_of, weights_of
from lcq.training.objective import Term
from lcq.training.penalty import gradient, penalty, proximal
from lcq.training.schedules import Geometric, Scheduled
from lcq.training.task_step import Kept, Sums, as_sums, distance, solve_task, square
from lcq.tree.aliases import Leaves, Params
from lcq.tree.compress import check_finite
from lcq.tree.paths import flatten
from lcq.tree.rules import Task

_T = TypeVar("_T")

_INFINITE = 1e30
"""A mu so large that a cost does not count: Theta = w."""


@register_empty
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """What is fixed when the state is initialised: the C steps and the penalty weights. A pytree without leaves."""

    tasks: tuple[Task, ...] = dataclasses.field(metadata={"static": True})
    mu: Geometric | Scheduled = dataclasses.field(metadata={"static": True})


class Info(NamedTuple):
    """Scalars of the last C step, see `lcq.metrics`."""

    gap: Float[Array, ""]
    distortion: Float[Array, ""]
    multiplier_norm: Float[Array, ""]
    kept_back: Int[Array, ""]
    skipped: Int[Array, ""]


class Lagrangian(NamedTuple):
    """Theta, lambda and mu.

    Attributes:
        problem: Tasks and penalty weights, static.
        c_steps: C steps made, int32; mu = problem.mu.at(c_steps).
        multipliers: The multipliers lambda, shaped like the parameters; `optax.MaskedNode()` at leaves under no rule.
        codes: The leaf-shaped arrays of the forms, a tuple of trees shaped like the parameters, masked likewise; those
            that are bool in a form are uint8 here, see `lcq.forms.base.cast_masks`.
        codebooks: What else the forms hold, such as codebooks and scales, by task and leaf.
        info: Scalars of the last C step.
    """

    problem: Problem
    c_steps: Int[Array, ""]
    multipliers: PyTree
    codes: tuple[PyTree, ...]
    codebooks: PyTree
    info: Info


@own_promotion()
def start(
    params: Params,
    problem: Problem,
    multipliers: bool,
    blank: bool = False,
    dtype: DTypeLike | None = None,
    narrow: bool = False,
) -> Lagrangian:
    """Direct compression, Theta = Pi(w) (Theta = w where the scheme has a cost), and lambda = 0.

    Every array is a fresh one, so that parameters and state can be donated together. `blank`: only shapes are wanted.
    `dtype`: of multipliers, None for that of sums. `narrow`: codes of at most 16 levels in 4 bits.
    """
    leaves, _ = flatten(params)
    for task in problem.tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
    all_ws = [_wide(leaves, task) for task in problem.tasks]
    forms = [first_forms(task, ws, blank, _INFINITE) for task, ws in zip(problem.tasks, all_ws, strict=True)]
    codes, codebooks = _split(problem, forms, narrow)
    lagrange = {
        path: placed_like(jnp.zeros_like(w, dtype), w)
        for task, ws in zip(problem.tasks, all_ws, strict=True)
        for path, w in zip(task.paths, ws, strict=True)
    }
    away, zero = functools.reduce(jnp.add, map(distance, all_ws, forms)), jnp.zeros([], jnp.int32)
    state = Lagrangian(
        problem=problem,
        c_steps=zero,
        multipliers=_like(params, lagrange if multipliers else {}),
        codes=tuple(_like(params, chosen) for chosen in codes),
        codebooks=codebooks,
        info=_info(Sums(away, away, jnp.float32(0), zero), functools.reduce(jnp.add, map(square, all_ws)), zero, zero),
    )
    return jax.tree.map(lambda a: jnp.array(a, copy=True), state)


def first_forms(
    task: Task, ws: tuple[Array | np.ndarray, ...], blank: bool, mu: ArrayLike | None = None
) -> tuple[Form, ...]:
    """Pi(w). Where only shapes are expected a scheme that is solved on the host gets zeros: it cannot be traced."""
    if not (blank and task.scheme.host):
        return task.project(ws, mu=mu)
    with jax.ensure_compile_time_eval():
        return task.project(tuple(jnp.zeros(w.shape, w.dtype) for w in ws), mu=mu)


@own_promotion()
def solve(state: Lagrangian, params: Params) -> tuple[list[tuple[Form, ...]], Lagrangian]:
    """The C step at `params`: the forms of every task, and the state after it.

    If weights are not finite nothing changes but `skipped`, one higher.
    """
    mu, leaves, lagrange = state.problem.mu.at(state.c_steps), flatten(params)[0], flatten(state.multipliers)[0]
    size = functools.reduce(jnp.add, (square(_wide(leaves, task)) for task in state.problem.tasks))
    finite = jnp.isfinite(size)
    nothing = Sums(jnp.float32(0), jnp.float32(0), jnp.float32(0), jnp.int32(0))
    codes, codebooks, all_sums = [flatten(tree)[0] for tree in state.codes], [], []
    for task, books in zip(state.problem.tasks, state.codebooks, strict=True):
        ws = tuple(jnp.asarray(weights_of(leaves, path, "lc")) for path in task.paths)
        arrays = tuple(tuple(jnp.asarray(tree[path]) for tree in codes if path in tree) for path in task.paths)
        before = Kept(arrays, books, {path: lagrange[path] for path in task.paths if path in lagrange})
        after, sums = _when(
            finite, functools.partial(solve_task, task, ws, mu, jnp.asarray(state.c_steps)), (before, nothing)
        )
        lagrange.update(after.multipliers)
        for path, some in zip(task.paths, after.arrays, strict=True):
            for tree, array in zip((tree for tree in codes if path in tree), some, strict=True):
                tree[path] = array
        codebooks.append(after.codebooks)
        all_sums.append(sums)
    sums = jax.tree.map(lambda *parts: sum(parts), *all_sums)
    info = _info(sums, size, state.info.kept_back + sums.kept_back, state.info.skipped)
    skipped = state.info._replace(skipped=state.info.skipped + 1)
    state = state._replace(
        c_steps=state.c_steps + finite.astype(state.c_steps.dtype),
        multipliers=_like(state.multipliers, lagrange),
        codes=tuple(map(_like, state.codes, codes)),
        codebooks=tuple(codebooks),
        info=jax.tree.map(lambda a, b: jnp.where(finite, a, b), info, skipped),
    )
    return theta(state), state


def _when(true: Bool[Array, ""], f: Callable[[_T], _T], before: _T) -> _T:
    """f(before) if true, else `before`. In a trace a branch, which keeps the memory of tasks apart."""
    if isinstance(true, jax.core.Tracer):
        return jax.lax.cond(true, f, lambda kept: kept, before)
    return f(before) if true else before


def theta(state: Lagrangian) -> list[tuple[Form, ...]]:
    """Theta, put together from the state: the forms of every task."""
    return [tuple(cast_masks(form, bool) for form in forms) for forms in _joined(state)]


def check_shapes(state: Lagrangian, params: Params) -> None:
    """Refuses parameters of other shapes than those that the state was made for.

    Raises:
        ValueError: names the leaf; the states of several runs.
    """
    check_one_run(state.c_steps, "lc")
    leaves, _ = flatten(params)
    for task, forms in zip(state.problem.tasks, _joined(state), strict=True):
        for path, form in zip(task.paths, forms, strict=True):
            w = weights_of(leaves, path, "lc")
            if w.shape != form.shape:
                raise ValueError(
                    f"{named(path)}: expected the shape {list(form.shape)} that lc was given in init, got "
                    f"{w.dtype}{list(w.shape)}; call init with these parameters for a state of their shapes"
                )


def _joined(state: Lagrangian) -> list[tuple[Form, ...]]:
    """The forms of every task, masks as the state keeps them."""
    codes = [flatten(tree)[0] for tree in state.codes]
    return [
        tuple(
            join_leafwise(rest, [widened(jnp.asarray(tree[path])) for tree in codes if path in tree])
            for path, rest in zip(task.paths, codebooks, strict=True)
        )
        for task, codebooks in zip(state.problem.tasks, state.codebooks, strict=True)
    ]


def coupling_term(state: Lagrangian, mu: Array) -> Term:
    """The coupling mu/2 ||w - Delta - lambda/mu||^2 of the L step, as a function of the parameters."""
    fixed = _targets(state)

    def coupled(params: Params) -> dict[str, tuple[Array, Array, Array | None]]:
        ws = _wide_by_path(state, params)
        return {path: (ws[path], *parts) for path, parts in fixed.items()}

    @own_promotion()
    def value(params: Params) -> Float[Array, ""]:
        return functools.reduce(jnp.add, (penalty(*parts, mu) for parts in coupled(params).values()))

    @own_promotion()
    def slope(params: Params) -> dict[str, Array]:
        return {path: gradient(*parts, mu) for path, parts in coupled(params).items()}

    @own_promotion()
    def add(grads: optax.Updates, params: Params) -> optax.Updates:
        slopes, structure = flatten(grads)
        for path, more in slope(params).items():
            given = slope_of(slopes, path, more)
            slopes[path] = nearest_number(given.astype(more.dtype) + more, given.dtype)
        return jax.tree.unflatten(structure, slopes.values())

    return Term(value, slope, add)


def check_slopes(grads: optax.Updates, state: Lagrangian, params: Params) -> None:
    """Refuses gradients that lack one of a selected leaf."""
    slopes = flatten(grads)[0]
    for path, w in _wide_by_path(state, params).items():
        slope_of(slopes, path, w)


@own_promotion()
def pull(updates: optax.Updates, state: Lagrangian, params: Params, mu: Array, s: PyTree) -> optax.Updates:
    """Follows the inner optimizer's updates by the proximal step at the selected leaves; s as in `proximal`."""
    moves, structure = flatten(updates)
    sizes, ws = flatten(s)[0], _wide_by_path(state, params)
    for path, (delta, multiplier) in _targets(state).items():
        w, size = ws[path], sizes[path] if path in sizes else sizes[""]
        moved = proximal(w + moves[path].astype(w.dtype), delta, multiplier, mu, size)
        moves[path] = nearest_number(moved - w, moves[path].dtype)
    return jax.tree.unflatten(structure, moves.values())


def _targets(state: Lagrangian) -> dict[str, tuple[Array, Array | None]]:
    """(Delta(Theta), lambda or None) of every selected leaf, by path."""
    lagrange = {path: as_sums(multiplier) for path, multiplier in flatten(state.multipliers)[0].items()}
    return {
        path: (form.dense(), lagrange.get(path))
        for task, forms in zip(state.problem.tasks, theta(state), strict=True)
        for path, form in zip(task.paths, forms, strict=True)
    }


def _wide_by_path(state: Lagrangian, params: Params) -> dict[str, Array]:
    """Every selected weight in float32 or wider, by path."""
    leaves = flatten(params)[0]
    return {path: w for task in state.problem.tasks for path, w in zip(task.paths, _wide(leaves, task), strict=True)}


def _wide(leaves: Leaves, task: Task) -> tuple[Array, ...]:
    """The weights of a task in float32 or wider."""
    ws = (weights_of(leaves, path, "lc") for path in task.paths)
    return tuple(jnp.asarray(w, compute_dtype(w.dtype)) for w in ws)


def _split(
    problem: Problem, forms: list[tuple[Form, ...]], narrow: bool = False
) -> tuple[list[dict[str, Array]], PyTree]:
    """The leaf-shaped arrays of all forms by path, and the rest by task; inverse of `theta`."""
    codes: list[dict[str, Array]] = [{} for _ in range(max(task.scheme.leaf_arrays for task in problem.tasks))]
    codebooks = []
    for task, of_task in zip(problem.tasks, forms, strict=True):
        parts = [split_leafwise(narrowed(form) if narrow else cast_masks(form, jnp.uint8)) for form in of_task]
        codebooks.append(tuple(rest for _, rest in parts))
        for path, (arrays, _) in zip(task.paths, parts, strict=True):
            for chosen, array in zip(codes, arrays, strict=False):
                chosen[path] = array
    return codes, tuple(codebooks)


def _like(tree: PyTree, chosen: Leaves) -> PyTree:
    """`tree` with the chosen arrays at its leaves, and masks where there is none."""
    leaves, structure = flatten(tree)
    return jax.tree.unflatten(structure, [chosen.get(path, optax.MaskedNode()) for path in leaves])


def _info(sums: Sums, size: Array, kept_back: Array, skipped: Array | np.ndarray) -> Info:
    return Info(
        gap=(sums.away / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)).astype(jnp.float32),
        distortion=sums.distortion.astype(jnp.float32),
        multiplier_norm=jnp.sqrt(sums.multipliers),
        kept_back=kept_back,
        skipped=jnp.asarray(skipped),
    )
