"""Blocks of a GGUF file: codes of neighbouring weights of a row, and what scales them, in a few bytes.

    value[j] = scale level(code[j]) + minimum

Codes count levels from the lowest, as `lcq.forms.Codes` does. Scales and minima are float16; an MXFP4 block has a power
of two. A scale may be negative.

    Q4_0   18 bytes for 32   d, then byte j = code j | code j+16 << 4; levels -8 .. 7
    Q4_1   20                d, m, then as Q4_0; 0 .. 15
    Q5_0   22                d, the fifth bits as uint32 (bit j of code j), the low four as Q4_0; -16 .. 15
    Q5_1   24                d, m, then as Q5_0; 0 .. 31
    Q8_0   34                d, 32 int8; -128 .. 127
    MXFP4  17                e, then as Q4_0, codes of e2m1 times 2^(e - 127)
    TQ1_0  54 bytes for 256  48 + 4 bytes of five and four digits of base 3, d; -1, 0, 1
    TQ2_0  66                64 bytes, in each half of 128 byte j = codes j, j+32, j+64, j+96 at 2 bits, d; -1 .. 2

Source: ggml-quants.c of llama.cpp, by way of the package gguf 0.19.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8


class Blocks(NamedTuple):
    """Blocks of one type, apart.

    Attributes:
        codes: below the number of the type's levels.
        scale: float16, or float32 powers of two of MXFP4.
        minimum: float16; None of types that have none.
    """

    codes: UInt8[np.ndarray, "*many length"]
    scale: Float[np.ndarray, "*many"]
    minimum: Float[np.ndarray, "*many"] | None = None


@dataclasses.dataclass(frozen=True)
class BlockType:
    """A type of blocks.

    Attributes:
        name: of the type.
        number: that stands for it in a file.
        length: weights of a block.
        size: bytes of a block.
        levels: ascending.
        minimum: whether blocks have one.

    Example:
        >>> q8 = BLOCK_TYPES["Q8_0"]
        >>> packed = q8.pack(Blocks(np.full((1, 32), 130, np.uint8), np.ones(1, np.float16)))
        >>> packed.shape, packed[0, :3].tolist(), q8.unpack(packed).codes[0, :2].tolist()
        ((1, 34), [0, 60, 2], [130, 130])
    """

    name: str
    number: int
    length: int
    size: int
    levels: tuple[float, ...]
    minimum: bool = False

    def pack(self, blocks: Blocks) -> UInt8[np.ndarray, "*many size"]:
        """The bytes of blocks.

        Raises:
            ValueError: codes that are not below the number of levels, a minimum that the type does not have, or of
                MXFP4 a scale that is no power of two from 2^-127 to 2^127.
        """
        codes = blocks.codes
        if codes.shape[-1] != self.length or int(codes.max(initial=0)) >= len(self.levels):
            raise ValueError(
                f"{self.name}: expected blocks of {self.length} codes below {len(self.levels)}, "
                f"got {codes.shape[-1]} up to {codes.max(initial=0)}"
            )
        if (blocks.minimum is not None) != self.minimum:
            raise ValueError(f"{self.name}: expected {'a' if self.minimum else 'no'} minimum for each block")
        numbers = [_halves(a) for a in (blocks.scale, blocks.minimum) if a is not None] if self.name != "MXFP4" else []
        match self.name:
            case "Q4_0" | "Q4_1":
                parts = [*numbers, _nibbles(codes)]
            case "Q5_0" | "Q5_1":
                parts = [*numbers, np.packbits(codes >> 4, axis=-1, bitorder="little"), _nibbles(codes & 15)]
            case "Q8_0":
                parts = [*numbers, codes ^ np.uint8(128)]
            case "MXFP4":
                parts = [_exponents(blocks.scale)[..., None], _nibbles(_E2M1[codes])]
            case "TQ1_0":
                parts = [*(_digits(codes[..., at : at + n * k], n, k) for at, n, k in _DIGITS), *numbers]
            case _:
                parts = [_quarters(codes), *numbers]
        return np.concatenate(parts, axis=-1)

    def unpack(self, data: UInt8[np.ndarray, "*many size"]) -> Blocks:
        """Blocks from their bytes; a code that e2m1 has for -0 becomes that for 0."""
        many, length = data.shape[:-1], self.length
        low = data[..., -16:] if length == 32 else data
        nibbles = np.stack([low & 15, low >> 4], axis=-2).reshape(*many, -1)
        match self.name:
            case "Q4_0" | "Q4_1":
                codes = nibbles
            case "Q5_0" | "Q5_1":
                high = np.unpackbits(data[..., -20:-16], axis=-1, bitorder="little")
                codes = nibbles | high << 4
            case "Q8_0":
                codes = data[..., 2:] ^ np.uint8(128)
            case "MXFP4":
                codes = _FROM_E2M1[nibbles]
                return Blocks(codes, np.ldexp(np.float32(1), data[..., 0].astype(np.int32) - 127))
            case "TQ1_0":
                starts = np.cumsum([0, *(n for _, n, _ in _DIGITS)])
                fields = zip(starts, _DIGITS, strict=False)
                codes = np.concatenate([_from_digits(data[..., i : i + n], k) for i, (_, n, k) in fields], axis=-1)
            case _:
                codes = (data[..., :64].reshape(*many, 2, 1, 32) >> _QUARTERS[:, None] & 3).reshape(*many, 256)
        if length == 256:
            return Blocks(codes, _numbers(data[..., -2:]))
        return Blocks(codes, _numbers(data[..., :2]), _numbers(data[..., 2:4]) if self.minimum else None)

    def values(self, blocks: Blocks) -> Float[np.ndarray, "*many length"]:
        """The weights of blocks in float32."""
        values = np.asarray(self.levels, np.float32)[blocks.codes] * blocks.scale.astype(np.float32)[..., None]
        return values if blocks.minimum is None else values + blocks.minimum.astype(np.float32)[..., None]


def _whole(low: int, high: int) -> tuple[float, ...]:
    return tuple(map(float, range(low, high + 1)))


_POSITIVE = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_E2M1 = np.array([15, 14, 13, 12, 11, 10, 9, *range(8)], np.uint8)  # bit patterns of levels in ascending order
_FROM_E2M1 = np.array([*range(7, 15), 7, *range(6, -1, -1)], np.uint8)
_QUARTERS = np.array([0, 2, 4, 6], np.uint8)
_POWERS = np.array([1, 3, 9, 27, 81], np.uint8)
_DIGITS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))  # first code, bytes, digits of a byte

BLOCK_TYPES = {
    made.name: made
    for made in (
        BlockType("Q4_0", 2, 32, 18, _whole(-8, 7)),
        BlockType("Q4_1", 3, 32, 20, _whole(0, 15), minimum=True),
        BlockType("Q5_0", 6, 32, 22, _whole(-16, 15)),
        BlockType("Q5_1", 7, 32, 24, _whole(0, 31), minimum=True),
        BlockType("Q8_0", 8, 32, 34, _whole(-128, 127)),
        BlockType("TQ1_0", 34, 256, 54, _whole(-1, 1)),
        BlockType("TQ2_0", 35, 256, 66, _whole(-1, 2)),
        BlockType("MXFP4", 39, 32, 17, (*(-v for v in reversed(_POSITIVE)), 0.0, *_POSITIVE)),
    )
}
"""Types of blocks by name."""


def _halves(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers, "<f2")[..., None].view(np.uint8)


def _numbers(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")[..., 0]


def _nibbles(codes: np.ndarray) -> np.ndarray:
    return codes[..., :16] | codes[..., 16:] << 4


def _quarters(codes: np.ndarray) -> np.ndarray:
    apart = codes.reshape(*codes.shape[:-1], 2, 4, 32)
    joined = apart[..., 0, :] | apart[..., 1, :] << 2 | apart[..., 2, :] << 4 | apart[..., 3, :] << 6
    return joined.reshape(*codes.shape[:-1], 64)


def _digits(codes: np.ndarray, count: int, digits: int) -> np.ndarray:
    """Bytes of so many digits of base 3, v = sum_i t_i 3^(4 - i), kept as ceil(256 v / 243)."""
    apart = codes.reshape(*codes.shape[:-1], digits, count).astype(np.uint16)
    whole = (apart * _POWERS[::-1][:digits, None].astype(np.uint16)).sum(axis=-2, dtype=np.uint16)
    return ((whole * np.uint16(256) + np.uint16(242)) // np.uint16(243)).astype(np.uint8)


def _from_digits(data: np.ndarray, digits: int) -> np.ndarray:
    """Digit i is the whole part of 3 (3^i byte mod 256) / 256."""
    shifted = (data[..., None, :] * _POWERS[:digits, None]).astype(np.uint16)
    return (shifted * 3 >> 8).astype(np.uint8).reshape(*data.shape[:-1], -1)


def _exponents(scale: np.ndarray) -> np.ndarray:
    """e of the scales 2^(e - 127)."""
    mantissa, exponent = np.frexp(scale.astype(np.float32))
    if not ((mantissa == 0.5) & (exponent >= -126) & (exponent <= 128)).all():
        raise ValueError("MXFP4: expected scales that are powers of two from 2^-127 to 2^127, got others")
    return (exponent + 126).astype(np.uint8)
