"""The C step of one task, layer by layer where its leaves are stacks.

    x = w - lambda/mu,    Theta <- Pi(x),    lambda <- mu (Delta(Theta) - x)

Source: as in `augmented_lagrangian`.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lcq.forms.base import Form, cast_masks, join_leafwise, split_leafwise, widened
from lcq.forms.blocks import compute_dtype
from lcq.training.layer_turns import each_layer
from lcq.training.stochastic_rounding import stochastic_bfloat16
from lcq.tree.aliases import Leaves
from lcq.tree.rules import Task

_ROUNDING = 1e-4
"""Relative rise of an objective that float32 sums explain."""


class Sums(NamedTuple):
    """||w - Delta||^2, ||x - Delta||^2, ||lambda||^2 and projections dropped, over the leaves of tasks."""

    away: Float[Array, ""]
    distortion: Float[Array, ""]
    multipliers: Float[Array, ""]
    kept_back: Int[Array, ""]


class Kept(NamedTuple):
    """What the state keeps of a task: leaf-shaped arrays and the rest of the form of each leaf, multipliers by path."""

    arrays: tuple[tuple[Array, ...], ...]
    codebooks: tuple[Form, ...]
    multipliers: Leaves


def solve_task(
    task: Task, ws: tuple[Array, ...], mu: Array, turn: Array, before: tuple[Kept, Sums]
) -> tuple[Kept, Sums]:
    """The C step of one task, that of each layer by itself."""
    for x in _shifted(task, ws, before[0].multipliers, mu) if task.stacked else ():
        if not isinstance(x, jax.core.Tracer):
            task.scheme.check_numbers(x)
    return _solve_layers(task, mu, turn, jnp.int32(0), ws, before[0])


def _solve_layers(
    task: Task, mu: Array, turn: Array, number: Array, ws: tuple[Array, ...], kept: Kept
) -> tuple[Kept, Sums]:
    """The same of the layer, or stack of layers, of a number."""
    if not task.stacked:
        return _solve_one(task, mu, turn, number, ws, kept)
    alone, layers = dataclasses.replace(task, stacked=task.stacked - 1), len(ws[0])

    def step(layer: Array, ws: tuple[Array, ...], kept: Kept) -> tuple[Kept, Sums]:
        return _solve_layers(alone, mu, turn, number * layers + layer, ws, kept)

    return each_layer(step, ws, kept, one_by_one=task.scheme.host)


def _solve_one(
    task: Task, mu: Array, turn: Array, layer: Array, ws: tuple[Array, ...], kept: Kept
) -> tuple[Kept, Sums]:
    """The same of one layer; a projection with a higher objective than the Theta before is dropped."""
    lagrange, ws = kept.multipliers, tuple(map(as_sums, ws))
    pairs = zip(kept.codebooks, kept.arrays, strict=True)
    previous = tuple(cast_masks(join_leafwise(rest, [widened(a) for a in arrays]), bool) for rest, arrays in pairs)
    xs = _shifted(task, ws, lagrange, mu)
    forms = _projected(task, xs, previous, mu)
    _check_theta(task, forms, previous)
    new, old = (distance(xs, f) + task.scheme.charge(f, mu) for f in (forms, previous))
    forms = jax.tree.map(lambda a, b: jnp.where(new <= old, a, b), forms, previous)
    moved = (mu * (form.dense() - x) for x, form in zip(xs, forms, strict=True))
    lagrange = {
        path: _kept(value, lagrange[path].dtype, turn, layer)
        for path, value in zip(task.paths, moved, strict=True)
        if path in lagrange
    }
    sums = Sums(
        away=distance(ws, forms).astype(jnp.float32),
        distortion=distance(xs, forms).astype(jnp.float32),
        multipliers=square(lagrange.values()).astype(jnp.float32),
        kept_back=(new > old * (1 + _ROUNDING)).astype(jnp.int32),
    )
    parts = [split_leafwise(cast_masks(form, jnp.uint8)) for form in forms]
    arrays = tuple(
        tuple(a.astype(b.dtype) for a, b in zip(found, of_leaf, strict=True))
        for (found, _), of_leaf in zip(parts, kept.arrays, strict=True)
    )
    return Kept(arrays, tuple(rest for _, rest in parts), lagrange), sums


def _projected(task: Task, xs: tuple[Array, ...], previous: tuple[Form, ...], mu: Array) -> tuple[Form, ...]:
    """The projection from the Theta before; one of other settings may not even fit into its arithmetic."""
    try:
        return task.project(xs, previous, mu=mu)
    except (TypeError, ValueError):
        if not task.scheme.host:
            _check_theta(task, jax.eval_shape(lambda xs: task.project(xs, mu=mu), xs), previous)
        raise


def _check_theta(task: Task, forms: tuple[Form, ...], previous: tuple[Form, ...]) -> None:
    """Refuses a state of other forms than the scheme makes, as a checkpoint of other rules puts into it."""
    for path, new, old in zip(task.paths, forms, previous, strict=True):
        (of_new, made), (of_old, kept) = map(jax.tree.flatten, (new, old))
        shapes = [[np.shape(a) for a in arrays] for arrays in (of_new, of_old)]
        if (made, shapes[0]) != (kept, shapes[1]):
            raise ValueError(
                f"{path or 'the only leaf'}: expected the state of {task.scheme}, got one of other settings, a "
                f"{type(old).__name__} of the arrays {shapes[1]}, not {shapes[0]}: restore a checkpoint with the rules "
                "that it was made for, or start from its weights alone: state = tx.init(params)"
            )


def _shifted(task: Task, ws: tuple[Array, ...], lagrange: Leaves, mu: Array) -> tuple[Array, ...]:
    """x = w - lambda/mu."""
    wide = zip(task.paths, map(as_sums, ws), strict=True)
    return tuple(w - as_sums(lagrange[path]) / mu if path in lagrange else w for path, w in wide)


def _kept(multiplier: Array, dtype: DTypeLike, turn: Array, layer: Array) -> Array:
    """A multiplier as the state keeps it."""
    if dtype != jnp.bfloat16:
        return multiplier.astype(dtype)
    return stochastic_bfloat16(multiplier, turn, layer.astype(jnp.uint32) * jnp.uint32(multiplier.size % (1 << 32)))


def distance(xs: tuple[Array, ...], forms: tuple[Form, ...]) -> Float[Array, ""]:
    """||x - Delta(Theta)||^2 over the leaves of a task."""
    return functools.reduce(jnp.add, (jnp.sum((x - form.dense()) ** 2) for x, form in zip(xs, forms, strict=True)))


def square(arrays: Iterable[Array]) -> Float[Array, ""]:
    """The sum of all squares."""
    return functools.reduce(jnp.add, (jnp.sum(as_sums(a) ** 2) for a in arrays), jnp.float32(0))


def as_sums(a: Array) -> Array:
    """In the dtype of sums."""
    return a.astype(compute_dtype(a.dtype))
