"""The batches a function is walked with: their checks, which of their positions count, and a trace for each shape."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import TypeAliasType

from lcq.forms.dtypes import native
from lcq.tracing.param_flow import trace
from lcq.tracing.program import Program
from lcq.tree.aliases import Batch, Params
from lcq.tree.paths import flatten

Mask = TypeAliasType("Mask", Callable[[Any], Any] | str | None)
"""Which positions of a batch count, see `lcq.quantize`."""


def checked_batches(batches: Any) -> list[Any]:
    """An iterable of batches as trees of jax arrays, all of the same structure.

    Raises:
        ValueError: no batch, one without examples, a leaf that is no array, or another structure; names batch and leaf.
    """
    if hasattr(batches, "shape"):
        raise ValueError(f"expected an iterable of batches, got one array {list(batches.shape)}; pass [batch]")
    if batches is None or isinstance(batches, str | bytes | dict):
        raise ValueError(f"expected an iterable of batches, got {_told(batches)}; pass [batch]")
    made = []
    for i, batch in enumerate(batches):
        leaves, structure = jax.tree.flatten(batch)
        if not leaves:
            raise ValueError(f"batch {i}: expected a tree of arrays, got {_told(batch)}; drop it")
        paths = [""] if leaves[0] is batch else list(flatten(batch)[0])
        arrays = [
            _array(f"batch {i}" + (f", leaf {p}" if p else ""), leaf) for p, leaf in zip(paths, leaves, strict=True)
        ]
        made.append(jax.tree.unflatten(structure, arrays))
    if not made:
        raise ValueError("expected at least one batch of inputs, got none")
    for i, batch in enumerate(made):
        one, two = (str(jax.tree.structure(each)) for each in (made[0], batch))
        if one != two:
            raise ValueError(
                f"batch {i}: expected batches of equal structure, got {one} before and here {two}; drop it"
            )
        if any(0 in np.shape(leaf) for leaf in jax.tree.leaves(batch)):
            raise ValueError(
                f"batch {i}: expected at least one example, got {jax.tree.map(jax.typeof, batch)}; drop it"
            )
    return made


def _array(name: str, leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return leaf
    try:
        array = np.asarray(leaf)
    except (TypeError, ValueError):
        array = np.asarray(None)
    if array.dtype.kind not in "biufcV" or array.dtype.names or isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{name}: expected an array, got {_told(leaf)}; leave it out of the batch, or close over it: "
            "lambda params, batch: fn(params, batch, ...)"
        )
    return jnp.asarray(leaf) if np.isscalar(leaf) else jax.device_put(native(array))


def _told(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:60]!r}"


def counts_of(mask: Mask, batch: Batch, number: int) -> list[Any] | None:
    """For every leaf of a batch a boolean array of its leading axes, or None where all of it counts.

    Raises:
        ValueError: a mask that fits no leaf, is not of zeros and ones, or counts nothing.
    """
    if mask is None:
        return None
    leaves = flatten(batch)[0] if not hasattr(batch, "shape") else {"": batch}
    if isinstance(mask, str):
        if mask not in leaves:
            raise ValueError(
                f"mask={mask!r}: expected the path of a leaf of the batch: {', '.join(leaves)}, got none of it"
            )
        given: Any = leaves[mask]
    else:
        given = mask(batch)
    if hasattr(given, "shape"):
        found = _boolean(given, number)
        return _for_leaves(found, [np.shape(leaf) for leaf in leaves.values()], number)
    each = jax.tree.leaves(given, is_leaf=lambda value: value is None)
    if len(each) != len(leaves):
        raise ValueError(
            f"batch {number}: expected a mask for all leaves, or for each of {', '.join(leaves)}, got {len(each)} masks"
        )
    made = [None if one is None else _boolean(one, number) for one in each]
    for one, (path, leaf) in zip(made, leaves.items(), strict=True):
        if one is not None and one.shape != np.shape(leaf)[: one.ndim]:
            raise ValueError(
                f"batch {number}: expected a mask of the leading axes of {path} {list(np.shape(leaf))}, got "
                f"{list(one.shape)}"
            )
    return made


def _for_leaves(found: Any, shapes: Sequence[tuple[int, ...]], number: int) -> list[Any]:
    """One mask for all leaves that begin with its axes; a leaf of its first axes alone counts where anything does."""
    made: list[Any] = []
    for shape in shapes:
        rank = min(len(shape), found.ndim)
        fits = rank > 0 and shape[:rank] == found.shape[:rank]
        made.append(found.any(tuple(range(rank, found.ndim))) if fits else None)
    if not any(shape[: found.ndim] == found.shape for shape in shapes):
        raise ValueError(
            f"batch {number}: expected a mask of the leading axes of a leaf: {', '.join(map(str, map(list, shapes)))}, "
            f"got {list(found.shape)}"
        )
    return made


def _boolean(given: Any, number: int) -> Any:
    values = np.asarray(given)
    if values.ndim == 0 or not np.isin(values, (0, 1)).all():
        raise ValueError(
            f"batch {number}: expected a mask of booleans, or of 0 and 1, with an axis for the examples, got "
            f"{values.dtype.name} {list(values.shape)}; compare first, as in tokens != 0"
        )
    if not values.any():
        raise ValueError(f"batch {number}: expected a mask with a position that counts, got none; drop the batch")
    return jnp.asarray(values.astype(bool))


def traced(
    fn: Callable[[Any, Any], Any], params: Params, batches: Sequence[Any], selected: Collection[str], mask: Mask = None
) -> tuple[list[Program], list[Any]]:
    """For every batch the trace of fn on its shapes, one object for equal shapes, and the inputs of that trace.

    An error of fn on a batch that is a tuple or a list has a note on how fn is called.
    """
    programs: list[Program] = []
    kinds: list[Any] = []
    inputs = []
    for number, batch in enumerate(batches):
        counts = counts_of(mask, batch, number)
        kind = jax.tree.flatten(jax.tree.map(jax.typeof, (batch, counts)), is_leaf=lambda a: a is None)
        if kind in kinds:
            programs.append(programs[kinds.index(kind)])
        else:
            with told_how_called(batch):
                programs.append(trace(fn, params, batch, selected, counts=counts))
        kinds.append(kind)
        inputs.append((batch, counts))
    return programs, inputs


@contextlib.contextmanager
def told_how_called(batch: Batch) -> Iterator[None]:
    """Adds to errors of a function on a batch of several parts that it gets them as one argument."""
    try:
        yield
    except (TypeError, AttributeError) as error:
        if isinstance(batch, tuple | list):
            error.add_note(
                f"the function is called as fn(params, batch), and here batch is a {type(batch).__name__} of "
                f"{len(batch)}; if it takes the parts one by one pass lambda params, batch: fn(params, *batch)"
            )
        raise
