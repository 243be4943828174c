"""Layouts of other programs: bytes written out by hand, oracles bit by bit, and back."""

import numpy as np
import pytest

from lcq.io.layouts import BLOCK_TYPES, Blocks, pack_rows, unpack_rows

RNG = np.random.default_rng(0)


def stream(row, bits):
    """int32 words of a row of codes, bit by bit."""
    whole = sum(int(code) << bits * i for i, code in enumerate(row))
    words = [whole >> 32 * i & 0xFFFFFFFF for i in range(-(-len(row) * bits // 32))]
    return np.array(words, np.uint32).view(np.int32)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 11])
@pytest.mark.parametrize("n", [1, 10, 32, 33, 96])
def test_rows_are_one_bit_stream_each(bits, n):
    codes = RNG.integers(0, 1 << bits, (5, n)).astype(np.uint8 if bits <= 8 else np.uint16)
    words = pack_rows(codes, bits)
    assert words.dtype == np.int32
    np.testing.assert_array_equal(words, [stream(row, bits) for row in codes])
    np.testing.assert_array_equal(unpack_rows(words, bits, n), codes)


def test_what_rows_refuse():
    with pytest.raises(ValueError, match=r"expected codes below 4 \(2 bits\), got 4"):
        pack_rows(np.uint8([[4]]), 2)
    with pytest.raises(ValueError, match="expected rows of 2 words for 11 codes of 3, got 1"):
        unpack_rows(np.zeros((2, 1), np.int32), 3, 11)


def some(name, many=(3, 2)):
    kind = BLOCK_TYPES[name]
    codes = RNG.integers(0, len(kind.levels), (*many, kind.length)).astype(np.uint8)
    if name == "MXFP4":
        return kind, Blocks(codes, np.exp2(RNG.integers(-127, 128, many)).astype(np.float32))
    scale, minimum = RNG.normal(size=(2, *many)).astype(np.float16)
    return kind, Blocks(codes, scale, minimum if kind.minimum else None)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_come_back(name):
    kind, blocks = some(name)
    data = kind.pack(blocks)
    assert data.dtype == np.uint8 and data.shape == (3, 2, kind.size)
    for new, old in zip(kind.unpack(data), blocks, strict=True):
        np.testing.assert_array_equal(new, old)
    again = kind.pack(kind.unpack(data))
    np.testing.assert_array_equal(again, data)


def decoded(name, block):
    """The weights of one block of bytes, a weight at a time, as ggml's C has it."""
    data = [int(b) for b in block]
    half = lambda at: float(block[at : at + 2].view(np.float16)[0])  # noqa: E731
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    out = []
    for j in range(BLOCK_TYPES[name].length):
        nibble = lambda start: data[start + j % 16] >> 4 * (j // 16) & 15  # noqa: B023, E731
        if name == "Q4_0":
            out.append(half(0) * (nibble(2) - 8))
        elif name == "Q4_1":
            out.append(half(0) * nibble(4) + half(2))
        elif name in ("Q5_0", "Q5_1"):
            at = 2 if name == "Q5_0" else 4
            fifth = int.from_bytes(bytes(data[at : at + 4]), "little") >> j & 1
            code = nibble(at + 4) | fifth << 4
            out.append(half(0) * (code - 16) if name == "Q5_0" else half(0) * code + half(2))
        elif name == "Q8_0":
            out.append(half(0) * int(np.int8(block[2 + j : 3 + j].view(np.int8)[0])))
        elif name == "MXFP4":
            code = nibble(1)
            out.append((-1) ** (code >> 3) * e2m1[code & 7] * 2.0 ** (data[0] - 127))
        elif name == "TQ2_0":
            part, place = divmod(j, 128)
            out.append(half(64) * ((data[32 * part + place % 32] >> 2 * (place // 32) & 3) - 1))
        else:
            first, start, count = [s for s in ((0, 0, 32), (160, 32, 16), (240, 48, 4)) if s[0] <= j][-1]
            digit, place = divmod(j - first, count)
            out.append(half(52) * ((data[start + place] * 3**digit % 256 * 3 >> 8) - 1))
    return np.array(out)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_blocks_mean_what_ggml_reads(name):
    kind, blocks = some(name)
    data, values = kind.pack(blocks), kind.values(blocks)
    for at in np.ndindex(3, 2):
        np.testing.assert_allclose(values[at], decoded(name, data[at]), rtol=1e-6, atol=1e-7 * np.abs(values[at]).max())


def test_every_fourth_of_three_digits_is_told_apart():
    """ceil(256 v / 243) loses none of the 243 numbers of five digits."""
    kind = BLOCK_TYPES["TQ1_0"]
    codes = RNG.integers(0, 3, (200, 256)).astype(np.uint8)
    np.testing.assert_array_equal(kind.unpack(kind.pack(Blocks(codes, np.ones(200, np.float16)))).codes, codes)


def test_what_blocks_refuse():
    kind, blocks = some("TQ1_0")
    with pytest.raises(ValueError, match="TQ1_0: expected blocks of 256 codes below 3, got 256 up to 3"):
        kind.pack(blocks._replace(codes=blocks.codes + 1))
    with pytest.raises(ValueError, match="TQ1_0: expected no minimum"):
        kind.pack(blocks._replace(minimum=blocks.scale))
    mx, blocks = some("MXFP4")
    with pytest.raises(ValueError, match="MXFP4: expected scales that are powers of two"):
        mx.pack(blocks._replace(scale=blocks.scale * 3))
