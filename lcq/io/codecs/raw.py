"""Arrays as they are: little-endian, in C order."""

import numpy as np

from lcq.io.codecs.base import CODECS, Codec, Stream
from lcq.io.container import bytes_of, flat, view


@CODECS.register("raw")
class Raw(Codec):
    """Takes every array, and no time."""

    def encode(self, array: np.ndarray, codes: tuple[int, int] | None) -> np.ndarray:
        del codes  # packed codes stay packed
        return flat(array)

    def memory(self, stream: Stream, size: int) -> int:
        if size != bytes_of(stream.struct):
            raise ValueError(f"expected {bytes_of(stream.struct)} raw bytes, got {size}")
        return 0

    def decode(self, data: np.ndarray, stream: Stream, on_device: bool) -> np.ndarray:
        del on_device  # nothing has to be decoded
        return view(data, stream.struct)
