"""Frequency tables: counts of symbols <-> a few bytes <-> integer frequencies that sum to 2^r.

Of an alphabet of M <= 2^16 symbols S are present. Each has a weight, and with W_i the sum of the weights before the
i-th, W of all (all 1 if all are 0), and R = 2^r - S, its frequency ends where the next begins:

    c_i = i + floor(W_i R / W)        f_i = c_{i+1} - c_i >= 1

so frequencies sum to 2^r whatever the weights are, and weights may be coarse. Of a weight b = its number of binary
digits (its class, 0 to 16) and the m digits behind the first one are stored; half a unit of the last is added for the
rest. A table is, all little-endian,

    u8      r - 8 in the low 4 bits, m in the high 4
    u8      plain: k in the low 4 bits, class bits q <= 5 in the high 4;      nested: 0xf0
    plain:  varint S - 1, then one string of bits, lowest first, filled up by zeros to whole bytes, of
            the S gaps' lengths, the S gaps' digits, the S classes of q bits, the S weights' digits
            where a gap is the number of absent symbols before a present one: of g = gap + 2^k, which has n binary
            digits, the length is n - k - 1 zeros and a one, the digits all but the first
    nested: for each of the M symbols the letter 0 if it is absent, else its class + 1, coded by rANS (see `lanes`): a
            plain table of the 18 letters and, if it has more than one, varint words, u32 state, u16 words;
            then a string of bits of the S weights' digits

A varint has 7 bits a byte, lowest first, and a high bit in all bytes but the last.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from lcq.io.entropy_coding import lanes

PRECISIONS = (8, 10, 12, 14, 16)
"""r that `fit` tries; `read` takes any from 8 to 16."""

_LETTERS = 18
_HEAVIEST = 65535
_NESTED = 0xF0
_FEWEST = 80  # bits that nested classes cost at least, about
_FINEST = 128  # slots a counted symbol, above which frequencies say no more about few of them
_WORTH = 1e-4  # of all bits: what more precision must save, as small tables are faster
_SMALL = 32  # up to so many symbols all precisions are tried in one go, with up to _SOME - 1 digits
_SOME = 4


class FrequencyTable(NamedTuple):
    """A table as it is stored, what it says, and what it would cost to code the counts by it.

    States of 32 bits lose about 4^(r - 20) bits a symbol, as (x div f_s) 2^r is coarse where x is near 2^16: so it was
    measured, and it is nothing up to r = 14.

    Attributes:
        data: its bytes.
        frequencies: of all symbols of the alphabet, 0 of absent ones; they sum to 2^r.
        bits: of the counted symbols coded by these frequencies, without the table's own.
    """

    data: bytes
    frequencies: np.ndarray
    bits: float


def fit(counts: Int[np.ndarray, " alphabet"], nested: bool = True) -> FrequencyTable:
    """The table that makes itself and the counted symbols smallest together; of like ones that of fewest slots.

    Example:
        >>> table = fit(np.array([700, 200, 0, 100]))
        >>> table.frequencies, len(table.data)
        (array([185,  47,   0,  24]), 6)
    """
    present = np.flatnonzero(counts)
    count, total = counts[present], int(counts.sum())
    gaps, order, told = _gaps(present)
    entropy, extremes = entropy_bits(count), (int(count.min()), int(count.max()))
    found, best = None, np.inf
    tried = [p for p in PRECISIONS if present.size <= 1 << p]
    scales = [2.0**precision / total for precision in tried]
    ends = [[_weight(extreme * scale) for extreme in extremes] for scale in scales]
    several = _weights(count, scales, ends) if present.size <= _SMALL else None
    rates = _rates(count, several[0], several[2], range(_SOME), tried) if several else None
    for i, precision in enumerate(tried):
        if found and 1 << precision > _FINEST * total:
            continue
        smallest, largest = ends[i]
        largest *= smallest < largest  # equal ones need not be told
        fixed = float(told + present.size * largest.bit_length().bit_length())
        if (min(fixed, _FEWEST) if nested else fixed) + entropy >= best * (1 - _WORTH):
            continue
        here = slice(i, i + 1)
        made = tuple(a[here] for a in several) if several else _weights(count, scales[here], ends[here])
        weights, classes, behind = (a[0] for a in made)
        if nested and fixed > _FEWEST:
            fixed = min(fixed, _letter_bits(classes, counts.size))
        for digits in range(16):
            known = fixed + (float(np.minimum(behind, digits).sum()) if digits else 0.0)
            if known + entropy >= best * (1 - _WORTH):
                break  # more digits cost more, and no frequencies code below the entropy
            if rates and digits < _SOME:
                frequencies, bits = rates[0][i, digits], rates[1][i][digits]
            else:
                one = _rates(count, made[0], made[2], [digits], [precision])
                frequencies, bits = one[0][0, 0], one[1][0][0]
            bits += total * 4.0 ** (precision - 20)
            if known + bits < best * (1 - _WORTH):
                found, best = (precision, digits, weights, frequencies, bits), known + bits
            if largest < 2 << digits:
                break
    assert found is not None
    precision, digits, weights, frequencies, bits = found
    data = _write_plain(present, gaps, weights, order, precision, digits)
    if nested and _least_nested(weights, counts.size, digits) < len(data):
        data = min(data, _write_nested(present, weights, counts.size, precision, digits), key=len)
    dense = np.zeros(counts.size, np.int64)
    dense[present] = frequencies
    return FrequencyTable(data, dense, bits)


def least_bits(present: Int[np.ndarray, " present"], alphabet: int) -> float:
    """Bits that no table goes below in saying which symbols of an alphabet are present, be it plain or nested.

    Example:
        >>> least_bits(np.array([3, 200]), 256) < 8 * len(fit(np.bincount([3, 200], minlength=256)).data)
        True
    """
    low, high = about_bits(present.size, alphabet)
    return low if low == high else max(low, min(float(_gaps(present)[2]), high))


def about_bits(present: int, alphabet: int) -> tuple[float, float]:
    """What `least_bits` is at least and at most, of so many symbols.

    Example:
        >>> about_bits(2, 4)
        (2.0, 4.0)
    """
    absent = alphabet - present
    nested = present * math.log2(alphabet / present) + absent * math.log2(alphabet / absent) if absent else 0.0
    return float(present), max(float(present), nested)


def entropy_bits(counts: Int[np.ndarray, " present"]) -> float:
    """Bits of all counted symbols at their entropy; none of the counts is 0.

    Example:
        >>> entropy_bits(np.array([2, 1, 1]))
        6.0
    """
    return float((counts * np.log2(counts.sum() / counts)).sum())


def read(data: UInt8[np.ndarray, " bytes"], alphabet: int, nested: bool = True) -> tuple[np.ndarray, int]:
    """The frequencies of a table at the start of `data`, and the number of its bytes.

    Raises:
        ValueError: what is there is no table of such an alphabet.
    """
    if data.size < 2:
        raise ValueError(f"expected a table of frequencies, got {data.size} bytes")
    precision, digits, kind = (int(data[0]) & 15) + 8, int(data[0]) >> 4, int(data[1])
    if precision > 16 or (kind != _NESTED and kind >> 4 > 5) or (kind == _NESTED and not nested):
        raise ValueError(f"expected a table of 8 to 16 bits, plain or nested once, got {precision} bits, kind {kind}")
    if kind == _NESTED:
        present, classes, at = _read_letters(data, 2, alphabet)
        if not 0 < present.size <= 1 << precision:
            raise ValueError(f"expected 1 to {1 << precision} symbols, got {present.size}")
        bits = _Bits(data, at, 15 * present.size)
    else:
        at = 2
        size, at = read_varint(data, at)
        size += 1
        if size > min(alphabet, 1 << precision):
            raise ValueError(f"expected at most {min(alphabet, 1 << precision)} symbols, got {size}")
        bits = _Bits(data, at, (17 + 16 + 5 + 15) * size)
        present = np.cumsum(bits.gaps(size, kind & 15) + 1) - 1
        if present[-1] >= alphabet:
            raise ValueError(f"expected symbols below {alphabet}, got {present[-1]}")
        classes = bits.numbers(np.full(size, kind >> 4))
    if classes.max() > 16:
        raise ValueError(f"expected weights of at most 16 binary digits, got {classes.max()}")
    widths = np.minimum(np.maximum(classes - 1, 0), digits)
    weights = _from_digits(classes, bits.numbers(widths), widths)
    dense = np.zeros(alphabet, np.int64)
    dense[present] = _frequencies(weights, 1 << precision)
    return dense, bits.end()


def varint(value: int) -> bytes:
    """A number in as few bytes as it needs, 7 bits each.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def read_varint(data: UInt8[np.ndarray, " bytes"], at: int) -> tuple[int, int]:
    """A number below 2^35 written by `varint`, and where it ends; ValueError if there is none."""
    value = 0
    for i, byte in enumerate(data[at : at + 5].tolist()):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            if i and not byte:
                break
            return value, at + i + 1
    raise ValueError(
        f"expected a number in as few bytes as it needs, at most 5, got {data[at : at + 5].tobytes().hex()}"
    )


