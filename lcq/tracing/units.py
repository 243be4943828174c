"""Which products use the same weights: the weights that are rounded together, found product by product."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from lcq.tracing.contraction import Product, Unit
from lcq.tracing.equation import Content
from lcq.tracing.obstacles import not_whole, shared_in_part


class Units:
    """The units of the selected leaves.

    Two products share all of their weights or none; a part of those that another one uses together is no unit.
    """

    def __init__(self, leaves: Mapping[str, Content]) -> None:
        self._owners = {path: _Owners(np.shape(leaf)) for path, leaf in leaves.items()}
        self.units: list[Unit] = []

    def add(self, product: Product) -> None:
        """Notes which weights a product uses: all new, or all seen before."""
        owners = self._owners[product.path]
        found = owners.of(product)
        if found[0] == -1 and len(found) > 1:
            way, name = product.weight.chain(), product.primitive.name
            used = int((owners.each()[product.places(owners.shape)] >= 0).sum())
            size = math.prod(product.w.shape)
            raise ValueError(shared_in_part(product.path, way, name, product.source, used, size))
        if found[0] == -1:
            owners.take(product, len(self.units))
            self.units.append(Unit(product, owners.shape, (product.number,)))
            return
        for u in found:
            unit = self.units[u]
            if unit.can_sum(product):
                self.units[u] = dataclasses.replace(unit, uses=(*unit.uses, product.number))
            else:
                self.units[u] = dataclasses.replace(unit, others=(*unit.others, product.number))

    def check(self) -> None:
        """Raises unless every element of every selected leaf has reached a product."""
        for path, owners in self._owners.items():
            if owners.reached < (size := math.prod(owners.shape)):
                raise ValueError(not_whole(path, owners.reached, size))


class _Owners:
    """The unit of every weight of a leaf: by slices while each product takes a whole one, all of the same depth; else
    by weights, which takes four bytes for each."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._slices: dict[tuple[int, ...], int] = {}
        self._each: np.ndarray | None = None

    def each(self) -> np.ndarray:
        """The unit of every weight, -1 for none."""
        if self._each is None:
            self._each = np.full(self.shape, -1, np.int32)
            for index, number in self._slices.items():
                self._each[index] = number
        return self._each.reshape(-1)

    def of(self, product: Product) -> list[int]:
        """The units of a product's weights, ascending; -1 first if some have none."""
        if self._by_slices(product):
            return [self._slices.get(product.weight.index, -1)]
        return np.unique(self.each()[product.places(self.shape)]).tolist()

    def take(self, product: Product, number: int) -> None:
        """Gives a product's weights to a unit."""
        if self._by_slices(product):
            self._slices[product.weight.index] = number
        else:
            self.each()[product.places(self.shape)] = number

    @property
    def reached(self) -> int:
        """How many weights have a unit."""
        if self._each is not None:
            return int((self._each >= 0).sum())
        return sum(math.prod(self.shape[len(index) :]) for index in self._slices)

    def _by_slices(self, product: Product) -> bool:
        depth = len(next(iter(self._slices), product.weight.index))
        return self._each is None and len(product.weight.index) == depth and product.is_whole(self.shape)
