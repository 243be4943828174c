"""How the streams of a tree lie in a file: a tensor each, or coded, all in one.

Plain: every stream is a tensor of its own, for other readers of safetensors; in the metadata

    index     JSON {"leaves": [record, ..], "digests": {name: digest}, "plan": TOML}

Coded: two tensors of bytes, as a header entry costs more than many a stream; in the metadata

    coded     the digest of `index`

and the tensors are

    index     JSON {"leaves": [record, ..], "streams": [stream, ..], "plan": TOML}, deflated (RFC 1951)
    data      the bytes of the streams, in the order of the index

where a stream names the codec that its bytes are of (see `codecs`), and is one of

    [name, codec, bytes, digest, levels, count]     `count` packed codes (see `bitpack`), each below `levels`
    [name, codec, bytes, digest, dtype, shape]      any other array

A stream's digest is that of its bytes in the file: 16 bytes in the plain layout, 8 in the coded one.
Records are those of `records`. The plan, if there is one, is only text here. So is "metadata", strings by name from the
checkpoint that was compressed, if it had any: {.., "metadata": {name: string, ..}}.
"""

import reprlib
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from lcq.forms import bitpack
from lcq.io.codecs.base import CODECS, Stream, decode, encode
from lcq.io.container import (
    LONGEST_HEADER,
    NAMES,
    Container,
    Json,
    bytes_of,
    digest,
    flat,
    header,
    parse,
    struct_of,
    to_json,
    view,
)
from lcq.io.former import current_metadata, current_stream
from lcq.io.records import Encoder

LONGEST_PLAN = 1 << 22
"""Bytes of the text of a plan, and of metadata."""

_SAID = {"plan", "metadata"}
_METADATA = {"format", "version", "digest"}
_SHORT = 8  # bytes of a digest where every byte counts
_EXPANSION = 32  # bytes of memory, roughly, for a byte of parsed JSON
_SMALL_INDEX = 1 << 16  # bytes that any limit allows


class Contents(NamedTuple):
    """What a file says it holds; nothing of it is in memory yet but this.

    Attributes:
        version: of the format.
        records: of the leaves.
        plan: its text, if there is one.
        metadata: strings by name.
        structs: shapes and dtypes of the streams, by name.
        sizes: bytes that each takes in the file.
        codecs: names of those that the streams are coded by.
        decoding: bytes of memory that decoding a stream takes beside it, by name.
        bytes: of memory for all streams, and for decoding the longest.
        read: gives a stream, its digest verified; of codes in host memory, or decoded on the default device.
    """

    version: str
    records: list[Json]
    plan: str | None
    metadata: dict[str, str]
    structs: dict[str, jax.ShapeDtypeStruct]
    sizes: dict[str, int]
    codecs: dict[str, str]
    decoding: dict[str, int]
    bytes: int
    read: Callable[[str, bool], Array | np.ndarray]


_T = TypeVar("_T")

Said = dict[str, Json]
"""What a file says beside its leaves: "plan" and "metadata", as far as there are such."""

Progress = Callable[[int, int, str], None] | None
"""Called after each stream with its number from 1, how many there are, and its name."""


