"""rANS: symbols of integer frequencies <-> the states of L lanes and one stream of 16-bit words.

Frequencies f_s sum to 2^r, 8 <= r <= 16; c_s is the sum of those before s; a state is 2^16 <= x < 2^32. With
c_s <= x mod 2^r < c_s + f_s a state says that symbol s comes next, and the two steps

    put s:   x <- (x div f_s) 2^r + (x mod f_s) + c_s        before it, if (x >> (32 - r)) >= f_s, a word x mod 2^16
                                                             is written and x <- x >> 16
    take s:  x <- f_s (x div 2^r) + (x mod 2^r) - c_s        after it, if x < 2^16, a word w is read and
                                                             x <- 2^16 x + w

undo each other. Symbol i is in lane i mod L, row i div L. All lanes share the words: they are read row by row, inside a
row lane by lane. The encoder starts all states at 2^16 and goes the other way, last symbol first; its words are then
reversed. So a decoder that ends with all states at 2^16 and no word left has read what was written.

With f_s - 1 and x mod 2^r - c_s for each of the 2^r slots x mod 2^r, both of 16 bits, a step needs one look-up. A
single symbol has f_s = 2^r: states stay as they are.

Source: Duda, Asymmetric numeral systems, arXiv 1311.2540; lanes as in Giesen, arXiv 1402.3392.
"""

import functools
from array import array

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree, UInt, UInt16, UInt32

START = 1 << 16
"""The state of a lane before its last symbol is put, and after it is taken."""

WIDE = 32
"""Lanes from which a row is worth array operations; symbol by symbol is faster below."""

_CHUNK = 1 << 16
_UNROLL = 2  # rows a turn of the loop, whose turns cost as much as the work in a row


def encode(
    symbols: UInt16[np.ndarray, " count"], frequencies: Int[np.ndarray, " alphabet"], lanes: int
) -> tuple[UInt32[np.ndarray, " lanes"], UInt16[np.ndarray, " words"]]:
    """The states and words from which `decode` takes the symbols; none of them has frequency 0.

    Example:
        >>> encode(np.array([0, 1, 0], np.uint16), np.array([192, 64]), 1)
        (array([466176], dtype=uint32), array([], dtype=uint16))
    """
    precision = _precision(frequencies)
    starts = np.cumsum(frequencies) - frequencies
    put = _put_rows if lanes >= WIDE else _put_each
    return put(symbols, frequencies.astype(np.uint32), starts.astype(np.uint32), precision, lanes)


def decode(
    states: UInt32[np.ndarray, " lanes"],
    words: UInt16[np.ndarray, " words"],
    frequencies: Int[np.ndarray, " alphabet"],
    count: int,
) -> UInt16[np.ndarray, " count"]:
    """The `count` symbols that were encoded.

    Raises:
        ValueError: too few words, words left over, or a state that is not 2^16 at the end.
    """
    take = _take_rows if states.size >= WIDE else _take_each
    found, final, used = take(states, words, steps(frequencies), _precision(frequencies), count)
    check_end(bool((final == START).all()), used, words.size)
    symbols = symbol_of_slot(frequencies)
    for first in range(0, count, _CHUNK):  # numpy takes 8 bytes for each index
        some = slice(first, first + _CHUNK)
        found[some] = symbols[found[some]]
    return found


def check_end(at_start: bool, used: int, words: int) -> None:
    """Raises ValueError unless all lanes are back at their start and all words are used."""
    if used != words or not at_start:
        raise ValueError(
            f"expected {words} words to be used, and all states 2^16 after the last symbol, got {used} words"
        )


def steps(frequencies: Int[np.ndarray, " alphabet"]) -> UInt32[np.ndarray, " slots"]:
    """2^16 (f_s - 1) + (slot - c_s) of each slot."""
    starts = np.cumsum(frequencies) - frequencies
    slots = np.arange(int(frequencies.sum()))
    return (np.repeat(((frequencies - 1) << 16) - starts, frequencies) + slots).astype(np.uint32)


