"""Codes of b bits <-> uint32 words: one little-endian bit stream, code i at bits b*i .. b*i + b - 1."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt, UInt32

_ROWS = 1 << 12
"""Rows of 32 codes at a time on the host, where each code takes 8 bytes on its way."""

_WHOLE = (1, 2, 4, 8)
"""Widths of which a byte holds whole codes, which on the host are then shifted as bytes."""

_CODES = 1 << 18
"""So many of those at a time."""

_FEW = 1 << 12
"""Up to so many codes it is faster to go through an array of single bits, as array operations count, not codes."""


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
        raise ValueError(f"expected codes below {1 << bits} ({bits} bits), got {int(flat.max())}")
    if flat.size <= _FEW:
        apart = np.zeros(32 * word_count(flat.size, bits), np.uint8)
        apart[: flat.size * bits].reshape(flat.size, bits)[...] = flat[:, None] >> np.arange(bits, dtype=flat.dtype) & 1
        return np.packbits(apart, bitorder="little").view("<u4").astype(np.uint32)
    if bits in _WHOLE:
        return _pack_bytes(flat, bits)
    rows = -(-flat.size // 32)
    packed = np.empty((rows, bits), np.uint32)
    for first in range(0, rows if bits else 0, _ROWS):
        some = flat[32 * first : 32 * (first + _ROWS)]
        padded = np.zeros((-(-some.size // 32), 32), np.uint64)
        padded.reshape(-1)[: some.size] = some
        words = np.zeros((len(padded), bits + 1), np.uint64)  # 32 codes fill `bits` words; one more takes the overhang
        for i in range(32):
            word, shift = divmod(i * bits, 32)
            spread = padded[:, i] << np.uint64(shift)
            words[:, word] |= spread & np.uint64(0xFFFFFFFF)
            words[:, word + 1] |= spread >> np.uint64(32)
        packed[first : first + _ROWS] = words[:, :bits]
    return packed.reshape(-1)[: word_count(flat.size, bits)]


def _pack_bytes(flat: np.ndarray, bits: int) -> np.ndarray:
    """`pack` where no byte holds parts of a code: 8/b codes side by side fill one."""
    each, size = 8 // bits, flat.size
    packed = np.zeros(4 * word_count(size, bits), np.uint8)
    for first in range(0, size, _CODES):
        some = flat[first : first + _CODES]
        codes = np.zeros(-(-some.size // each) * each, np.uint8)
        codes[: some.size] = some
        out = packed[first // each : (first + codes.size) // each]
        for i in range(each):
            out |= codes[i::each] << np.uint8(i * bits)
    return packed.view("<u4").astype(np.uint32, copy=False)


def _unpack_bytes(words: np.ndarray, bits: int, size: int) -> np.ndarray:
    """Inverse of `_pack_bytes`."""
    each = 8 // bits
    data, codes = words.astype("<u4", copy=False).view(np.uint8), np.empty(size, np.uint8)
    for first in range(0, size, _CODES):
        out = codes[first : first + _CODES]
        some = data[first // each : -(-(first + out.size) // each)]
        for i in range(each):
            out[i::each] = (some[: len(out[i::each])] >> np.uint8(i * bits)) & np.uint8((1 << bits) - 1)
    return codes


def unpack(words: UInt32[Array, " words"], bits: int, shape: tuple[int, ...]) -> UInt[Array, "..."]:
    """Codes of `shape` from packed words; jit-able. uint8 up to 8 bits, uint16 above.

    Example:
        >>> unpack(jnp.array([177], jnp.uint32), 2, (2, 2))
        Array([[1, 0],
               [3, 2]], dtype=uint8)
    """
    return _unpack(words, bits, tuple(shape))


@functools.partial(jax.jit, static_argnames=("bits", "shape"), inline=True)  # eager, a hundred steps are one
def _unpack(words: Array, bits: int, shape: tuple[int, ...]) -> Array:
    size = int(np.prod(shape))
    dtype = jnp.uint8 if bits <= 8 else jnp.uint16
    if bits == 0:
        return jnp.zeros(shape, dtype)
    rows = -(-size // 32)
    mask = jnp.uint32((1 << bits) - 1)
    if 32 % bits == 0:  # no code lies across two words: one step for all places, which is fused with what comes next
        shifts = jnp.arange(0, 32, bits, dtype=jnp.uint32)
        return ((words[:, None] >> shifts) & mask).astype(dtype).reshape(-1)[:size].reshape(shape)
    words = jnp.pad(words, (0, rows * bits - words.shape[0])).reshape(rows, bits)
    codes = []
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = words[:, word] >> shift
        if shift + bits > 32:
            code |= words[:, word + 1] << (32 - shift)
        codes.append((code & mask).astype(dtype))
    return jnp.stack(codes, axis=1).reshape(-1)[:size].reshape(shape)


def pack_on_device(codes: UInt[Array, "..."], bits: int) -> UInt32[Array, " words"]:
    """As `pack`, jit-able, of codes that are known to fit.

    Example:
        >>> pack_on_device(jnp.array([1, 0, 3, 2], jnp.uint8), 2)
        Array([177], dtype=uint32)
    """
    size = codes.size
    codes = jnp.pad(codes.reshape(-1), (0, -size % 32)).reshape(-1, 32).astype(jnp.uint32)
    words = [jnp.zeros(len(codes), jnp.uint32)] * (bits + 1)  # one more takes the overhang
    for i in range(32 if bits else 0):
        word, shift = divmod(i * bits, 32)
        words[word] |= codes[:, i] << shift
        if shift + bits > 32:
            words[word + 1] |= codes[:, i] >> (32 - shift)
    return jnp.stack(words[: max(bits, 1)], axis=1).reshape(-1)[: word_count(size, bits)]


def unpack_host(words: UInt32[np.ndarray, " words"], bits: int, size: int) -> UInt[np.ndarray, " size"]:
    """As `unpack`, in numpy.

    Example:
        >>> unpack_host(np.array([177], np.uint32), 2, 4)
        array([1, 0, 3, 2], dtype=uint8)
    """
    dtype = np.uint8 if bits <= 8 else np.uint16
    if size <= _FEW:
        apart = np.unpackbits(words.astype("<u4").view(np.uint8), count=size * bits, bitorder="little")
        places = np.arange(bits).astype(dtype)
        return np.bitwise_or.reduce(np.left_shift(apart.reshape(size, bits), places), axis=1, dtype=dtype)
    if bits in _WHOLE:
        return _unpack_bytes(words, bits, size)
    codes = np.zeros((-(-size // 32), 32), dtype)
    grid = np.zeros((len(codes), bits), np.uint32)
    grid.reshape(-1)[: words.size] = words
    for i in range(32 if bits else 0):
        word, shift = divmod(i * bits, 32)
        code = grid[:, word] >> np.uint32(shift)
        if shift + bits > 32:
            code |= grid[:, word + 1] << np.uint32(32 - shift)
        codes[:, i] = code & np.uint32((1 << bits) - 1)
    return codes.reshape(-1)[:size]


def pack_positions(chosen: Bool[np.ndarray, "..."]) -> tuple[UInt32[np.ndarray, " words"], int | None]:
    """Which of n places are chosen: the smaller of a bit for each place, and gap codes. Host only.

    A gap code of b bits counts the places skipped before the next chosen one; 2^b - 1 skips so many and chooses none.

    Returns:
        Words, and b; None for the bit mask.

    Example:
        >>> pack_positions(np.isin(np.arange(64), (2, 40)))
        (array([134217726], dtype=uint32), 2)
    """
    flat = np.asarray(chosen).reshape(-1)
    skipped = np.diff(np.flatnonzero(flat), prepend=-1) - 1
    best, gap = word_count(flat.size, 1), None
    for bits in range(2, 17):
        words = word_count(skipped.size + int((skipped // ((1 << bits) - 1)).sum()), bits)
        if words < best:
            best, gap = words, bits
    if gap is None:
        return pack(flat.astype(np.uint8), 1), None
    escape = (1 << gap) - 1
    ends = np.cumsum(skipped // escape + 1)
    codes = np.full(ends[-1] if ends.size else 0, escape, np.uint16)
    codes[ends - 1] = skipped % escape
    return pack(codes, gap), gap


def unpack_positions(words: UInt32[Array, " words"], gap: int | None, count: int, size: int) -> Bool[Array, " size"]:
    """The mask of `size` places from the words of `pack_positions`; jit-able.

    Args:
        words: as packed.
        gap: bits of a gap code, None for a bit mask.
        count: places chosen.
        size: all places.
    """
    if gap is None:
        return unpack(words, 1, (size,)).astype(bool)
    codes, escape = unpack(words, gap, (32 * words.shape[0] // gap,)).astype(jnp.uint32), (1 << gap) - 1
    here = codes < escape
    here &= jnp.cumsum(here) <= count  # what fills the last word is none
    places = jnp.cumsum(codes + (codes < escape)) - 1
    return jnp.zeros(size, bool).at[jnp.where(here, places, size)].set(True, mode="drop")


def unpack_positions_host(
    words: UInt32[np.ndarray, " words"], gap: int | None, count: int, size: int
) -> Bool[np.ndarray, " size"]:
    """As `unpack_positions`, in numpy.

    Example:
        >>> np.flatnonzero(unpack_positions_host(np.array([134217726], np.uint32), 2, 2, 64))
        array([ 2, 40])
    """
    if gap is None:
        return unpack_host(words, 1, size).astype(bool)
    codes, escape = unpack_host(words, gap, 32 * words.size // gap), (1 << gap) - 1
    places = np.cumsum(codes.astype(np.int64) + (codes < escape)) - 1
    chosen = np.zeros(size, bool)
    chosen[places[codes < escape][:count]] = True  # what fills the last word is none
    return chosen


def check_positions(words: UInt32[np.ndarray, " words"], gap: int | None, count: int, size: int) -> None:
    """Raises ValueError unless words choose exactly `count` of `size` places. Host only."""
    if gap is None:
        chosen, needed = int(np.bitwise_count(words).sum()), word_count(size, 1)
        if words.size == needed and size % 32 and int(words[-1]) >> (size % 32):
            raise ValueError("expected a bit mask that ends with the leaf, got bits behind its end")
        places = size
    else:
        escape = (1 << gap) - 1
        if words.size > word_count(count + size // escape, gap):  # before memory is taken for their codes
            raise ValueError(f"expected gaps between {count} of {size} places, got {words.size} words of {gap} bits")
        codes = unpack_host(words, gap, 32 * words.size // gap)
        here = codes < escape
        behind = int(np.count_nonzero(here)) - count  # what fills the last word looks like chosen places
        ends = max(0, codes.size - 32) + np.flatnonzero(here[-32:])[::-1]
        chosen = count + min(behind, 0)
        used = int(ends[behind]) + 1 if count and 0 <= behind < ends.size else 0
        needed = word_count(used, gap)
        places = int(codes[:used].sum(dtype=np.int64)) + int(np.count_nonzero(here[:used]))
    if chosen != count or words.size != needed or places > size:
        raise ValueError(f"expected {count} of {size} places, got {chosen} up to {places} in {words.size} words")
