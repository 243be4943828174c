"""Lists: a matrix of few weights as kernels read it, a list of them for each of its columns."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lcq.forms import Sparse
from lcq.forms.base import own, tree_form
from lcq.forms.dtypes import own_promotion, wider
from lcq.kernels.base import Laid
from lcq.kernels.codes_xla import tile_by_tile
from lcq.tracing import jaxpr

LONGEST = 1 / 3
"""Of the rows: with longer lists the dense matrix is hardly larger."""


_FEW = 8
"""Rows up to which lists are summed entry by entry."""


@tree_form
class Lists(Laid):
    """Few weights laid out for products. Made by `lists`.

        Delta[k, n] = sum over j with places[j, n] = k of values[j, n]

    All lists are as long as the longest; shorter ones end with zeros in row 0.

    Attributes:
        places: uint16, or uint32 of a matrix of more than 65,536 rows, [*stacked, j, n].
        values: of the form's dtype, [*stacked, j, n].
    """

    places: Any = own()
    values: Any = own()

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

    def take(self, numbers: Int[Array, " m"]) -> "Lists":
        places, values = (jnp.take(a, numbers, -1) for a in (self.places, self.values))
        return dataclasses.replace(self, places=places, values=values, tail=(self.rows, numbers.shape[0]), axes=(0, 1))


@own_promotion()
def lists(form: Sparse) -> Lists | None:
    """Lays out few weights of a matrix [K, n], or of stacked ones [G, K, n]; on the host, once, when a net is loaded.

    Returns:
        None if a column has more than a third of all rows, or if the form is traced, as under jit: how long lists are
        depends on the mask.

    Example:
        >>> import lcq
        >>> laid = lists(lcq.Prune(kept=2).project(jnp.array([[0.1, 5.0], [0.2, 0.3], [4.0, 0.1], [0.0, 0.3]])))
        >>> laid.places.tolist(), laid.values.tolist()
        ([[2, 0]], [[4.0, 5.0]])
    """
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(form)):
        return None
    form = form.unpack()
    mask, dense = np.asarray(form.mask), np.asarray(form.dense())
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
    found = {"places": places, "values": values}
    arrays = {name: jnp.asarray(a.reshape(*stacked, length, n)) for name, a in found.items()}
    return Lists(**arrays, tail=(rows, n), axes=(0, 1), dtype=form.dtype, shared=form.shared)


def list_product(x: Float[Array, "m k"], laid: Lists) -> Float[Array, "m n"]:
    """y[m, n] = sum_j x[m, places[j, n]] values[j, n], in float32 or wider.

    Few rows go entry by entry of all lists, many with one tile of columns after another made dense. A NaN or infinity
    in x that no list names is not lost: it makes the row NaN, as the zeros of the dense product do.
    """
    wide = wider(x.dtype, laid.values.dtype, jnp.float32)
    x, values = x.astype(wide), laid.values.astype(wide)

    def add(y: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        places, values = entry
        return y + x.at[:, places].get(mode="promise_in_bounds") * values, None

    def dense(part: dict[str, Any]) -> Array:
        return dataclasses.replace(laid, **part, tail=(laid.rows, part["places"].shape[-1]), axes=(0, 1)).matrix()

    if not jaxpr.at_most(x.shape[0], _FEW):
        return tile_by_tile(x, laid.columns, {"places": laid.places, "values": values}, dense)
    start = jnp.broadcast_to((0 * x).sum(1, keepdims=True), (x.shape[0], laid.columns))
    return jax.lax.scan(add, start, (laid.places, values))[0]
