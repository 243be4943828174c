"""What a wrapper tells the optimizer in it about the function that is minimised, beside the gradient.

Line searches, Polyak steps, schedules by plateau and Hessian estimates take extra arguments of `update`: the loss's
`value` and `grad` at the parameters, and functions of parameters, `value_fn`, `obj_fn` and `grad_fn`. They have to be
those of the function whose gradient the optimizer is given, or it searches one function along the slope of another.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PyTree

from lcq.tree.aliases import ExtraArgs, Params
from lcq.tree.paths import flatten

_VALUES, _SLOPES = ("value_fn", "obj_fn"), ("grad_fn",)
KEYS = ("value", "grad", *_VALUES, *_SLOPES)
"""Extra arguments of optax's optimizers that describe the function they minimise."""

SEARCHES = (optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)
"""States that keep a value and a gradient for `optax.value_and_grad_from_state`."""


class Term(NamedTuple):
    """A function of the parameters that a wrapper adds to the loss.

    Attributes:
        value: The term as a function of the parameters, a scalar.
        slope: Its gradient as a function of the parameters: by path, an array for each leaf that it depends on.
        add: Maps (gradients, parameters) to the gradients of the sum.
    """

    value: Callable[[Params], Float[Array, ""]]
    slope: Callable[[Params], dict[str, Array]]
    add: Callable[[optax.Updates, Params], optax.Updates]


def add_term(extra: ExtraArgs, params: Params, term: Term) -> ExtraArgs:
    """Extra arguments of `update` that describe the loss, as those of loss + term.

        value + term(w),   grad + term'(w),   value_fn(.) + term(.),   obj_fn(.) + term(.),   grad_fn(.) + term'(.)

    Functions keep their signatures, by which optax passes them data; what else there is stays as it is.
    """
    changed = dict(extra)
    if extra.get("value") is not None:
        changed["value"] = _sum(extra["value"], term.value(params))
    if extra.get("grad") is not None:
        changed["grad"] = term.add(extra["grad"], params)
    for key in _VALUES:
        if extra.get(key) is not None:
            changed[key] = _after(extra[key], lambda value, w: _sum(value, term.value(w)))
    for key in _SLOPES:
        if extra.get(key) is not None:
            changed[key] = _after(extra[key], term.add)
    return changed


def _sum(value: ArrayLike, term: Array) -> Array:
    """Both in the wider of their dtypes."""
    value = jnp.asarray(value)
    wide = jnp.promote_types(value.dtype, term.dtype)
    return value.astype(wide) + term.astype(wide)


def _after(function: Callable[..., PyTree], change: Callable[[PyTree, Params], PyTree]) -> Callable[..., PyTree]:
    """change(function(w, ...), w), with the signature of `function`."""

    @functools.wraps(function)
    def changed(w: Params, *args: object, **kwargs: object) -> PyTree:
        return change(function(w, *args, **kwargs), w)

    return changed


def at(extra: ExtraArgs, place: Callable[[Params], Params]) -> ExtraArgs:
    """Extra arguments whose functions are of v as those given are of w = place(v)."""

    def moved(function: Callable[..., PyTree]) -> Callable[..., PyTree]:
        return functools.wraps(function)(lambda v, *args, **kwargs: function(place(v), *args, **kwargs))

    return extra | {key: moved(extra[key]) for key in (*_VALUES, *_SLOPES) if extra.get(key) is not None}


def take_term(inner_state: PyTree, params: Params, term: Term) -> PyTree:
    """The inner state with the value and gradient that line searches keep, at `params`, again those of the loss.

    `optax.value_and_grad_from_state` hands them to the next update, which adds the term: the next one, if it changed.
    """

    def bare(node: PyTree) -> PyTree:
        if not isinstance(node, SEARCHES):
            return node
        value = (node.value - term.value(params)).astype(node.value.dtype)
        if node.grad is None:
            return node._replace(value=value)
        slopes, structure = flatten(node.grad)
        for path, slope in term.slope(params).items():
            if hasattr(slopes.get(path), "dtype"):
                slopes[path] = (slopes[path] - slope).astype(slopes[path].dtype)
        return node._replace(value=value, grad=jax.tree.unflatten(structure, slopes.values()))

    return jax.tree.map(bare, inner_state, is_leaf=_is_search)


def forget(inner_state: PyTree, when: ArrayLike) -> PyTree:
    """The inner state without the value that line searches keep, where parameters were moved away from it."""

    def without(node: PyTree) -> PyTree:
        if not isinstance(node, SEARCHES):
            return node
        return node._replace(value=jnp.where(when, jnp.inf, node.value).astype(node.value.dtype))

    return jax.tree.map(without, inner_state, is_leaf=_is_search)


def keeps_value(inner_state: PyTree) -> bool:
    """Whether there is a line search in a state."""
    return any(map(_is_search, jax.tree.leaves(inner_state, is_leaf=_is_search)))


def _is_search(node: PyTree) -> bool:
    return isinstance(node, SEARCHES)


def refuse_used(update: Callable[..., PyTree], extra: ExtraArgs, why: str) -> None:
    """Refuses extra arguments that describe the loss where an optimizer makes use of them and they would be wrong.

    Args:
        update: extra arguments by name -> what the optimizer returns.
        extra: all of them. Those that nothing depends on may pass: other members of a chain may want them.
        why: what is wrong, and the remedy.

    Raises:
        ValueError: one is used; names it.
    """
    arrays = {key: extra[key] for key in ("grad", "value") if extra.get(key) is not None}
    functions = {key: _refused(key, why) for key in (*_VALUES, *_SLOPES) if extra.get(key) is not None}
    if not arrays and not functions:
        return
    others = {key: value for key, value in extra.items() if key not in arrays}
    traced = jax.make_jaxpr(lambda arrays: update(**others | functions | arrays))(arrays).jaxpr
    live = {id(var) for var in traced.outvars}
    for eqn in reversed(traced.eqns):
        if any(id(var) in live for var in eqn.outvars):
            live.update(map(id, eqn.invars))
    names = (key for key, tree in arrays.items() for _ in jax.tree.leaves(tree))  # a dict's leaves come by its keys
    used = sorted({key for key, var in zip(names, traced.invars, strict=True) if id(var) in live})
    if used:
        raise ValueError(_message(used[0], why))


def _refused(key: str, why: str) -> Callable[..., NoReturn]:
    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise ValueError(_message(key, why))

    return refuse


def _message(key: str, why: str) -> str:
    return f"expected an optimizer that needs no {key}=, got one that uses it: {why}"
