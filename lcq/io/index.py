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
A set of files (see `shard_files`) is coded, too. The file of the index has no `data`; its index says which files have
the streams, so many each, in the order of the index: {.., "shards": [[name, streams, bytes], ..]}.

Records are those of `records`. The plan, if there is one, is only text here. So is "metadata", strings by name from the
checkpoint that was compressed, if it had any: {.., "metadata": {name: string, ..}}.
"""

import heapq
import itertools
import reprlib
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

import jax
import numpy as np
from jaxtyping import Array

from lcq.forms import bitpack
from lcq.io.codecs.base import CODECS, Stream, decode
from lcq.io.container import (
    LONGEST_HEADER,
    SET,
    Container,
    Json,
    bytes_of,
    digest,
    parse,
    struct_of,
    to_json,
    view,
)
from lcq.io.former import current_metadata, current_stream

LONGEST_PLAN = 1 << 22
"""Bytes of the text of a plan, and of metadata."""

AT_ONCE = 2
"""Streams that are decoded beside each other."""

SHORT = 8
"""Bytes of a digest where every byte counts."""

_SAID = {"plan", "metadata"}
_METADATA = {"format", "version", "digest"}
_EXPANSION = 32  # bytes of memory, roughly, for a byte of parsed JSON
_SMALL_INDEX = 1 << 16  # bytes that any limit allows


class Contents(NamedTuple):
    """What a file says it holds; nothing of it is in memory yet but this.

    Attributes:
        version: The version of the format.
        records: The records of the leaves.
        plan: The text of the plan, if there is one.
        metadata: Strings by name.
        structs: The shapes and dtypes of the streams, by name.
        sizes: How many bytes each takes in the file.
        codecs: The names of the codecs that the streams are coded by.
        decoding: How many bytes of memory decoding a stream takes beside it, by name.
        bytes: How many bytes of memory all streams take, and decoding the `AT_ONCE` longest.
        shards: How many bytes the files that hold the streams of a set have, by name; none of a single file.
        on_disk: How many bytes all files have.
        read: Gives a stream, its digest verified; of codes in host memory, or decoded on the default device.
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
    shards: dict[str, int]
    on_disk: int
    read: Callable[[str, bool], Array | np.ndarray]


class Shard(NamedTuple):
    """A file of a set, as the index has it: its name, how many streams it holds, and their bytes."""

    name: str
    streams: int
    bytes: int


class Data(NamedTuple):
    """Where the bytes of so many streams are: in a file, behind its first `begin` bytes, `size` of them."""

    path: str
    begin: int
    size: int
    streams: int


OpenShard = Callable[[Shard, str], Data]
"""Finds a file of a set, whose header has this digest of its streams; raises ValueError if it is not there."""

_T = TypeVar("_T")

Said = dict[str, Json]
"""What a file says beside its leaves: "plan" and "metadata", as far as there are such."""


def contents_of(container: Container, size: int, limit: int, open_shard: OpenShard) -> Contents:
    """Reads and checks the index of a file of so many bytes, and of the files of its set what they are.

    Raises:
        ValueError: anything that is not as the module says.
    """
    container = container._replace(metadata=current_metadata(container.metadata))
    if "shard" in container.metadata:
        raise ValueError(
            "expected a file with an index, got a shard of a set; load the file without -00001-of-.. in its name"
        )
    if "coded" in container.metadata:
        return _coded(container, size, limit, open_shard)
    return _plain(container, size)


def _plain(container: Container, size: int) -> Contents:
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
    return Contents(version, records, plan, metadata, structs, sizes, raw, nothing, sum(sizes.values()), {}, size, read)


class _Entry(NamedTuple):
    """A stream of a coded file, in which data; `begin` counts from their start, `memory` is what decoding takes."""

    stream: Stream
    codec: str
    data: Data
    begin: int
    size: int
    digest: str
    memory: int


