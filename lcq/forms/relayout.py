"""`Relayout`: a function that only moves or drops elements of an array, and what becomes of tables of its blocks."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_IN_ORDER = {"reshape", "squeeze", "expand_dims"}


@dataclasses.dataclass(frozen=True)
class Relayout:
    """A function that moves or drops elements of an array, and changes none.

    Attributes:
        shape: the array's shape.
        function: array -> array, of any dtype; at least one element is left.

    Example:
        >>> turned = Relayout((4, 3), jnp.transpose)
        >>> turned.result, turned.in_order, turned.places[0].tolist()
        ((3, 4), False, [0, 3, 6, 9])
    """

    shape: tuple[int, ...]
    function: Callable[[Any], Any]

    @functools.cached_property
    def result(self) -> tuple[int, ...]:
        """The shape of what it makes."""
        return tuple(jax.eval_shape(self.function, jax.ShapeDtypeStruct(self.shape, jnp.int32)).shape)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether no element changes its place in row-major order."""
        closed = jax.make_jaxpr(self.function)(jax.ShapeDtypeStruct(self.shape, jnp.int32))
        return all(eqn.primitive.name in _IN_ORDER or _transposes_nothing(eqn) for eqn in closed.eqns)

    @property
    def idle(self) -> bool:
        """Whether it gives back the array as it is."""
        return self.in_order and self.result == self.shape

    @functools.cached_property
    def places(self) -> np.ndarray:
        """For each element of the result its place in the array, in row-major order."""
        numbers = np.arange(math.prod(self.shape), dtype=np.int32)
        if self.in_order:
            return numbers.reshape(self.result)
        with jax.ensure_compile_time_eval():
            return np.asarray(self.function(jnp.asarray(numbers.reshape(self.shape))))

    def tables(self, tables: Mapping[str, Array]) -> dict[str, Array] | None:
        """Tables of one entry per block, for the blocks of the result; None if those are as small as elements.

        Where one block of the array fills several of the result, as the channels of a kernel [inputs, heads, units]
        do once its heads and units are the columns of a matrix, its entry is there several times.

        Args:
            tables: by name, [*blocks, ..] with equal blocks along each axis of the array, the same in all.
        """
        rank = len(self.shape)
        counts = next((a.shape[:rank] for a in tables.values()), ())
        if math.prod(counts) == 1:
            return {name: a.reshape((1,) * len(self.result) + a.shape[rank:]) for name, a in tables.items()}
        index = _blocks(_spread(counts, self.shape).reshape(-1)[self.places])
        if index is None:
            return None
        return {name: a.reshape(-1, *a.shape[rank:])[index] for name, a in tables.items()}


class MatrixView(NamedTuple):
    """How a leaf is seen as matrices [K, n].

    Attributes:
        axes: the leaf's axes behind the stacked ones, in the order in which they are rows and columns.
        columns: n.
    """

    axes: tuple[int, ...]
    columns: int

    @property
    def allows(self) -> set[str]:
        """Other uses than products for which a leaf can be prepacked so: rows that are whole columns of the matrix."""
        return {"rows"} if self.axes[-1] == 0 else set()

    def stacked(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of a leaf of this shape before those of one matrix."""
        return shape[: len(shape) - len(self.axes)]

    def of(self, shape: tuple[int, ...]) -> Relayout:
        """What makes the matrices of a leaf."""
        stacked = self.stacked(shape)
        order = (*range(len(stacked)), *(len(stacked) + axis for axis in self.axes))
        return Relayout(shape, lambda w: w.transpose(order).reshape(*stacked, -1, self.columns))


def take_from_tables(tables: Mapping[str, Array], rows: Any, length: int) -> dict[str, Array]:
    """Tables of the blocks of some rows, of an array of `length` rows."""
    return {name: a if a.shape[0] == 1 else a[rows // (length // a.shape[0])] for name, a in tables.items()}


def unstack_tables(tables: Mapping[str, Array], length: int) -> dict[str, Array]:
    """Tables with the entries of each row's blocks, of an array of `length` rows."""
    return {name: jnp.repeat(a, length // a.shape[0], 0) for name, a in tables.items()}


def _transposes_nothing(eqn: Any) -> bool:
    """Whether an equation is a transpose of nothing but axes of length 1."""
    if eqn.primitive.name != "transpose":
        return False
    long = [axis for axis in eqn.params["permutation"] if eqn.invars[0].aval.shape[axis] > 1]
    return long == sorted(long)


def _spread(counts: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The number of its block for each element."""
    numbers = np.arange(math.prod(counts), dtype=np.int32).reshape(counts)
    for axis, (count, length) in enumerate(zip(counts, shape, strict=True)):
        numbers = numbers.repeat(length // count, axis)
    return numbers


def _blocks(numbers: np.ndarray) -> np.ndarray | None:
    """One number for each block, the largest equal blocks within which numbers are equal.

    None if so many entries are no shorter than the elements, unless it is one for each column, which never is long.
    """
    size = numbers.size
    for axis, length in enumerate(numbers.shape):
        lines = np.moveaxis(numbers, axis, 0)
        changes = (lines[1:] != lines[:-1]).any(tuple(range(1, lines.ndim)))
        numbers = numbers.take(range(0, length, np.gcd.reduce([*np.flatnonzero(changes) + 1, length])), axis)
    columns = math.prod(numbers.shape[:-1]) == 1
    return numbers if columns or 2 * numbers.size <= size or len(np.unique(numbers)) == numbers.size else None
