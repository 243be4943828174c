"""Paths through a leaf: in which order its weights are written, and the last bits that were, at each of them.

A path runs along some axes of a leaf, in row-major order of these; the other axes tell paths apart. It is cut into
equal pieces, each of which bites its tail: the codes before its first are its last.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped, UInt, UInt16

from lcq.forms.relayout import Relayout

_Any = Array | np.ndarray


def as_paths(a: Shaped[_Any, "..."], along: tuple[int, ...], length: int) -> Shaped[_Any, "t p"]:
    """The pieces of a leaf side by side.

    Args:
        a: an array of the leaf's shape.
        along: the axes along which a path runs, counted from the end.
        length: weights of a piece.

    Example:
        >>> as_paths(np.arange(8).reshape(4, 2), (-2,), 2).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    run, rest = _order(a.ndim, along)
    count = math.prod(a.shape[i] for i in run) // length
    return a.transpose(*run, *rest).reshape(count, length, -1).swapaxes(0, 1).reshape(length, -1)


def from_paths(pieces: Shaped[Array, "t p"], shape: tuple[int, ...], along: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Inverse of `as_paths` for an array of a shape."""
    run, rest = _order(len(shape), along)
    length, moved = pieces.shape[0], [shape[i] for i in (*run, *rest)]
    count = math.prod(moved[: len(run)]) // length
    a = pieces.reshape(length, count, -1).swapaxes(0, 1).reshape(moved)
    return a.transpose([int(i) for i in np.argsort((*run, *rest))])


def piece_length(run: int, block: int) -> int:
    """Weights of a piece, of a path of `run`: the shortest that divides it and has at least `block`; the whole if it is
    shorter.

    Example:
        >>> piece_length(4096, 1000), piece_length(300, 1000), piece_length(2003, 1000)
        (1024, 300, 2003)
    """
    most = max(run // block, 1)
    return run // next(count for count in range(most, 0, -1) if run % count == 0)


@functools.partial(jax.jit, static_argnames=("bits", "memory"), inline=True)
def states_of(codes: UInt[Array, "t p"], bits: int, memory: int) -> UInt16[Array, "t p"]:
    """The last `memory` bits at each weight, of which the lowest are its own code's.

    Example:
        >>> states_of(jnp.array([[1], [0], [1], [1]], jnp.uint8), 1, 3)[:, 0].tolist()
        [7, 6, 5, 3]
    """
    back = -(-memory // bits) - 1
    whole = jnp.concatenate([codes[len(codes) - back :], codes]).astype(jnp.uint16)
    states = whole[back:]
    for i in range(1, back + 1):
        states |= whole[back - i : len(whole) - i] << jnp.uint16(i * bits)
    return states & jnp.uint16((1 << memory) - 1)


def moved_paths(along: tuple[int, ...], change: Relayout) -> tuple[int, ...] | None:
    """The axes along which paths run after a change of layout; None if they do not run along whole axes."""
    places = np.arange(math.prod(change.shape), dtype=np.int32).reshape(change.shape)
    run = math.prod(change.shape[i] for i in along)
    order = np.empty(places.size, np.int32)  # of each weight the number of its path times `run`, and its place there
    order[as_paths(places, along, run).T.reshape(-1)] = np.arange(places.size)
    return path_axes(order[change.places], run, run)


def path_axes(found: Int[np.ndarray, "..."], run: int, length: int) -> tuple[int, ...] | None:
    """The axes along which paths run, counted from the end; None if their pieces do not run along whole axes.

    Args:
        found: for each weight of a leaf the number of its path times `run`, and its place there.
        run: weights of a path.
        length: of a piece of it.

    Example:
        >>> path_axes(np.array([[0, 1, 2], [3, 4, 5]]), 3, 3), path_axes(np.array([[0, 2], [1, 3]]), 2, 2)
        ((-1,), (-2,))
    """
    steps = {}
    for axis in range(-found.ndim, 0):
        first = np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1)[:2, 0]
        if len(first) == 2 and first[0] // run == first[1] // run:
            steps[axis] = first[1] - first[0]
    axes = tuple(sorted(steps, key=lambda axis: -steps[axis]))
    if math.prod(found.shape[i] for i in axes) % length:
        return None
    paths = as_paths(found, axes, length)
    same = (paths[0] % length == 0).all() and (paths == paths[0] + np.arange(length)[:, None]).all()
    return axes if same else None


def _order(rank: int, along: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of a path, and the others."""
    run = tuple(axis + rank for axis in along)
    return run, tuple(axis for axis in range(rank) if axis not in run)
