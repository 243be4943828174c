"""The wire format of protocol buffers, as far as ONNX needs it: fields by number, numbers and bytes.

    field:  varint of number << 3 | kind, then of kind 0 a varint, 1: 8 bytes, 2: a varint of a length and the bytes,
            5: 4 bytes

Source: protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """A field of a message.

    Attributes:
        number: of the field.
        value: a whole number of kind 0, else the bytes.
        raw: the field as it stands in the message.
    """

    number: int
    value: int | memoryview
    raw: memoryview


def varint(number: int) -> bytes:
    """A whole number, seven bits a byte, those below first; negative ones as 64 bits.

    Example:
        >>> varint(300).hex()
        'ac02'
    """
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def field(number: int, value: int | str | bytes) -> bytes:
    """A field with a number, a text, or bytes.

    Example:
        >>> field(1, 150).hex(), field(2, "ab").hex()
        ('089601', '12026162')
    """
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return opened(number, len(data)) + data


def opened(number: int, size: int) -> bytes:
    """What stands before so many bytes of a field."""
    return varint(number << 3 | 2) + varint(size)


def fields(message: bytes | memoryview) -> Iterator[Field]:
    """The fields of a message, in order.

    Raises:
        ValueError: bytes that are no message.

    Example:
        >>> [(f.number, f.value) for f in fields(field(1, 150))]
        [(1, 150)]
    """
    view, at = memoryview(message), 0
    while at < len(view):
        begin = at
        key, at = read_varint(view, at)
        kind = key & 7
        if kind == 0:
            value, at = read_varint(view, at)
            yield Field(key >> 3, value, view[begin:at])
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"expected a field of kind 0, 1, 2 or 5, got {kind}: not a message, or damaged")
        size, at = read_varint(view, at) if kind == 2 else (8 if kind == 1 else 4, at)
        if at + size > len(view):
            raise ValueError(f"expected {size} bytes of field {key >> 3}, got {len(view) - at}: damaged")
        yield Field(key >> 3, view[at : at + size], view[begin : at + size])
        at += size


def read_varint(view: memoryview, at: int) -> tuple[int, int]:
    """A whole number of `varint`, and where it ends.

    Raises:
        ValueError: it does not.
    """
    number = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ValueError("expected a whole number, got the end of a message: damaged")
        number |= (view[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if view[at - 1] < 0x80:
            return number, at
