"""Laid: a leaf as the matrix that kernels read."""

import abc
import dataclasses
import math
from typing import Never, Self

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from lcq.forms.base import Form, static


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Laid(Form):
    """A leaf laid out for products: in memory only, not for files.

    Attributes:
        tail: shape of the leaf, without stacked axes.
        axes: the order of the leaf's axes in which it is the matrix [K, n], reshaped.
    """

    tail: tuple[int, ...] = static(default=())
    axes: tuple[int, ...] = static(default=())

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
    def take(self, numbers: Int[Array, " m"]) -> Self:
        """The matrix [K, m] of some columns, of one that is not stacked."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stacked, *self.tail)

    @property
    def bits(self) -> int:
        """As it lies in memory."""
        return sum(8 * a.size * a.dtype.itemsize for a in jax.tree.leaves(self))

    @property
    def rows(self) -> int:
        """K."""
        return math.prod(self.tail) // self.columns

    def dense(self) -> Array:
        lead = len(self.stacked)
        moved = self.matrix().reshape(*self.stacked, *(self.tail[axis] for axis in self.axes))
        back = [*range(lead), *(lead + int(i) for i in np.argsort(self.axes))]
        return moved.transpose(back).astype(self.dtype)

    def pack(self) -> Never:
        raise ValueError("expected forms, got a leaf laid out for products; save the forms that it was made of")

    def unpack(self) -> Self:
        return self

    def check_stored(self) -> Never:
        self.pack()