def _coded(container: Container, size: int, limit: int, open_shard: OpenShard) -> Contents:
    is_set = container.metadata["version"] == SET
    index = inflated(container, limit, {"index"} if is_set else {"index", "data"})
    match index:
        case {"leaves": [_, *_] as records, "streams": [*streams], **rest} if rest.keys() - _SAID == (
            {"shards"} if is_set else set()
        ):
            plan, metadata = _plan(index), _kept(index)
        case _:
            raise ValueError("expected an index of leaves and streams, got another")
    version = container.metadata["version"]
    streams = [current_stream(version, stream) for stream in streams]
    if is_set:
        files = _shards(index["shards"], streams, open_shard)
    else:
        tensor = container.tensors["data"]
        files = [Data(container.file.name, tensor.begin, tensor.size, len(streams))]
    entries, one_reads = _entries(streams, files), threading.Lock()

    def read(name: str, on_device: bool) -> Array | np.ndarray:
        entry = entries[name]
        data = np.empty(entry.size, np.uint8)
        if is_set:
            with open(entry.data.path, "rb") as file:
                _read_into(file, entry.data.begin + entry.begin, data)
        else:
            with one_reads:
                _read_into(container.file, entry.data.begin + entry.begin, data)
        return _verified(name, data, entry.digest, SHORT, lambda: decode(entry.codec, data, entry.stream, on_device))

    structs = {name: entry.stream.struct for name, entry in entries.items()}
    sizes = {name: entry.size for name, entry in entries.items()}
    codecs = {name: entry.codec for name, entry in entries.items()}
    decoding = {name: entry.memory for name, entry in entries.items()}
    memory = sum(map(bytes_of, structs.values())) + sum(heapq.nlargest(AT_ONCE, decoding.values()))
    shards = {Path(file.path).name: file.begin + file.size for file in files} if is_set else {}
    on_disk = size + sum(shards.values())
    return Contents(version, records, plan, metadata, structs, sizes, codecs, decoding, memory, shards, on_disk, read)


def _read_into(file: BinaryIO, begin: int, data: np.ndarray) -> None:
    file.seek(begin)
    file.readinto(data.data)  # type: ignore[attr-defined]


def _shards(written: Json, streams: list[Json], open_shard: OpenShard) -> list[Data]:
    """The files of a set, which are opened and found to be those that the index means."""
    files, first = [], 0
    match written:
        case [*shards] if all(_is_shard(shard) for shard in shards) and len({s[0] for s in shards}) == len(shards):
            pass
        case _:
            raise ValueError(f"expected shards with their streams and bytes, got {reprlib.repr(written)}")
    if sum(shard[1] for shard in shards) != len(streams):
        raise ValueError(f"expected shards for {len(streams)} streams, got {reprlib.repr(written)}")
    for name, count, size in shards:
        held = streams[first : first + count]
        files.append(open_shard(Shard(name, count, size), digest_of_shard(held)))
        first += count
    return files


def _is_shard(written: Json) -> bool:
    match written:
        case [str(_), count, size]:
            return type(count) is type(size) is int and count > 0 and size >= 0
    return False


def digest_of_shard(streams: list[Json]) -> str:
    """Of what the streams of a shard are, by their entries: it is in the name of the file, and in its header."""
    return digest(to_json([stream[2:4] for stream in streams if isinstance(stream, list)]).encode(), SHORT)


def _entries(streams: list[Json], files: list[Data]) -> dict[str, _Entry]:
    entries, left = dict[str, _Entry](), iter(streams)
    for data in files:
        begin = 0
        for stream in itertools.islice(left, data.streams):
            name, entry = _entry(stream, data, begin)
            if name in entries:
                raise ValueError(f"{name[:200]}: two streams have this name")
            entries[name], begin = entry, begin + entry.size
        if begin != data.size:
            raise ValueError(f"expected {begin} bytes of data; the file has {data.size}")
    return entries


def inflated(container: Container, limit: int, tensors: set[str]) -> Json:
    """The index of a coded file, within the memory that it may take."""
    structs = {name: tensor.struct.dtype for name, tensor in container.tensors.items()}
    wanted = dict.fromkeys(tensors, np.dtype(np.uint8))
    if container.metadata.keys() != _METADATA | {"coded"} or structs != wanted:
        raise ValueError(
            f"expected the metadata and tensors of a coded file, {' and '.join(sorted(tensors, reverse=True))}, "
            "got others"
        )
    raw = container.read("index")
    if digest(raw, SHORT) != container.metadata["coded"]:
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


def _entry(written: Json, data: Data, begin: int) -> tuple[str, _Entry]:
    match written:
        case [str(name), str(codec), size, str(stated), first, second] if type(size) is int and size >= 0:
            stream = _stream(first, second)
        case _:
            stream = None
    if stream is None:
        raise ValueError(f"expected a stream of the coded layout, got {reprlib.repr(written)}")
    try:
        return name, _Entry(stream, codec, data, begin, size, stated, CODECS[codec]().memory(stream, size))
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
