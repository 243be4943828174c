"""Rotated: the form of a leaf that was turned along its inputs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
from jaxtyping import Array, Int

from lcq.forms.base import Decoding, Form, register_form, static
from lcq.forms.dtypes import nearest_number, wider
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on
from lcq.forms.paths import moved_paths
from lcq.forms.relayout import MatrixView, Relayout
from lcq.forms.rotation import check_length, turned, turned_back
from lcq.forms.validate import check_axes, check_float, named


@register_form
class Rotated(Form):
    """A form in turned coordinates: Delta = R Delta'(Theta) along some axes, the inputs.

    R is orthogonal, fixed by their number and a seed, and nothing of it is stored, see `lcq.forms.rotation`. In a
    product x Delta = (x R) Delta' the activations are turned in its place: of [M, N] by [N, n] that is M N (p + q)
    multiplications more than M N n, p q = N and both near sqrt(N).

    Attributes:
        inner: the form of the turned leaf, of the same shape.
        axes: the inputs, counted from the end, in the order in which they are one; none where each weight is the only
            input.
        seed: of the signs.
    """

    inner: Form
    axes: tuple[int, ...] = static(default=())
    seed: int = static(default=0)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def bits(self) -> int:
        return self.inner.bits

    @property
    def shared_bits(self) -> int:
        return self.inner.shared_bits

    def pack(self) -> Self:
        return self._with(self.inner.pack())

    def unpack(self) -> Self:
        return self._with(self.inner.unpack())

    def dense(self) -> Array:
        self._check_whole()
        mesh = explicit_mesh(self)
        return by_compiler(Rotated._dense, None if mesh is None else placed_on(mesh, self.spec(mesh)), self)

    def _dense(self) -> Array:
        return nearest_number(turned_back(self.inner.dense(), self.axes, self.seed), self.dtype)

    def describe(self) -> str:
        return f"rotated {self.inner.describe()}"

    def one_per(self) -> str:
        return self.inner.one_per()

    def relayout(self, change: Relayout) -> Form | None:
        if change.idle:
            return self
        self._check_whole()
        axes, inner = moved_paths(self.axes, change), self.inner.relayout(change)
        if axes is None or inner is None:
            return None
        moved = dataclasses.replace(self, inner=inner, axes=axes)
        return moved if moved._length == self._length else None  # else several runs of inputs lie along one axis

    def take_rows(self, rows: Int[Array, " R"]) -> Form | None:
        return self._apart(lambda inner: inner.take_rows(rows))

    def unstack(self) -> Form | None:
        return self._apart(lambda inner: inner.unstack())

    def prepack(self, view: MatrixView | None = None, *, traced: bool = False) -> Form:
        return self._with(self.inner.prepack(view, traced=traced))

    def product(self, x: Array, matmul: Callable[[Array, Any], Array]) -> Array | None:
        """(x R) Delta', x R in the dtype of the product."""
        if self.axes != (-2,):
            return None
        rotated, exact = turned(x, (-1,), self.seed), not jnp.issubdtype(x.dtype, jnp.inexact)
        return matmul(rotated if exact else nearest_number(rotated, wider(x.dtype, self.dtype)), self.inner)

    @property
    def decoding(self) -> Decoding:
        return self.inner.decoding

    def spec(self, mesh: Any) -> tuple[Any, ...]:
        return self.inner.spec(mesh)

    @property
    def _length(self) -> int:
        """The number of inputs."""
        return math.prod(self.shape[axis] for axis in self.axes)

    def _check_whole(self) -> None:
        """Refuses what is left of a leaf when `jax.vmap`, or an index, has taken inputs from it."""
        if min(self.axes, default=0) < -len(self.shape):
            raise ValueError(
                f"expected a leaf whose axes {list(self.axes)} are turned together, got a part {list(self.shape)} of "
                "it; of layers that are mapped make it with Rule(.., stacked=1), or Rotated(.., along=(-2,))"
            )

    def _with(self, inner: Form) -> Self:
        return self if inner is self.inner else dataclasses.replace(self, inner=inner)

    def _apart(self, change: Callable[[Form], Form | None]) -> Form | None:
        """Of a leaf whose first axis is none of its inputs."""
        inner = None if -len(self.shape) in self.axes else change(self.inner)
        return None if inner is None else self._with(inner)

    def check_stored(self) -> None:
        check_float("dtype", self.dtype)
        if not isinstance(self.inner, Form) or isinstance(self.inner, Rotated):
            raise ValueError(f"inner: expected a form that is not rotated itself, got {type(self.inner).__name__}")
        with named("inner"):
            self.inner.check_stored()
        check_axes("axes", self.shape, self.axes)
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"expected a seed of 32 bits, got {self.seed}")
        check_length(self._length)
