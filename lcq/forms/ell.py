"""Ell: a matrix of few weights as kernels read it, a list of them for each of its columns."""

import dataclasses
import math
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcq.forms.base import own, tree_form
from lcq.forms.dtypes import wider
from lcq.forms.prepacked import Prepacked

LONGEST = 1 / 3
"""Of the rows: with longer lists the dense matrix is hardly larger."""


@tree_form
class Ell(Prepacked):
    """Few weights prepacked for products, in the ELL format down the columns of the matrix.

        Delta[k, n] = sum over j with places[j, n] = k of values[j, n]

    All lists are as long as the longest; shorter ones end with zeros in row 0.

    Attributes:
        places: uint16, or uint32 of a matrix of more than 65,536 rows, [*stacked, j, n].
        values: of the form's dtype, [*stacked, j, n].
    """

    places: Any = own()
    values: Any = own()
    column_axes = MappingProxyType({"places": -1, "values": -1})

    @property
    def stacked(self) -> tuple[int, ...]:
        return tuple(self.places.shape[:-2])

    @property
    def columns(self) -> int:
        return self.places.shape[-1]

    def matrix(self) -> Float[Array, "*stacked k n"]:
        *stacked, length, n = self.places.shape
        groups = math.prod(stacked)
        places, values = (a.reshape(groups, length, n) for a in (self.places, self.values))
        wide = wider(values.dtype, jnp.float32)
        group, column = jnp.arange(groups)[:, None, None], jnp.arange(n)
        zeros = jnp.zeros((groups, self.rows, n), wide)
        full = zeros.at[group, places, column].add(values.astype(wide), mode="promise_in_bounds")
        return full.reshape(*stacked, self.rows, n)

    def take_columns(self, numbers: Int[Array, " m"]) -> "Ell":
        places, values = (jnp.take(a, numbers, -1) for a in (self.places, self.values))
        return dataclasses.replace(self, places=places, values=values, tail=(self.rows, numbers.shape[0]), axes=(0, 1))


def lists(mask: np.ndarray, dense: np.ndarray) -> Ell | None:
    """Prepacks the weights of a matrix [K, n], or of stacked ones [G, K, n], where a mask is true; on the host.

    Returns:
        None if a column has more than a third of all rows.
    """
    *stacked, rows, n = mask.shape
    kept = np.moveaxis(mask.reshape(-1, rows, n), 1, 2)  # groups, columns, rows
    lengths = kept.sum(2)
    length = int(lengths.max(initial=0))
    if length > LONGEST * rows:
        return None
    group, column, row = np.nonzero(kept)
    first = (np.cumsum(lengths) - lengths.reshape(-1)).reshape(lengths.shape)
    place = np.arange(row.size) - first[group, column]
    places = np.zeros((len(kept), length, n), np.uint16 if rows <= 1 << 16 else np.uint32)
    values = np.zeros(places.shape, dense.dtype)
    places[group, place, column] = row
    values[group, place, column] = dense.reshape(-1, rows, n)[group, row, column]
    where, what = (jnp.asarray(a.reshape(*stacked, length, n)) for a in (places, values))
    return Ell(places=where, values=what, tail=(rows, n), axes=(0, 1))
