"""Frequency tables say what was fitted, cost little, and are looked at with distrust."""

import math

import numpy as np
import pytest

from lcq.io.entropy_coding import frequency_tables
from tests.io.entropy_coding.reference import table

RNG = np.random.default_rng(7)
LETTERS = frequency_tables.fit(np.array([3, 1] + [0] * 16), nested=False).data


@pytest.mark.parametrize("counts", [[5], [0, 0, 9], [1, 1], [3, 0, 10**7, 2], [7] * 300, [0] * 999 + [1, 0, 5]])
def test_tables_say_what_fit_says(counts):
    fitted = frequency_tables.fit(np.array(counts))
    found, size = frequency_tables.read(np.frombuffer(fitted.data + b"more", np.uint8), len(counts))
    assert size == len(fitted.data)
    np.testing.assert_array_equal(found, fitted.frequencies)
    assert table(fitted.data + b"more", 0, len(counts)) == (found.tolist(), size)
    np.testing.assert_array_equal(found > 0, np.array(counts) > 0)


def test_large_tables_are_nested_and_cost_little():
    counts = RNG.poisson(np.geomspace(0.01, 200, 4096)).astype(np.int64)
    fitted = frequency_tables.fit(counts)
    assert fitted.data[1] == 0xF0
    frequencies, size = table(fitted.data, 0, 4096)
    assert (frequencies, size) == (fitted.frequencies.tolist(), len(fitted.data))
    bound = sum(c * math.log2(counts.sum() / c) for c in counts.tolist() if c)
    assert bound < fitted.bits < 1.01 * bound
    assert 8 * size < 0.6 * 8 * np.count_nonzero(counts)
    assert len(frequency_tables.fit(counts, nested=False).data) > 1.05 * size


@pytest.mark.parametrize("symbols", [1, 2, 8, 32])
def test_small_tables_are_those_of_the_search_one_by_one(symbols, monkeypatch):
    """All precisions in one go, or each on its own."""
    for spread in (0.1, 1, 3):
        counts = np.zeros(64, np.int64)
        counts[RNG.choice(64, symbols, replace=False)] = 1 + RNG.exponential(30, symbols) ** spread
        monkeypatch.undo()
        together = frequency_tables.fit(counts)
        monkeypatch.setattr(frequency_tables, "_SMALL", 0)
        assert frequency_tables.fit(counts).data == together.data


@pytest.mark.parametrize("alphabet", [1, 8, 300])
def test_bounds_of_what_says_which_symbols_are_present(alphabet):
    for symbols in {1, alphabet // 7 + 1, alphabet}:
        low, high = frequency_tables.about_bits(symbols, alphabet)
        present = np.sort(RNG.choice(alphabet, symbols, replace=False))
        assert low <= frequency_tables.least_bits(present, alphabet) <= high


@pytest.mark.parametrize(
    "data, why",
    [
        ("00", "a table"),
        ("09 00 00 01", "8 to 16 bits"),
        ("00 60 00 01", "plain or nested"),
        ("00 f0 00 f0 00 01", "nested once"),
        ("00 00 01 03", "at most 1 symbols"),
        ("00 00 80 80 80 80 80 00", "at most 5"),
        ("00 00 80 00 01", "as few bytes"),
        ("00 00 00 02", "below 1"),
        ("00 00 00 00 00 00 00", "gaps"),
        ("00 00 00 03", "zeros behind"),
        ("00 50 00 23", "16 binary digits"),
        ("00 50 00", "end of the stream"),
        ("00 f0" + LETTERS.hex() + "00 ff ff 00 00", "state of at least"),
        ("00 f0" + LETTERS.hex() + "05 00 00 01 00", "words of a table"),
    ],
)
def test_bad_tables_are_refused(data, why):
    with pytest.raises(ValueError, match=why):
        frequency_tables.read(np.frombuffer(bytes.fromhex(data), np.uint8), 1)
