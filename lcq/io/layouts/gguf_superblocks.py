"""Blocks of a GGUF file that hold smaller ones, each with a few bits of scale; Q4_K, Q5_K and Q6_K are written too.

    value[j] = d s_g level(code[j]) - dmin m_g,  g the group of weight j

    Q2_K   84 bytes for 256   16 scales and minima of 4 bits, 64 bytes of codes of 2 bits, d, dmin; groups of 16
    Q3_K   110                32 bytes of third bits, 64 of the low two, 16 scales of 6 bits, d; groups of 16
    Q4_K   144                d, dmin, 8 scales and minima of 6 bits, 128 bytes of codes of 4 bits; groups of 32
    Q5_K   176                as Q4_K, with 32 bytes of fifth bits before the codes
    Q6_K   210                128 bytes of the low four bits, 64 of the high two, 16 scales of 8 bits, d; groups of 16
    IQ4_NL 18 bytes for 32    as Q4_0, with 16 levels that are no grid
    IQ4_XS 136 bytes for 256  d, 8 scales of 6 bits, 128 bytes of codes; groups of 32, levels as IQ4_NL

Source: ggml-quants.c of llama.cpp.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Integer, UInt8

from lcq.io.layouts.gguf_blocks import Blocks

_UNEVEN = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclasses.dataclass(frozen=True)
class SuperBlockType:
    """A type of blocks of groups.

    Attributes:
        name: of the type.
        number: that stands for it in a file.
        length: weights of a block.
        size: bytes of a block.
        groups: of a block.
        levels: ascending.

    Example:
        >>> q6 = SUPERBLOCK_TYPES["Q6_K"]
        >>> q6.unpack(np.zeros((1, 210), np.uint8)).codes.shape
        (1, 16, 16)
    """

    name: str
    number: int
    length: int
    size: int
    groups: int
    levels: tuple[float, ...]

    def unpack(self, data: UInt8[np.ndarray, "*many size"]) -> Blocks:
        """Groups of blocks, (*many, groups, length of a group), from their bytes; scales and minima are float32."""
        many = data.shape[:-1]
        codes, scale, minimum = _UNPACK[self.name](data.reshape(-1, self.size))
        shape = (*many, self.groups)
        return Blocks(
            codes.astype(np.uint8).reshape(*shape, -1),
            scale.astype(np.float32).reshape(shape),
            None if minimum is None else minimum.astype(np.float32).reshape(shape),
        )

    def steps(
        self, data: UInt8[np.ndarray, "*many size"]
    ) -> tuple[UInt8[np.ndarray, "*many groups"], UInt8[np.ndarray, "*many groups"], Float[np.ndarray, "2 *many"]]:
        """s_g, m_g, and d and dmin, of blocks of Q4_K or Q5_K."""
        many = data.shape[:-1]
        scale, least = _six_bits(data[..., 4:16].reshape(-1, 12))
        units = np.ascontiguousarray(data[..., :4]).view("<f2")
        return scale.reshape(*many, -1), least.reshape(*many, -1), np.moveaxis(units, -1, 0)

    def pack(
        self,
        codes: UInt8[np.ndarray, "*many groups length"],
        scale: Integer[np.ndarray, "*many groups"],
        least: Integer[np.ndarray, "*many groups"] | None,
        units: Float[np.ndarray, "units *many"],
    ) -> UInt8[np.ndarray, "*many size"]:
        """The bytes of blocks of Q4_K, Q5_K or Q6_K.

        Args:
            codes: below the number of levels.
            scale: s_g, of 6 bits; of Q6_K from -128 to 127.
            least: m_g, of 6 bits; None of Q6_K.
            units: d, and dmin of types that have one, float16.
        """
        many = codes.shape[:-2]
        halves = np.ascontiguousarray(np.moveaxis(units, 0, -1), "<f2").reshape(-1, len(units)).view(np.uint8)
        if least is None:
            low, high = codes.reshape(-1, 2, 2, 64) & 15, codes.reshape(-1, 2, 4, 32) >> 4
            fours = (high << np.arange(0, 8, 2, dtype=np.uint8)[:, None]).sum(2, dtype=np.uint8)
            eights = np.ascontiguousarray(scale, np.int8).reshape(-1, self.groups).view(np.uint8)
            parts = [(low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128), fours.reshape(-1, 64), eights, halves]
            return np.concatenate(parts, axis=1).reshape(*many, self.size)
        scale, least = (a.astype(np.uint8).reshape(-1, 8) for a in (scale, least))
        codes = codes.reshape(-1, 4, 2, 32)
        parts = [halves, _six_bits_packed(scale, least), (codes[:, :, 0] & 15 | codes[:, :, 1] << 4).reshape(-1, 128)]
        if self.name == "Q5_K":
            parts.insert(2, np.packbits(codes.reshape(-1, 8, 32) >> 4, axis=1, bitorder="little")[:, 0])
        return np.concatenate(parts, axis=1).reshape(*many, self.size)

    def values(self, blocks: Blocks) -> Float[np.ndarray, "*many length"]:
        """The weights of groups in float32."""
        values = np.asarray(self.levels, np.float32)[blocks.codes] * blocks.scale[..., None]
        return values if blocks.minimum is None else values + blocks.minimum[..., None]


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _q2(data: np.ndarray) -> _Parts:
    nibbles, qs, d, least = _fields(data, 16, 64, 2, 2)
    return _shifted(qs, 32, 2) & 3, _half(d) * (nibbles & 15), -_half(least) * (nibbles >> 4)


def _q3(data: np.ndarray) -> _Parts:
    third, qs, packed, d = _fields(data, 32, 64, 12, 2)
    low, high = (_shifted(packed[:, :8], 8, 4) & 15).reshape(-1, 16), _shifted(packed[:, 8:], 4, 2) & 3
    scale = (low | high.reshape(-1, 16) << 4).astype(np.float32) - 32
    return (
        (_shifted(qs, 32, 2) & 3).reshape(-1, 256) | (_shifted(third, 32, 1) & 1).reshape(-1, 256) << 2,
        (_half(d) * scale),
        None,
    )


def _q4(data: np.ndarray) -> _Parts:
    d, least, packed, qs = _fields(data, 2, 2, 12, 128)
    scale, minimum = _six_bits(packed)
    return _shifted(qs, 32, 4) & 15, _half(d) * scale, -_half(least) * minimum


def _q5(data: np.ndarray) -> _Parts:
    d, least, packed, fifth, qs = _fields(data, 2, 2, 12, 32, 128)
    scale, minimum = _six_bits(packed)
    codes = (_shifted(qs, 32, 4) & 15).reshape(-1, 256) | (_shifted(fifth, 32, 1) & 1).reshape(-1, 256) << 4
    return codes, _half(d) * scale, -_half(least) * minimum


def _q6(data: np.ndarray) -> _Parts:
    low, high, scale, d = _fields(data, 128, 64, 16, 2)
    codes = (_shifted(low, 64, 4) & 15).reshape(-1, 256) | (_shifted(high, 32, 2) & 3).reshape(-1, 256) << 4
    return codes, _half(d) * np.ascontiguousarray(scale).view(np.int8), None


def _iq4_nl(data: np.ndarray) -> _Parts:
    d, qs = _fields(data, 2, 16)
    return _shifted(qs, 16, 4) & 15, _half(d), None


def _iq4_xs(data: np.ndarray) -> _Parts:
    d, high, low, qs = _fields(data, 2, 2, 4, 128)
    top = np.ascontiguousarray(high).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scale = _pairs(low) | top.astype(np.uint8) << 4
    return _shifted(qs, 16, 4) & 15, _half(d) * (scale.astype(np.float32) - 32), None


_UNPACK = {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6, "IQ4_NL": _iq4_nl, "IQ4_XS": _iq4_xs}


def _whole(low: int, high: int) -> tuple[float, ...]:
    return tuple(map(float, range(low, high + 1)))


SUPERBLOCK_TYPES = {
    made.name: made
    for made in (
        SuperBlockType("Q2_K", 10, 256, 84, 16, _whole(0, 3)),
        SuperBlockType("Q3_K", 11, 256, 110, 16, _whole(-4, 3)),
        SuperBlockType("Q4_K", 12, 256, 144, 8, _whole(0, 15)),
        SuperBlockType("Q5_K", 13, 256, 176, 8, _whole(0, 31)),
        SuperBlockType("Q6_K", 14, 256, 210, 16, _whole(-32, 31)),
        SuperBlockType("IQ4_NL", 20, 32, 18, 1, tuple(map(float, _UNEVEN))),
        SuperBlockType("IQ4_XS", 23, 256, 136, 8, tuple(map(float, _UNEVEN))),
    )
}
"""Types of blocks of groups by name."""


def _fields(data: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(data, np.cumsum(sizes)[:-1], axis=1)


def _half(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _shifted(data: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Each run of bytes once for every field of so many bits in a byte, the lowest first; upper bits are left in."""
    return data.reshape(len(data), -1, 1, run) >> np.arange(0, 8, bits, dtype=np.uint8)[:, None]


def _pairs(data: np.ndarray) -> np.ndarray:
    """Both halves of each byte, the low one first."""
    return np.stack([data & 15, data >> 4], axis=-1).reshape(len(data), -1)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight scales and eight minima of 6 bits from 12 bytes."""
    a, b, c = np.split(packed, 3, axis=1)
    scale = np.concatenate([a & 63, (c & 15) | (a >> 2 & 48)], axis=1)
    return scale, np.concatenate([b & 63, c >> 4 | (b >> 2 & 48)], axis=1)


def _six_bits_packed(scale: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The 12 bytes of eight scales and eight minima."""
    (first, last), (low, high) = (np.split(a, 2, axis=1) for a in (scale, least))
    return np.concatenate([first | last >> 4 << 6, low | high >> 4 << 6, last & 15 | (high & 15) << 4], axis=1)
