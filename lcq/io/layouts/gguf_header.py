"""The head of a GGUF file: metadata and where its tensors lie.

    "GGUF" | u32 3 | u64 tensors | u64 keys | a key, u32 type, value, each
    | a name, u32 axes, u64 lengths, u32 type, u64 offset, each

Strings are a u64 length and UTF-8. Lengths of axes are those of numpy in reverse. Zeros fill it up to a multiple of 32;
offsets count from there, and are multiples of 32, too.

Source: ggml/docs/gguf.md, version 3.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from typing_extensions import TypeAliasType

ALIGNMENT = 32
"""Bytes of which every offset is a multiple."""

TENSOR_TYPES = {"F32": 0, "F16": 1, "I8": 24, "I16": 25, "I32": 26, "I64": 27, "F64": 28, "BF16": 30}
"""Numbers of the types that are no blocks, by name."""

TENSOR_DTYPES = {
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (32, 16, 64)},
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    "BF16": np.dtype(jnp.bfloat16),
}
"""And what they are in numpy."""

Scalar = str | bool | int | float | np.generic
Value = TypeAliasType("Value", "Scalar | Sequence[Scalar] | np.ndarray")
"""What metadata hold. Numbers of numpy keep their type; an int of Python is uint32 if it fits, in a list
int32, a float is float32, each wider if it has to be."""

_NUMBERS = ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", None, None, "u8", "i8", "f8")
_CODES = {np.dtype(name): code for code, name in enumerate(_NUMBERS) if name is not None}
_STRING, _ARRAY = 8, 9


def gguf_header(metadata: Mapping[str, Value], tensors: Mapping[str, tuple[Sequence[int], int, int]]) -> bytes:
    """The file up to its first tensor.

    Args:
        metadata: by key.
        tensors: in their order in the file, of each its shape, the number of its type, and its bytes.

    Raises:
        ValueError: a value that is no string, number, or list of one kind of them; names the key.

    Example:
        >>> head = gguf_header({"general.alignment": 32}, {"w": ((2, 3), 0, 24)})
        >>> head[:4], len(head)
        (b'GGUF', 128)
    """
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts += [_string(key), _value(value)]
        except (ValueError, TypeError, OverflowError, StopIteration) as error:
            raise ValueError(f"{key}: expected a string, a number, or a list of either, got {value!r:.80}") from error
    offset = 0
    for name, (shape, kind, size) in tensors.items():
        axes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts += [_string(name), axes, struct.pack("<IQ", kind, offset)]
        offset += size + -size % ALIGNMENT
    head = b"".join(parts)
    return head + bytes(-len(head) % ALIGNMENT)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: object) -> bytes:
    """A type and a value."""
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if isinstance(value, list | tuple | np.ndarray):
        if all(isinstance(each, str) for each in value):
            return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))
        array = value if isinstance(value, np.ndarray) else _array(value)
        return struct.pack("<IIQ", _ARRAY, _CODES[array.dtype], array.size) + _little(array)
    number = value if isinstance(value, np.generic) else _scalar(value)
    return struct.pack("<I", _CODES[number.dtype]) + _little(np.asarray(number))


def _little(array: np.ndarray) -> bytes:
    return array.astype(array.dtype.newbyteorder("<")).tobytes()


def _array(values: Sequence[object]) -> np.ndarray:
    """Numbers of one kind in the first type that holds all."""
    if all(isinstance(value, bool | np.bool_) for value in values):
        return np.asarray(values, bool)
    if all(isinstance(value, int | np.integer) for value in values):
        return np.asarray(
            values, next(kind for kind in ("i4", "u4", "i8", "u8") if all(_fits(v, kind) for v in values))
        )
    if not all(isinstance(value, int | float | np.integer | np.floating) for value in values):
        raise ValueError
    return np.asarray(values, np.result_type(*map(_float, np.asarray(values, np.float64))))


def _scalar(value: object) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, int):
        return np.dtype(next(kind for kind in ("u4", "i4", "u8", "i8") if _fits(value, kind))).type(value)
    if isinstance(value, float):
        return _float(value)
    raise ValueError


def _fits(value: Any, kind: str) -> bool:
    return np.iinfo(kind).min <= value <= np.iinfo(kind).max


def _float(value: float) -> np.floating:
    """In float32, or in float64 what would overflow there, or vanish."""
    with np.errstate(over="ignore", under="ignore"):
        short = np.float32(value)
    return np.float64(value) if np.isinf(short) != np.isinf(value) or (value and not short) else short
