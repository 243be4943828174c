"""Factors: a matrix as a product of two thin ones."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcq.forms.base import Decoding, Form, own, register_form, static
from lcq.forms.cast import Cast
from lcq.forms.dtypes import nearest_number, wider
from lcq.forms.meshes import divides, spec_of
from lcq.forms.processes import on_host
from lcq.forms.relayout import Relayout
from lcq.forms.validate import check_float, check_shape


@register_form
class Factors(Form):
    """A product of two thin matrices: Delta = left @ right, the leaf seen as a matrix.

    A dense kernel is a matrix as it is. Of a convolution's kernel (kh, kw, cin, cout) the rows are (kh, kw, cin) and
    the columns (cout,); if it is `separable`, the rows are (kh, cin) and the columns (kw, cout).

    The working layout has room for the largest rank, and zeros beyond `rank`. The stored layout is as narrow as the
    rank; a rank so high that the factors would be no smaller is stored as the matrix itself. Products of other widths
    add up in another order, so `dense()` of the two layouts is equal up to rounding.

    Attributes:
        left: [*stacked, rows, room].
        right: [*stacked, room, columns]; None if `left` is the matrix itself, in the stored layout.
        rank: int32 [*stacked], columns of `left` that count; None in the stored layout, where all do.
        tail: shape of the leaf, without stacked axes.
        separable: which of the two matrices of a convolution it is.
    """

    left: Any = own()
    tail: tuple[int, ...] = static()
    right: Any = own(default=None)
    rank: Any = own(default=None)
    separable: bool = static(default=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.left.shape[:-2], *self.tail)

    @property
    def bits(self) -> int:
        """In the working layout of what is traced or a shape struct an estimate, of the largest rank."""
        if isinstance(self.rank, np.ndarray | jax.Array) and not isinstance(self.rank, jax.core.Tracer):
            return self.pack().bits
        arrays = [self.left] if self.right is None else [self.left, self.right]
        bits = sum(a.size * a.dtype.itemsize * 8 for a in arrays)
        return bits if self.rank is None else min(bits, math.prod(self.shape) * self.left.dtype.itemsize * 8)

    def pack(self) -> Self:
        if self.rank is None:
            return self
        host = jax.device_get(on_host(self))
        rows, columns = matrix_shape(self.tail, self.separable)
        r = int(host.rank.max())
        if r * (rows + columns) >= rows * columns:
            matrix = jax.device_get(self._matrix())
            return dataclasses.replace(host, left=matrix, right=None, rank=None)
        left, right = (np.array(a, order="C") for a in (host.left[..., :r], host.right[..., :r, :]))
        return dataclasses.replace(host, left=left, right=right, rank=None)

    def unpack(self) -> Self:
        if self.rank is not None:
            return self
        left, stacked = jnp.asarray(self.left), self.left.shape[:-2]
        if self.right is None:
            columns = left.shape[-1]
            right = jnp.broadcast_to(jnp.eye(columns, dtype=left.dtype), (*stacked, columns, columns))
        else:
            right = jnp.asarray(self.right)
        rank = jnp.full(stacked, left.shape[-1], jnp.int32)
        return dataclasses.replace(self, left=left, right=right, rank=rank)

    def _matrix(self) -> Array:
        left = jnp.asarray(self.left)
        return left if self.right is None else jnp.matmul(left, jnp.asarray(self.right), precision="highest")

    def dense(self) -> Array:
        return nearest_number(from_matrix(self._matrix(), self.tail, self.separable), self.dtype)

    def describe(self) -> str:
        rank = "room for rank" if self.rank is not None else "rank"
        return "matrix" if self.right is None else f"{rank} {self.left.shape[-1]}"

    def relayout(self, change: Relayout) -> Form | None:
        """Each matrix of the result is rows r, r+1, .. and columns c, c+1, .. of one of its own, or that transposed."""
        if change.idle:
            return self
        if self.right is None:
            return Cast(self.dense(), dtype=self.dtype).relayout(change)
        if len(change.result) not in (2, 3):
            return None
        rows, columns = matrix_shape(self.tail, self.separable)
        places = change.places
        if self.separable:
            kh, kw, cin, cout = self.tail
            order = np.arange(math.prod(self.shape)).reshape(-1, kh, kw, cin, cout).swapaxes(2, 3)
            places = np.argsort(order.reshape(-1))[places]
        for turned in (False, True):
            cut = places.swapaxes(-1, -2) if turned else places
            lead, (k, n) = cut.shape[:-2], cut.shape[-2:]
            first = cut.reshape(-1, k, n)[:, :1, :1]
            matrix, rest = np.divmod(first.reshape(-1), rows * columns)
            row, column = np.divmod(rest, columns)
            grid = first + np.arange(k)[:, None] * columns + np.arange(n)
            if (row + k > rows).any() or (column + n > columns).any() or (grid.reshape(cut.shape) != cut).any():
                continue
            left = _cut_out(self.left, matrix, row, k, -2).reshape(*lead, k, -1)
            right = _cut_out(self.right, matrix, column, n, -1).reshape(*lead, -1, n)
            if turned:
                left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
            return self._replaced(left=left, right=right, rank=None, tail=change.result[-2:], separable=False)
        return None

    def take_rows(self, rows: Int[Array, " R"]) -> Form | None:
        left, length = jnp.asarray(self.left), self.shape[0]
        if left.ndim > 2:
            rank = None if self.rank is None else self.rank[rows]
            right = None if self.right is None else jnp.asarray(self.right)[rows]
            return self._replaced(left=left[rows], right=right, rank=rank)
        if self.separable:
            return None
        some = left.reshape(length, -1, left.shape[-1])[rows].reshape(-1, left.shape[-1])
        return self._replaced(left=some, rank=None, tail=(rows.shape[0], *self.tail[1:]))

    def unstack(self) -> Form | None:
        left, length = jnp.asarray(self.left), self.shape[0]
        if left.ndim > 2:
            return self
        if self.separable or len(self.tail) < 3:
            return None
        right = None if self.right is None else jnp.asarray(self.right)
        if right is not None:
            right = jnp.broadcast_to(right, (length, *right.shape))
        return self._replaced(left=left.reshape(length, -1, left.shape[-1]), right=right, rank=None, tail=self.tail[1:])

    def product(self, x: Array, matmul: Callable[[Array, Any], Array]) -> Array | None:
        """(x left) right."""
        del matmul
        if self.right is None or self.separable:
            return None
        return jnp.matmul(jnp.matmul(x.astype(wider(x.dtype, self.left.dtype)), self.left), self.right)

    @property
    def decoding(self) -> Decoding:
        return "always" if self.right is None else "never"

    def spec(self, mesh: Any) -> tuple[Any, ...]:
        if self.separable:
            return (None,) * len(self.shape)
        *stacked, rows = spec_of(self.left)[:-1]
        columns = spec_of(self.left if self.right is None else self.right)[-1]
        rows = rows if divides(rows, self.tail[0], mesh) else None
        return (*stacked, rows, *[None] * (len(self.tail) - 2), columns)

    def _replaced(self, **changes: Any) -> "Factors":
        return dataclasses.replace(self, **changes)

    def layers(self) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Kernels of the two layers that do what the one did, for fine-tuning: no activation between, the bias second.

        Dense: (m, r) and (r, n). Convolution: (kh, kw, cin, r), with the strides and padding of the one, and (1, 1, r,
        cout); if `separable`, (kh, 1, cin, r) with its strides and padding along the height, and (1, kw, r, cout)
        with those along the width. Not for kernels whose groups of channels see different inputs.

        Raises:
            ValueError: the matrix itself is stored, as it has no smaller factors; stacked leaves.

        Example:
            >>> import lcq
            >>> w = jnp.outer(jnp.arange(1.0, 5.0), jnp.ones(3))
            >>> [kernel.shape for kernel in lcq.LowRank(1).project(w).layers()]
            [(4, 1), (1, 3)]

        Source: Jaderberg, Vedaldi & Zisserman, arXiv 1405.3866; Wen et al., arXiv 1703.09746.
        """
        form = self.pack()
        if form.right is None or len(form.left.shape) > 2:
            got = "a matrix without smaller factors" if form.right is None else f"shape {list(self.shape)}"
            raise ValueError(f"expected one low-rank kernel, got {got}; keep it as one layer")
        left, right, r = jnp.asarray(form.left), jnp.asarray(form.right), form.left.shape[-1]
        if len(self.tail) == 2:
            return left, right
        if not self.separable:
            ones = (1,) * (len(self.tail) - 2)
            return left.reshape(*self.tail[:-1], r), right.reshape(*ones, r, self.tail[-1])
        kh, kw, cin, cout = self.tail
        return left.reshape(kh, 1, cin, r), right.reshape(r, kw, cout).transpose(1, 0, 2)[None]

    def check_stored(self) -> None:
        if self.rank is not None:
            raise ValueError("expected factors without a rank, got the working layout")
        check_shape(self.tail)
        check_float("dtype", self.dtype)
        check_matrix_shape(self.tail, self.separable)
        rows, columns = matrix_shape(self.tail, self.separable)
        check_float("left", str(self.left.dtype))
        *stacked, _, width = self.left.shape if len(self.left.shape) >= 2 else (0, 0)
        check_shape((*stacked, *self.tail))
        if self.right is None:
            wanted: tuple[Any, ...] = ((*stacked, rows, columns), None)
        else:
            check_float("right", str(self.right.dtype))
            wanted = ((*stacked, rows, width), (*stacked, width, columns))
        got = (tuple(self.left.shape), None if self.right is None else tuple(self.right.shape))
        if got != wanted:
            raise ValueError(f"expected factors of a matrix {[rows, columns]}, {wanted}, got {got}")


