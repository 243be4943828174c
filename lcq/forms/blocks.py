"""How a leaf is cut into blocks, each with a codebook or scale of its own, without moving its data."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from lcq.forms.dtypes import wider

Per = None | str | int | tuple[int, ...]
"""What shares one codebook or scale; see `block_counts`."""


class Blocks(NamedTuple):
    """How an array is cut into equal blocks along each axis, without moving data.

    An axis of length d in c blocks stays one axis if c is 1 or d, and is split into (c, d/c) otherwise; so an array
    that is sharded along an axis keeps its sharding.

    Attributes:
        split: the array's shape with the cut axes split.
        stat: the shape of one number per block, with ones where `split` runs inside a block.
        axes: the axes of `split` that run inside a block.
        size: elements in one block.
    """

    split: tuple[int, ...]
    stat: tuple[int, ...]
    axes: tuple[int, ...]
    size: int


def blocks(shape: Sequence[int], counts: Sequence[int]) -> Blocks:
    """The block structure of an array of `shape` with `counts[i]` equal blocks along axis i."""
    split: list[int] = []
    stat: list[int] = []
    for length, count in zip(shape, counts, strict=True):
        cut = (length,) if count in (1, length) else (count, length // count)
        split += cut
        stat += (count,) if len(cut) == 1 else (count, 1)
    axes = tuple(i for i, b in enumerate(stat) if b == 1)
    size = 1
    for i in axes:
        size *= split[i]
    return Blocks(tuple(split), tuple(stat), axes, size)


def cut_axes(x: Array, counts: Sequence[int]) -> Array:
    """x.reshape(blocks(x.shape, counts).split), an axis at a time: so sharded axes can be cut."""
    for axis, count in reversed(list(enumerate(counts))):
        if count not in (1, x.shape[axis]):
            x = x.reshape(*x.shape[:axis], count, x.shape[axis] // count, *x.shape[axis + 1 :])
    return x


def join_axes(x: Array, shape: Sequence[int]) -> Array:
    """Inverse of `cut_axes` for an array of `shape`."""
    for axis, length in enumerate(shape):
        if x.shape[axis] != length:
            x = x.reshape(*x.shape[:axis], length, *x.shape[axis + 2 :])
    return x


def of_each(numbers: Array, lengths: Sequence[int]) -> Array:
    """Numbers with one entry per block along their first axes, for each index of axes of these lengths.

    Example:
        >>> of_each(jnp.array([[1], [2]]), (4,)).tolist()
        [[1], [1], [2], [2]]
    """
    for axis, length in enumerate(lengths):
        numbers = jnp.repeat(numbers, length // numbers.shape[axis], axis)
    return numbers


def block_counts(per: Per, shape: Sequence[int]) -> tuple[int, ...]:
    """Number of blocks along each axis of `shape`, where every block has its own codebook or scale.

    Args:
        per: None: one block; "channel": one for each index of the last axis (an output unit or filter of a
            JAX kernel); an int g: groups of g consecutive weights along the input axis, the last but one, for each
            index of the last axis; a tuple: block lengths along the trailing axes, 0 for a whole axis, so that (1, 0)
            gives every row of a matrix its own.
        shape: the leaf's shape.

    Raises:
        ValueError: lengths that do not divide the axes, or more lengths than axes.
    """
    if per is None:
        lengths: tuple[int, ...] = ()
    elif per == "channel":
        lengths = (1,)
    elif isinstance(per, int) and not isinstance(per, bool) and per > 0:
        lengths = (per, 1)
    elif isinstance(per, tuple) and all(isinstance(g, int) and g >= 0 for g in per):
        lengths = per
    else:
        raise ValueError(f"expected per=None, 'channel', a group length or a tuple of block lengths, got {per!r}")
    if len(lengths) > len(shape):
        raise ValueError(f"per={per!r} needs at least {len(lengths)} axes, got shape {tuple(shape)}")
    lengths = (0,) * (len(shape) - len(lengths)) + lengths
    counts = []
    for axis, (length, g) in enumerate(zip(shape, lengths, strict=True)):
        if g and length % g:
            raise ValueError(
                f"per={per!r} cuts axis {axis} of shape {tuple(shape)} into groups of {g}, which do not divide {length}"
            )
        counts.append(length // g if g else 1)
    return tuple(counts)


def compute_dtype(dtype: DTypeLike) -> Any:
    """The dtype of sums and statistics over leaves of `dtype`: float32, or wider."""
    return wider(dtype, jnp.float32)


def explicit_sharding(x: Array) -> jax.sharding.NamedSharding | None:
    """Where an array lies on a mesh with explicit axes; None anywhere else, where the compiler chooses."""
    sharding = jax.typeof(x).sharding
    return sharding if any(sharding.spec) else None
