"""Packed codes against arithmetic on one big Python integer, code i at bits b*i .. b*i + b - 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcq.forms import bitpack

unpack = jax.jit(bitpack.unpack, static_argnums=(1, 2))
unpack_positions = jax.jit(bitpack.unpack_positions, static_argnums=(1, 2, 3))


def words_of(codes, bits):
    """The bit stream of `codes` as 32-bit words."""
    stream = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    count = (len(codes) * bits + 31) // 32
    return [(stream >> (32 * i)) % 2**32 for i in range(count)]


def random_codes(size, bits, seed):
    dtype = np.uint8 if bits <= 8 else np.uint16
    codes = np.random.default_rng(seed).integers(0, 2**bits, size).astype(dtype)
    codes[: size // 3] = 2**bits - 1
    return codes


@pytest.mark.parametrize("bits", range(17))
@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 64, 97, 1000])
def test_pack_writes_one_bit_stream(bits, size):
    codes = random_codes(size, bits, seed=size * 17 + bits)
    words = bitpack.pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.tolist() == words_of(codes, bits)
    assert words.size == bitpack.word_count(size, bits)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [4097, 5003, 8192])
def test_bytes_of_whole_codes_are_that_stream(bits, size, monkeypatch):
    monkeypatch.setattr(bitpack, "_CODES", 1 << 11)  # so that there are several rounds
    codes = random_codes(size, bits, seed=size + bits)
    words = bitpack.pack(codes, bits)
    assert words.dtype == np.uint32 and words.tolist() == words_of(codes, bits)
    np.testing.assert_array_equal(bitpack.unpack_host(words, bits, size), codes)
    np.testing.assert_array_equal(bitpack.pack(codes.astype(np.uint16), bits), words)


@settings(max_examples=5)
@given(st.integers(0, 16), st.integers(0, 200), st.integers(0, 2**32))
@example(16, 1, 0)
@example(7, 161, 3)
def test_unpack_undoes_pack(bits, size, seed):
    codes = random_codes(size, bits, seed)
    back = unpack(jnp.asarray(bitpack.pack(codes, bits)), bits, (size,))
    np.testing.assert_array_equal(back, codes)
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)


@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (2, 3, 11), (0, 4), (1, 1, 1)])
@pytest.mark.parametrize("bits", [0, 1, 3, 13])
def test_codes_are_in_row_major_order(shape, bits):
    codes = random_codes(int(np.prod(shape)), bits, seed=5).reshape(shape)
    words = bitpack.pack(codes, bits)
    assert words.tolist() == words_of(codes.ravel(), bits)
    back = unpack(words, bits, shape)
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(("size", "bits"), [(0, 3), (1, 16), (33, 5), (1000, 11), (7, 0), (64, 1)])
def test_packing_on_the_device(size, bits):
    codes = random_codes(size, bits, seed=bits)
    words = jax.jit(bitpack.pack_on_device, static_argnums=1)(jnp.asarray(codes), bits)
    assert words.dtype == jnp.uint32 and words.tolist() == words_of(codes, bits)


def test_strided_codes_are_packed_by_value():
    codes = random_codes(60, 5, seed=1).reshape(6, 10)
    assert bitpack.pack(codes.T, 5).tolist() == words_of(codes.T.ravel(), 5)
    assert bitpack.pack(codes[:, ::3], 5).tolist() == words_of(codes[:, ::3].ravel(), 5)


@pytest.mark.parametrize(("code", "bits"), [(1, 0), (2, 1), (8, 3), (256, 8)])
def test_a_code_that_needs_more_bits_is_refused(code, bits):
    with pytest.raises(ValueError, match=rf"expected codes below {2**bits} \({bits} bits\), got {code}"):
        bitpack.pack(np.array([0, code], np.uint16), bits)


@pytest.mark.parametrize(("levels", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (65536, 16)])
def test_width(levels, bits):
    assert bitpack.width(levels) == bits


# Positions: a bit for each place, or gaps


def gap_codes(chosen, bits):
    """The gap codes of a mask, place by place."""
    codes, skipped, escape = [], 0, 2**bits - 1
    for place in chosen:
        if place:
            codes.append(skipped)
            skipped = 0
        elif (skipped := skipped + 1) == escape:
            codes.append(escape)
            skipped = 0
    while codes and codes[-1] == escape:
        codes.pop()
    return codes


def masks():
    rng = np.random.default_rng(0)
    for density in (0, 0.003, 0.05, 0.3, 0.5, 1):
        yield f"{density} of 1000", rng.random(1000) < density
    for size in (1, 32, 33):
        yield f"none of {size}", np.zeros(size, bool)
        yield f"all of {size}", np.ones(size, bool)
        yield f"the last of {size}", np.arange(size) == size - 1
    yield "1 of 100000", np.arange(100_000) == 70_000
    yield "the first of 100000", np.arange(100_000) == 0
    for gap in (2, 6, 8):  # a code that is one below, at, and one above the one that chooses none
        yield f"skips around 2^{gap} - 1", np.isin(np.arange(20_000), np.cumsum(2**gap + np.array([-2, -1, 0, 1] * 20)))


MASKS = dict(masks())


@pytest.mark.parametrize("name", MASKS)
def test_positions_take_the_fewest_words_and_come_back(name):
    chosen = MASKS[name]
    words, gap = bitpack.pack_positions(chosen)
    coded = {bits: words_of(gap_codes(chosen, bits), bits) for bits in range(2, 17)}
    coded[None] = words_of(chosen, 1)
    assert words.dtype == np.uint32 and words.tolist() == coded[gap]
    assert words.size == min(map(len, coded.values()))
    bitpack.check_positions(words, gap, int(chosen.sum()), chosen.size)
    for unpacked in (unpack_positions, bitpack.unpack_positions_host):
        np.testing.assert_array_equal(unpacked(words, gap, int(chosen.sum()), chosen.size), chosen)


@pytest.mark.parametrize("gap", [2, 3, 5, 7, 16])
def test_gap_codes_of_every_width_are_unpacked(gap):
    chosen = np.random.default_rng(gap).random(300) < 0.1
    words = np.array(words_of(gap_codes(chosen, gap), gap), np.uint32)
    bitpack.check_positions(words, gap, int(chosen.sum()), chosen.size)
    for unpacked in (unpack_positions, bitpack.unpack_positions_host):
        np.testing.assert_array_equal(unpacked(words, gap, int(chosen.sum()), chosen.size), chosen)


def words(*codes, bits=4):
    return np.array(words_of(codes, bits), np.uint32)


@pytest.mark.parametrize(
    ("given_words", "gap", "count", "size", "message"),
    [
        (words(1, 0, 1, 1, bits=1), None, 2, 4, "expected 2 of 4 places, got 3"),
        (words(1, 0, 1, 1, bits=1), None, 3, 3, "bits behind its end"),
        (words(1, 0, 1, 1, bits=1), None, 3, 40, "got 3 up to 40 in 1 words"),
        (words(*[1] * 33, bits=1), None, 33, 32, "in 2 words"),
        (words(), None, 0, 4, "got 0 up to 4 in 0 words"),
        (words(3, 5), 4, 2, 9, "expected 2 of 9 places, got 2 up to 10"),
        (words(15, 15, 3), 4, 1, 33, "expected 1 of 33 places, got 1 up to 34"),
        (words(3, 5), 4, 9, 99, "expected 9 of 99 places, got 8"),
        (words(*[15] * 8), 4, 1, 999, "expected 1 of 999 places, got 0"),
        (words(3, *[0] * 8), 4, 1, 9, "expected gaps between 1 of 9 places, got 2 words of 4 bits"),
        (words(3, *[0] * 8), 4, 1, 200, "got 1 up to 4 in 2 words"),
        (words(*[0] * 800), 4, 1, 99, "got 100 words"),
        (words(), 4, 1, 9, "got 0 up to 0 in 0 words"),
        (words(7), 4, 0, 9, "expected gaps between 0 of 9 places, got 1 words"),
    ],
)
def test_words_that_do_not_choose_as_many_places_are_refused(given_words, gap, count, size, message):
    with pytest.raises(ValueError, match=message):
        bitpack.check_positions(given_words, gap, count, size)


@pytest.mark.parametrize(("size", "bits"), [(0, 3), (1, 16), (33, 5), (1000, 11), (7, 0), (40 << 15, 3)])
def test_unpacking_on_the_host(size, bits):
    codes = random_codes(size, bits, seed=bits)
    back = bitpack.unpack_host(bitpack.pack(codes, bits), bits, size)
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)
    np.testing.assert_array_equal(back, codes)
