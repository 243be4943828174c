"""Safetensors checkpoints: one file, or several, the shards, with an index that says which tensor is in which.

A folder as Hugging Face's libraries write it holds

    model.safetensors                                            or
    model.safetensors.index.json   {"metadata": {..}, "weight_map": {name: file, ..}}   and the files that it names

and other files that are none of our business. The index, its folder, or the one file may be given. Nothing is taken
from a set of shards that is not whole: every tensor is in the index once, and in the file that this names, and nowhere
else. Strings that the files' headers hold as metadata are kept; those on which shards differ are not.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from lcq.io.container import DTYPES, parse
from lcq.io.mapped import MappedArray

INDEX = ".safetensors.index.json"
"""How the name of an index ends."""

_PART = re.compile(r"-\d+-of-(\d+)\.safetensors$")
_SEVERAL = 4  # names that an error lists


class Tensors(NamedTuple):
    """Arrays by name, in the order of the file or of the index, and the metadata of the headers."""

    arrays: dict[str, np.ndarray] | dict[str, MappedArray]
    metadata: dict[str, str]


def is_sharded(path: Path) -> bool:
    """Whether this is an index, or a folder with safetensors files or an index."""
    if path.is_dir():
        return any(path.glob(f"*{INDEX}")) or any(path.glob("*.safetensors"))
    return path.name.endswith(INDEX)


def read_tensors(path: Path, lazy: bool = False) -> Tensors:
    """All tensors of a file, of an index, or of a folder with one of either.

    Args:
        path: of it.
        lazy: whether only the headers are read, and the arrays are `MappedArray`s.

    Raises:
        ValueError: none or several in the folder; an index that is none; files that are missing or damaged; tensors
            that are missing, or there more than once. Names file and tensor, and what to do.
    """
    if path.is_dir():
        path = _in_folder(path)
    read = _map_file if lazy else _read_file
    return _read_shards(path, read) if path.name.endswith(INDEX) else read(path)


def _in_folder(folder: Path) -> Path:
    """The one index, or the one file, of a folder."""
    indices, files = (sorted(folder.glob(pattern)) for pattern in (f"*{INDEX}", "*.safetensors"))
    found = indices or files
    if not indices and any(int(part[1]) > 1 for file in files if (part := _PART.search(file.name))):
        raise ValueError(
            f"{folder}: expected an index *{INDEX} beside shards, got {len(files)} files as {files[0].name} and none; "
            "get the whole checkpoint, or name the one file you mean"
        )
    if len(found) != 1:
        names = ", ".join(each.name for each in found[:_SEVERAL])
        why = "" if indices else f" and no *{INDEX}"
        raise ValueError(
            f"{folder}: expected one checkpoint, got {len(found)} files, {names}{why}; name the one you mean"
        )
    return found[0]


def _read_shards(path: Path, read: Callable[[Path], Tensors]) -> Tensors:
    where = _weight_map(path)
    shards = list(dict.fromkeys(where.values()))
    if gone := [name for name in shards if not (path.parent / name).is_file()]:
        raise ValueError(
            f"{path}: expected {len(shards)} shards beside the index; {len(gone)} are missing, "
            f"{', '.join(gone[:_SEVERAL])}; get the whole checkpoint"
        )
    parts = {name: read(path.parent / name) for name in shards}
    for name, part in parts.items():
        for tensor in part.arrays:
            if where.get(tensor) != name:
                wanted = f"in {where[tensor]}" if tensor in where else "nowhere"
                raise ValueError(
                    f"{path.parent / name}: {tensor}: the index has this tensor {wanted}, this file has it too; "
                    "remove what is left of another checkpoint, or get the whole one again"
                )
    if lost := [tensor for tensor, name in where.items() if tensor not in parts[name].arrays]:
        raise ValueError(
            f"{path}: {lost[0]}: expected this tensor in {where[lost[0]]}, which does not have it "
            f"({len(lost)} of {len(where)} are missing); get the whole checkpoint again"
        )
    arrays: Any = {tensor: parts[name].arrays[tensor] for tensor, name in where.items()}
    said = [item for part in parts.values() for item in part.metadata.items()]
    agreed = {key: value for key, value in said if all(v == value for k, v in said if k == key)}
    return Tensors(arrays, agreed)


def _weight_map(path: Path) -> dict[str, str]:
    """Which tensor is in which file, by the index."""
    try:
        index = parse(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not an index of shards: {error}") from error
    match index:
        case {"weight_map": dict(where)} if where and all(type(name) is str for name in where.values()):
            pass
        case _:
            raise ValueError(f"{path}: expected an index with a weight_map of tensors to files, got another")
    for name in where.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: expected names of .safetensors files beside the index, got {name!r:.200}")
    return where


def _read_file(path: Path) -> Tensors:
    data = path.read_bytes()
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}; get it again") from error
    arrays = {}
    for name, entry in tensors:
        if entry["dtype"] not in DTYPES:
            raise ValueError(_unknown_dtype(path, name, entry["dtype"]))
        arrays[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return Tensors(arrays, _checked(path, data[8 : 8 + int.from_bytes(data[:8], "little")])[1])


def _map_file(path: Path) -> Tensors:
    """The tensors of a file whose header alone is read, as the library checks it."""
    try:
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}; get it again") from error
    with open(path, "rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header, metadata = _checked(path, raw.read(length))
    arrays = {}
    for name, entry in header.items():
        if entry["dtype"] not in DTYPES:
            raise ValueError(_unknown_dtype(path, name, entry["dtype"]))
        start = 8 + length + entry["data_offsets"][0]
        arrays[name] = MappedArray(path, tuple(entry["shape"]), DTYPES[entry["dtype"]], start)
    return Tensors(arrays, metadata)


def _unknown_dtype(path: Path, name: str, dtype: str) -> str:
    return f"{path}: {name}: expected one of {', '.join(DTYPES)}, got {dtype}; convert this tensor first"


def _checked(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors that a header names, and its strings."""
    try:
        header: Any = parse(raw.decode())
    except ValueError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}; get it again") from error
    metadata = dict(header.pop("__metadata__", None) or {})
    if metadata.get("format") == "lcq":
        raise ValueError(
            f"{path}: expected tensors of another program, got an .lcq file; lcq.load and lcq.save are for .lcq files"
        )
    return header, metadata
