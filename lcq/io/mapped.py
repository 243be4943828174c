"""Arrays in files that are read when they are asked for, a slice at a time."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np


class MappedArray:
    """An array in a file, of which what is asked for is read: `array[2]` a slice, `np.asarray(array)` all of it.

    The file is mapped for each slice, and what was asked for copied, so that no part of it counts as this process's
    memory afterwards. `lcq.quantize` takes such leaves, a layer at a time; for anything else make them arrays:
    jax.tree.map(np.asarray, tree). A file that was written again in the meantime holds other numbers, or these at
    another place, and is refused.

    Attributes:
        path: Of the file, absolute.
        shape: Of the array.
        dtype: Of the array.
        offset: Byte at which it begins.

    Raises:
        ValueError: the file has changed since this was made.
        OSError: it is not there, or cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.arange(6, dtype=np.int32).tofile(f"{folder}/numbers")
        ...     array = MappedArray(f"{folder}/numbers", (3, 2), np.int32)
        ...     array[1:], np.asarray(array[0])
        (array([[2, 3],
               [4, 5]], dtype=int32), array([0, 1], dtype=int32))
    """

    def __init__(self, path: str | Path, shape: tuple[int, ...], dtype: Any, offset: int = 0) -> None:
        self.path, self.shape, self.dtype, self.offset = Path(path).absolute(), tuple(shape), np.dtype(dtype), offset
        self._state = _state(os.stat(path))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        if not self.size:
            return np.empty(self.shape, self.dtype)[index]
        with open(self.path, "rb") as file:
            if _state(os.fstat(file.fileno())) != self._state:
                raise ValueError(f"{self.path}: this file has changed since its arrays were read lazily; read it again")
            mapped = np.memmap(file, np.uint8, "r", self.offset, (self.nbytes,))
        return np.array(mapped.view(np.ndarray).view(self.dtype).reshape(self.shape)[index])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError(f"{self.path}: expected to copy what is read from a file, got copy=False; leave it out")
        return self[()].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"MappedArray({self.path.name!r}, {self.dtype}{list(self.shape)})"


def _state(found: os.stat_result) -> tuple[int, int]:
    """What is another when a file is replaced or written to."""
    return found.st_size, found.st_mtime_ns
