"""Codes of products put together to the form of their leaf."""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from lcq.forms import Codes
from lcq.tracing.contraction import Product


class Assembly:
    """A leaf whose products are quantized one after another: layers of a stack, slices of a fused kernel.

    Attributes:
        dense: the leaf, quantized where its products have been.
    """

    def __init__(self, leaf: Any) -> None:
        self.dense = leaf
        self._shape, self._dtype = tuple(leaf.shape), str(leaf.dtype)
        self._codes = np.zeros(self._shape, np.uint16)
        self._block = np.zeros(self._shape, np.int64)
        self._rows: list[np.ndarray] = []
        self._form: Codes | None = None

    def put(self, product: Product, form: Codes) -> None:
        """Takes the codes [G, N, n] of one product, and the numbers of its codebook: one row for each block."""
        places = np.asarray(product.weights(jax.numpy.asarray(product.weight.elements(self._shape))))
        codes = jax.device_get(form.codes)
        self._codes.reshape(-1)[places] = codes
        rows, block = _rows(jax.device_get(form), codes.shape)
        self._block.reshape(-1)[places] = block + sum(map(len, self._rows))
        self._rows.append(rows)
        self._form = form
        dense = np.array(self.dense, order="C")
        dense.reshape(-1)[places] = np.asarray(jax.vmap(Codes.dense)(form))
        self.dense = placed(dense, self.dense)

    def form(self) -> Codes:
        """The form of the whole leaf, its blocks as large as equal numbers allow."""
        assert self._form is not None
        table, which = np.unique(np.concatenate(self._rows), axis=0, return_inverse=True)
        block = which.reshape(-1)[self._block]
        first = tuple(slice(None, None, period(axis, block)) for axis in range(block.ndim))
        numbers = table[block[first]]
        fields: dict[str, Any] = {}
        for name in ("scale", "zero", "levels"):
            array = getattr(self._form, name)
            if array is not None:
                many = array.shape[-1] if name == "levels" else 1
                part, numbers = numbers[..., :many], numbers[..., many:]
                fields[name] = jax.numpy.asarray((part if name == "levels" else part[..., 0]).astype(array.dtype))
        codes = self._codes.astype(self._form.codes.dtype)
        return Codes(jax.numpy.asarray(codes), **fields, values=self._form.values, dtype=self._dtype)


def placed(values: Any, like: PyTree) -> jax.Array:
    """The values on the devices of `like`, and committed to them only if it is, or programs would be compiled twice."""
    return jax.device_put(values, like.sharding if isinstance(like, jax.Array) and like.committed else None)


def _rows(form: Codes, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero, levels) of every block as rows, in float64, and for each code [G, N, n] the number of its row."""
    many = shape[1]
    arrays = [form.scale, form.zero, form.levels]
    columns = [a if a is None or i == 2 else a[..., None] for i, a in enumerate(arrays)]
    parts = [a.astype(np.float64) for a in columns if a is not None]
    if not parts:
        return np.zeros((1, 0)), np.zeros(shape, np.int64)
    blocks = np.broadcast_shapes(*(a.shape[:3] for a in parts))
    rows = np.concatenate([np.broadcast_to(a, (*blocks, a.shape[-1])).reshape(math.prod(blocks), -1) for a in parts], 1)
    number = np.arange(math.prod(blocks)).reshape(blocks).repeat(many // blocks[1], axis=1)
    return rows, np.broadcast_to(number, shape)


def period(axis: int, block: np.ndarray) -> int:
    """The greatest length into which an axis can be cut so that blocks do not change inside."""
    rows = np.moveaxis(block, axis, 0)
    changes = np.flatnonzero((rows[1:] != rows[:-1]).any(tuple(range(1, rows.ndim)))) + 1
    return math.gcd(len(rows), *map(int, changes))