def _cut_out(a: Any, matrix: np.ndarray, start: np.ndarray, length: int, axis: int) -> Array:
    """[G, ...]: of matrix[g] the `length` rows or columns from start[g]."""
    a = jnp.asarray(a)
    a = a.reshape(-1, *a.shape[-2:])
    if len(a) != len(matrix) or (matrix != np.arange(len(a))).any():
        a = a[matrix]
    if length == a.shape[axis]:
        return a
    index = start[:, None] + np.arange(length)
    return jnp.take_along_axis(a, jnp.asarray(index[:, :, None] if axis == -2 else index[:, None]), axis)


def check_matrix_shape(shape: tuple[int, ...], separable: bool) -> None:
    """Raises ValueError if a leaf of this shape is no matrix in this view."""
    if len(shape) < 2 or (separable and len(shape) != 4):
        wanted = "a convolution's kernel (kh, kw, cin, cout)" if separable else "at least two axes"
        raise ValueError(f"expected {wanted}, got shape {tuple(shape)}")


def matrix_shape(shape: tuple[int, ...], separable: bool) -> tuple[int, int]:
    """(rows, columns) of the matrix that a leaf is seen as."""
    if separable:
        kh, kw, cin, cout = shape
        return kh * cin, kw * cout
    return math.prod(shape[:-1]), shape[-1]


def as_matrix(x: Float[Array, "..."], separable: bool) -> Float[Array, "rows columns"]:
    """A leaf without stacked axes as a matrix."""
    return (x.transpose(0, 2, 1, 3) if separable else x).reshape(matrix_shape(x.shape, separable))


def from_matrix(x: Float[Array, "*stacked rows columns"], tail: tuple[int, ...], separable: bool) -> Array:
    """Inverse of `as_matrix`, under stacked axes."""
    stacked = x.shape[:-2]
    if not separable:
        return x.reshape(*stacked, *tail)
    kh, kw, cin, cout = tail
    return jnp.swapaxes(x.reshape(*stacked, kh, cin, kw, cout), -3, -2)
