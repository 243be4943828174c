"""Factors: a matrix as a product of two thin ones."""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms.base import Form, own, register_form, static
from lcq.forms.dtypes import nearest_number
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
        host = jax.device_get(self)
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
