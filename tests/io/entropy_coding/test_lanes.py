"""Lanes: states and words are those of the definition, on hosts and on devices."""

import numpy as np
import pytest

from lcq.io.entropy_coding import lanes
from tests.io.entropy_coding.reference import put, skewed

RNG = np.random.default_rng(7)


def test_a_toy_by_hand():
    # f = (192, 64) of 256. 0 onto 65536 = 341 * 192 + 64 gives 341 * 256 + 64 = 87360; 1 onto 87360 = 1365 * 64 gives
    # 1365 * 256 + 192 = 349632; 0 onto 349632 = 1821 * 192 gives 1821 * 256 = 466176.
    frequencies, symbols = np.array([192, 64]), np.array([0, 1, 0], np.uint16)
    states, words = lanes.encode(symbols, frequencies, 1)
    assert (states.tolist(), words.tolist()) == ([466176], [])
    np.testing.assert_array_equal(lanes.decode(states, words, frequencies, 3), symbols)


@pytest.mark.parametrize("count", [1, 2, 3, lanes.WIDE - 1, lanes.WIDE, lanes.WIDE + 1, 70])
@pytest.mark.parametrize(
    "frequencies", [[1, 255], [100, 0, 56, 100], [2**14 - 3, 1, 2], [2**16 - 1, 1], [2**15, 2**15]]
)
def test_states_and_words_are_those_of_the_reference(frequencies, count):
    chances = np.array(frequencies) ** 0.3 * (np.array(frequencies) > 0)
    symbols = RNG.choice(len(frequencies), 211, p=chances / chances.sum()).astype(np.uint16)
    states, words = lanes.encode(symbols, np.array(frequencies), count)
    assert (states.tolist(), words.tolist()) == put(symbols.tolist(), frequencies, count)
    np.testing.assert_array_equal(lanes.decode(states, words, np.array(frequencies), 211), symbols)


def test_a_single_symbol_leaves_the_states_alone():
    for count in (1, 40):
        states, words = lanes.encode(np.zeros(100, np.uint16), np.array([2**16]), count)
        assert set(states.tolist()) == {2**16} and words.size == 0
        assert not lanes.decode(states, words, np.array([2**16]), 100).any()


@pytest.mark.parametrize("count", [2, 40])
def test_states_and_words_are_checked(count):
    with pytest.raises(ValueError, match="more than 0 words"):  # 255 * 257 + 0 is the largest that reads a word
        lanes.decode(np.full(count, 2**16 + 256, np.uint32), np.zeros(0, np.uint16), np.array([255, 1]), count)
    with pytest.raises(ValueError, match="2\\^16"):
        lanes.decode(np.full(count, 2**17, np.uint32), np.zeros(0, np.uint16), np.array([255, 1]), count)
    frequencies, symbols = np.array([200, 56]), skewed(5000, 2).astype(np.uint16)
    states, words = lanes.encode(symbols, frequencies, count)
    for bad in (words[:-1], np.append(words, np.uint16(0))):
        with pytest.raises(ValueError, match="words"):
            lanes.decode(states, bad, frequencies, 5000)
    with pytest.raises(ValueError, match="words"):
        lanes.decode(states + np.uint32(1), words, frequencies, 5000)
