"""Parameters of other tools, in and out: .safetensors, .npz, and folders of orbax.

The first two hold a flat list of named arrays. Names are split at "/", and only there, into nested dicts:
"dense0/kernel" becomes {"dense0": {"kernel": ..}}, while "layers.0.weight" stays one key. So a rule's pattern is
matched against the name as it is in the file, and what is read is written under the same names.
"""

import importlib.util
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from lcq.artifact.container import DTYPES
from lcq.artifact.file import host_array, replacing
from lcq.artifact.paths import Leaf, flatten, is_empty, nest
from lcq.base import is_form
from lcq.dtypes import native

_DAMAGED = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def read(path: str | os.PathLike[str]) -> Any:
    """Nested dicts of numpy arrays from a .safetensors or .npz file, or a folder that orbax wrote.

    Lists of an orbax checkpoint stay lists, and tuples become lists.

    Raises:
        ValueError: another kind of file, a damaged one, or arrays of a dtype without a name in numpy.
        FileNotFoundError: there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    kind = "orbax" if path.is_dir() else path.suffix
    return _reader(path, kind, {".safetensors": _read_safetensors, ".npz": _read_npz, "orbax": _read_orbax})(path)


def write(path: str | os.PathLike[str], tree: Any) -> None:
    """Writes a tree of arrays as the kind its name says: .safetensors, .npz, or a new orbax folder if it has no suffix.

    Files appear whole or not at all, and replace what was there; an orbax folder must be new.

    Raises:
        ValueError: another kind, a form (call `lcq.decompress` first), a leaf that is no array, a dtype that the kind
            cannot hold, or, in a file, None or an empty container; names the leaf.
    """
    path = Path(path)
    writers = {".safetensors": _write_safetensors, ".npz": _write_npz, "": _write_orbax}
    writer = _reader(path, path.suffix, writers)
    leaves = [_to_host(leaf) for leaf in flatten(tree)[0]]
    if path.suffix and any(is_empty(leaf) for leaf in leaves):
        bad = next(leaf for leaf in leaves if is_empty(leaf))
        raise ValueError(
            f"{bad.path}: wanted an array; got {bad.value!r}, which {path.suffix} cannot hold; leave it out"
        )
    writer(path, leaves)


def _reader(path: Path, kind: str, known: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if kind not in known:
        hint = "; lcq.load and lcq.save are for .lcq files" if kind == ".lcq" else ""
        raise ValueError(f"{path}: wanted a .safetensors or .npz file, or an orbax folder without suffix{hint}")
    return known[kind]


def _to_host(leaf: Leaf) -> Leaf:
    if is_form(leaf.value):
        raise ValueError(f"{leaf.path}: wanted an array; got {type(leaf.value).__name__}; call lcq.decompress first")
    return leaf if is_empty(leaf) else leaf._replace(value=host_array(leaf.path, leaf.value))


def _nested(path: Path, arrays: dict[str, np.ndarray]) -> Any:
    leaves = [Leaf(tuple(name.split("/")), "d" * (name.count("/") + 1), array) for name, array in arrays.items()]
    try:
        return nest(leaves)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> Any:
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged: {error}") from error
    arrays = {}
    for name, entry in tensors:
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{path}: {name}: wanted one of {', '.join(DTYPES)}; got {entry['dtype']}")
        arrays[name] = np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return _nested(path, arrays)


def _write_safetensors(path: Path, leaves: list[Leaf]) -> None:
    data = safetensors.numpy.save({leaf.path: leaf.value for leaf in leaves})
    with replacing(path) as file:
        file.write(data)


def _read_npz(path: Path) -> Any:
    arrays = {}
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                for name in archive.files:
                    arrays[name] = native(archive[name])
        except _DAMAGED as error:
            raise ValueError(f"{path}: not an npz file of numbers, or damaged: {error}") from error
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            hint = "; npz drops the names of dtypes such as bfloat16" if array.dtype.kind == "V" else ""
            raise ValueError(f"{path}: {name}: wanted numbers; got {array.dtype}{hint}")
    return _nested(path, arrays)


def _write_npz(path: Path, leaves: list[Leaf]) -> None:
    for leaf in leaves:
        if leaf.value.dtype.type.__module__ != "numpy":
            raise ValueError(f"{leaf.path}: npz cannot hold {leaf.value.dtype}; write .safetensors instead")
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # np.savez cannot name an array "file"
        for leaf in leaves:
            with archive.open(f"{leaf.path}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, leaf.value, allow_pickle=False)


def _orbax(path: Path) -> Any:
    if any(importlib.util.find_spec(name) is None for name in ("orbax", "orbax.checkpoint")):
        raise ValueError(f"{path}: a folder needs orbax; pip install orbax-checkpoint, or use .safetensors")
    import orbax.checkpoint

    return orbax.checkpoint


def _read_orbax(path: Path) -> Any:
    ocp = _orbax(path)
    if not (path / "_METADATA").exists():
        inside = sorted(
            str(found.parent.relative_to(path)) for depth in ("*", "*/*") for found in path.glob(f"{depth}/_METADATA")
        )
        raise ValueError(f"{path}: no orbax checkpoint of a tree; those inside: {', '.join(inside[:8]) or 'none'}")
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        return checkpointer.restore(path.absolute(), restore_args=as_numpy)


def _write_orbax(path: Path, leaves: list[Leaf]) -> None:
    ocp = _orbax(path)
    if path.exists():
        raise ValueError(f"{path}: wanted a new folder; it exists; remove it first")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nest(leaves))
