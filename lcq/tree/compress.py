"""Verbs on parameter trees: compress, decompress, and what a tree costs."""

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms.base import Form, is_form
from lcq.forms.blocks import compute_dtype
from lcq.forms.restored import check_restored
from lcq.tree.aliases import Forms, Leaves, Params
from lcq.tree.lazy import LazyLeaf, parts, whole
from lcq.tree.paths import check_numbers, flatten, leave_out
from lcq.tree.rules import Rules, Task, check_same_rules, resolve


def compress(params: Params, rules: Rules, *, importance: Leaves | None = None) -> Forms:
    """Direct compression: every selected leaf becomes its nearest form, Theta = Pi(w).

    Args:
        params: a tree of arrays.
        rules: which leaves, and how; the first match wins. per="channel" is the last axis unless the rule has a layout;
            leaves that look like stacks of layers, and are not said to be, are warned of.
        importance: by path, how much the squared error of each element counts, such as `lcq.ptq.curvature` gives;
            leaves without are unweighted.

    Returns:
        The tree with forms in the working layout at the selected leaves, everything else as it was.

    Raises:
        ValueError: a rule without a leaf, a leaf its scheme cannot take, a NaN, an infinity or a number above a quarter
            of the largest, an importance of a leaf that no rule selects; names the leaf. Arrays on the devices of
            several processes that have different rules.

    Example:
        >>> import lcq
        >>> w = {"kernel": jnp.array([[-1., -3.], [1., 3.]])}
        >>> lcq.decompress(compress(w, [lcq.Rule("kernel", lcq.KMeans(k=2))]))
        {'kernel': Array([[-2., -2.],
               [ 2.,  2.]], dtype=float32)}

    Source: Carreira-Perpinan, arXiv 1707.01209, section 3.1.
    """
    check_same_rules(rules, params)
    tasks = resolve(rules, params)
    leaves, structure = flatten(params)
    for task in tasks:
        for path in task.paths:
            check_finite(path, leaves[path])
    left = set(importance or ()) - {path for task in tasks for path in task.paths}
    if left:
        raise ValueError(
            f"{', '.join(sorted(left))}: expected importances of leaves that a rule compresses; drop these"
        )
    return replace(structure, leaves, tasks, [_project(task, leaves, importance or {}) for task in tasks])


def _project(task: Task, leaves: Leaves, importance: Leaves) -> tuple[Form, ...]:
    xs = take(leaves, task)
    if not any(path in importance for path in task.paths):
        return task.project(xs)
    ones = (jnp.ones((1,) * x.ndim) for x in xs)
    return task.project(
        xs, importance=tuple(importance.get(path, one) for path, one in zip(task.paths, ones, strict=True))
    )


def decompress(tree: Forms) -> Params:
    """Replaces every form by its dense array Delta(Theta).

    Raises:
        ValueError: a dict that was a form, restored from a checkpoint without a target; the name of a file.
    """
    if isinstance(tree, str | os.PathLike):
        raise ValueError(f"expected a tree of forms, got the name {os.fspath(tree)!r}; read it: lcq.load(name)")
    check_restored(tree)
    return jax.tree.map(lambda leaf: leaf.dense() if is_form(leaf) else leaf, tree, is_leaf=is_form)


def take(leaves: Leaves, task: Task) -> tuple[Any, ...]:
    """The leaves of one task, in its order."""
    return tuple(whole(leaves[path]) for path in task.paths)


def replace(
    structure: jax.tree_util.PyTreeDef, leaves: Leaves, tasks: Sequence[Task], forms: Sequence[tuple[Form, ...]]
) -> Forms:
    """The tree of `structure` with each task's forms at its leaves."""
    new = dict(leaves)
    for task, of_task in zip(tasks, forms, strict=True):
        new.update(zip(task.paths, of_task, strict=True))
    return jax.tree.unflatten(structure, new.values())


def check_finite(path: str, leaf: Array | np.ndarray | np.number | jax.ShapeDtypeStruct | LazyLeaf) -> None:
    """Refuses NaN, infinities and numbers near the largest in a concrete leaf; a traced one cannot be looked at."""
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    with jax.ensure_compile_time_eval():  # a concrete leaf may be met inside a trace
        finite = all(bool(_all_usable(part)) for part in parts(leaf))
    if not finite:
        with jax.ensure_compile_time_eval():
            bad = sum(int((~jnp.isfinite(part)).sum()) for part in parts(leaf))
        got = f"{bad} NaN or infinite" if bad else "some that are larger"
        most = "" if bad else f" of at most {_largest(leaf.dtype):.1e}"
        raise ValueError(
            f"{path}: expected finite weights{most}, got {got} of {math.prod(leaf.shape)}; train again with a smaller "
            f"learning rate, or exclude it with {leave_out(path)} before its rule"
        )


@jax.jit
def _all_usable(x: Array) -> Array:
    """Whether every number is one that lcq can reckon with; as one program, which keeps nothing of the length of x."""
    return (jnp.abs(x).astype(compute_dtype(x.dtype)) <= _largest(x.dtype)).all()


def _largest(dtype: Any) -> float:
    """Of twice as much the levels of a grid around it would overflow."""
    return float(jnp.finfo(compute_dtype(dtype)).max) / 4


class Size(NamedTuple):
    """Bits of one leaf before and after.

    Attributes:
        dense: Bits of the leaf as it was, in its own dtype: what every ratio compares with.
        bits: Bits of what is stored, without what another leaf already counted.
        form: Name of the form, "-" for a plain array.
    """

    dense: int
    bits: int
    form: str


def sizes(tree: Forms) -> dict[str, Size]:
    """Bits of every leaf of a compressed tree; nothing is left out, what a joint task shares counts at its first leaf.

    Exact for stored forms; in the working layout an estimate where the cost depends on the values.

    Raises:
        ValueError: a leaf that is no array, form or number; names it.

    Example:
        >>> import lcq
        >>> w = {"bias": jnp.zeros(2), "kernel": jnp.ones((8, 4))}
        >>> sizes(compress(w, [lcq.Rule("kernel", lcq.Binary(scale=True))]))["kernel"]
        Size(dense=1024, bits=64, form='Codes')
    """
    check_restored(tree)
    result = {}
    seen: set[str] = set()
    leaves, _ = flatten(tree)
    check_numbers(leaves)
    for path, leaf in leaves.items():
        if not is_form(leaf):
            leaf = np.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
            bits = leaf.size * leaf.dtype.itemsize * 8
            result[path] = Size(bits, bits, "-")
            continue
        bits = leaf.bits
        if leaf.shared is not None:
            bits -= leaf.shared_bits if leaf.shared in seen else 0
            seen.add(leaf.shared)
        dense = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize * 8
        result[path] = Size(dense, bits, type(leaf).__name__)
    return result


def ratio(tree: Forms) -> float:
    """Bits of the tree as it was over bits as stored: b (P1 + P0) / (bits(Theta) + b P0), every leaf in its own dtype.

    Of P1 numbers that are compressed and P0 that are not; b is 32 in float32 and 16 in bfloat16.

    Raises:
        ValueError: no numbers in it, or a leaf that is no array, form or number.

    Example:
        >>> import lcq
        >>> w = {"kernel": jnp.ones((8, 4), jnp.bfloat16)}
        >>> ratio(compress(w, [lcq.Rule("kernel", lcq.Binary())]))
        8.0
    """
    rows = sizes(tree).values()
    if not any(row.bits for row in rows):
        raise ValueError(
            "expected a tree with at least one number, got none; pass the tree that compress or extract gave"
        )
    return sum(row.dense for row in rows) / sum(row.bits for row in rows)
