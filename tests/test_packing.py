"""Packed codes against arithmetic on one big Python integer, code i at bits b*i .. b*i + b - 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lcq import packing

unpack = jax.jit(packing.unpack, static_argnums=(1, 2))


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
    words = packing.pack(codes, bits)
    assert words.dtype == np.uint32
    assert words.tolist() == words_of(codes, bits)
    assert words.size == packing.word_count(size, bits)


@settings(max_examples=5)
@given(st.integers(0, 16), st.integers(0, 200), st.integers(0, 2**32))
@example(16, 1, 0)
@example(7, 161, 3)
def test_unpack_undoes_pack(bits, size, seed):
    codes = random_codes(size, bits, seed)
    back = unpack(jnp.asarray(packing.pack(codes, bits)), bits, (size,))
    np.testing.assert_array_equal(back, codes)
    assert back.dtype == (np.uint8 if bits <= 8 else np.uint16)


@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (2, 3, 11), (0, 4), (1, 1, 1)])
@pytest.mark.parametrize("bits", [0, 1, 3, 13])
def test_codes_are_in_row_major_order(shape, bits):
    codes = random_codes(int(np.prod(shape)), bits, seed=5).reshape(shape)
    words = packing.pack(codes, bits)
    assert words.tolist() == words_of(codes.ravel(), bits)
    back = unpack(words, bits, shape)
    np.testing.assert_array_equal(back, codes)


def test_strided_codes_are_packed_by_value():
    codes = random_codes(60, 5, seed=1).reshape(6, 10)
    assert packing.pack(codes.T, 5).tolist() == words_of(codes.T.ravel(), 5)
    assert packing.pack(codes[:, ::3], 5).tolist() == words_of(codes[:, ::3].ravel(), 5)


@pytest.mark.parametrize(("code", "bits"), [(1, 0), (2, 1), (8, 3), (256, 8)])
def test_a_code_that_needs_more_bits_is_refused(code, bits):
    with pytest.raises(ValueError, match=rf"wanted codes below {2**bits} \({bits} bits\); got {code}"):
        packing.pack(np.array([0, code], np.uint16), bits)


@pytest.mark.parametrize(("levels", "bits"), [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (256, 8), (257, 9), (65536, 16)])
def test_width(levels, bits):
    assert packing.width(levels) == bits
