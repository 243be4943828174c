"""Codes packed down the columns of a matrix, as kernels read them."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped, UInt, UInt32

from lcq.forms.dtypes import own_promotion


@own_promotion()
def pack_columns(codes: UInt[Array, "*g k n"], width: int) -> UInt32[Array, "*g w n"]:
    """Words of codes that run down the columns, see `fields`; zeros fill the last.

    Example:
        >>> pack_columns(jnp.array([[1, 0], [1, 1], [0, 1]], jnp.uint8), 1)
        Array([[3, 6]], dtype=uint32)
    """
    each = 32 // width
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 2) + [(0, -codes.shape[-2] % each), (0, 0)])
    *lead, rows, n = codes.shape
    codes = codes.reshape(*lead, rows // each, each, n).astype(jnp.uint32)
    return (codes << jnp.arange(0, 32, width, dtype=jnp.uint32)[:, None]).sum(-2, dtype=jnp.uint32)


@own_promotion()
def pack_signs(x: Shaped[Array, "*g k"]) -> UInt32[Array, "*g w"]:
    """Signs packed along the last axis: bit j of word i is set if x[32 i + j] >= 0, for +1; zeros fill the last word.

    Example:
        >>> pack_signs(jnp.array([0.5, -2.0, 0.0, 3.0]))
        Array([13], dtype=uint32)
    """
    return pack_columns((x >= 0)[..., None].astype(jnp.uint8), 1)[..., 0]


def fields(words: UInt32[Array, "*g w n"], bits: int) -> UInt32[Array, "*g k n"]:
    """Codes of `bits` bits that run down the columns: code k is in word k // (32/bits), the first in the lowest bits.

    `bits` is 1, 2, 4, 8 or 16, so that no code lies across two words; k = w 32/bits.
    """
    shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)[:, None]
    codes = (words[..., None, :] >> shifts) & jnp.uint32((1 << bits) - 1)
    return codes.reshape(*words.shape[:-2], -1, words.shape[-1])
