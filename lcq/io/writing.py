"""Coded files, and sets of them, written a leaf at a time: by one process, or by several that share the leaves.

A leaf is packed and coded while the next one is made, so that two are in memory, and what the index will say of all.
The streams of a single file go to a temporary one first, since the index stands before them.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from lcq.forms.processes import exchange
from lcq.io.atomic import replacing
from lcq.io.container import Json
from lcq.io.host import gathered, stored
from lcq.io.index import Said
from lcq.io.shard_files import HEADER, ShardWriter, Written, remove_shards, shards_of
from lcq.io.streams import CodedLeaves, coded_head
from lcq.io.tree_paths import Leaf

_LARGE = 1 << 16  # numbers of a leaf from which a thread of its own pays
_SPOOL = 1 << 24  # bytes of streams that are kept in memory before they go to a temporary file


class Job(NamedTuple):
    """What is to be written, and by whom.

    Attributes:
        path: of the file, or of the index of a set.
        leaves: one after another, in the order of the tree; all processes take them all.
        mine: which of them this process writes.
        together: whether processes share the leaves, so that none may leave before all have come to the end.
        said: what the index says beside leaves.
        codecs: names of those to try.
        told: called after each leaf with its number from 0 and the names of its streams.
    """

    path: str
    leaves: Iterable[Leaf]
    mine: Sequence[bool]
    together: bool
    said: Said
    codecs: Sequence[str]
    told: Callable[[int, list[str]], None]


def write_file(job: Job) -> int:
    """Writes one file, of several processes the first, and gives its size."""
    first, coder, size = jax.process_index() == 0, CodedLeaves(job.codecs), 0
    with contextlib.ExitStack() as stack:
        spool = None
        if first:
            folder = os.path.dirname(os.path.realpath(job.path))
            spool = stack.enter_context(tempfile.SpooledTemporaryFile(_SPOOL, dir=folder))
        with _failures(job.together) as failures:
            _encode(job, coder, failures, lambda _, piece: spool and spool.write(piece.data))
            if coder.records and not failures:
                head = coded_head([record for _, record in coder.records], coder.entries, job.said)
                size = len(head) + sum(entry[2] for entry in coder.entries)
                if spool is not None:
                    with replacing(job.path) as file:
                        file.write(head)
                        spool.seek(0)
                        shutil.copyfileobj(spool, file, 1 << 20)
    return max(part["size"] for part in _meet(job.together, failures, {"size": size}))


def write_set(job: Job, most: int, before: set[str]) -> int:
    """Writes a set of files of at most so many bytes each, and gives their size.

    Args:
        job: what is to be written.
        most: bytes of a file.
        before: names of the shards that the set has which is replaced.
    """
    coder, shards = CodedLeaves(job.codecs), ShardWriter(job.path, most)
    mine: list[str] = []
    try:
        with _failures(job.together) as failures:
            _encode(job, coder, failures, shards.put)
            shards.close()
        part = {"records": coder.records, "entries": coder.entries, "shards": shards.written}
        parts = _meet(job.together, failures, part)
        all_shards = shards_of(job.path, [Written(*shard) for part in parts for shard in part["shards"]])
        here = jax.process_index() if job.together else 0
        start = sum(len(part["shards"]) for part in parts[:here])
        mine = [shard.name for shard in all_shards[start : start + len(shards.written)]]
        with _failures(job.together) as failures:
            shards.finish(mine)
        _meet(job.together, failures, {})
        records = [record for _, record in sorted((pair for part in parts for pair in part["records"]), key=_number)]
        head = coded_head(records, [entry for part in parts for entry in part["entries"]], job.said, all_shards)
        with _failures(job.together) as failures:
            if jax.process_index() == 0:
                with replacing(job.path) as file:
                    file.write(head)
        _meet(job.together, failures, {})
    except BaseException:
        shards.abandon()
        remove_shards(job.path, set(mine) - before)
        raise
    return len(head) + sum(HEADER + shard.bytes for shard in all_shards)


def _number(pair: tuple[int, Json]) -> int:
    return pair[0]


def _encode(job: Job, coder: CodedLeaves, failures: list[Exception], put: Callable[[Json, np.ndarray], object]) -> None:
    """Codes the leaves that are this process's; goes on to the end where others wait at the leaves that are theirs."""

    def write(number: int, leaf: Leaf) -> tuple[int, list[str]]:
        pieces = coder.encode(number, stored(leaf))
        for entry, piece in pieces:
            put(entry, piece)
        return number, [entry[0] for entry, _ in pieces]

    with ThreadPoolExecutor(1) as worker:
        waiting: list[Future[tuple[int, list[str]]]] = []

        def settle() -> None:
            with _failures(job.together, failures):
                while waiting:
                    job.told(*waiting.pop().result())

        for number, (leaf, mine) in enumerate(zip(job.leaves, job.mine, strict=True)):
            held = gathered(leaf)
            if not mine or failures:
                continue
            settle()
            if _size(held.value) >= _LARGE:
                waiting.append(worker.submit(write, number, held))
                continue
            with _failures(job.together, failures):
                job.told(*write(number, held))
        settle()


def _size(value: PyTree) -> int:
    return sum(getattr(array, "size", 1) for array in jax.tree.leaves(value))


@contextlib.contextmanager
def _failures(together: bool, found: list[Exception] | None = None) -> Iterator[list[Exception]]:
    """Keeps what a process fails of for `_meet`, if others are to hear of it; else lets it go its way."""
    failures = [] if found is None else found
    try:
        yield failures
    except (ValueError, OSError) as error:
        if not together:
            raise
        failures.append(error)


def _meet(together: bool, failures: list[Exception], part: dict[str, Json]) -> list[dict[str, Json]]:
    """What all processes have to tell, once all have come here; raises in all of them if one has failed.

    Raises:
        ValueError: names the process that failed, and of what; there its own error.
    """
    if not together:
        return [part]
    parts = [json.loads(text) for text in exchange(json.dumps(part | {"error": [*map(str, failures)][:1]}))]
    if failures:
        raise failures[0]
    for number, each in enumerate(parts):
        if each["error"]:
            raise ValueError(f"process {number} could not write its part, so nothing was saved: {each['error'][0]}")
    return parts