def symbol_of_slot(frequencies: Int[np.ndarray, " alphabet"]) -> UInt16[np.ndarray, " slots"]:
    """The symbol s of each slot."""
    return np.repeat(np.arange(frequencies.size), frequencies).astype(np.uint16)


def _precision(frequencies: np.ndarray) -> int:
    return int(frequencies.sum()).bit_length() - 1


def _put_rows(
    symbols: np.ndarray, frequencies: np.ndarray, starts: np.ndarray, precision: int, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    states, chunks = np.full(lanes, START, np.uint32), []
    for first in range((symbols.size - 1) // lanes * lanes, -1, -lanes):
        row = symbols[first : first + lanes]
        x, f = states[: row.size], frequencies[row]
        full = (x >> np.uint32(32 - precision)) >= f
        chunks.append(x[full].astype(np.uint16))
        x[full] >>= np.uint32(16)
        quotient = x // f
        x += (quotient << np.uint32(precision)) - quotient * f + starts[row]
    return states, np.concatenate(chunks[::-1])


def _put_each(
    symbols: np.ndarray, frequencies: np.ndarray, starts: np.ndarray, precision: int, lanes: int
) -> tuple[np.ndarray, np.ndarray]:
    fs, cs, row = frequencies.tolist(), starts.tolist(), symbols.data
    states, words = [START] * lanes, array("H")
    for i in range(symbols.size - 1, -1, -1):
        s, x = row[i], states[i % lanes]
        f = fs[s]
        if x >> (32 - precision) >= f:
            words.append(x & 0xFFFF)
            x >>= 16
        states[i % lanes] = (x // f << precision) + x % f + cs[s]
    return np.array(states, np.uint32), np.frombuffer(words, np.uint16)[::-1]


def _take_rows(
    states: np.ndarray, words: np.ndarray, table: np.ndarray, precision: int, count: int
) -> tuple[np.ndarray, np.ndarray, int]:
    states, slots, used = states.copy(), np.empty(count, np.uint16), 0
    mask, low, one = np.uint32((1 << precision) - 1), np.uint32(0xFFFF), np.uint32(1)
    for first in range(0, count, states.size):
        x = states[: count - first]
        slot = x & mask
        step = table[slot]
        x >>= np.uint32(precision)
        x *= (step >> np.uint32(16)) + one
        x += step & low
        empty = np.flatnonzero(x <= low)
        if empty.size > words.size - used:
            raise ValueError(f"expected more than {words.size} words, which last for {first} of {count} symbols")
        x[empty] = x[empty] << np.uint32(16) | words[used : used + empty.size]
        used += empty.size
        slots[first : first + x.size] = slot
    return slots, states, used


def _take_each(
    states: np.ndarray, words: np.ndarray, table: np.ndarray, precision: int, count: int
) -> tuple[np.ndarray, np.ndarray, int]:
    xs, slots, used = states.tolist(), np.empty(count, np.uint16), 0
    entries, stream, out = table.data, words.data, slots.data
    mask, lanes = (1 << precision) - 1, states.size
    for i in range(count):
        x = xs[i % lanes]
        out[i] = slot = x & mask
        step = entries[slot]
        x = ((step >> 16) + 1) * (x >> precision) + (step & 0xFFFF)
        if x < START:
            if used == words.size:
                raise ValueError(f"expected more than {used} words, which last for {i} of {count} symbols")
            x = x << 16 | stream[used]
            used += 1
        xs[i % lanes] = x
    return slots, np.array(xs, np.uint32), used


def decode_digits(
    states: UInt32[np.ndarray, " lanes"],
    words: UInt16[np.ndarray, " words"],
    frequencies: Int[np.ndarray, " alphabet"],
    count: int,
    levels: int,
    block: int,
) -> UInt[Array, " digits"]:
    """`decode` on the default device to the `block` digits in base `levels` of each symbol, lowest first; and more.

    One program serves all streams of as many lanes, levels and digits a block whose lengths are nearly the same.

    Raises:
        ValueError: as `decode`.
    """
    table, symbols = steps(frequencies), symbol_of_slot(frequencies)
    digits, at_start, used = _take_on_device(
        states,
        np.pad(words, (0, (1 << words.size.bit_length()) - words.size)),
        np.pad(table, (0, (1 << 16) - table.size)),
        np.pad(symbols, (0, (1 << 16) - symbols.size)),
        np.uint32(_precision(frequencies)),
        np.uint32(count),
        rows=_roomy(-(-count // states.size)),
        levels=levels,
        block=block,
    )
    check_end(bool(at_start), int(used), words.size)
    return digits


@functools.partial(jax.jit, static_argnames=("rows", "levels", "block"))
def _take_on_device(
    states: UInt32[Array, " lanes"],
    words: UInt16[Array, " words"],
    table: UInt32[Array, " slots"],
    symbols: UInt16[Array, " slots"],
    precision: UInt32[Array, ""],
    count: UInt32[Array, ""],
    *,
    rows: int,
    levels: int,
    block: int,
) -> tuple[UInt[Array, " digits"], Bool[Array, ""], UInt32[Array, ""]]:
    """Digits of `rows` rows, decoded as far as `count` symbols go; whether all lanes ended at 2^16; words used."""
    lanes, mask = states.shape[0], (jnp.uint32(1) << precision) - 1
    lane = jnp.arange(lanes, dtype=jnp.uint32)

    def row(first: Array, x: Array, used: Array) -> tuple[Array, Array, Array]:
        slot = x & mask
        step = table.at[slot].get(mode="promise_in_bounds")
        x = jnp.where(first + lane < count, ((step >> 16) + 1) * (x >> precision) + (step & 0xFFFF), x)
        empty = x < START
        before, total = _counts(empty)
        word = words.at[used + before].get(mode="clip")
        return slot.astype(jnp.uint16), jnp.where(empty, x << 16 | word, x), used + total

    def some(i: Array, carry: PyTree) -> PyTree:
        x, used, slots = carry
        rows = []
        for j in range(_UNROLL):
            slot, x, used = row((i * _UNROLL + j).astype(jnp.uint32) * lanes, x, used)
            rows.append(slot)
        return x, used, lax.dynamic_update_slice(slots, jnp.stack(rows), (i * _UNROLL, 0))

    start = (states, jnp.uint32(0), jnp.zeros((rows, lanes), jnp.uint16))
    needed = ((count + jnp.uint32(_UNROLL * lanes - 1)) // (_UNROLL * lanes)).astype(jnp.int32)
    states, used, slots = lax.fori_loop(jnp.int32(0), needed, some, start)
    found = symbols.at[slots.reshape(-1)].get(mode="promise_in_bounds").astype(jnp.uint32)
    dtype = jnp.uint8 if levels <= 256 else jnp.uint16
    digits = jnp.stack([(found // levels**i % levels).astype(dtype) for i in range(block)], axis=1)
    return digits.reshape(-1), (states == START).all(), used


def _counts(empty: Bool[Array, " lanes"]) -> tuple[UInt32[Array, " lanes"], UInt32[Array, ""]]:
    """How many are empty before each lane, and in all: by the ones in words of 32 lanes, as prefix sums are slow."""
    lanes = empty.shape[0]
    bit = jnp.arange(32, dtype=jnp.uint32)
    groups = jnp.pad(empty, (0, -lanes % 32)).reshape(-1, 32)
    ones = (groups.astype(jnp.uint32) << bit).sum(axis=1, dtype=jnp.uint32)
    sums = lax.population_count(ones)
    group = jnp.arange(sums.shape[0])
    if sums.shape[0] <= 64:
        before = jnp.where(group < group[:, None], sums, 0).sum(axis=1, dtype=jnp.uint32)
    else:
        before = jnp.cumsum(sums, dtype=jnp.uint32) - sums
    inside = lax.population_count(ones[:, None] & ((jnp.uint32(1) << bit) - 1))
    return (before[:, None] + inside).reshape(-1)[:lanes], before[-1] + sums[-1]


def _roomy(size: int) -> int:
    """The next of 4 sizes an octave, so that few programs are compiled."""
    step = max(_UNROLL, 1 << max(0, size.bit_length() - 3))
    return -(-size // step) * step
