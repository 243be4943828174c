"""Products of activations with codes, in XLA for any backend; made for CPUs.

Few rows: a loop over words. A code is shifted into the mantissa of 1.0, so that two instructions make a float of it,
and all columns are summed up side by side:

    v = 1 + code / 2^width        x.code = 2^width (x.v - sum(x))

Many rows: a loop over tiles of columns, each made dense and multiplied. A tile stays in the cache, so that making it
costs little beside its product, and no more than one is ever there.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lcq.forms.base import Form
from lcq.forms.column_words import fields
from lcq.forms.columns import Columns
from lcq.kernels.base import KERNELS, Kernel

_Parts = dict[str, Any]
"""Arrays of a form by the names of their fields."""

FEW = 2
"""Rows up to which codes are summed word by word."""

_TILE = 128
"""Columns that are made dense at once."""

_WORDS = 4
"""Words of a column that one step of the loop sums up. With several cores XLA shares out each step, and they meet after
it: with 1 word two cores are slower than one. With 8 one core is slower."""

_CHAINS = 4
"""Sums of a word that do not wait for each other."""


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


def word_by_word(x: Float[Array, "m k"], words: UInt32[Array, "w n"], width: int) -> Float[Array, "m n"]:
    """y[m, n] = sum_k x[m, k] code[k, n] in float32, where code k of a column is in word k // (32/width).

    Relative to sum_k |x[m, k]| 2^width the error is a few units of rounding.
    """
    each, count = 32 // width, words.shape[0]
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, each * count - x.shape[1])))
    rows = x.reshape(x.shape[0], count, each)

    def add(sums: Array, i: Array | int) -> Array:
        word = jax.lax.dynamic_index_in_dim(words, i, 0, keepdims=False)
        row = jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)
        terms = [_in_mantissa(word, j, width) * row[:, j, None] for j in range(each)]
        return sums + sum(sum(terms[chain::_CHAINS]) for chain in range(min(_CHAINS, each)))

    def add_some(i: Array, sums: Array) -> Array:
        return functools.reduce(add, [_WORDS * i + j for j in range(_WORDS)], sums)

    whole, sums = count // _WORDS, jnp.zeros((x.shape[0], words.shape[1]), jnp.float32)
    sums = functools.reduce(add, range(whole * _WORDS, count), jax.lax.fori_loop(0, whole, add_some, sums))
    return (sums - x.sum(1, keepdims=True)) * 2.0**width


def _in_mantissa(word: UInt32[Array, " n"], j: int, width: int) -> Float[Array, " n"]:
    """1 + code/2^width of the codes at place j."""
    up = 23 - width * (j + 1)
    moved = word << jnp.uint32(up) if up >= 0 else word >> jnp.uint32(-up)
    bits = moved & jnp.uint32(((1 << width) - 1) << (23 - width)) | jnp.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def in_tiles(x: Float[Array, "m k"], words: UInt32[Array, "w n"], width: int) -> Float[Array, "m n"]:
    """The same a tile at a time; a function of x that JAX can transpose."""

    def dense(part: _Parts) -> Array:
        return fields(part["words"], width)[: x.shape[1]].astype(jnp.int32).astype(jnp.float32)

    return tile_by_tile(x.astype(jnp.float32), words.shape[1], {"words": words}, dense)


def matrix_product(x: Float[Array, "m k"], form: Columns) -> Float[Array, "m n"]:
    """y = x Delta(form) in float32, one tile of columns after another."""

    def dense(part: _Parts) -> Array:
        tail = (x.shape[1], part["words"].shape[-1])
        return Columns(**part, lowest=form.lowest, width=form.width, tail=tail, axes=(0, 1)).matrix()

    named = {name: getattr(form, name) for name in ("words", "first", "step", "levels", "zero")}
    parts = {name: a for name, a in named.items() if a is not None}
    return tile_by_tile(x.astype(jnp.float32), form.columns, parts, dense)


def tile_by_tile(
    x: Float[Array, "m k"], n: int, parts: _Parts, dense: Callable[[_Parts], Array]
) -> Float[Array, "m n"]:
    """x times the columns that `dense` makes of a tile of the parts; made again, not kept, for a gradient."""
    tiles = -(-n // _TILE)
    axes = {name: a.ndim - 1 - (name == "levels") for name, a in parts.items()}
    cut = {name: axis for name, axis in axes.items() if parts[name].shape[axis] == n}
    filled = {name: _filled(a, cut[name], tiles * _TILE) if name in cut else a for name, a in parts.items()}

    @jax.checkpoint
    def one(x: Array, filled: _Parts, tile: Array) -> Array:
        part = {
            name: jax.lax.dynamic_slice_in_dim(a, tile * _TILE, _TILE, cut[name]) if name in cut else a
            for name, a in filled.items()
        }
        return x @ dense(part)

    if tiles == 1:
        return one(x, filled, 0)[:, :n]
    found = jax.lax.map(lambda tile: one(x, filled, tile), jnp.arange(tiles))
    return found.swapaxes(0, 1).reshape(x.shape[0], -1)[:, :n]


def _filled(a: Array, axis: int, length: int) -> Array:
    """With zeros up to a length."""
    return jnp.pad(a, [(0, length - size if i == axis else 0) for i, size in enumerate(a.shape)])
