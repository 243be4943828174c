"""`Codec`: arrays -> the bytes that a coded file holds for them, and back."""

import abc
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lcq.forms.registry import Registry


class Stream(NamedTuple):
    """What a file says of an array beside its bytes.

    Attributes:
        struct: its shape and dtype.
        codes: of packed codes (`lcq.forms.bitpack`), among how many levels, and how many codes; None of other arrays.
    """

    struct: jax.ShapeDtypeStruct
    codes: tuple[int, int] | None = None


class Codec(abc.ABC):
    """Arrays <-> bytes, without loss; equal arrays give equal bytes.

    A subclass is registered in `CODECS` by the name that files hold. It has no state: settings that decoding needs are
    part of the bytes. `save(codecs=)` names those to try, `load` finds a stream's codec by its name.

    Bytes may come from anyone. The file checks their digest and the shape and dtype of what `decode` returns, and keeps
    to the limit of `load` by what `memory` says, before it calls `decode`.

    Example:
        >>> import math, tempfile, zlib, lcq
        >>> @CODECS.register("deflate")
        ... class Deflate(Codec):
        ...     def encode(self, array, codes):
        ...         return np.frombuffer(zlib.compress(array.tobytes()), np.uint8)
        ...     def memory(self, stream, size):
        ...         return size
        ...     def decode(self, data, stream, on_device):
        ...         size = math.prod(stream.struct.shape) * stream.struct.dtype.itemsize
        ...         inflate = zlib.decompressobj()
        ...         try:
        ...             raw = inflate.decompress(data, size)
        ...         except zlib.error as error:
        ...             raise ValueError(str(error)) from error
        ...         if len(raw) != size:
        ...             raise ValueError(f"expected {size} bytes, got {len(raw)}")
        ...         return np.frombuffer(raw, stream.struct.dtype).reshape(stream.struct.shape)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = lcq.save(f"{folder}/net.lcq", {"w": np.zeros(1000)}, codecs=["rans", "deflate"])
        ...     size < 1000, lcq.load(f"{folder}/net.lcq")["w"].shape
        (True, (1000,))
        >>> CODECS.unregister("deflate")
    """

    @abc.abstractmethod
    def encode(self, array: np.ndarray, codes: tuple[int, int] | None) -> np.ndarray | None:
        """The bytes of an array, a uint8 array; None if this codec does not take such arrays.

        Args:
            array: in this host's memory, of any shape, in C order.
            codes: as in `Stream`.
        """

    @abc.abstractmethod
    def memory(self, stream: Stream, size: int) -> int:
        """Bytes of memory that decoding takes beside the array; at once, whatever the stream declares.

        Args:
            stream: what is to be decoded.
            size: of its bytes in the file.

        Raises:
            ValueError: no stream of so many bytes is such an array.
        """

    @abc.abstractmethod
    def decode(self, data: np.ndarray, stream: Stream, on_device: bool) -> jax.Array | np.ndarray:
        """The array, whose bytes in the file are `data`, a uint8 array.

        Args:
            data: as many bytes as `memory` was told.
            stream: what is to be decoded.
            on_device: whether it should be decoded on JAX's default device and stay there, if this codec can do that.

        Raises:
            ValueError: bytes that are no such array; no other error.
        """


CODECS: Registry[type[Codec]] = Registry("codecs", "import the package that registers it; a newer lcq may know it")
"""Every codec by its name in files."""


def encode(array: np.ndarray, codes: tuple[int, int] | None, names: Sequence[str]) -> tuple[str, np.ndarray]:
    """Of the named codecs that take an array the one of fewest bytes, the first of equals, or raw; and its bytes."""
    for tried in (names, ("raw",)):
        found = [
            (name, _bytes(name, data)) for name in tried if (data := CODECS[name]().encode(array, codes)) is not None
        ]
        if found:
            return min(found, key=lambda pair: pair[1].size)
    raise AssertionError("raw takes every array")


def _bytes(name: str, data: object) -> np.ndarray:
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
        raise ValueError(
            f"expected encode of codec {name!r} to return a uint8 array of one axis, or None, got "
            f"{type(data).__name__}; np.frombuffer(data, np.uint8) makes one of bytes"
        )
    return data


def decode(name: str, data: np.ndarray, stream: Stream, on_device: bool) -> jax.Array | np.ndarray:
    """The array of a stream.

    Raises:
        ValueError: as the codec does, or it gives another array than the file declares.
    """
    array = CODECS[name]().decode(data, stream, on_device)
    if (array.shape, array.dtype) != (stream.struct.shape, stream.struct.dtype):
        raise ValueError(
            f"expected {stream.struct.dtype}{list(stream.struct.shape)} of codec {name!r}, "
            f"got {array.dtype}{list(array.shape)}"
        )
    return array
