"""The safetensors container: a header of JSON with a digest, then tensors one after another.

    u64 n, little-endian | header: n bytes of JSON, padded by spaces to a multiple of 8 | the tensors, one after another

The header is that of safetensors,

    {"__metadata__": {..}, name: {"dtype": "U32", "shape": [3], "data_offsets": [0, 12]}, ..}

with strings of our own in its metadata, among them

    format    "lcq"
    version   "3"; "4" of a set of files (see `shard_files`); "1" and "2" are read too (see `former`)
    digest    of the header, with 32 zeros in the place of this digest

Digests are BLAKE2b in hexadecimal. They find damage, not forgery: whoever writes a file can write its digests, so what
reads one trusts nothing that it has not checked.
"""

import hashlib
import json
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from typing_extensions import TypeAliasType

from lcq.forms.validate import check_shape

DTYPES = {
    "BOOL": np.dtype(bool),
    **{f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)},
    **{f"F{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "C64": np.dtype(np.complex64),
}
"""Dtypes by their names in a safetensors header."""

Json = TypeAliasType("Json", Any)
"""What JSON can hold, as a file has it: nothing of it has been looked at."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""And the other way round."""

VERSION = "3"
"""Of a file that holds all of a tree."""

SET = "4"
"""Of the files of a set, see `shard_files`."""

VERSIONS = ("1", "2", VERSION, SET)
"""Of those that are read."""

LONGEST_HEADER = 100_000_000  # as in other readers of safetensors
_NO_DIGEST = "0" * 32


class Tensor(NamedTuple):
    """A tensor that a header declares: `begin` counts from the start of the file."""

    struct: jax.ShapeDtypeStruct
    begin: int
    size: int


class Container(NamedTuple):
    """An open file whose header has been checked."""

    file: BufferedReader
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    def read(self, name: str) -> np.ndarray:
        """The bytes of a tensor."""
        tensor = self.tensors[name]
        data = np.empty(tensor.size, np.uint8)
        self.file.seek(tensor.begin)
        if self.file.readinto(data.data) != tensor.size:
            raise ValueError(f"{name}: the file ends before its data does")
        return data


def header(
    metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray | int], version: str = VERSION, least: int = 0
) -> bytes:
    """The file up to its first tensor.

    Args:
        metadata: strings by name, beside those of every file.
        tensors: in their order in the file; a number stands for so many bytes.
        version: of the format.
        least: bytes that it takes, for a header that is written when its tensors are.

    Raises:
        ValueError: a header that is too long.
    """
    entries: dict[str, object] = {}
    begin = 0
    for name, tensor in tensors.items():
        if isinstance(tensor, int):
            dtype, shape, end = "U8", [tensor], begin + tensor
        else:
            dtype, shape, end = NAMES[tensor.dtype], list(tensor.shape), begin + tensor.nbytes
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        begin = end
    whole = {"format": "lcq", "version": version, **metadata, "digest": _NO_DIGEST}

    def text() -> bytes:
        raw = to_json({"__metadata__": whole} | entries).encode()
        return raw + b" " * max(-len(raw) % 8, least - 8 - len(raw))

    raw = text()
    if len(raw) > LONGEST_HEADER:
        raise ValueError(
            f"expected a header of at most {LONGEST_HEADER} bytes, got {len(raw)}; save fewer leaves a file"
        )
    whole["digest"] = digest(raw)
    raw = text()
    return struct.pack("<Q", len(raw)) + raw


def open_container(file: BufferedReader, size: int) -> Container:
    """Reads and checks the header of a file of so many bytes.

    Raises:
        ValueError: anything that is not as the module says.
    """
    first = file.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or not 2 <= length <= min(size - 8, LONGEST_HEADER):
        raise ValueError(f"not an lcq file, or cut short: a header of {length} bytes in a file of {size}")
    raw = file.read(length)
    entries = parse(raw.decode("utf-8"))
    match entries:
        case {"__metadata__": {"format": "lcq", "version": version}} if version not in VERSIONS:
            raise ValueError(
                f"expected format version {', '.join(VERSIONS)}, got {reprlib.repr(version)}; "
                "read it with the lcq that wrote it"
            )
        case {"__metadata__": {"format": "lcq", "version": _, "digest": str(stated)} as metadata}:
            pass
        case _:
            raise ValueError(
                "not an lcq file: its header does not name the format; lcq.io.read is for files of other programs"
            )
    if raw.count(stated.encode()) != 1 or digest(raw.replace(stated.encode(), _NO_DIGEST.encode())) != stated:
        raise ValueError("the header is damaged: its digest differs")
    start = 8 + length
    tensors = {name: _tensor(name, entry, start) for name, entry in entries.items() if name != "__metadata__"}
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].size)):
        if tensor.begin != end:
            raise ValueError(f"{name}: expected data at {end - start}, got {tensor.begin - start}")
        end += tensor.size
    if end != size:
        raise ValueError(f"expected {end} bytes; the file has {size}")
    return Container(file, metadata, tensors)


def _tensor(name: str, entry: object, start: int) -> Tensor:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [begin, end], **rest} if not rest:
            if all(type(n) is int for n in (begin, end)):
                struct = struct_of(dtype, shape)
                if struct is not None and 0 <= begin and bytes_of(struct) == end - begin:
                    return Tensor(struct, start + begin, end - begin)
    raise ValueError(
        f"{name[:200]}: expected a known dtype, a shape, and the offsets of as many bytes, got {reprlib.repr(entry)}"
    )


def struct_of(dtype: object, shape: list[Json]) -> jax.ShapeDtypeStruct | None:
    """What a dtype's name and a shape from a file declare; None if they declare nothing."""
    if dtype not in DTYPES or not all(type(n) is int for n in shape):
        return None
    check_shape(tuple(shape))
    return jax.ShapeDtypeStruct(tuple(shape), DTYPES[dtype])


def bytes_of(struct: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array."""
    return math.prod(struct.shape) * struct.dtype.itemsize


def view(data: np.ndarray, struct: jax.ShapeDtypeStruct) -> np.ndarray:
    """Bytes as the array that they are.

    Raises:
        ValueError: truth values that are none.
    """
    if struct.dtype == bool and data.max(initial=0) > 1:
        raise ValueError("expected truth values 0 and 1, got others")
    return data.view(struct.dtype).reshape(struct.shape)


def check_names(names: Iterable[str]) -> None:
    """Refuses the name under which a safetensors file keeps its text: with a tensor of that name no program opens it.

    Raises:
        ValueError: that name.
    """
    if "__metadata__" in names:
        raise ValueError(
            "__metadata__: expected another name, a safetensors file keeps its text there; rename the leaf"
        )


def flat(array: np.ndarray) -> np.ndarray:
    """The bytes of an array."""
    return array.reshape(-1).view(np.uint8)


def digest(data: Any, size: int = 16) -> str:
    """BLAKE2b of so many bytes, in hexadecimal."""
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def to_json(value: object) -> str:
    """JSON without spaces; no NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def read_object(path: Path) -> dict[str, Json]:
    """The object of JSON that a file of another program holds, which may have an infinity, or a key twice.

    Raises:
        ValueError: it holds something else.
    """
    try:
        found = json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected an object of JSON, got {type(found).__name__}")
    return found


def parse(text: str) -> Json:
    """JSON without NaN, and without keys that occur twice."""

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key occurs twice in its JSON")
        return dict(pairs)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} in its JSON")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
