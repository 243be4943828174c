"""What the kernels mean, in plain jax.numpy, slow and as short as the definition; and what they refuse."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, UInt32

from lcq.forms.column_words import fields


def code_product(x: Float[Array, "m k"], words: UInt32[Array, "w n"], bits: int) -> Float[Array, "m n"]:
    """y[m, n] = sum_k x[m, k] code[k, n]; codes beyond the last column of x are left out.

    With levels first + step code, the product with the weights is first sum(x) + step y. So x should be finite:
    an infinite one may make NaN where the dense product is infinite. NaN stays NaN.
    """
    codes = fields(words, bits)[: x.shape[1]].astype(jnp.float32)
    return jnp.matmul(x.astype(jnp.float32), codes, precision="highest")


def xnor(a: UInt32[Array, "m w"], b: UInt32[Array, "n w"], size: int) -> Int32[Array, "m n"]:
    """y[m, n] = sum_k s_k t_k over `size` signs, +1 for a bit that is set and -1 for one that is not.

        y[m, n] = size - 2 popcount(a[m] ^ b[n])

    Bit j of word i is sign 32 i + j; bits behind the last sign are left out.
    """
    signs = [2 * fields(words.T, 1)[:size].astype(jnp.int32) - 1 for words in (a, b)]
    return jnp.matmul(signs[0].T, signs[1])


def check_bits(x: Array, words: Array) -> None:
    """Raises ValueError unless x [M, K] can be multiplied by words down the columns of K bits."""
    if words.shape[0] != -(-x.shape[1] // 32) or x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"expected float32 or bfloat16 x, and {-(-x.shape[1] // 32)} rows of words for {x.shape[1]} bits, "
            f"got x {x.dtype}{list(x.shape)}, words {list(words.shape)}"
        )


def check_signs(a: Array, words: Array, size: int, unit: str | None) -> None:
    """Raises ValueError unless words along rows, and others down columns, hold `size` signs; or of another unit."""
    if unit not in (None, "matrix", "popcount"):
        raise ValueError(f"expected unit='matrix', 'popcount' or None, got {unit!r}")
    if a.shape[1] != -(-size // 32) or words.shape[0] != a.shape[1]:
        raise ValueError(
            f"expected {-(-size // 32)} words a row, and as many rows of words, for k={size}, "
            f"got a {list(a.shape)}, words {list(words.shape)}"
        )
