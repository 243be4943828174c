"""Parameters of other tools, in and out: .safetensors, whole or in shards, .npz, and folders of orbax.

The first two hold a flat list of named arrays. Names are split at "/", and only there, into nested dicts:
"dense0/kernel" becomes {"dense0": {"kernel": ..}}, while "layers.0.weight" stays one key. So a rule's pattern is
matched against the name as it is in the file, and what is read is written under the same names.
"""

import importlib.util
import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from lcq.forms.base import is_form
from lcq.forms.dtypes import native
from lcq.io.checkpoints.shards import INDEX, is_sharded, read_tensors
from lcq.io.container import DTYPES
from lcq.io.file import host_array, replacing
from lcq.io.tree_paths import Leaf, flatten, is_empty, nest

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


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tree: nested dicts of numpy arrays.
        metadata: strings by name, of a safetensors header.
    """

    tree: Any
    metadata: dict[str, str]


_TORCH = "; of torch's files, which may run code, make one with safetensors.torch.save_file"
_HINTS = {".lcq": "; lcq.load and lcq.save are for .lcq files", ".json": "; an index of shards ends in " + INDEX}
_HINTS |= dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _TORCH)


def read(path: str | os.PathLike[str]) -> Any:
    """Nested dicts of numpy arrays from a .safetensors or .npz file, or a folder that orbax wrote.

    A safetensors checkpoint in shards is read whole: give its folder or its index, see
    `lcq.io.checkpoints.shards`. Lists of an orbax checkpoint stay lists, and tuples become lists.

    Raises:
        ValueError: another kind of file, a damaged one, shards that are not whole, or arrays of a dtype without a name
            in numpy.
        FileNotFoundError: there is nothing at `path`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(f"{folder}/net.safetensors", {"dense0": {"bias": np.zeros(2)}}, {"format": "np"})
        ...     read_checkpoint(folder)
        Checkpoint(tree={'dense0': {'bias': array([0., 0.])}}, metadata={'format': 'np'})
    """
    return read_checkpoint(path).tree


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """What `read` gives, with the metadata of safetensors files.

    Raises:
        ValueError, FileNotFoundError: as `read`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if is_sharded(path) and not (path / "_METADATA").exists():
        kind = ".safetensors"
    else:
        kind = "orbax" if path.is_dir() else path.suffix
    return _reader(path, kind, {".safetensors": _read_safetensors, ".npz": _read_npz, "orbax": _read_orbax})(path)


def write(path: str | os.PathLike[str], tree: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree of arrays as the kind its name says: .safetensors, .npz, or a new orbax folder if it has no suffix.

    Files appear whole or not at all, and replace what was there; an orbax folder must be new.

    Args:
        path: of the file or folder.
        tree: of arrays.
        metadata: strings by name for the header of a .safetensors file; the other kinds have no place for them.

    Raises:
        ValueError: another kind, a form (call `lcq.decompress` first), a leaf that is no array, a dtype that the kind
            cannot hold, or, in a file, None or an empty container; names the leaf. Metadata for another kind.
    """
    path = Path(path)
    check_kind(path)
    if metadata and path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors file for metadata, got {', '.join(metadata)}; leave it out")
    leaves = [_to_host(leaf) for leaf in flatten(tree)[0]]
    if path.suffix and any(is_empty(leaf) for leaf in leaves):
        bad = next(leaf for leaf in leaves if is_empty(leaf))
        raise ValueError(
            f"{bad.path}: expected an array, got {bad.value!r}, which {path.suffix} cannot hold; leave it out"
        )
    if path.suffix == ".safetensors":
        return _write_safetensors(path, leaves, dict(metadata or {}))
    (_write_npz if path.suffix else _write_orbax)(path, leaves)


def check_kind(path: Path) -> None:
    """Raises ValueError unless the name says a kind that `write` knows."""
    _reader(path, path.suffix, dict.fromkeys((".safetensors", ".npz", "")))


def _reader(path: Path, kind: str, known: Mapping[str, Any]) -> Any:
    if kind not in known:
        hint = _HINTS.get(kind, "")
        raise ValueError(f"{path}: expected a .safetensors or .npz file, or an orbax folder without suffix{hint}")
    return known[kind]


def _to_host(leaf: Leaf) -> Leaf:
    if is_form(leaf.value):
        raise ValueError(f"{leaf.path}: expected an array, got {type(leaf.value).__name__}; call lcq.decompress first")
    return leaf if is_empty(leaf) else leaf._replace(value=host_array(leaf.path, leaf.value))


def _nested(path: Path, arrays: dict[str, np.ndarray]) -> Any:
    leaves = [Leaf(tuple(name.split("/")), "d" * (name.count("/") + 1), array) for name, array in arrays.items()]
    try:
        return nest(leaves)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_safetensors(path: Path) -> Checkpoint:
    tensors = read_tensors(path)
    return Checkpoint(_nested(path, tensors.arrays), tensors.metadata)


def _write_safetensors(path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
    data = safetensors.numpy.save({leaf.path: leaf.value for leaf in leaves}, metadata or None)
    with replacing(path) as file:
        file.write(data)


def _read_npz(path: Path) -> Checkpoint:
    arrays, name = dict[str, Any](), ""
    with open(path, "rb") as file:
        try:
            with np.load(file, allow_pickle=False) as archive:
                for name in archive.files:
                    arrays[name] = native(archive[name])
        except _DAMAGED as error:
            where = f"{path}: {name}" if name else path
            raise ValueError(f"{where}: not an npz file of numbers, or damaged: {error}") from error
    for name, array in arrays.items():
        if array.dtype not in DTYPES.values():
            hint = "; leave it out, or convert it first"
            if array.dtype.kind == "V":
                hint = "; npz drops the names of dtypes such as bfloat16: write .safetensors instead"
            raise ValueError(f"{path}: {name}: expected numbers, got {array.dtype}{hint}")
    return Checkpoint(_nested(path, arrays), {})


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


def _read_orbax(path: Path) -> Checkpoint:
    ocp = _orbax(path)
    if not (path / "_METADATA").exists():
        inside = sorted(
            str(found.parent.relative_to(path)) for depth in ("*", "*/*") for found in path.glob(f"{depth}/_METADATA")
        )
        raise ValueError(f"{path}: no orbax checkpoint of a tree; those inside: {', '.join(inside[:8]) or 'none'}")
    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path.absolute()).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        return Checkpoint(checkpointer.restore(path.absolute(), restore_args=as_numpy), {})


def _write_orbax(path: Path, leaves: list[Leaf]) -> None:
    ocp = _orbax(path)
    if path.exists():
        raise ValueError(f"{path}: expected a new folder; it exists; remove it first")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), nest(leaves))
