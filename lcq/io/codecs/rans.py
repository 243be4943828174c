"""Packed codes at about their joint entropy: `lcq.io.entropy_coding.rans`."""

import jax
import numpy as np

from lcq.forms import bitpack
from lcq.io.codecs.base import CODECS, Codec, Stream
from lcq.io.entropy_coding import rans

_BYTES = 4  # of memory for a code, and for a byte of its stream


@CODECS.register("rans")
class Rans(Codec):
    """Takes packed codes alone; decodes them on a device as well, where lanes run side by side."""

    def encode(self, array: np.ndarray, codes: tuple[int, int] | None) -> np.ndarray | None:
        if codes is None:
            return None
        levels, count = codes
        return np.frombuffer(rans.encode(bitpack.unpack_host(array, bitpack.width(levels), count), levels), np.uint8)

    def memory(self, stream: Stream, size: int) -> int:
        _, count = _codes(stream)
        return _BYTES * (count + size)

    def decode(self, data: np.ndarray, stream: Stream, on_device: bool) -> np.ndarray | jax.Array:
        levels, count = _codes(stream)
        if on_device:
            return bitpack.pack_on_device(rans.decode_on_device(data, count, levels), bitpack.width(levels))
        return bitpack.pack(rans.decode(data, count, levels), bitpack.width(levels))


def _codes(stream: Stream) -> tuple[int, int]:
    if stream.codes is None:
        raise ValueError(f"expected packed codes for rans, got {stream.struct.dtype}{list(stream.struct.shape)}")
    return stream.codes
