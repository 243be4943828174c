"""`Prepacked`: a leaf as the matrix that kernels read."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Never, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lcq.forms.base import Form, static
from lcq.forms.meshes import divides, spec_of
from lcq.forms.relayout import MatrixView, Relayout


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Prepacked(Form):
    """A leaf prepacked for products: in memory only, not for files. Made by `Form.prepack`.

    Attributes:
        tail: shape of the leaf, without stacked axes.
        axes: the order of the leaf's axes in which it is the matrix [K, n], reshaped.
        column_axes: the axis of the matrix's columns in each of its arrays, by name.
    """

    tail: tuple[int, ...] = static(default=())
    axes: tuple[int, ...] = static(default=())
    column_axes: ClassVar[Mapping[str, int]]

    @property
    @abc.abstractmethod
    def stacked(self) -> tuple[int, ...]:
        """Lengths of the axes before those of one matrix."""

    @property
    @abc.abstractmethod
    def columns(self) -> int:
        """n."""

    @abc.abstractmethod
    def matrix(self) -> Float[Array, "*stacked k n"]:
        """Delta as the matrix [K, n], in float32 or wider."""

    @abc.abstractmethod
    def take_columns(self, numbers: Int[Array, " m"]) -> Self:
        """The matrix [K, m] of some columns, of one that is not stacked."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stacked, *self._here)

    @property
    def bits(self) -> int:
        """As it is in memory."""
        return sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def rows(self) -> int:
        """K."""
        return math.prod(self._here) // self.columns

    @property
    def _here(self) -> tuple[int, ...]:
        """`tail`; of a matrix with the columns that are here: inside of `jax.shard_map` a device has some of them."""
        return (self.tail[0], self.columns) if self.is_matrix else self.tail

    @property
    def is_matrix(self) -> bool:
        """Whether the leaf is the matrix [K, n] itself."""
        return self.axes == (0, 1)

    def seen_as(self, shape: tuple[int, ...], view: MatrixView | None) -> Self:
        """These matrices as the leaf of a shape whose view they are; as they are without one."""
        if view is None:
            return self
        return dataclasses.replace(self, tail=tuple(shape[len(shape) - len(view.axes) :]), axes=view.axes)

    def dense(self) -> Array:
        lead = len(self.stacked)
        moved = self.matrix().reshape(*self.stacked, *(self._here[axis] for axis in self.axes))
        back = [*range(lead), *(lead + int(i) for i in np.argsort(self.axes))]
        return moved.transpose(back).astype(self.dtype)

    def pack(self) -> Never:
        raise ValueError("expected forms, got a leaf prepacked for products; save the forms that it was made of")

    def unpack(self) -> Self:
        return self

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Self:
        del view, traced
        return self

    def check_stored(self) -> Never:
        self.pack()

    def relayout(self, change: Relayout) -> Form | None:
        """Only as the matrix that it was prepacked as."""
        stacked, matrix = self.stacked, (*self.stacked, self.rows, self.columns)
        if change.result not in (matrix, matrix[-2:], (1, *matrix[-2:])):
            return None
        if not change.in_order or self.axes != tuple(range(len(self.tail))):
            order = np.arange(math.prod(change.shape), dtype=np.int32).reshape(-1, *self._here)
            order = order.transpose(0, *(axis + 1 for axis in self.axes))
            if not np.array_equal(order.reshape(-1), change.places.reshape(-1)):
                return None
        reshaped = dataclasses.replace(self, tail=matrix[-2:], axes=(0, 1))
        return jax.tree.map(lambda a: a.reshape(*change.result[:-2], *a.shape[len(stacked) :]), reshaped)

    def take_rows(self, rows: Int[Array, " R"]) -> Form | None:
        if self.stacked:
            return jax.tree.map(lambda a: a[rows], self)
        if self.axes[-1] != 0 or self.tail[0] != self.columns:
            return None
        return dataclasses.replace(self.take_columns(rows), tail=(rows.shape[0], *self.tail[1:]), axes=self.axes)

    def unstack(self) -> Form | None:
        return self if self.stacked else None

    def spec(self, mesh: Any) -> tuple[Any, ...]:
        spec, lead = spec_of(getattr(self, next(iter(self.column_axes)))), len(self.stacked)
        tail: list[Any] = [None] * len(self.tail)
        across = column_axes(self._here, self.axes, self.columns)
        if across and divides(spec[-1], self._here[across[0]], mesh):
            tail[across[0]] = spec[-1]
        return (*spec[:lead], *tail)


def column_axes(tail: tuple[int, ...], axes: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """The axes of a leaf that are the columns of its matrix, in the matrix's order."""
    for count in range(1, len(axes) + 1):
        if math.prod(tail[axis] for axis in axes[-count:]) == columns:
            return axes[-count:]
    return ()
