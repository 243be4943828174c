"""TrellisColumns: a matrix on a trellis as kernels read it, its codes packed down its columns."""

import dataclasses
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt, UInt32

from lcq.forms.base import own, static, tree_form
from lcq.forms.blocks import of_each
from lcq.forms.dtypes import own_promotion, wider
from lcq.forms.prepacked import Prepacked
from lcq.forms.state_values import state_values


@tree_form
class TrellisColumns(Prepacked):
    """Codes of a trellis prepacked for products: a word holds floor(32/k) of them, the first in its highest bits, so
    that every state is a part of two words that follow each other.

    Attributes:
        words: uint32 [*stacked, b, 1 + w, n] of b pieces; the first word of each holds its last codes, and zeros fill
            its last word.
        scale: [*stacked, groups along K, 1 or n].
        table: [*stacked, 2^L] of a learned code; None otherwise.
        width: k, bits of a code.
        memory: L, bits of a state.
        code: how a state becomes a value.
    """

    words: Any = own()
    scale: Any = own(default=None)
    table: Any = own(default=None)
    width: int = static(default=1)
    memory: int = static(default=1)
    code: str = static(default="computed")
    column_axes = MappingProxyType({"words": -1, "scale": -1, "table": -1})

    @property
    def stacked(self) -> tuple[int, ...]:
        return tuple(self.words.shape[:-3])

    @property
    def columns(self) -> int:
        return self.words.shape[-1]

    @property
    def length(self) -> int:
        """Weights of a piece."""
        return self.rows // self.words.shape[-3]

    def states(self) -> UInt32[Array, "*stacked k n"]:
        before, here = self.words[..., :-1, None, :], self.words[..., 1:, None, :]
        places = jnp.arange(codes_of_word(self.width))[:, None]
        states = state_at(before, here, places, self.width, self.memory)
        states = states.reshape(*self.words.shape[:-2], -1, self.columns)[..., : self.length, :]
        return states.reshape(*self.stacked, self.rows, self.columns)

    def matrix(self) -> Float[Array, "*stacked k n"]:
        if self.table is None:
            values = state_values(self.states(), self.memory, self.code)
        else:
            states = self.states().astype(jnp.int32)
            values = jnp.take_along_axis(self.table, states.reshape(*self.stacked, -1), -1).reshape(states.shape)
        scale = self.scale.astype(wider(self.scale.dtype, jnp.float32))
        groups = values.reshape(*self.stacked, scale.shape[-2], -1, self.columns)
        return (groups * scale[..., None, :]).reshape(values.shape)

    def take_columns(self, numbers: Int[Array, " m"]) -> "TrellisColumns":
        scale = self.scale if self.scale.shape[-1] == 1 else jnp.take(self.scale, numbers, -1)
        words, tail = jnp.take(self.words, numbers, -1), (self.rows, numbers.shape[0])
        return dataclasses.replace(self, words=words, scale=scale, tail=tail, axes=(0, 1))


def codes_of_word(width: int) -> int:
    """Codes in the lower bits of a word."""
    return 32 // width


def state_at(
    before: UInt32[Array, "..."], here: UInt32[Array, "..."], place: Any, width: int, memory: int
) -> UInt32[Array, "..."]:
    """The state at a place of a word, a number or an array of such, from it and the one before."""
    used = width * codes_of_word(width)
    shift = used - width * (place + 1)
    state = here >> jnp.asarray(shift, jnp.uint32)
    if not isinstance(place, int) or memory > used - shift:  # what it has not in this word
        state |= before << jnp.asarray(used - shift, jnp.uint32)
    return state & jnp.uint32((1 << memory) - 1)


@own_promotion()
def trellis_columns(
    steps: UInt[Array, "*g k n"], scale: Array, table: Array | None, *, length: int, width: int, memory: int, code: str
) -> TrellisColumns:
    """Prepacks codes of a matrix [K, n], or of stacked ones, whose paths run down the columns. Works under jit."""
    *stacked, rows, n = steps.shape
    codes, each = steps.reshape(*stacked, rows // length, length, n), codes_of_word(width)
    last = codes[..., np.arange(-each, 0) % length, :]
    filled = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, -length % each), (0, 0)])
    whole = jnp.concatenate([last, filled], -2).astype(jnp.uint32)
    whole = whole.reshape(*codes.shape[:-2], -1, each, n)
    shifts = jnp.arange(each - 1, -1, -1, dtype=jnp.uint32) * jnp.uint32(width)
    words = (whole << shifts[:, None]).sum(-2, dtype=jnp.uint32)
    across = scale.shape[-1]
    scale = of_each(scale, stacked)
    scale = scale if across in (1, n) else jnp.repeat(scale, n // across, -1)
    table = None if table is None else jnp.broadcast_to(table, (*stacked, table.shape[-1]))
    return TrellisColumns(
        words=words, scale=scale, table=table, width=width, memory=memory, code=code, tail=(rows, n), axes=(0, 1)
    )