def plain_layout(records: list[Json], encoder: Encoder, said: Said) -> list[Any]:
    """A file with a tensor for each stream, in pieces."""
    streams = dict(sorted(encoder.streams.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all aligned
    digests = {name: digest(flat(array)) for name, array in streams.items()}
    index = to_json({"leaves": records, "digests": digests} | said)
    return [header({"index": index}, streams), *(flat(array).data for array in streams.values())]


def coded_layout(
    records: list[Json], encoder: Encoder, said: Said, codecs: Sequence[str], progress: Progress = None
) -> list[Any]:
    """A file with all streams in one block, each by the codec of these that makes it shortest; in pieces."""
    entries, pieces = [], []
    for number, (name, array) in enumerate(encoder.streams.items(), 1):
        codes = encoder.codes.get(name)
        codec, piece = encode(array, codes, codecs)
        what = codes or (NAMES[array.dtype], [*array.shape])
        entries.append([name, codec, piece.size, digest(piece, _SHORT), *what])
        pieces.append(piece)
        if progress is not None:
            progress(number, len(encoder.streams), name)
    deflate = zlib.compressobj(9, wbits=-15)
    index = deflate.compress(to_json({"leaves": records, "streams": entries} | said).encode()) + deflate.flush()
    tensors = {"index": len(index), "data": sum(map(len, pieces))}
    return [header({"coded": digest(index, _SHORT)}, tensors), index, *pieces]


def contents_of(container: Container, limit: int) -> Contents:
    """Reads and checks the index of a file.

    Raises:
        ValueError: anything that is not as the module says.
    """
    container = container._replace(metadata=current_metadata(container.metadata))
    return (_coded if "coded" in container.metadata else _plain)(container, limit)


def _plain(container: Container, limit: int) -> Contents:
    del limit  # the index is in the header, and its bytes in the file
    if container.metadata.keys() != _METADATA | {"index"} or not isinstance(container.metadata["index"], str):
        raise ValueError(f"expected the metadata of a plain or a coded file, got {reprlib.repr(container.metadata)}")
    index = parse(container.metadata["index"])
    match index:
        case {"leaves": [_, *_] as records, "digests": dict(digests), **rest} if rest.keys() <= _SAID:
            plan, metadata = _plan(index), _kept(index)
        case _:
            raise ValueError("expected an index of leaves and digests, got another")
    tensors = container.tensors
    if odd := digests.keys() ^ tensors.keys():
        raise ValueError(f"{min(odd)}: expected as many digests as tensors; this has only one of them")

    def read(name: str, on_device: bool) -> np.ndarray:
        del on_device  # nothing has to be decoded
        data = container.read(name)
        return _verified(name, data, digests[name], 16, lambda: view(data, tensors[name].struct))

    structs = {name: tensor.struct for name, tensor in tensors.items()}
    sizes = {name: tensor.size for name, tensor in tensors.items()}
    raw, nothing = dict.fromkeys(structs, "raw"), dict.fromkeys(structs, 0)
    version = container.metadata["version"]
    return Contents(version, records, plan, metadata, structs, sizes, raw, nothing, sum(sizes.values()), read)


class _Entry(NamedTuple):
    """A stream of a coded file; `begin` counts from the start of the file, `memory` is what decoding takes."""

    stream: Stream
    codec: str
    begin: int
    size: int
    digest: str
    memory: int


def _coded(container: Container, limit: int) -> Contents:
    index = _inflated(container, limit)
    match index:
        case {"leaves": [_, *_] as records, "streams": [*streams], **rest} if rest.keys() <= _SAID:
            plan, metadata = _plan(index), _kept(index)
        case _:
            raise ValueError("expected an index of leaves and streams, got another")
    entries, version = dict[str, _Entry](), container.metadata["version"]
    begin = container.tensors["data"].begin
    for stream in streams:
        name, entry = _entry(current_stream(version, stream), begin)
        if name in entries:
            raise ValueError(f"{name[:200]}: two streams have this name")
        entries[name], begin = entry, begin + entry.size
    start = container.tensors["data"].begin
    if begin - start != container.tensors["data"].size:
        raise ValueError(f"expected {begin - start} bytes of data; the file has {container.tensors['data'].size}")

    def read(name: str, on_device: bool) -> Array | np.ndarray:
        entry = entries[name]
        data = np.empty(entry.size, np.uint8)
        container.file.seek(entry.begin)
        container.file.readinto(data.data)
        return _verified(name, data, entry.digest, _SHORT, lambda: decode(entry.codec, data, entry.stream, on_device))

    structs = {name: entry.stream.struct for name, entry in entries.items()}
    sizes = {name: entry.size for name, entry in entries.items()}
    codecs = {name: entry.codec for name, entry in entries.items()}
    decoding = {name: entry.memory for name, entry in entries.items()}
    memory = sum(map(bytes_of, structs.values())) + max(decoding.values(), default=0)
    return Contents(version, records, plan, metadata, structs, sizes, codecs, decoding, memory, read)


def _inflated(container: Container, limit: int) -> Json:
    """The index of a coded file, within the memory that it may take."""
    structs = {name: tensor.struct.dtype for name, tensor in container.tensors.items()}
    wanted = dict.fromkeys(("index", "data"), np.dtype(np.uint8))
    if container.metadata.keys() != _METADATA | {"coded"} or structs != wanted:
        raise ValueError("expected the metadata and tensors of a coded file, index and data, got others")
    raw = container.read("index")
    if digest(raw, _SHORT) != container.metadata["coded"]:
        raise ValueError("index: its data is damaged: the digest differs")
    most = min(LONGEST_HEADER, max(limit // _EXPANSION, _SMALL_INDEX))
    inflate = zlib.decompressobj(wbits=-15)
    try:
        text = inflate.decompress(raw.data, most + 1)
    except zlib.error as error:
        raise ValueError(f"index: {error}") from error
    if len(text) > most:
        raise ValueError(f"expected an index of at most {most} bytes, got more; raise limit= if you trust the file")
    if not inflate.eof or inflate.unused_data:
        raise ValueError("index: expected one whole deflated text, got another")
    return parse(text.decode("utf-8"))


def _entry(written: Json, begin: int) -> tuple[str, _Entry]:
    match written:
        case [str(name), str(codec), size, str(stated), first, second] if type(size) is int and size >= 0:
            stream = _stream(first, second)
        case _:
            stream = None
    if stream is None:
        raise ValueError(f"expected a stream of the coded layout, got {reprlib.repr(written)}")
    try:
        return name, _Entry(stream, codec, begin, size, stated, CODECS[codec]().memory(stream, size))
    except ValueError as error:
        raise ValueError(f"{name[:200]}: {error}") from error


def _stream(first: Json, second: Json) -> Stream | None:
    """What levels and count, or a dtype and a shape, of a file declare; None if they declare nothing."""
    if type(first) is type(second) is int and 2 <= first <= 65536 and 0 <= second < 1 << 48:
        words = bitpack.word_count(second, bitpack.width(first))
        return Stream(jax.ShapeDtypeStruct((words,), np.uint32), (first, second))
    if not isinstance(first, str) or not isinstance(second, list):
        return None
    struct = struct_of(first, second)
    return None if struct is None else Stream(struct)


def _verified(name: str, data: np.ndarray, stated: str, size: int, made: Callable[[], _T]) -> _T:
    if digest(data, size) != stated:
        raise ValueError(f"{name}: its data is damaged: the digest differs")
    try:
        return made()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _plan(index: dict[str, Json]) -> str | None:
    plan = index.get("plan")
    if "plan" in index and not isinstance(plan, str):
        raise ValueError(f"expected a plan that is text, got {reprlib.repr(plan)}")
    if plan is not None:
        check_plan(plan)
    return plan


def _kept(index: dict[str, Json]) -> dict[str, str]:
    metadata = index.get("metadata", {})
    check_metadata(metadata)
    return metadata


def check_metadata(metadata: object) -> None:
    """Raises ValueError unless metadata are strings by name, and not too long."""
    if not isinstance(metadata, dict) or not all(type(s) is str for pair in metadata.items() for s in pair):
        raise ValueError(f"expected metadata= a dict of strings by name, got {reprlib.repr(metadata)}")
    if (size := len(to_json(metadata))) > LONGEST_PLAN:
        raise ValueError(f"expected metadata of at most {LONGEST_PLAN} bytes, got {size}; keep them in a file beside")


def check_plan(text: str) -> None:
    """Raises ValueError if the text of a plan is too long."""
    if (size := len(text.encode())) > LONGEST_PLAN:
        raise ValueError(f"expected a plan of at most {LONGEST_PLAN} bytes, got {size}; patterns can say more in fewer")
