"""What a training wrapper is given, looked at once at its door: parameters, gradients, states."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, PyTree
from typing_extensions import TypeAliasType

from lcq.forms.meshes import placed_like
from lcq.tree.aliases import Leaves, OptState, Params
from lcq.tree.paths import flatten, leave_out
from lcq.tree.rules import Rules, Task, resolve

Optimizer = TypeAliasType("Optimizer", optax.GradientTransformation)
"""An optax optimizer."""

OptimizerOrFactory = TypeAliasType(
    "OptimizerOrFactory", optax.GradientTransformation | Callable[..., optax.GradientTransformation]
)
"""An optax optimizer, or a function from a learning rate to one."""

Schedule = TypeAliasType("Schedule", optax.ScalarOrSchedule)
"""A number, or a function of the number of updates."""


def abstract(params: Params) -> bool:
    """Whether a tree has shape structs among its leaves, as `jax.eval_shape` returns them.

    Example:
        >>> abstract({"kernel": jax.ShapeDtypeStruct((2,), "float32")}), abstract({"kernel": np.ones(2)})
        (True, False)
    """
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params))


def named(path: str) -> str:
    """A leaf's path for a message; of a tree that is a single leaf it is empty."""
    return path or "the only leaf"


def start_inner(inner: optax.GradientTransformation, params: Params) -> OptState:
    """`inner.init(params)`; what has the path and shape of a parameter in it lies where that does, also under jit.

    Raises:
        ValueError: it fails, and there are leaves that are no arrays; names the first.
    """
    try:
        return _placed(inner.init(params), params)
    except (TypeError, AttributeError) as error:
        check_arrays(params, error)
        raise


def _placed(state: OptState, params: Params) -> OptState:
    """Zeros that a trace makes lie nowhere; here they get the places of the parameters that they are for."""
    places = {keys: leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}

    def place(keys: tuple[object, ...], leaf: Array) -> Array:
        if not isinstance(leaf, jax.core.Tracer):
            return leaf
        alike = [places[keys[i:]] for i in range(len(keys) + 1) if keys[i:] in places]
        return placed_like(leaf, alike[0]) if alike and getattr(alike[0], "shape", None) == leaf.shape else leaf

    return jax.tree_util.tree_map_with_path(place, state)


def check_arrays(params: Params, cause: Exception | None = None) -> None:
    """Refuses leaves that are neither arrays nor numbers.

    Raises:
        ValueError: names the first.
    """
    for path, leaf in flatten(params)[0].items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | int | float | complex):
            raise ValueError(
                f"{named(path)}: expected an array, got {type(leaf).__name__}, which the optimizer cannot take: keep "
                "what is no array out of the parameters, or put optax.masked around the optimizer"
            ) from cause


def weights_of(leaves: Leaves, path: str, method: str) -> Array | np.ndarray:
    """The leaf at a path.

    Raises:
        ValueError: there is none.
    """
    leaf: Array | np.ndarray | None = leaves.get(path)
    if leaf is None or not hasattr(leaf, "dtype"):
        got = "they have no such leaf" if leaf is None else f"it is {type(leaf).__name__}"
        raise ValueError(
            f"{named(path)}: expected the parameters that {method} was given in init; {got}; pass them in the same tree"
        )
    return leaf


def slope_of(
    slopes: Leaves, path: str, w: Array | np.ndarray, what: str = "the gradient of the loss"
) -> Array | np.ndarray:
    """The gradient of the leaf w at a path.

    Raises:
        ValueError: there is none, or one of another shape.
    """
    slope: Array | np.ndarray | None = slopes.get(path)
    if slope is None or not hasattr(slope, "dtype") or slope.dtype == jax.dtypes.float0:
        got = "none" if slope is None else getattr(slope, "dtype", type(slope).__name__)
        raise ValueError(
            f"{named(path)}: expected {what}, got {got}; differentiate with respect to this leaf, or exclude it "
            f"with {leave_out(path)} before its rule"
        )
    if slope.shape != w.shape:
        raise ValueError(
            f"{named(path)}: expected {what}, of the leaf's shape {list(w.shape)}, "
            f"got {slope.dtype}{list(slope.shape)}; pass gradients in the tree of the parameters, summed over examples"
        )
    return slope


RESTORED = "a state that was restored without a target is plain dicts and lists: restore into tx.init(params)"
"""The remedy where a checkpoint lost the types of a state."""


def check_state(state: PyTree, kind: type, method: str, sound: bool = True) -> None:
    """Refuses what is not a state of a method, or has lost the types in it.

    Raises:
        ValueError: not of `kind`, or not `sound`.
    """
    if not isinstance(state, kind) or not sound:
        got = type(state).__name__ if not isinstance(state, kind) else f"a {kind.__name__} of plain dicts and lists"
        raise ValueError(
            f"expected the state that init of {method} made, got {got}; the order is update(grads, state, params), and "
            f"{RESTORED}"
        )


def check_one_run(number: ArrayLike, method: str) -> None:
    """Refuses the states of several runs in one, as `jax.vmap` makes them, where they are not mapped over.

    Args:
        number: of updates or C steps, which a run has one of.
        method: for the message.

    Raises:
        ValueError: several numbers.
    """
    if jnp.ndim(number):
        raise ValueError(
            f"expected the state of one run of {method}, got those of {jnp.size(number)}: map over them with jax.vmap, "
            "or take one of them, jax.tree.map(lambda a: a[0], (state, params))"
        )


def check_rules(tasks: Sequence[Task], rules: Rules, params: Params, method: str) -> None:
    """Refuses a state that was made by other rules than those of the optimizer that it is given to.

    Raises:
        ValueError: names the first leaf that has another scheme.
    """
    made, wanted = (
        {path: task for task in some for path in task.paths} for some in (tasks, resolve(rules, params, warn=False))
    )
    for path in {**wanted, **made}:
        old, new = made.get(path), wanted.get(path)
        if old != new:
            says = [_said(task) for task in (old, new)]
            if says[0] == says[1]:
                says = [f"{text} joint for {task.paths}" for text, task in zip(says, (old, new), strict=True) if task]
            raise ValueError(
                f"{named(path)}: the state of {method} was made for {says[0]}, its rules now say {says[1]}; go on with "
                "the rules of the state, or start one of the new rules from these weights: state = tx.init(params)"
            )


def _said(task: Task | None) -> str:
    """What a task makes of its leaves."""
    if task is None:
        return "no scheme"
    return f"{task.scheme}, stacked={task.stacked}" if task.stacked else str(task.scheme)
