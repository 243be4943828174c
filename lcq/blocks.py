"""How a leaf is cut into blocks, each with a codebook or scale of its own, without moving its data."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from lcq.dtypes import wider

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


def _split(shape: Sequence[int], counts: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    """`blocks(shape, counts).split` of an array of `lengths` that broadcasts to `shape`."""
    split: list[int] = []
    for whole, count, length in zip(shape, counts, lengths, strict=True):
        axes = (whole,) if count in (1, whole) else (count, whole // count)
        split += axes if length == whole else (1,) * len(axes)
    return tuple(split)


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
        raise ValueError(f"wanted per=None, 'channel', a group length or a tuple of block lengths; got {per!r}")
    if len(lengths) > len(shape):
        raise ValueError(f"per={per!r} needs at least {len(lengths)} axes; got shape {tuple(shape)}")
    lengths = (0,) * (len(shape) - len(lengths)) + lengths
    counts = []
    for axis, (length, g) in enumerate(zip(shape, lengths, strict=True)):
        if g and length % g:
            raise ValueError(
                f"per={per!r} cuts axis {axis} of shape {tuple(shape)} into groups of {g}, which do not divide {length}"
            )
        counts.append(length // g if g else 1)
    return tuple(counts)


class Cut(NamedTuple):
    """Leaves cut into blocks, with one number per block that all leaves share.

    Attributes:
        leaves: the arrays in float32 or wider, of shape `blocks.split`.
        blocks: how each leaf is cut.
        counts: blocks along each axis of each leaf.
        weights: how much each element counts, arrays that broadcast against the leaves: floats, or, if the leaves and
            what is made of them are finite, integers; None for once.
    """

    leaves: tuple[Array, ...]
    blocks: tuple[Blocks, ...]
    counts: tuple[tuple[int, ...], ...]
    weights: tuple[Array, ...] | None = None

    def weighted(self, arrays: Iterable[Array]) -> Iterable[Array]:
        """Arrays shaped like the leaves, times the weights."""
        if self.weights is None:
            return arrays
        return [_times(a, h) for a, h in zip(arrays, self.weights, strict=True)]

    def sum(self, arrays: Iterable[Array]) -> Array:
        """Weighted sums over blocks and leaves: one number per block, of the shape of the first leaf's blocks."""
        return functools.reduce(jnp.add, self._each(jnp.sum, self.weighted(arrays)))

    def max(self, arrays: Iterable[Array]) -> Array:
        """Maxima over blocks and leaves, of what has a weight."""
        if self.weights is not None:
            arrays = [jnp.where(h > 0, a, -jnp.inf) for a, h in zip(arrays, self.weights, strict=True)]
        return functools.reduce(jnp.maximum, self._each(jnp.max, arrays))

    def _each(self, reduce: Any, arrays: Iterable[Array]) -> list[Array]:
        first = self.blocks[0].stat
        pairs = zip(arrays, self.blocks, strict=True)
        return [reduce(array, block.axes, keepdims=True).reshape(first) for array, block in pairs]

    def thin(self, size: int) -> "Cut":
        """Every n-th part of each leaf along its longest axis, so that a block keeps about `size` elements in all.

        Not where there are weights: a sample could miss the few that weigh most.
        """
        if self.weights is not None:
            return self
        leaves, times = [], sum(block.size for block in self.blocks) // size
        for x, block in zip(self.leaves, self.blocks, strict=True):
            axis = max(block.axes, key=lambda i: x.shape[i], default=0)
            stride = min(times, x.shape[axis]) if block.axes else 1
            leaves.append(jax.lax.slice_in_dim(x, 0, None, stride, axis) if stride > 1 else x)
        return self._replace(leaves=tuple(leaves))

    def spread(self, stat: Array) -> list[Array]:
        """One number per block, shaped to broadcast against each leaf."""
        return [stat.reshape(block.stat) for block in self.blocks]

    def numbers(self, stat: Array) -> list[Array]:
        """One number per block, shaped as a form stores it for each leaf."""
        return [stat.reshape(count) for count in self.counts]

    def rows(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Elements of all leaves and their weights in float64, a row for every block. Host only."""

        def of(arrays: Iterable[Array]) -> np.ndarray:
            parts = []
            for a, block in zip(arrays, self.blocks, strict=True):
                outside = [i for i in range(len(block.split)) if i not in block.axes]
                whole = np.broadcast_to(np.asarray(a, np.float64), block.split)
                parts.append(whole.transpose(outside + list(block.axes)).reshape(-1, block.size))
            return np.concatenate(parts, axis=1)

        return of(self.leaves), None if self.weights is None else of(self.weights)


def _times(a: Array, h: Array) -> Array:
    """a h; zero where a float weight is zero, though a may be anything there: nothing was scaled to contain it."""
    return a * h if jnp.issubdtype(h.dtype, jnp.integer) else jnp.where(h > 0, a * h, 0)


def cut(xs: Sequence[Array], per: Per, weights: Sequence[Array] | None = None) -> Cut:
    """Cuts leaves into blocks.

    Args:
        xs: the leaves.
        per: what makes a block, see `block_counts`.
        weights: floats >= 0 that broadcast against the leaves and have as many axes. The result's are proportional to
            them with mean one in every block, and ones in a block where all are zero.

    Raises:
        ValueError: `per` does not fit a shape, or several leaves are to share the numbers of more than one block.
    """
    if len(xs) > 1 and per is not None:
        raise ValueError(f"per={per!r}: leaves of a joint task share one codebook and scale; drop per= or joint=")
    counts = tuple(block_counts(per, x.shape) for x in xs)
    how = tuple(blocks(x.shape, count) for x, count in zip(xs, counts, strict=True))
    leaves = tuple(x.astype(compute_dtype(x.dtype)).reshape(b.split) for x, b in zip(xs, how, strict=True))
    if weights is None:
        return Cut(leaves, how, counts)
    split = [_split(x.shape, count, h.shape) for x, count, h in zip(xs, counts, weights, strict=True)]
    hs = [h.reshape(s) for h, s in zip(weights, split, strict=True)]
    return Cut(leaves, how, counts, tuple(_of_mean_one(hs, how)))


def _of_mean_one(weights: Sequence[Array], how: Sequence[Blocks]) -> list[Array]:
    """Weights over their mean in every block, in two steps so that sums neither overflow nor vanish."""

    def shared(numbers: list[Array], reduce: Any) -> list[Array]:
        """Leaves that share a block are each one block."""
        return numbers if len(numbers) == 1 else [functools.reduce(reduce, [a.reshape(()) for a in numbers])] * len(how)

    total = sum(b.size for b in how)
    top = shared([jnp.max(h, b.axes, keepdims=True) for h, b in zip(weights, how, strict=True)], jnp.maximum)
    some = [t >= jnp.finfo(t.dtype).tiny for t in top]
    hs = [jnp.where(s, h / jnp.where(s, t, 1), 1) for h, t, s in zip(weights, top, some, strict=True)]
    means = [jnp.mean(h, b.axes, keepdims=True) * (b.size / total) for h, b in zip(hs, how, strict=True)]
    return [h / mean for h, mean in zip(hs, shared(means, jnp.add), strict=True)]


def compute_dtype(dtype: DTypeLike) -> Any:
    """The dtype of sums and statistics over leaves of `dtype`: float32, or wider."""
    return wider(dtype, jnp.float32)


def explicit_sharding(x: Array) -> jax.sharding.NamedSharding | None:
    """Where an array lies on a mesh with explicit axes; None anywhere else, where the compiler chooses."""
    sharding = jax.typeof(x).sharding
    return sharding if any(sharding.spec) else None
