"""Streams of codes against a coder in Python integers, entropies in float64, and hostile bytes.

The reference coder below follows the description of the format, not the code: symbols one by one, words in a list.
"""

import jax
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcq.io.entropy_coding import frequency_tables, lanes, rans
from tests.io.entropy_coding.reference import entropy_bits, reference, skewed, table

RNG = np.random.default_rng(7)
SIZES = (0, 1, 2, 31, 32, 33, 97, 1009)


CASES = [
    *((skewed(size, levels), levels) for levels in (2, 3, 16, 255, 256, 257, 65536) for size in SIZES),
    *((np.zeros(size, np.uint8), 1) for size in (0, 1, 7)),
    *((np.full(size, 4, np.uint8), 5) for size in (1, 9, 1009)),
    (np.array([0, 1, 2] * 50 + [1], np.uint8), 4),
    (np.eye(1, 1009, 500, dtype=np.uint8)[0], 2),
    (RNG.integers(0, 16, 333).astype(np.uint8), 16),
    (RNG.integers(0, 65536, 333).astype(np.uint16), 65536),
    (np.sort(RNG.integers(0, 300, 2000)).astype(np.uint16), 300),
]


@pytest.mark.parametrize("codes, levels", CASES, ids=[f"{codes.size}-{levels}" for codes, levels in CASES])
def test_streams_say_what_was_encoded(codes, levels):
    data = rans.encode(codes, levels)
    found = rans.decode(data, codes.size, levels)
    assert found.dtype == (np.uint8 if levels <= 256 else np.uint16)
    np.testing.assert_array_equal(found, codes)
    assert reference(data, codes.size, levels) == (codes.tolist(), True)
    assert len(data) <= 1 + -(-codes.size * (levels - 1).bit_length() // 8)


@pytest.mark.parametrize("levels, block", [(2, 1), (2, 7), (2, 16), (3, 3), (3, 10), (4, 8), (256, 2)])
@pytest.mark.parametrize("count", [1, 5, 33])
def test_blocks_and_lanes_as_asked(levels, block, count):
    codes = np.resize(skewed(97, levels), 6001)
    data = rans.encode(codes.reshape(1, 6001), levels, block=block, lanes=count)
    assert data[0] == block
    assert reference(data, 6001, levels) == (codes.tolist(), True)
    np.testing.assert_array_equal(rans.decode(data, 6001, levels), codes)


@pytest.mark.parametrize(
    "levels, block, count", [(2, 6, 32), (3, 1, 33), (4, 2, 64), (300, 1, 2100), (2, 3, 2), (9, 2, 40)]
)
def test_devices_decode_the_same(levels, block, count):
    codes = skewed(6007 if count < 2000 else 12000, levels)
    data = rans.encode(codes, levels, block=block, lanes=count)
    found = rans.decode_on_device(data, codes.size, levels)
    assert isinstance(found, jax.Array) and found.dtype == codes.dtype
    np.testing.assert_array_equal(found, codes)
    if count >= lanes.WIDE:
        for bad in (data[:-2], data + b"\0\0", data[:-2] + bytes([data[-2] ^ 1, data[-1]])):
            with pytest.raises(ValueError, match="words"):
                rans.decode_on_device(bad, codes.size, levels)


def test_devices_take_what_is_raw_or_constant():
    for codes, levels in ((RNG.integers(0, 5, 99).astype(np.uint8), 5), (np.full(99, 3, np.uint8), 5)):
        np.testing.assert_array_equal(rans.decode_on_device(rans.encode(codes, levels), 99, levels), codes)


def test_like_streams_share_a_program():
    before = lanes._take_on_device._cache_size()
    for size in (20_000, 20_500):
        codes = skewed(size, 4, seed=size)
        rans.decode_on_device(rans.encode(codes, 4, block=1, lanes=48), size, 4)
    assert lanes._take_on_device._cache_size() == before + 1


def test_constant_codes_take_a_few_bytes():
    for size, level in ((1009, 0), (10**6, 200)):
        assert len(rans.encode(np.full(size, level, np.uint8), 256)) <= 8


@pytest.mark.parametrize("chances", [[0.45, 0.25, 0.2, 0.1], [0.9, 0.05, 0.05], [0.5, 0.5], [0.97, 0.03]])
def test_a_thousand_codes_are_within_forty_bytes(chances):
    codes = RNG.choice(len(chances), 1000, p=chances).astype(np.uint8)
    assert len(rans.encode(codes, len(chances))) <= entropy_bits(codes.tolist()) / 8 + 40


@pytest.mark.parametrize("block", [1, 2, 3])
def test_blocks_of_a_markov_source_reach_their_entropy(block):
    fresh, kept = RNG.choice(4, 300_000, p=[0.45, 0.25, 0.2, 0.1]), RNG.random(300_000) < 0.4
    since = np.maximum.accumulate(np.where(kept, 0, np.arange(300_000)))
    codes = fresh[since].astype(np.uint8)
    blocks = list(zip(*(codes[i::block].tolist() for i in range(block)), strict=True))
    bits = entropy_bits(blocks)
    assert rans.entropy(codes, 4, block) == pytest.approx(bits / 300_000, rel=1e-12)
    assert bits < 8 * len(rans.encode(codes, 4, block=block)) < 1.003 * bits
    assert len(rans.encode(codes, 4)) <= 1.001 * len(rans.encode(codes, 4, block=block))


@pytest.mark.parametrize("levels", [2, 3, 4, 16])
@pytest.mark.parametrize("concentration", [0.1, 1.0, None])
def test_few_codes_are_hardly_longer_than_by_trying_every_block(levels, concentration):
    rng, ours, best = np.random.default_rng(levels), 0, 0
    for size in (40, 256, 512):
        chances = None if concentration is None else rng.dirichlet(np.full(levels, concentration))
        random = rng.choice(levels, size, p=chances).astype(np.uint8)
        for codes in (random, np.resize(random[:8], size)):
            tried = [rans.encode(codes, levels, block=n) for n in rans.BLOCKS if n <= size and levels**n <= 1 << 16]
            ours, best = ours + len(rans.encode(codes, levels)), best + min(map(len, tried))
    assert ours <= 1.02 * best


@pytest.mark.parametrize("density", [0.1, 0.01])
def test_masks_cost_less_than_a_bit(density):
    mask = (RNG.random(200_000) < density).astype(np.uint8)
    assert len(rans.encode(mask, 2)) < 1.02 * entropy_bits(mask.tolist()) / 8


def test_sparse_alphabets_cost_what_they_use():
    gaps = RNG.choice(RNG.integers(0, 65536, 40), 20_000).astype(np.uint16)
    assert len(rans.encode(gaps, 65536)) < entropy_bits(gaps.tolist()) / 8 + 40 * 3 + 40


def test_entropy_leaves_out_what_is_no_block():
    assert rans.entropy(np.array([0, 1, 0, 1, 1], np.uint8), 2, 2) == 0
    assert rans.entropy(np.zeros(0, np.uint8), 2, 2) == 0
    assert rans.entropy(np.arange(256, dtype=np.uint8), 256) == pytest.approx(8)


@pytest.mark.parametrize(
    "levels, options", [(3, {}), (0, {}), (65537, {}), (4, {"block": 9}), (4, {"block": 0}), (4, {"lanes": 0})]
)
def test_encode_says_what_it_wants(levels, options):
    with pytest.raises(ValueError, match="expected"):
        rans.encode(np.array([0, 3], np.uint8), levels, **options)


STREAMS = [
    (rans.encode(codes, levels, **options), codes.size, levels)
    for codes, levels, options in (
        (skewed(400, 4), 4, {}),
        (skewed(401, 3), 3, {"block": 2, "lanes": 40}),
        (np.full(50, 3, np.uint8), 5, {}),
        (RNG.integers(0, 5, 50).astype(np.uint8), 5, {}),
        (np.minimum(RNG.poisson(30, 1500), 255).astype(np.uint8), 256, {}),
    )
]


def test_bad_streams_are_refused():
    data, size, levels = STREAMS[0]
    words = len(data) - 2 * lanes.encode(skewed(400, 4).astype(np.uint16), table_of(data, levels), 1)[1].size
    for bad, n, k, why in (
        (b"", 0, 2, "stream"),
        (b"\x09" + data[1:], size, levels, "blocks of 9"),
        (b"\x02" + data[1:], 1, levels, "blocks of 2"),
        (data[: words - 4] + b"\xff\xff\0\0" + data[words:], size, levels, "states of at least"),
        (data + b"\0", size, levels, "last word"),
        (b"\x02\x03" + STREAMS[1][0][2:], 401, 3, "at the end"),
        (rans.encode(np.full(50, 3, np.uint8), 5) + b"\0\0", 50, 5, "last word"),
        (b"\0\x05", 1, 5, "codes below 5"),
        (b"\0\x08", 1, 5, "codes below 5"),
        (b"\0\x01\0", 1, 5, "2 bytes"),
    ):
        with pytest.raises(ValueError, match=why):
            rans.decode(bad, n, k)


def table_of(data, levels):
    """Frequencies of a stream of single codes."""
    return np.array(table(data, 1, levels)[0])


def refused(data, size, levels):
    """Whether a stream is refused; what is not is at least of the right kind."""
    try:
        codes = rans.decode(data, size, levels)
    except ValueError:
        return True
    assert codes.shape == (size,) and codes.dtype == (np.uint8 if levels <= 256 else np.uint16)
    assert size == 0 or int(codes.max()) < levels
    return False


@pytest.mark.parametrize("data, size, levels", STREAMS, ids=range(len(STREAMS)))
def test_cut_and_longer_streams_are_refused(data, size, levels):
    assert all(refused(data[:i], size, levels) for i in range(len(data)))
    assert all(refused(data + more, size, levels) for more in (b"\0", b"\0\0", b"\x01\x02\x03\x04"))


@pytest.mark.parametrize("data, size, levels", STREAMS, ids=range(len(STREAMS)))
def test_flipped_bits_are_refused_or_only_change_codes(data, size, levels):
    """A flip in a raw code, or from one table or constant to another, gives other codes: a digest's affair."""
    for i in range(min(len(data), 120)):
        for bit in range(8):
            refused(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :], size, levels)
    n, words = data[0], len(data) - 20
    if n and size > 100:
        assert all(
            refused(data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :], size, levels) for i in range(words, len(data))
        )


