"""Codes of b bits <-> uint32 words: one little-endian bit stream, code i at bits b*i .. b*i + b - 1."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt32


def width(levels: int) -> int:
    """Bits of one code among `levels`: ceil(log2(levels)), and 0 if there is nothing to tell apart."""
    return (levels - 1).bit_length()


def word_count(size: int, bits: int) -> int:
    """uint32 words that hold `size` codes of `bits` bits."""
    return -(-size * bits // 32)


def pack(codes: UInt[np.ndarray, "..."], bits: int) -> UInt32[np.ndarray, " words"]:
    """Packs codes in row-major order. Host only.

    Args:
        codes: integers below 2^bits, of any shape.
        bits: width of a code, 0 to 16.

    Raises:
        ValueError: a code that needs more bits.

    Example:
        >>> pack(np.array([1, 0, 3, 2], np.uint8), 2)
        array([177], dtype=uint32)
    """
    flat = np.asarray(codes).reshape(-1)
    if flat.size and int(flat.max()) >> bits:
        raise ValueError(f"wanted codes below {1 << bits} ({bits} bits); got {int(flat.max())}")
    rows = -(-flat.size // 32)
    padded = np.zeros((rows, 32), np.uint64)
    padded.reshape(-1)[: flat.size] = flat
    words = np.zeros((rows, bits + 1), np.uint64)  # 32 codes fill exactly `bits` words; one more takes the overhang
    for i in range(32 if bits else 0):
        word, shift = divmod(i * bits, 32)
        spread = padded[:, i] << np.uint64(shift)
        words[:, word] |= spread & np.uint64(0xFFFFFFFF)
        words[:, word + 1] |= spread >> np.uint64(32)
    return words[:, :bits].astype(np.uint32).reshape(-1)[: word_count(flat.size, bits)]


def unpack(words: UInt32[Array, " words"], bits: int, shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """Codes of `shape` from packed words; jit-able. uint8 up to 8 bits, uint16 above.

    Example:
        >>> unpack(jnp.array([177], jnp.uint32), 2, (2, 2))
        Array([[1, 0],
               [3, 2]], dtype=uint8)
    """
    size = int(np.prod(shape))
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    if bits == 0:
        return jnp.zeros(shape, dtype)
    rows = -(-size // 32)
    words = jnp.pad(words, (0, rows * bits - words.shape[0])).reshape(rows, bits)
    mask = jnp.uint32((1 << bits) - 1)
    codes = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << (32 - shift)
        codes.append((code & mask).astype(dtype))
    return jnp.stack(codes, axis=1).reshape(-1)[:size].reshape(shape)
