"""A coder and a decoder of the streams as their definition has them, symbol by symbol, and codes to try them on."""

import math
from bisect import bisect_right
from collections import Counter, deque
from itertools import accumulate

import numpy as np


def put(symbols, frequencies, count):
    """States and words: last symbol first, symbol i in lane i mod count, words reversed in the end."""
    *starts, total = accumulate(frequencies, initial=0)
    r = total.bit_length() - 1
    states, words = [2**16] * count, []
    for i in reversed(range(len(symbols))):
        f, c, x = frequencies[symbols[i]], starts[symbols[i]], states[i % count]
        if x >> (32 - r) >= f:
            words.append(x % 2**16)
            x //= 2**16
        states[i % count] = (x // f) * total + x % f + c
        assert 2**16 <= states[i % count] < 2**32
    return states, words[::-1]


def take(states, words, frequencies, size):
    """The symbols, and whether every state is back at 2^16 and every word used."""
    *starts, total = accumulate(frequencies, initial=0)
    words, states, symbols = deque(words), list(states), []
    for i in range(size):
        x = states[i % len(states)]
        s = bisect_right(starts, x % total) - 1
        x = frequencies[s] * (x // total) + x % total - starts[s]
        if x < 2**16:
            x = 2**16 * x + words.popleft()
        states[i % len(states)] = x
        symbols.append(s)
    return symbols, not words and set(states) == {2**16}


def varint(data, at):
    value = shift = 0
    while data[at] > 127:
        value, shift, at = value + (data[at] - 128 << shift), shift + 7, at + 1
    return value + (data[at] << shift), at + 1


def table(data, at, alphabet, nested=True):
    """Frequencies of a table and where it ends, one bit after another."""
    r, m, kind = data[at] % 16 + 8, data[at] // 16, data[at + 1]
    at += 2
    classes = {}
    if kind == 0xF0:
        assert nested
        letters, at = table(data, at, 18, nested=False)
        if sum(f > 0 for f in letters) > 1:
            count, at = varint(data, at)
            state = int.from_bytes(data[at : at + 4], "little")
            words = [int.from_bytes(data[at + 4 + 2 * i : at + 6 + 2 * i], "little") for i in range(count)]
            found, well = take([state], words, letters, alphabet)
            assert well
            at += 4 + 2 * count
        else:
            found = [letters.index(2 ** (sum(letters).bit_length() - 1))] * alphabet
        classes = {s: letter - 1 for s, letter in enumerate(found) if letter}
        bits, start = int.from_bytes(data[at:], "little"), at
        used = 0
    else:
        k, q = kind % 16, kind // 16
        count, at = varint(data, at)
        count += 1
        bits, start, used = int.from_bytes(data[at:], "little"), at, 0
        lengths = []
        for _ in range(count):
            zeros = 0
            while not bits >> used & 1:
                used, zeros = used + 1, zeros + 1
            used += 1
            lengths.append(zeros + k + 1)
        place, present = -1, []
        for n in lengths:
            g = 2 ** (n - 1) + (bits >> used) % 2 ** (n - 1)
            used += n - 1
            place += g - 2**k + 1
            present.append(place)
        for s in present:
            classes[s] = (bits >> used) % 2**q
            used += q
    weights = {}
    for s, b in classes.items():
        behind = max(b - 1, 0)
        n = min(behind, m)
        top = 2**n + (bits >> used) % 2**n
        used += n
        weights[s] = 0 if b == 0 else top * 2 ** (behind - n) + (2 ** (behind - n) // 2)
    if not any(weights.values()):
        weights = dict.fromkeys(weights, 1)
    total, before, frequencies = sum(weights.values()), 0, [0] * alphabet
    free = 2**r - len(weights)
    for s, w in weights.items():
        frequencies[s] = 1 + (before + w) * free // total - before * free // total
        before += w
    assert sum(frequencies) == 2**r
    return frequencies, start + -(-used // 8)


def reference(data, size, levels):
    """What a stream says, and whether the reference coder writes the same states and words from it."""
    n = data[0]
    if n == 0:
        width = (levels - 1).bit_length()
        bits = int.from_bytes(data[1:], "little")
        assert len(data) == 1 + -(-size * width // 8)
        return [(bits >> i * width) % 2**width for i in range(size)], True
    left = size % n
    at = 1 + next(i for i in range(9) if 256**i >= levels**left)
    rest = int.from_bytes(data[1:at], "little")
    frequencies, at = table(data, at, levels**n)
    blocks, same = [frequencies.index(max(frequencies))] * (size // n), True
    if sum(f > 0 for f in frequencies) > 1:
        count, at = varint(data, at)
        states = [int.from_bytes(data[at + 4 * i : at + 4 * i + 4], "little") for i in range(count)]
        words = [int.from_bytes(data[i : i + 2], "little") for i in range(at + 4 * count, len(data), 2)]
        blocks, same = take(states, words, frequencies, size // n)
        same = same and put(blocks, frequencies, count) == (states, words)
    else:
        same = at == len(data)
    codes = [b // levels**i % levels for b in blocks for i in range(n)]
    return codes + [rest // levels**i % levels for i in range(left)], same


def skewed(size, levels, seed=0):
    """Codes of which low ones are likely."""
    dtype = np.uint8 if levels <= 256 else np.uint16
    return np.minimum(np.random.default_rng(seed).geometric(0.8, size) - 1, levels - 1).astype(dtype)


def entropy_bits(symbols):
    """Bits of all symbols at their empirical entropy."""
    counts = Counter(symbols)
    return sum(c * math.log2(len(symbols) / c) for c in counts.values())
