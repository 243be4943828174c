"""Codes -> a short stream of bytes, and back: blocks of codes coded by rANS at their joint entropy.

    u8      n, the codes of a block, 1 to 16; or 0: raw
    raw:    one string of bits, ceil(log2(levels)) for each code, lowest first, filled up by zeros to whole bytes
    n > 0:  the last size mod n codes as one number in base `levels`, first code lowest, in as many bytes as the largest
            such number needs; a table of frequencies (see `frequency_tables`) of the levels^n <= 2^16 blocks, each a
            number in base `levels`, first code lowest; and, if it has more than one block,
            varint L <= size div n, L u32 states, and u16 words to the end (see `lanes`)

All is little-endian. Neither size nor levels are part of the stream. With one block in the table, all blocks are it.

Codes that depend on their neighbours have a lower entropy in blocks, H_n = -(1/n) sum_b p_b log2 p_b bits a code, and
codes of far less than a bit are decoded n at a time; but there are levels^n frequencies to store. The encoder takes the
n of which table, states and words are smallest together, and of like ones the largest.

What is damaged raises ValueError or, where the format cannot know, gives other codes: digests are the file's affair.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt, UInt8

from lcq.forms import bitpack
from lcq.io.entropy_coding import frequency_tables, lanes

BLOCKS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)
"""Codes of a block that `encode` tries, as far as levels^n <= 2^16; `decode` takes any up to 16."""

_ALPHABET = 1 << 16
_LIKE = 1 + 2**-11  # sizes that count as equal: a larger block is decoded faster
_LIKE_IF_MANY = 1 + 2**-10  # of so many codes that time counts, and of more than 8 levels, which leave few n
_MANY = 1 << 22
_PAYLOAD = 4000  # bytes a lane: its state is .1 % of them
_ROWS = 1 << 17  # more lanes rather than more rows
_LANES = 1 << 14
_CHUNK = 1 << 20  # codes whose histogram is made at once
_SOME = 1 << 16  # blocks, or groups of 8, that are taken apart at once
_FEW = 512  # up to so many codes, once two n cannot pay, only the largest power of two is tried, for what repeats
_SYMBOL = 0.6  # bytes for a symbol in a table, about, above the bound
_SPARSE = 4  # times as many symbols as blocks: these are sorted rather than counted in a table


class _Blocks(NamedTuple):
    """How codes would be coded in blocks of n."""

    n: int
    table: frequency_tables.FrequencyTable
    lanes: int
    size: float


class _Counted(NamedTuple):
    """Blocks of n: which there are, in order, how often each, and bytes that a stream of them does not go below."""

    n: int
    present: np.ndarray
    counts: np.ndarray
    bound: float


def encode(codes: UInt[np.ndarray, "..."], levels: int, *, block: int | None = None, lanes: int | None = None) -> bytes:
    """Codes in row-major order as a stream, about as small as this module can make it.

    Args:
        codes: integers below `levels`.
        levels: how many there may be, at most 65,536.
        block: codes of a block; by default what gives the smallest stream, to .05 %.
        lanes: symbols that are decoded side by side; each costs three bytes. By default a power of two, such that
            states are about .1 % of the stream, and more if rows were more than 131,072.

    Raises:
        ValueError: a code that is not below `levels`; levels, block or lanes out of range.

    Example:
        >>> codes = np.array([0, 0, 0, 1] * 1000, np.uint8)
        >>> len(encode(codes, 2)), len(encode(codes, 2, block=1))
        (5, 415)
    """
    flat = np.asarray(codes).reshape(-1)
    _check(flat.size, levels)
    if flat.size and int(flat.max()) >= levels:
        raise ValueError(f"expected codes below {levels}, got {int(flat.max())}")
    if block is not None and not (1 <= block <= 16 and levels**block <= _ALPHABET):
        raise ValueError(f"expected blocks of 1 to 16 codes with {levels}^n <= {_ALPHABET}, got n = {block}")
    if lanes is not None and lanes < 1:
        raise ValueError(f"expected a lane or more, got {lanes}")
    plan, raw = _plan(flat, levels, block, lanes), _raw_bytes(flat.size, levels)
    stream = _encode_blocks(flat, levels, plan) if plan.n else b""
    if 0 < len(stream) < raw:
        return stream
    return b"\0" + bitpack.pack(flat, bitpack.width(levels)).astype("<u4").tobytes()[: raw - 1]


def decode(data: bytes | UInt8[np.ndarray, " bytes"], size: int, levels: int) -> UInt[np.ndarray, " size"]:
    """The codes of a stream: uint8 up to 256 levels, else uint16.

    Takes time in proportion to `size`, the stream and a table, and memory of at most 4 bytes for each code and each
    byte of the stream, and some 4 MB; a few bytes can stand for any number of codes, so limit `size` first.

    Raises:
        ValueError: the stream is not one of `size` codes below `levels`.

    Example:
        >>> decode(encode(np.arange(6, dtype=np.uint8), 7), 6, 7)
        array([0, 1, 2, 3, 4, 5], dtype=uint8)
    """
    stream = _parse(data, size, levels)
    if stream.n == 0:
        return _unpack(stream.raw, size, levels)
    if stream.states.size == 0:
        found = np.full(stream.blocks, np.argmax(stream.frequencies), np.uint16)
    else:
        found = lanes.decode(stream.states, stream.words, stream.frequencies, stream.blocks)
    codes = np.empty(size, _dtype(levels))
    if width := _bits_of_symbols(levels, stream.n):
        words = np.pad(found, (0, -stream.blocks % 4)).astype(f"<u{width // 8}", copy=False).view("<u4")
        codes[: stream.blocks * stream.n] = bitpack.unpack_host(words, width // stream.n, stream.blocks * stream.n)
        codes[stream.blocks * stream.n :] = stream.rest
        return codes
    bits = bitpack.width(levels)
    for first in range(0, stream.blocks, _SOME):
        some = found[first : first + _SOME]
        if levels < 1 << bits:
            some = some.astype(np.uint32)
        part = codes[first * stream.n : (first + some.size) * stream.n].reshape(-1, stream.n)
        for i in range(stream.n):
            if levels == 1 << bits:
                part[:, i] = (some >> np.uint16(bits * i)) & np.uint16(levels - 1)
            else:
                some, part[:, i] = np.divmod(some, np.uint32(levels))
    codes[stream.blocks * stream.n :] = stream.rest
    return codes


def decode_on_device(data: bytes | UInt8[np.ndarray, " bytes"], size: int, levels: int) -> UInt[Array, " size"]:
    """`decode` to the default device, which does what is done code by code; only the stream travels.

    Streams of less than 32 lanes are decoded on the host: a device would take as many steps, and each takes it longer.

    Raises:
        ValueError: as `decode`; and 2^31 codes or more.
    """
    if size >= 1 << 31:
        raise ValueError(f"expected less than 2^31 codes, got {size}; decode them on the host")
    stream = _parse(data, size, levels)
    if stream.states.size < lanes.WIDE:
        return jnp.asarray(decode(data, size, levels))
    digits = lanes.decode_digits(stream.states, stream.words, stream.frequencies, stream.blocks, levels, stream.n)
    return jnp.concatenate([digits[: stream.blocks * stream.n], stream.rest])


def entropy(codes: UInt[np.ndarray, "..."], levels: int, block: int = 1) -> float:
    """Empirical entropy of disjoint blocks of n codes, in bits a code: H_n = -(1/n) sum_b p_b log2 p_b.

    Codes behind the last whole block are left out.

    Example:
        >>> entropy(np.array([0, 1, 0, 1], np.uint8), 2), entropy(np.array([0, 1, 0, 1], np.uint8), 2, block=2)
        (1.0, 0.0)
    """
    if not (block >= 1 and 1 <= levels**block <= _ALPHABET):
        raise ValueError(f"expected {levels}^n from 1 to {_ALPHABET}, got n = {block}")
    counts = _histogram(np.asarray(codes).reshape(-1), levels, block)
    return frequency_tables.entropy_bits(counts[counts > 0]) / max(1, int(counts.sum())) / block


class _Stream(NamedTuple):
    """The parts of a stream of `blocks` blocks of n codes, or of raw codes if n = 0."""

    n: int
    blocks: int
    rest: np.ndarray
    frequencies: np.ndarray
    states: np.ndarray
    words: np.ndarray
    raw: np.ndarray


_NOTHING = np.zeros(0, np.uint8)


def _parse(data: bytes | np.ndarray, size: int, levels: int) -> _Stream:
    """The parts of a stream, checked for all but what only decoding can tell."""
    _check(size, levels)
    data = np.frombuffer(data, np.uint8)
    n = int(data[0]) if data.size else -1
    if n == 0:
        if data.size != _raw_bytes(size, levels):
            raise ValueError(f"expected {_raw_bytes(size, levels)} bytes for {size} raw codes, got {data.size}")
        return _Stream(0, 0, _NOTHING, _NOTHING, _NOTHING, _NOTHING, data[1:])
    if not (1 <= n <= min(16, size) and levels**n <= _ALPHABET):
        raise ValueError(f"expected a stream of {size} codes below {levels}, got one in blocks of {n} codes")
    count, left = divmod(size, n)
    at = 1 + _rest_bytes(left, levels)
    rest = int.from_bytes(data[1:at].tobytes(), "little")
    if rest >= levels**left:
        raise ValueError(f"expected {left} codes below {levels} at the end, got the number {rest}")
    frequencies, length = frequency_tables.read(data[at:], levels**n)
    at += length
    size_of_lanes = 0
    if np.count_nonzero(frequencies) > 1:
        size_of_lanes, at = frequency_tables.read_varint(data, at)
        if not 1 <= size_of_lanes <= min(count, (data.size - at) // 4):
            most = min(count, (data.size - at) // 4)
            raise ValueError(
                f"expected at most {most} lanes for {count} blocks in {data.size} bytes, got {size_of_lanes}"
            )
    middle = at + 4 * size_of_lanes
    if (data.size - middle) % 2 or (size_of_lanes == 0 and data.size > middle):
        raise ValueError(f"expected a stream that ends with its last word, got {data.size} bytes")
    states = np.frombuffer(data[at:middle].tobytes(), "<u4").astype(np.uint32)
    words = np.frombuffer(data[middle:].tobytes(), "<u2").astype(np.uint16)
    if size_of_lanes and int(states.min()) < lanes.START:
        raise ValueError(f"expected states of at least 2^16, got {states.min()}")
    last = np.array([rest // levels**i % levels for i in range(left)], _dtype(levels))
    return _Stream(n, count, last, frequencies, states, words, _NOTHING)


def _check(size: int, levels: int) -> None:
    if not 1 <= levels <= _ALPHABET or size < 0:
        raise ValueError(f"expected 1 to {_ALPHABET} levels and a size, got {levels} levels and {size} codes")


def _plan(codes: np.ndarray, levels: int, block: int | None, wanted: int | None) -> _Blocks:
    """Estimates every n from its histogram; encodes nothing. n = 0 is raw."""
    least, like = float(_raw_bytes(codes.size, levels)), _LIKE_IF_MANY if codes.size >= _MANY and levels > 8 else _LIKE
    plan = _Blocks(0, frequency_tables.FrequencyTable(b"", _NOTHING, 0.0), 0, least)
    for counted in _promising(codes, levels, BLOCKS if block is None else (block,)):
        if counted.bound > least * like:
            continue
        n, total = counted.n, codes.size // counted.n
        counts = np.zeros(levels**n, np.int64)
        counts[counted.present] = counted.counts
        table = frequency_tables.fit(counts)
        used = 0
        if counted.counts.size > 1:
            used = _lanes(table.bits / 8, total) if wanted is None else min(wanted, total)
        size = 3 + _rest_bytes(codes.size % n, levels) + len(table.data) + table.bits / 8 + 3 * used
        if size <= least * like:
            plan = _Blocks(n, table, used, size)
        least = min(least, size)
        if counted.counts.size == 1:
            break
    return plan


def _promising(codes: np.ndarray, levels: int, blocks: Sequence[int]) -> Iterator[_Counted]:
    """Blocks of every n; of few codes those that are likely best, if any can pay: a fit takes longer than a count."""
    fitting = [n for n in blocks if n <= codes.size and levels**n <= _ALPHABET]
    if codes.size > _FEW:
        yield from (_counted(codes, levels, n) for n in fitting)
        return
    raw, futile = _raw_bytes(codes.size, levels), 0
    best, least = list[_Counted](), np.inf
    for n in fitting:
        if futile > 1 and (n & n - 1 or 2 * n in fitting):
            continue
        counted = _counted(codes, levels, n, raw, least)
        futile = futile + 1 if counted.bound > raw else 0
        if not futile and (size := counted.bound + _SYMBOL * counted.counts.size) < least:
            best, least = [counted], size
    yield from best


def _counted(codes: np.ndarray, levels: int, n: int, raw: float = np.inf, least: float = np.inf) -> _Counted:
    """Its bound is looser where that tells already that it is above `raw`, or that it is not, but no less than the
    `least` size of others."""
    if levels**n > _SPARSE * codes.size:
        symbols = np.sort(_symbols(codes, levels, n)).astype(np.int64)
        ends = np.flatnonzero(np.append(symbols[1:] != symbols[:-1], True)) + 1
        present, counts = symbols[ends - 1], ends.copy()
        counts[1:] -= ends[:-1]
    else:
        counts = _histogram(codes, levels, n)
        present = np.flatnonzero(counts)
        counts = counts[present]
    head = 9 if counts.size > 1 else 6  # n, the fixed bytes of a table, and of a lane
    above = frequency_tables.entropy_bits(counts) / 8 + _rest_bytes(codes.size % n, levels) + head
    low, high = (above + bits / 8 for bits in frequency_tables.about_bits(counts.size, levels**n))
    if low > raw or (high <= raw and low + _SYMBOL * counts.size >= least):
        return _Counted(n, present, counts, low)
    return _Counted(n, present, counts, above + frequency_tables.least_bits(present, levels**n) / 8)


def _lanes(payload: float, count: int) -> int:
    """A power of two: a lane for 4,000 bytes, more if rows were too many, but not more than blocks."""
    enough = max(1 << int(payload / _PAYLOAD).bit_length() >> 1, 1 << (count // _ROWS).bit_length())
    return min(enough, 1 << count.bit_length() - 1, _LANES)


def _encode_blocks(codes: np.ndarray, levels: int, plan: _Blocks) -> bytes:
    left = codes.size % plan.n
    rest = sum(int(code) * levels**i for i, code in enumerate(codes[codes.size - left :]))
    stream = bytes([plan.n]) + rest.to_bytes(_rest_bytes(left, levels), "little") + plan.table.data
    if plan.lanes == 0:
        return stream
    states, words = lanes.encode(_symbols(codes, levels, plan.n), plan.table.frequencies, plan.lanes)
    ends = (states.astype("<u4", copy=False), words.astype("<u2", copy=False))
    return b"".join((stream, frequency_tables.varint(plan.lanes), *(array.tobytes() for array in ends)))


def _raw_bytes(size: int, levels: int) -> int:
    return 1 + (size * bitpack.width(levels) + 7) // 8


def _rest_bytes(left: int, levels: int) -> int:
    return ((levels**left - 1).bit_length() + 7) // 8


def _symbols(codes: np.ndarray, levels: int, n: int) -> np.ndarray:
    """Blocks as numbers in base `levels`, first code lowest."""
    whole = codes[: codes.size // n * n]
    if width := _bits_of_symbols(levels, n):
        return bitpack.pack(whole, width // n).view(f"<u{width // 8}")[: whole.size // n].astype(np.uint16, copy=False)
    symbols = whole[::n].astype(np.uint16)
    for i in range(1, n):
        symbols += whole[i::n] * np.uint16(levels**i)
    return symbols


def _bits_of_symbols(levels: int, n: int) -> int:
    """8 or 16 if blocks of n codes are numbers of so many bits, and packed codes thus symbols side by side; else 0."""
    bits = bitpack.width(levels)
    return bits * n if n > 1 and levels == 1 << bits and bits * n in (8, 16) else 0


def _histogram(codes: np.ndarray, levels: int, n: int) -> np.ndarray:
    counts = np.zeros(levels**n, np.int64)
    for start in range(0, codes.size // n * n, _CHUNK * n):
        counts += np.bincount(_symbols(codes[start : start + _CHUNK * n], levels, n), minlength=counts.size)
    return counts


def _dtype(levels: int) -> type[np.unsignedinteger]:
    return np.uint8 if levels <= 256 else np.uint16


def _unpack(data: np.ndarray, size: int, levels: int) -> np.ndarray:
    """Raw codes: 8 of them fill as many bytes as one has bits."""
    bits = bitpack.width(levels)
    groups = -(-size // 8)
    rows = np.zeros((groups, bits + 2), np.uint8)  # two more bytes, as a code may reach over three
    whole = data.size // bits if bits else 0
    rows[:whole, :bits] = data[: whole * bits].reshape(whole, bits)
    rows[whole:, : data.size - whole * bits] = data[whole * bits :]
    codes = np.zeros((groups, 8), _dtype(levels))
    for first in range(0, groups if bits else 0, _SOME):
        some = rows[first : first + _SOME]
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            wide = some[:, byte].astype(np.uint32)
            for j in (1, 2):
                wide |= some[:, byte + j].astype(np.uint32) << np.uint32(8 * j)
            codes[first : first + _SOME, i] = wide >> np.uint32(shift) & np.uint32((1 << bits) - 1)
    codes = codes.reshape(-1)[:size]
    used = size * bits % 8
    if (used and int(data[-1]) >> used) or (size and int(codes.max()) >= levels):
        raise ValueError(f"expected codes below {levels} and zeros behind them, got others")
    return codes
