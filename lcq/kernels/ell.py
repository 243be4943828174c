"""Products with few weights, kept as a list for each column of the matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms.base import Form
from lcq.forms.dtypes import wider
from lcq.forms.ell import Ell
from lcq.kernels.base import KERNELS, Kernel
from lcq.kernels.codes_xla import tile_by_tile
from lcq.tracing import jaxpr

_FEW = 8
"""Rows up to which lists are summed entry by entry."""


@KERNELS.register("ell")
class EllProduct(Kernel):
    """Lists of few weights."""

    def suits(self, form: Form) -> bool:
        return isinstance(form, Ell)

    def check(self, form: Form) -> None:
        if not isinstance(form, Ell):
            raise ValueError(
                f"the kernel 'ell' multiplies few weights, prepacked, got {type(form).__name__}; leave kernel= out"
            )

    def product(self, x: Array, form: Any) -> Array:
        return list_product(x, form)


def list_product(x: Float[Array, "m k"], form: Ell) -> Float[Array, "m n"]:
    """y[m, n] = sum_j x[m, places[j, n]] values[j, n], in float32 or wider.

    Few rows go entry by entry of all lists, many with one tile of columns after another made dense. A NaN or infinity
    in x that no list names is not lost: it makes the row NaN, as the zeros of the dense product do.
    """
    wide = wider(x.dtype, form.values.dtype, jnp.float32)
    x, values = x.astype(wide), form.values.astype(wide)

    def add(y: Array, entry: tuple[Array, Array]) -> tuple[Array, None]:
        places, values = entry
        return y + x.at[:, places].get(mode="promise_in_bounds") * values, None

    def dense(part: dict[str, Any]) -> Array:
        return dataclasses.replace(form, **part, tail=(form.rows, part["places"].shape[-1]), axes=(0, 1)).matrix()

    if not jaxpr.at_most(x.shape[0], _FEW):
        return tile_by_tile(x, form.columns, {"places": form.places, "values": values}, dense)
    start = jnp.broadcast_to((0 * x).sum(1, keepdims=True), (x.shape[0], form.columns))
    return jax.lax.scan(add, start, (form.places, values))[0]
