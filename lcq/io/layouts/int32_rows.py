"""Rows of codes in int32 words, as compressed-tensors and GPTQ keep them.

Each row is one little-endian bit stream, code i at bits b i .. b i + b - 1, filled with zeros to whole words: codes of
3 bits straddle words. compressed-tensors has a row for each output; GPTQ packs along the inputs, of codes [in, out]
`pack_rows(codes.T, b).T`.
"""

import numpy as np
from jaxtyping import Int32, UInt, UInt8

from lcq.forms import bitpack


def pack_rows(codes: UInt[np.ndarray, "rows n"], bits: int) -> Int32[np.ndarray, "rows words"]:
    """Words of each row of codes.

    Args:
        codes: integers below 2^bits.
        bits: width of a code, 1 to 16.

    Raises:
        ValueError: a code that needs more bits.

    Example:
        >>> pack_rows(np.array([[1, 2, 3], [7, 0, 1]], np.uint8), 4)
        array([[801],
               [263]], dtype=int32)
    """
    rows, n = codes.shape
    words = bitpack.word_count(n, bits)
    if bits in (2, 4, 8) and codes.dtype == np.uint8:
        return _in_bytes(codes, bits).view("<i4").astype(np.int32, copy=False)
    if n * bits % 32:
        codes = np.pad(codes, ((0, 0), (0, -n % 32)))
    packed = bitpack.pack(codes, bits).reshape(rows, codes.shape[1] * bits // 32)
    return np.ascontiguousarray(packed[:, :words]).view(np.int32)


def _in_bytes(codes: UInt[np.ndarray, "rows n"], bits: int) -> UInt8[np.ndarray, "rows bytes"]:
    """The same where no code straddles bytes; a transposed view is turned round when it is shorter."""
    each = 8 // bits
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"expected codes below {1 << bits} ({bits} bits), got {int(codes.max())}")
    if codes.shape[1] * bits % 32:
        codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % (4 * each))))
    made = codes[:, ::each].copy("K")
    for i in range(1, each):
        made |= codes[:, i::each] << np.uint8(i * bits)
    return np.ascontiguousarray(made)


def unpack_rows(words: Int32[np.ndarray, "rows words"], bits: int, n: int) -> UInt[np.ndarray, "rows n"]:
    """Inverse of `pack_rows`, of rows of n codes.

    Raises:
        ValueError: rows of other than ceil(n b / 32) words.

    Example:
        >>> unpack_rows(np.array([[801], [263]], np.int32), 4, 3)
        array([[1, 2, 3],
               [7, 0, 1]], dtype=uint8)
    """
    rows, count = words.shape
    if count != bitpack.word_count(n, bits):
        raise ValueError(f"expected rows of {bitpack.word_count(n, bits)} words for {n} codes of {bits}, got {count}")
    wide = n if n * bits % 32 == 0 else n + -n % 32
    whole = np.pad(words, ((0, 0), (0, wide * bits // 32 - count)))
    codes = bitpack.unpack_host(np.ascontiguousarray(whole).view(np.uint32).reshape(-1), bits, rows * wide)
    return codes.reshape(rows, wide)[:, :n]
