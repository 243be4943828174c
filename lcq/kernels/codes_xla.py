"""Products of many rows with codes, in XLA for any backend; made for CPUs.

A loop over tiles of columns, each made dense and multiplied. A tile stays in the cache, so that making it costs little
beside its product, and no more than one is ever there.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms.base import Form
from lcq.forms.columns import SELECT, Columns
from lcq.kernels.base import KERNELS, Kernel

_Parts = dict[str, Any]
"""Arrays of a form by the names of their fields."""

_TILE = 64
"""Columns that are made dense at once."""


class OfCodes(Kernel):
    """A kernel that multiplies codes."""

    def check(self, form: Form) -> None:
        if not isinstance(form, Columns):
            name = KERNELS.name_of(type(self))
            raise ValueError(f"the kernel {name!r} multiplies codes, got {type(form).__name__}; leave kernel= out")


@KERNELS.register("tiles")
class Tiles(OfCodes):
    """One tile of columns after another, made dense."""

    def product(self, x: Array, form: Any) -> Array:
        return matrix_product(x, form)


def matrix_product(x: Float[Array, "m k"], form: Columns) -> Float[Array, "m n"]:
    """y = x Delta(form) in float32, one tile of columns after another."""

    def dense(part: _Parts) -> Array:
        tail = (x.shape[1], part["words"].shape[-1])
        return Columns(**part, lowest=form.lowest, width=form.width, tail=tail, axes=(0, 1)).matrix()

    named = {name: getattr(form, name) for name in ("words", "first", "step", "levels", "zero")}
    parts = {name: a for name, a in named.items() if a is not None}
    if form.levels is not None and 2 < form.levels.shape[-2] < SELECT and form.levels.shape[-1] > 1:
        # XLA fuses the slices of fewer levels with their selects, which then take twice as long, as no vectors are made
        parts["levels"] = jnp.pad(form.levels, ((0, 0), (0, SELECT - form.levels.shape[-2]), (0, 0)), mode="edge")
    return tile_by_tile(x.astype(jnp.float32), form.columns, parts, dense)


def tile_by_tile(
    x: Float[Array, "m k"], n: int, parts: _Parts, dense: Callable[[_Parts], Array]
) -> Float[Array, "m n"]:
    """x times the columns that `dense` makes of a tile of the parts; made again, not kept, for a gradient."""
    tiles = -(-n // _TILE)
    cut = [name for name, a in parts.items() if a.shape[-1] == n]
    filled = {name: _filled(a, tiles * _TILE) if name in cut else a for name, a in parts.items()}

    @jax.checkpoint
    def one(x: Array, filled: _Parts, tile: Array) -> Array:
        part = {
            name: jax.lax.dynamic_slice_in_dim(a, tile * _TILE, _TILE, -1) if name in cut else a
            for name, a in filled.items()
        }
        return x @ dense(part)

    if tiles == 1:
        return one(x, filled, 0)[:, :n]
    found = jax.lax.map(lambda tile: one(x, filled, tile), jnp.arange(tiles))
    return found.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :n]


def _filled(a: Array, columns: int) -> Array:
    """With zeros up to a number of columns."""
    return jnp.pad(a, [*[(0, 0)] * (a.ndim - 1), (0, columns - a.shape[-1])])
