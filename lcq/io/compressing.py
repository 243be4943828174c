"""`compress_to`: direct compression into a file, so that the forms of all leaves are never in memory together."""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lcq.forms.base import Form
from lcq.forms.blocks import block_counts
from lcq.forms.processes import readable
from lcq.io.saving import checked_settings, write
from lcq.io.tree_paths import Leaf, flatten
from lcq.schemes.base import Quantizer
from lcq.tree.aliases import Leaves, Params
from lcq.tree.compress import check_finite, take
from lcq.tree.lazy import whole
from lcq.tree.paths import flatten as leaves_by_path
from lcq.tree.rules import Rules, Task, check_same_rules, resolve

_PART = 1 << 20
"""Weights that are projected at once where blocks are independent: of all steps in between there is only so much."""


def compress_to(
    path: str | os.PathLike[str],
    params: Params,
    rules: Rules,
    *,
    plan: object = None,
    metadata: Mapping[str, str] | None = None,
    codecs: Sequence[str] | None = None,
    max_shard_bytes: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> int:
    """Compresses and saves a task after another: `save(path, compress(params, rules))` for nets that fill the memory.

    Beside `params` there are the forms of two tasks at most; and of leaves whose scales or codebooks are those of
    groups or channels the C step is made on a part at a time. That can change what a sum rounds to, and so a code that
    is a tie.

    Args:
        path: of the file, or of the index of a set.
        params: a tree of arrays, or of leaves that are read when they are asked for (`lcq.io.read(.., lazy=True)`).
        rules: which leaves, and how, as in `lcq.compress`.
        plan, metadata, codecs, max_shard_bytes: as in `lcq.save`.
        progress: called after each leaf with its number from 1, how many there are, and its path.

    Returns:
        Bytes of the file, or of all files of a set.

    Raises:
        ValueError: as `lcq.compress` and `lcq.save`.
        OSError: the folder is not there, or the file cannot be written.

    Example:
        >>> import lcq, tempfile, jax.numpy as jnp
        >>> params = {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = compress_to(f"{folder}/net.lcq", params, [lcq.Rule("kernel", lcq.Uniform(4, per=32))])
        ...     lcq.load(f"{folder}/net.lcq")["kernel"].describe()
        'codes K=16, fixed, 16 scales'
    """
    said, names = checked_settings(path, params, plan, metadata, True, codecs, max_shard_bytes)
    check_same_rules(rules, params)
    tasks, leaves = resolve(rules, params), flatten(params)[0]
    arrays = leaves_by_path(params)[0]
    for task in tasks:
        for name in task.paths:
            check_finite(name, arrays[name])

    def told(number: int, streams: list[str]) -> None:
        del streams
        if progress is not None:
            progress(number + 1, len(leaves), leaves[number].path)

    return write(path, leaves, _compressed(leaves, arrays, tasks), said, names, max_shard_bytes, told)


def _compressed(leaves: Sequence[Leaf], arrays: Leaves, tasks: Sequence[Task]) -> Iterator[Leaf]:
    """The leaves with forms where there are rules; those of a joint task are kept until it is their turn."""
    of_path = {path: task for task in tasks for path in task.paths}
    ready: dict[str, Form] = {}
    for leaf in leaves:
        if (task := of_path.get(leaf.path)) is not None and leaf.path not in ready:
            ready.update(zip(task.paths, project_in_parts(task, take(arrays, task)), strict=True))
        yield leaf._replace(value=ready.pop(leaf.path)) if task is not None else leaf


def project_in_parts(task: Task, xs: tuple[Any, ...], most: int = _PART) -> tuple[Form, ...]:
    """`task.project(xs)`, of a leaf whose blocks are independent by parts of about `most` weights, packed.

    Along the axis with the most blocks, by whole blocks. What is not so cut is projected whole.
    """
    counts = _counts(task, xs)
    axis = int(np.argmax(counts)) if counts else 0
    size = math.prod(xs[0].shape)
    if not counts or counts[axis] == 1 or size <= most or not readable(xs[0]):
        return task.project(tuple(map(whole, xs)))
    (x,), many = xs, counts[axis]
    parts = min(many, -(-size // most))
    parts = next((n for n in range(parts, min(many, 2 * parts) + 1) if many % n == 0), parts)  # of one size, if it goes
    length = -(-many // parts) * (x.shape[axis] // many)
    before, joined, first = (slice(None),) * axis, dict[str, np.ndarray](), None
    for start in range(0, x.shape[axis], length):
        part = jax.device_get(task.project((x[(*before, slice(start, start + length))],))[0])
        first = first or part
        for field in dataclasses.fields(part):
            array = getattr(part, field.name)
            if field.metadata.get("static") or array is None:
                continue
            if field.name not in joined:
                along = many if array.shape[axis] < length else x.shape[axis]
                joined[field.name] = np.empty((*array.shape[:axis], along, *array.shape[axis + 1 :]), array.dtype)
            share = joined[field.name].shape[axis] * start // x.shape[axis]
            joined[field.name][(*before, slice(share, share + array.shape[axis]))] = array
    assert first is not None
    return (dataclasses.replace(first, **joined).pack(),)


def _counts(task: Task, xs: tuple[Any, ...]) -> tuple[int, ...]:
    """Blocks along each axis of a leaf whose blocks have nothing in common; () if there is no such thing."""
    scheme: Any = task.scheme
    if len(xs) > 1 or task.stacked or not isinstance(scheme, Quantizer) or scheme.host or getattr(scheme, "rate", 0):
        return ()
    return block_counts(scheme.per, xs[0].shape)
