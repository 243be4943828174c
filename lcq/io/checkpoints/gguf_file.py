"""The GGUF container of llama.cpp: fields by name, and tensors in blocks of bytes, read where they lie.

    "GGUF" | u32 version | u64 tensors | u64 fields | fields | tensors' infos | padding to the alignment | data
    field   name | u32 kind | value         an array is  u32 kind of its elements | u64 how many | elements
    info    name | u32 axes | u64 lengths, the fastest first | u32 type | u64 where it begins, in the data
    name    u64 bytes | UTF-8

Little-endian. Whoever writes a file can write any number into it: every length is compared with the bytes that are left
before anything is made of it, tensors do not overlap, and lie inside the file.

Source: github.com/ggml-org/ggml, docs/gguf.md.
"""

import itertools
import math
import mmap
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from lcq.forms.validate import check_shape

ALIGNMENT = 32
"""Of data in a file that does not say another."""

VERSIONS = (2, 3)

NUMBERS = {0: "u1", 1: "i1", 2: "u2", 3: "i2", 4: "u4", 5: "i4", 6: "f4", 7: "?", 10: "u8", 11: "i8", 12: "f8"}
"""Kinds of numbers in fields, by what stands for them in a file, as numpy's."""

TEXT, ARRAY = 8, 9
"""The other kinds."""

_DEEPEST = 4
_LEAST_FIELD, _LEAST_INFO = 13, 24  # bytes of the shortest
_AXES = 4


class GgufField(NamedTuple):
    """A field's value, with its kind, and that of its elements if it is an array.

    Attributes:
        kind: in the file.
        value: a number of numpy, a string, or of an array an array of numpy or a list.
        element: kind of the elements of an array; None.
    """

    kind: int
    value: Any
    element: int | None = None


class GgufTensor(NamedTuple):
    """A tensor as it lies in the file.

    Attributes:
        shape: as numpy has it, (out, in) of a weight.
        type: number of its type.
        begin: byte of the file at which its data begin.
        data: bytes from there on, as many as follow before another tensor or the end.
    """

    shape: tuple[int, ...]
    type: int
    begin: int
    data: UInt8[np.ndarray, " bytes"]


class GgufFile(NamedTuple):
    """What a file holds: fields and tensors by name, in the order of the file."""

    fields: dict[str, GgufField]
    tensors: dict[str, GgufTensor]


def open_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Reads and checks the header of a file; data are mapped, and read when they are looked at.

    Raises:
        ValueError: a file that is not as the module says, or of another version; names file and what is wrong.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        mapped: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    try:
        return _parsed(np.frombuffer(mapped, np.uint8))
    except ValueError as error:
        raise ValueError(f"{path}: not a GGUF file, or damaged: {error}; get it again") from error


def _parsed(data: np.ndarray) -> GgufFile:
    cursor = _Cursor(data)
    if cursor.take(4).tobytes() != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, tensors, many = cursor.number("u4"), cursor.number("u8"), cursor.number("u8")
    if version not in VERSIONS:
        raise ValueError(f"expected version {' or '.join(map(str, VERSIONS))}, little-endian, got {version}")
    fields: dict[str, GgufField] = {}
    for _ in range(cursor.count(many, _LEAST_FIELD, "fields")):
        name = cursor.text()
        if name in fields:
            raise ValueError(f"{name!r:.200}: this field is there twice")
        fields[name] = cursor.field()
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(cursor.count(tensors, _LEAST_INFO, "tensors")):
        name, axes = cursor.text(), cursor.number("u4")
        if name in infos or axes > _AXES:
            raise ValueError(f"{name!r:.200}: expected a new tensor of at most {_AXES} axes, got {axes}")
        shape = tuple(int(n) for n in cursor.array("u8", axes)[::-1])
        check_shape(shape)
        infos[name] = (shape, cursor.number("u4"), cursor.number("u8"))
    alignment = fields.get("general.alignment", GgufField(4, ALIGNMENT)).value
    if not isinstance(alignment, int | np.integer) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment: expected a power of 2, got {alignment!r:.80}")
    start = min(-(-cursor.at // int(alignment)) * int(alignment), data.size)
    return GgufFile(fields, _placed(infos, data[start:], start, int(alignment)))


def _placed(
    infos: dict[str, tuple[tuple[int, ...], int, int]], data: np.ndarray, start: int, alignment: int
) -> dict[str, GgufTensor]:
    """Tensors with their bytes, each up to where the next begins."""
    filled = sorted(begin for shape, _, begin in infos.values() if math.prod(shape))
    ends = dict(itertools.pairwise([*filled, data.size]))
    if len(ends) < len(filled):
        raise ValueError("two tensors begin at the same place")
    placed = {}
    for name, (shape, kind, begin) in infos.items():
        if begin % alignment or begin > data.size:
            raise ValueError(
                f"{name!r:.200}: expected data that begin at a multiple of {alignment} up to {data.size}, got {begin}"
            )
        end = ends[begin] if math.prod(shape) else begin
        placed[name] = GgufTensor(shape, kind, start + begin, data[begin:end])
    return placed


class _Cursor:
    """Reads one thing after another, none that is not there."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> np.ndarray:
        if size > self.data.size - self.at:
            raise ValueError(f"expected {size} bytes at {self.at}, got {self.data.size - self.at}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> int:
        return int(self.array(kind, 1)[0])

    def array(self, kind: str, many: int) -> np.ndarray:
        dtype = np.dtype(kind).newbyteorder("<")
        return self.take(many * dtype.itemsize).view(dtype)

    def count(self, many: int, least: int, what: str) -> int:
        """A number of things of so many bytes at least, all of which are there."""
        if many * least > self.data.size - self.at:
            raise ValueError(f"expected {what} of {least} bytes each, got {many} in {self.data.size - self.at}")
        return many

    def text(self) -> str:
        return self.take(self.number("u8")).tobytes().decode("utf-8", "surrogateescape")

    def field(self) -> GgufField:
        kind = self.number("u4")
        if kind != ARRAY:
            return GgufField(kind, self._value(kind))
        element, many = self.number("u4"), self.number("u8")
        return GgufField(kind, self._values(element, many, 1), element)

    def _value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind not in NUMBERS:
            raise ValueError(f"expected a field of a kind up to 12, got {kind}")
        return self.array(NUMBERS[kind], 1)[0]

    def _values(self, kind: int, many: int, depth: int) -> Any:
        if kind in NUMBERS:
            return self.array(NUMBERS[kind], many).copy()
        if kind == TEXT:
            return [self.text() for _ in range(self.count(many, 8, "strings"))]
        if kind != ARRAY or depth == _DEEPEST:
            raise ValueError(f"expected an array of kinds up to 12, at most {_DEEPEST} deep, got {kind}")
        nested = range(self.count(many, 12, "arrays"))
        return [self._values(self.number("u4"), self.number("u8"), depth + 1) for _ in nested]


def as_text(field: GgufField) -> str | None:
    """A field as a string of a checkpoint's metadata; None of arrays, which are a tokenizer's.

    Example:
        >>> as_text(GgufField(6, np.float32(1e-5))), as_text(GgufField(7, np.bool_(True)))
        ('1e-05', 'true')
    """
    if field.kind == ARRAY:
        return None
    text = str(field.value).lower() if field.kind == 7 else str(field.value)
    return text.encode("utf-8", "replace").decode()
