"""Leaves that are read when they are asked for, and anything else a part at a time."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

_PART = 1 << 24
"""Elements that are looked at together."""


@runtime_checkable
class LazyLeaf(Protocol):
    """An array that is read slice by slice, as `lcq.io.MappedArray` is, or a dataset of h5py or zarr.

    Attributes:
        shape: of the array.
        dtype: of the array.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        """What numpy's array would give for numbers and slices."""


def is_lazy(leaf: object) -> bool:
    """Whether a leaf is a `LazyLeaf`: no array, but read like one."""
    known = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return not known and all(hasattr(leaf, name) for name in ("shape", "dtype", "__getitem__"))


def whole(leaf: Any) -> Any:
    """A lazy leaf as an array; others as they are."""
    return np.asarray(leaf[()]) if is_lazy(leaf) else leaf


def shape_of(leaf: Any) -> Any:
    """The shape struct of a lazy leaf; others as they are."""
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype) if is_lazy(leaf) else leaf


def parts(leaf: Any) -> Iterator[np.ndarray | jax.Array]:
    """The leaf in row-major order, a limited number of elements at a time; what lies on devices in one.

    Example:
        >>> [part.shape for part in parts(np.zeros((2, 5000, 5000), np.int8))]
        [(3355, 5000), (1645, 5000), (3355, 5000), (1645, 5000)]
    """
    if isinstance(leaf, jax.Array):
        yield leaf
        return
    shape = tuple(np.shape(leaf))
    if math.prod(shape) <= _PART or not shape:
        yield np.asarray(whole(leaf))
        return
    rest = math.prod(shape[1:])
    if rest > _PART:
        for i in range(shape[0]):
            yield from parts(leaf[(i,)])
        return
    step = _PART // rest
    for i in range(0, shape[0], step):
        yield np.asarray(leaf[(slice(i, i + step),)])