@settings(max_examples=300)
@given(st.binary(max_size=60), st.integers(0, 3000), st.sampled_from([1, 2, 3, 16, 256, 257, 65536]))
@example(b"", 0, 2)
@example(b"\x01\x08\xf0\x00\x00\x00\x01", 3000, 65536)
@example(b"\x01\x00\x00\xff\xff\xff\xff\x7f", 10, 65536)
@example(b"\x01\x00\x00\x01\x03\xff\xff\xff\xff\x7f", 10, 2)
def test_any_bytes_are_codes_or_refused(data, size, levels):
    refused(data, size, levels)


@settings(max_examples=150)
@given(st.sampled_from(STREAMS), st.binary(min_size=1, max_size=6), st.integers(0, 30), st.integers(-2, 2))
def test_damaged_heads_are_codes_or_refused(stream, patch, at, more):
    data, size, levels = stream
    refused(data[:at] + patch + data[at + len(patch) :], size + more, levels)


def test_absurd_numbers_take_no_memory():
    codes = skewed(400, 4)
    data = rans.encode(codes, 4, block=1, lanes=1)
    at = data.index(b"\x01", 1 + len(frequency_tables.fit(np.bincount(codes)).data))
    for count in (0, 300, 2**31, 2**34):
        bad = data[:at] + frequency_tables.varint(count) + data[at + 1 :]
        with pytest.raises(ValueError, match="lanes"):
            rans.decode(bad, 400, 4)
    with pytest.raises(ValueError):
        rans.decode(b"\0", 2**62, 256)
    with pytest.raises(ValueError, match="2\\^31"):
        rans.decode_on_device(b"\0", 2**31, 2)


@pytest.mark.parametrize("levels", [2, 4, 16, 15, 256])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_symbols_that_are_packed_codes_are_those_of_any_levels(levels, n):
    """Blocks of 8 or 16 bits are packed, not computed; others by shifts, if levels are a power of two."""
    if levels**n > 1 << 16:
        pytest.skip("no such blocks")
    codes = np.random.default_rng(n).integers(0, levels, 10_003).astype(np.uint8)
    data = rans.encode(codes // 3, levels, block=n)
    assert data[0] == n
    np.testing.assert_array_equal(rans.decode(data, codes.size, levels), codes // 3)
    whole = codes[: codes.size // n * n].reshape(-1, n)
    expected = sum(whole[:, i].astype(int) * levels**i for i in range(n))
    np.testing.assert_array_equal(rans._symbols(codes, levels, n), expected)
