"""Codes of products put together to the form of their leaf."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from lcq.forms import Rotated, Trellis
from lcq.forms.base import Form
from lcq.forms.meshes import divides
from lcq.forms.paths import path_axes
from lcq.forms.rotation import turned_back
from lcq.ptq.block_numbers import BlockNumbers
from lcq.ptq.rounding.coded import Coded, codes_of, tables, with_codes
from lcq.tracing.contraction import Product
from lcq.tracing.param_site import slice_of


class _Put(NamedTuple):
    """The product whose codes were taken, and their form, but for the codes."""

    product: Product
    form: Coded


class Assembly:
    """A leaf whose products are quantized one after another: layers of a stack, slices of a fused kernel.

    It reads like the leaf, quantized where its products have been. What is read is made of the codes, a slice at a
    time; what was put is kept until `forget`. So a byte a weight is held, or two of more than 256 levels.

    Attributes:
        shape: The shape of the leaf.
        dtype: The dtype of the leaf.
        seed: Of the rotation in whose coordinates the forms are that it takes; None for those of the leaf.
    """

    def __init__(self, leaf: Any, seed: int | None = None) -> None:
        self.shape, self.dtype, self.seed = tuple(leaf.shape), leaf.dtype, seed
        self._leaf = leaf
        self._codes: np.ndarray | None = None
        self._numbers = BlockNumbers(self.shape)
        self._rows: list[np.ndarray] = []
        self._puts: list[_Put] = []
        self._dense: dict[tuple[int, ...], Array] = {}

    def put(self, product: Product, form: Coded) -> None:
        """Takes the codes [G, N, n] of one product, and the numbers of its codebook: one row for each block."""
        index, host = product.weight.index, jax.device_get(form)
        codes = codes_of(host)
        if self._codes is None or self._codes.dtype != codes.dtype:
            old = 0 if self._codes is None else self._codes
            self._codes = np.zeros(self.shape, codes.dtype)
            self._codes[...] = old
        self._codes[index].reshape(-1)[product.places(self.shape, len(index))] = codes
        rows, numbers = _rows(host, codes.shape)
        self._numbers.put(product, numbers + np.int32(sum(map(len, self._rows))))
        self._rows.append(rows)
        before = self[index]
        after = np.array(before, order="C")
        self._puts.append(_Put(product, with_codes(host, None)))
        self._write(after, len(index), self._puts[-1])
        apart = {key: part for key, part in self._dense.items() if not (_within(key, index) or _within(index, key))}
        self._dense = apart | {index: placed(after, before)}

    def forget(self, product: Product) -> None:
        """Drops the slice that a product has put, which can be made again."""
        self._dense.pop(product.weight.index, None)

    def __getitem__(self, index: tuple[int, ...]) -> Array:
        """leaf[index], quantized where its products have been."""
        if index in self._dense:
            return self._dense[index]
        above = [put.product.weight.index for put in self._puts if _within(index, put.product.weight.index)]
        if (first := min(above, key=len, default=index)) != index:
            return slice_of(self[first], index[len(first) :])
        before = slice_of(self._leaf, index)
        inside = [put for put in self._puts if _within(put.product.weight.index, index)]
        if not inside:
            return before
        part = np.array(before, order="C")
        for put in inside:
            self._write(part, len(index), put)
        return placed(part, before)

    @property
    def dense(self) -> Array:
        """The whole leaf, quantized where its products have been."""
        return self[()]

    def form(self) -> Form:
        """The form of the whole leaf, its blocks as large as equal numbers allow."""
        assert self._codes is not None
        last = self._puts[-1].form
        numbers, which = np.unique(np.concatenate(self._rows), axis=0, return_inverse=True)
        numbers = numbers[self._numbers.equal_blocks(which.reshape(-1))]
        fields: dict[str, Any] = {}
        for name, array in tables(last).items():
            many = array.shape[-1] if name == "levels" else 1
            part, numbers = numbers[..., :many], numbers[..., many:]
            fields[name] = (part if name == "levels" else part[..., 0]).astype(array.dtype)
        lies: dict[str, Any] = {name: lies_as(a, self._leaf) for name, a in fields.items()}
        lies |= axes_of(last, self.shape, [put.product for put in self._puts])
        whole = with_codes(dataclasses.replace(last, **lies), lies_as(self._codes, self._leaf))
        return of_leaf(whole, self.shape, str(self.dtype), [put.product for put in self._puts], self.seed)

    def _write(self, part: np.ndarray, depth: int, put: _Put) -> None:
        """Writes the weights of a product into leaf[index[:depth]]."""
        assert self._codes is not None
        product, index = put.product, put.product.weight.index
        inside = product.places(self.shape, len(index))
        codes = self._codes[index].reshape(-1)[inside]
        values = _dense(with_codes(put.form, codes))
        values = np.asarray(values if self.seed is None else turned_back(values, (-2,), self.seed))
        part[index[depth:]].reshape(-1)[inside] = values


_dense = jax.jit(jax.vmap(lambda form: form.dense()))


def axes_of(form: Coded, shape: tuple[int, ...], products: Sequence[Product]) -> dict[str, tuple[int, ...]]:
    """What a form of one of the products says of the axes of the leaf, if it says something.

    Raises:
        ValueError: as `paths_along`.
    """
    if isinstance(form, Trellis):
        return {"along": paths_along(shape, products, form.length)}
    if form.scale_bits is None:
        return {}
    return {"along": paths_along(shape, products, products[0].shape[2])}


def of_leaf(form: Coded, shape: tuple[int, ...], dtype: str, products: Sequence[Product], seed: int | None) -> Form:
    """A form of the dtype of its leaf, under the rotation of the inputs if there is one."""
    if seed is None:
        return dataclasses.replace(form, dtype=dtype)
    return Rotated(form, axes=inputs_along(shape, products), seed=seed, dtype=dtype)


def inputs_along(shape: tuple[int, ...], products: Sequence[Product]) -> tuple[int, ...]:
    """The axes of a leaf that are, whole, the inputs of its products.

    Raises:
        ValueError: as `paths_along`; inputs that are a part of an axis, such as one of two halves.
    """
    axes, length = paths_along(shape, products, products[0].shape[2]), products[0].shape[2]
    if math.prod(shape[axis] for axis in axes) != length:
        raise ValueError(
            f"{products[0].path}: expected products with all inputs along axes {list(axes)} of the leaf "
            f"{list(shape)}, as these are turned together, got products of {length} of them; split the leaf, or take "
            "the scheme without Rotated"
        )
    return axes


def paths_along(shape: tuple[int, ...], products: Sequence[Product], length: int) -> tuple[int, ...]:
    """The axes of a leaf along which the paths of its products run, in pieces of a length.

    Raises:
        ValueError: paths of products that run along no axes of the leaf.
    """
    found, first = np.zeros(math.prod(shape), np.int64), 0
    for product in products:
        places = product.places(shape)
        groups, many, neurons = places.shape
        paths = first + np.arange(groups * neurons).reshape(groups, 1, neurons)
        found[places] = paths * many + np.arange(many)[:, None]
        first += groups * neurons
    along = path_axes(found.reshape(shape), products[0].shape[2], length)
    if along is None:
        raise ValueError(
            f"{products[0].path}: expected products whose inputs lie along axes of the leaf {list(shape)}, for what "
            "runs along these, got others; split the leaf, or take a scheme whose blocks stand alone, such as "
            "Uniform without scale_bits="
        )
    return along


def placed(values: Any, like: PyTree) -> jax.Array:
    """The values on the devices of `like`, and committed to them only if it is, or programs would be compiled twice."""
    return jax.device_put(values, like.sharding if isinstance(like, jax.Array) and like.committed else None)


def lies_as(array: np.ndarray, leaf: Any) -> Array:
    """What belongs to a leaf where the leaf lies: cut along the same axes, as far as it has as many places on them."""
    if not isinstance(leaf, jax.Array) or not leaf.committed:
        return jax.device_put(array)
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        names = zip(array.shape, (*sharding.spec, *(None,) * array.ndim), strict=False)
        cut = [name if n > 1 and name is not None and divides(name, n, sharding.mesh) else None for n, name in names]
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*cut), memory_kind=sharding.memory_kind)
    return jax.device_put(array, sharding)


def _within(index: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether leaf[index] is a part of leaf[other]."""
    return index[: len(other)] == other


def _rows(form: Coded, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(scale, zero, levels) of every block as rows, in float64, and for each code [G, N, n] the number of its row."""
    many = shape[1]
    columns = [a if name == "levels" else a[..., None] for name, a in tables(form).items()]
    parts = [a.astype(np.float64) for a in columns]
    if not parts:
        return np.zeros((1, 0)), np.zeros(shape, np.int32)
    blocks = np.broadcast_shapes(*(a.shape[:3] for a in parts))
    rows = np.concatenate([np.broadcast_to(a, (*blocks, a.shape[-1])).reshape(math.prod(blocks), -1) for a in parts], 1)
    number = np.arange(math.prod(blocks), dtype=np.int32).reshape(blocks).repeat(many // blocks[1], axis=1)
    return rows, np.broadcast_to(number, shape)
