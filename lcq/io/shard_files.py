"""A set of files: one holds the index, others, the shards, the streams.

    net.lcq                                     the index; this name is given to `load`
    net-00001-of-00002-9f86d081884c7d65.lcq     streams, one after another, in a tensor `data`
    net-00002-of-00002-60303ae22b998861.lcq

A shard's name ends in a digest of its streams, which is in its header too, as `shard`. So a set that takes the place of
another writes over none of its files: the new shards are there before the index is replaced, which makes them the set,
and those of the old one that no longer belong to it go after that.
"""

import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from lcq.io.atomic import sync_folder, temporary_beside
from lcq.io.container import SET, Json, header, open_container
from lcq.io.index import Data, Shard, digest_of_shard, inflated

HEADER = 320
"""Bytes of a shard before its streams; they are written when the streams are."""

_NAME = re.compile(r"(?s).+-\d{5}-of-\d{5}-[0-9a-f]{16}\.lcq")
_MOST = 99_999


class Written(NamedTuple):
    """A shard that has not its name yet: the digest of its streams, how many there are, and their bytes."""

    digest: str
    streams: int
    bytes: int


class ShardWriter:
    """Streams -> files of at most so many bytes, beside the file of the index; under names of nobody until `finish`.

    Args:
        path: of the index.
        most: bytes of a file; a stream that is longer has one for itself.
    """

    def __init__(self, path: str | os.PathLike[str], most: int) -> None:
        self._target, self._most = os.path.realpath(path), most
        self._file: BinaryIO | None = None
        self._entries: list[Json] = []
        self._temporary: list[str] = []
        self.written: list[Written] = []

    def put(self, entry: Json, piece: np.ndarray) -> None:
        """Takes the next stream, its entry in the index and its bytes."""
        if self._file is not None and self._file.tell() + piece.size > self._most:
            self.close()
        if self._file is None:
            self._temporary.append(temporary_beside(self._target))
            self._file = open(self._temporary[-1], "xb")
            self._file.write(bytes(HEADER))
        self._file.write(piece.data)
        self._entries.append(entry)

    def close(self) -> None:
        """Ends the file that is being written, if there is one."""
        if self._file is None:
            return
        with self._file as file:
            size, digest = file.tell() - HEADER, digest_of_shard(self._entries)
            file.seek(0)
            file.write(header({"shard": digest}, {"data": size}, SET, HEADER))
            file.flush()
            os.fsync(file.fileno())
        self.written.append(Written(digest, len(self._entries), size))
        self._file, self._entries = None, []

    def finish(self, names: list[str]) -> None:
        """Gives the files their names."""
        folder = os.path.dirname(self._target)
        for temporary, name in zip(self._temporary, names, strict=True):
            os.replace(temporary, os.path.join(folder, name))
        self._temporary = []
        if names:
            sync_folder(folder)

    def abandon(self) -> None:
        """Removes what has no name yet."""
        if self._file is not None:
            self._file.close()
        for temporary in self._temporary:
            Path(temporary).unlink(missing_ok=True)


def shards_of(path: str | os.PathLike[str], written: list[Written]) -> list[Shard]:
    """The files of a set by their names, in order.

    Raises:
        ValueError: too many.
    """
    many, stem = len(written), Path(os.path.realpath(path)).stem
    if many > _MOST:
        raise ValueError(f"expected at most {_MOST:,} shards, got {many:,}; raise max_shard_bytes=")
    return [
        Shard(f"{stem}-{i:05}-of-{many:05}-{shard.digest}.lcq", shard.streams, shard.bytes)
        for i, shard in enumerate(written, 1)
    ]


def open_shard(index: str | os.PathLike[str], shard: Shard, stated: str) -> Data:
    """Where the streams of a shard are, whose file is beside that of the index.

    Raises:
        ValueError: it is not there, or is another file; names it.
    """
    if Path(shard.name).name != shard.name or not _NAME.fullmatch(shard.name):
        raise ValueError(f"expected the name of a shard beside the index, got {shard.name!r:.200}")
    path = os.path.join(os.path.dirname(os.path.realpath(index)), shard.name)
    try:
        with open(path, "rb") as file:
            held = open_container(file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError as error:
        raise ValueError(f"{shard.name}: this shard is missing; get all files of the set") from error
    except ValueError as error:
        raise ValueError(f"{shard.name}: {error}") from error
    data = held.tensors.get("data")
    if len(held.tensors) != 1 or data is None or data.size != shard.bytes or held.metadata.get("shard") != stated:
        raise ValueError(f"{shard.name}: expected the streams that the index names, got others; get the set again")
    return Data(path, data.begin, data.size, shard.streams)


def shard_names(index: str | os.PathLike[str]) -> set[str]:
    """The names of the shards that an index has, if there is one."""
    try:
        with open(index, "rb") as file:
            held = open_container(file, os.fstat(file.fileno()).st_size)
            if held.metadata["version"] != SET:
                return set()
            return {str(shard[0]) for shard in inflated(held, 1 << 40, {"index"})["shards"]}
    except (ValueError, OSError, KeyError, TypeError, IndexError):
        return set()  # whatever is there, it is no set that could have been loaded


def remove_shards(index: str | os.PathLike[str], names: set[str]) -> None:
    """Removes those files of a set that has been replaced which `shards_of` this index can have named."""
    target, ending = Path(os.path.realpath(index)), len("-00001-of-00002-9f86d081884c7d65.lcq")
    for name in names:
        if _NAME.fullmatch(name) and Path(name).name == name and name[:-ending] == target.stem:
            (target.parent / name).unlink(missing_ok=True)
