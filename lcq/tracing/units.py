"""Which products use the same weights: the weights that are rounded together, found product by product."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lcq.tracing.contraction import Product, Unit
from lcq.tracing.obstacles import not_whole, shared_in_part


class Units:
    """The units of the selected leaves.

    Two products share all of their weights or none; a part of those that another one uses together is no unit.
    """

    def __init__(self, leaves: Mapping[str, ArrayLike | jax.ShapeDtypeStruct]) -> None:
        self._shapes = {path: np.shape(leaf) for path, leaf in leaves.items()}
        self._owner = {path: np.full(math.prod(shape), -1) for path, shape in self._shapes.items()}
        self.units: list[Unit] = []

    def add(self, product: Product) -> None:
        """Notes which weights a product uses: all new, or all seen before."""
        owner = self._owner[product.path]
        elements = product.weight.elements(self._shapes[product.path])
        with jax.ensure_compile_time_eval():
            places = np.asarray(product.weights(jnp.asarray(elements)))
        owners = np.unique(owner[places])
        if owners[0] == -1 and len(owners) > 1:
            way, name, used = product.weight.chain(), product.primitive.name, int((owner[places] >= 0).sum())
            raise ValueError(shared_in_part(product.path, way, name, product.source, used, places.size))
        if owners[0] == -1:
            owner[places] = len(self.units)
            self.units.append(Unit(product.path, places, (product.number,)))
            return
        use = Unit(product.path, places, ())
        for u in owners:
            unit = self.units[u]
            alike = places.shape == unit.places.shape and (use.order == unit.order).all()
            field = "uses" if alike else "others"
            self.units[u] = unit._replace(**{field: (*getattr(unit, field), product.number)})

    def check(self) -> None:
        """Raises unless every element of every selected leaf has reached a product."""
        for path, owner in self._owner.items():
            if (owner < 0).any():
                raise ValueError(not_whole(path, int((owner >= 0).sum()), owner.size))
