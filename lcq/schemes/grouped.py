"""Leaves cut into blocks, with one number per block that all leaves share."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms.blocks import Blocks, Per, block_counts, blocks, compute_dtype


def _split(shape: Sequence[int], counts: Sequence[int], lengths: Sequence[int]) -> tuple[int, ...]:
    """`blocks(shape, counts).split` of an array of `lengths` that broadcasts to `shape`."""
    split: list[int] = []
    for whole, count, length in zip(shape, counts, lengths, strict=True):
        axes = (whole,) if count in (1, whole) else (count, whole // count)
        split += axes if length == whole else (1,) * len(axes)
    return tuple(split)


class Cut(NamedTuple):
    """Leaves cut into blocks, with one number per block that all leaves share.

    Attributes:
        leaves: the arrays in float32 or wider, of shape `blocks.split`.
        blocks: how each leaf is cut.
        counts: blocks along each axis of each leaf.
        importance: how much each element counts, arrays that broadcast against the leaves: floats, or, if the leaves
            and what is made of them are finite, integers; None for once.
    """

    leaves: tuple[Array, ...]
    blocks: tuple[Blocks, ...]
    counts: tuple[tuple[int, ...], ...]
    importance: tuple[Array, ...] | None = None

    def weighted(self, arrays: Iterable[Array]) -> Iterable[Array]:
        """Arrays shaped like the leaves, times their importance."""
        if self.importance is None:
            return arrays
        return [_times(a, h) for a, h in zip(arrays, self.importance, strict=True)]

    def sum(self, arrays: Iterable[Array]) -> Array:
        """Weighted sums over blocks and leaves: one number per block, of the shape of the first leaf's blocks."""
        return functools.reduce(jnp.add, self._each(jnp.sum, self.weighted(arrays)))

    def max(self, arrays: Iterable[Array]) -> Array:
        """Maxima over blocks and leaves, of what has a weight."""
        if self.importance is not None:
            arrays = [jnp.where(h > 0, a, -jnp.inf) for a, h in zip(arrays, self.importance, strict=True)]
        return functools.reduce(jnp.maximum, self._each(jnp.max, arrays))

    def _each(self, reduce: Any, arrays: Iterable[Array]) -> list[Array]:
        first = self.blocks[0].stat
        pairs = zip(arrays, self.blocks, strict=True)
        return [reduce(array, block.axes, keepdims=True).reshape(first) for array, block in pairs]

    def thin(self, size: int) -> "Cut":
        """Every n-th part of each leaf along its longest axis, so that a block keeps about `size` elements in all.

        Not where there is an importance: a sample could miss the few that weigh most.
        """
        if self.importance is not None:
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
        """Elements of all leaves and their importance in float64, a row for every block. Host only."""

        def of(arrays: Iterable[Array]) -> np.ndarray:
            parts = []
            for a, block in zip(arrays, self.blocks, strict=True):
                outside = [i for i in range(len(block.split)) if i not in block.axes]
                whole = np.broadcast_to(np.asarray(a, np.float64), block.split)
                parts.append(whole.transpose(outside + list(block.axes)).reshape(-1, block.size))
            return np.concatenate(parts, axis=1)

        return of(self.leaves), None if self.importance is None else of(self.importance)


def _times(a: Array, h: Array) -> Array:
    """a h; zero where a float weight is zero, though a may be anything there: nothing was scaled to contain it."""
    return a * h if jnp.issubdtype(h.dtype, jnp.integer) else jnp.where(h > 0, a * h, 0)


def cut(xs: Sequence[Array], per: Per, importance: Sequence[Array] | None = None) -> Cut:
    """Cuts leaves into blocks.

    Args:
        xs: the leaves.
        per: what makes a block, see `block_counts`.
        importance: floats >= 0 that broadcast against the leaves and have as many axes. The result's are proportional
            to them with mean one in every block, and ones in a block where all are zero.

    Raises:
        ValueError: `per` does not fit a shape, or several leaves are to share the numbers of more than one block.
    """
    if len(xs) > 1 and per is not None:
        raise ValueError(f"per={per!r}: leaves of a joint task share one codebook and scale; drop per= or joint=")
    counts = tuple(block_counts(per, x.shape) for x in xs)
    how = tuple(blocks(x.shape, count) for x, count in zip(xs, counts, strict=True))
    leaves = tuple(x.astype(compute_dtype(x.dtype)).reshape(b.split) for x, b in zip(xs, how, strict=True))
    if importance is None:
        return Cut(leaves, how, counts)
    split = [_split(x.shape, count, h.shape) for x, count, h in zip(xs, counts, importance, strict=True)]
    hs = [h.reshape(s) for h, s in zip(importance, split, strict=True)]
    return Cut(leaves, how, counts, tuple(_of_mean_one(hs, how)))


def _of_mean_one(importance: Sequence[Array], how: Sequence[Blocks]) -> list[Array]:
    """Weights over their mean in every block, in two steps so that sums neither overflow nor vanish."""

    def shared(numbers: list[Array], reduce: Any) -> list[Array]:
        """Leaves that share a block are each one block."""
        return numbers if len(numbers) == 1 else [functools.reduce(reduce, [a.reshape(()) for a in numbers])] * len(how)

    total = sum(b.size for b in how)
    top = shared([jnp.max(h, b.axes, keepdims=True) for h, b in zip(importance, how, strict=True)], jnp.maximum)
    some = [t >= jnp.finfo(t.dtype).tiny for t in top]
    hs = [jnp.where(s, h / jnp.where(s, t, 1), 1) for h, t, s in zip(importance, top, some, strict=True)]
    means = [jnp.mean(h, b.axes, keepdims=True) * (b.size / total) for h, b in zip(hs, how, strict=True)]
    return [h / mean for h, mean in zip(hs, shared(means, jnp.add), strict=True)]