def _weight(scaled: float) -> int:
    return min(max(round(scaled - 1), 0), _HEAVIEST)


def _weights(
    count: np.ndarray, scales: Sequence[float], ends: Sequence[Sequence[int]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each scale the weights of all symbols, their classes, and how many digits are behind the first one."""
    told = np.array([[first < last] for first, last in ends])  # equal ones are 0
    scaled = np.rint(count * np.array(scales)[:, None] - 1)
    weights = np.minimum(np.maximum(scaled, 0), _HEAVIEST).astype(np.int64) * told
    classes = _classes(weights)
    return weights, classes, np.maximum(classes - 1, 0)


def _rates(
    count: np.ndarray, weights: np.ndarray, behind: np.ndarray, digits: Sequence[int], precisions: Sequence[int]
) -> tuple[np.ndarray, list[list[float]]]:
    """Frequencies [precisions, digits, symbols] by weights with so many digits, and bits of all symbols by these."""
    slots = 1 << np.array(precisions)[:, None, None]
    lost = np.maximum(behind[:, None] - np.array(digits)[:, None], 0)
    frequencies = _frequencies(_coarse(weights[:, None], lost), slots)
    return frequencies, (count * -np.log2(frequencies / slots)).sum(-1).tolist()


def _frequencies(weights: np.ndarray, slots: int | np.ndarray) -> np.ndarray:
    """Of weights along the last axis, summing to so many slots."""
    ends = weights.cumsum(-1)
    ends = np.where(ends[..., -1:] > 0, ends, np.arange(1, weights.shape[-1] + 1))
    ends = ends * (slots - weights.shape[-1]) // ends[..., -1:]
    frequencies = ends + 1
    frequencies[..., 1:] -= ends[..., :-1]
    return frequencies


def _classes(weights: np.ndarray) -> np.ndarray:
    return np.frexp(weights)[1].astype(np.int64)  # frexp gives 2^(b-1) <= w < 2^b, and b = 0 for 0


def _digit_widths(weights: np.ndarray, digits: int) -> np.ndarray:
    return np.minimum(np.maximum(_classes(weights) - 1, 0), digits)


def _cut(weights: np.ndarray, digits: int) -> tuple[np.ndarray, np.ndarray]:
    """The digits of weights that are stored, behind the first one, and how many they are."""
    widths = _digit_widths(weights, digits)
    shift = np.maximum(_classes(weights) - 1, 0) - widths
    return (weights >> shift) & ((1 << widths) - 1), widths


def _from_digits(classes: np.ndarray, stored: np.ndarray, widths: np.ndarray) -> np.ndarray:
    shift = np.maximum(classes - 1, 0) - widths
    return np.where(classes > 0, ((1 << widths) + stored << shift) + (1 << shift >> 1), 0)


def _coarse(weights: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """Weights as a reader knows them that is not told so many of their last digits."""
    return (weights >> lost << lost) + (1 << lost >> 1)


def _gaps(present: np.ndarray) -> tuple[np.ndarray, int, int]:
    """The gaps between present symbols, the k that says them in the fewest bits, and these bits."""
    gaps = present.copy()
    gaps[1:] -= present[:-1] + 1
    if not gaps.any():
        return gaps, 0, gaps.size
    orders = np.arange(min(16, int(gaps.max()).bit_length() + 1))  # above, every k adds a bit to each
    widths = 2 * _classes(gaps[:, None] + (1 << orders)).sum(axis=0) - (1 + orders) * gaps.size
    order = int(np.argmin(widths))
    return gaps, order, int(widths[order])


def _letters(classes: np.ndarray, alphabet: int) -> np.ndarray:
    """How often each letter of a nested table occurs, without those that do not."""
    counts = np.bincount(classes, minlength=_LETTERS)
    counts[-1] = alphabet - classes.size
    return counts[counts > 0]


def _letter_bits(classes: np.ndarray, alphabet: int) -> float:
    """About what nested classes cost."""
    used = _letters(classes, alphabet)
    return entropy_bits(used) + (_FEWEST + 8 * (used.size - 1))


def _least_nested(weights: np.ndarray, alphabet: int, digits: int) -> float:
    """Bytes that a nested table does not go below: two, a table of 4, and of several letters a varint and a state.

    Such a state holds 16 bits of its letters at most, the rest of them is in words.
    """
    used = _letters(_classes(weights), alphabet)
    head = 6 if used.size == 1 else 9
    return head + (entropy_bits(used) + float(_digit_widths(weights, digits).sum())) / 8


def _write_plain(
    present: np.ndarray, gaps: np.ndarray, weights: np.ndarray, order: int, precision: int, digits: int
) -> bytes:
    classes, far = _classes(weights), gaps + (1 << order)
    lengths, bits = _classes(far), int(classes.max()).bit_length()
    stored, widths = _cut(weights, digits)
    parts = (
        (1 << lengths - order - 1, lengths - order),
        (far - (1 << lengths - 1), lengths - 1),
        (classes, np.full(classes.size, bits)),
        (stored, widths),
    )
    head = bytes([precision - 8 | digits << 4, order | bits << 4])
    return head + varint(present.size - 1) + _string(*parts)


def _write_nested(present: np.ndarray, weights: np.ndarray, alphabet: int, precision: int, digits: int) -> bytes:
    letters = np.zeros(alphabet, np.uint16)
    letters[present] = _classes(weights) + 1
    table = fit(np.bincount(letters, minlength=_LETTERS), nested=False)
    data = bytes([precision - 8 | digits << 4, _NESTED]) + table.data
    if np.count_nonzero(table.frequencies) > 1:
        states, words = lanes.encode(letters, table.frequencies, 1)
        data += varint(words.size) + states.astype("<u4").tobytes() + words.astype("<u2").tobytes()
    return data + _string(_cut(weights, digits))


def _read_letters(data: np.ndarray, at: int, alphabet: int) -> tuple[np.ndarray, np.ndarray, int]:
    frequencies, size = read(data[at:], _LETTERS, nested=False)
    at += size
    if np.count_nonzero(frequencies) > 1:
        count, at = read_varint(data, at)
        end = at + 4 + 2 * count
        if end > data.size:
            raise ValueError(f"expected {count} words of a table, got the end of the stream")
        state = np.frombuffer(data[at : at + 4].tobytes(), "<u4").astype(np.uint32)
        words = np.frombuffer(data[at + 4 : end].tobytes(), "<u2").astype(np.uint16)
        if state[0] < lanes.START:
            raise ValueError(f"expected a state of at least 2^16, got {state[0]}")
        letters, at = lanes.decode(state, words, frequencies, alphabet).astype(np.int64), end
    else:
        letters = np.full(alphabet, int(np.argmax(frequencies)))
    present = np.flatnonzero(letters)
    return present, letters[present] - 1, at


def _string(*parts: tuple[np.ndarray, np.ndarray]) -> bytes:
    """Values of given widths as one string of bits."""
    values, widths = (np.concatenate(column) for column in zip(*parts, strict=True))
    owner, place = _places(widths)
    return np.packbits((values[owner] >> place & 1).astype(np.uint8), bitorder="little").tobytes()


def _places(widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every bit in a string whose it is, and its place there."""
    owner = np.repeat(np.arange(widths.size), widths)
    return owner, np.arange(owner.size) - (np.cumsum(widths) - widths)[owner]


class _Bits:
    """Reads a string of at most `limit` bits that starts at a byte of `data`."""

    def __init__(self, data: np.ndarray, start: int, limit: int) -> None:
        self._start, self._at = start, 0
        self._bits = np.unpackbits(data[start : start + (limit + 7) // 8], bitorder="little")

    def numbers(self, widths: np.ndarray) -> np.ndarray:
        start, self._at = self._at, self._at + int(widths.sum())
        if self._at > self._bits.size:
            raise ValueError("expected a table of frequencies, got the end of the stream")
        owner, place = _places(widths)
        sums = np.bincount(owner, self._bits[start : self._at] * 2.0**place, minlength=widths.size)
        return sums.astype(np.int64)

    def gaps(self, size: int, order: int) -> np.ndarray:
        ones = np.flatnonzero(self._bits[: (17 * size)])[:size]
        lengths = np.diff(ones, prepend=-1) + order
        if ones.size < size or lengths.max() > 17:
            raise ValueError("expected gaps of at most 17 binary digits, got longer ones or the end of the stream")
        self._at = int(ones[-1]) + 1
        return (1 << lengths - 1) + self.numbers(lengths - 1) - (1 << order)

    def end(self) -> int:
        """Where the next byte begins, in `data`."""
        rest = self._bits[self._at : -(-self._at // 8) * 8]
        if rest.any():
            raise ValueError("expected zeros behind a table, got ones")
        return self._start + -(-self._at // 8)
