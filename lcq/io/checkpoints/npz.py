"""Checkpoints in .npz files of numpy."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lcq.forms.dtypes import native
from lcq.io.atomic import replacing
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested
from lcq.io.container import DTYPES
from lcq.io.facts import Facts
from lcq.io.tree_paths import Leaf

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


@CHECKPOINT_FORMATS.register("npz")
class Npz(CheckpointFormat):
    """A zip of named arrays, without the dtypes that numpy has no name for."""

    suffix = ".npz"

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        facts = Facts("`.npz`", "under their names", "", "objects; dtypes that numpy has no name for")
        return (facts,)

    def read(self, path: Path) -> Checkpoint:
        arrays, name = dict[str, np.ndarray](), ""
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
        return Checkpoint(nested(path, arrays), {})

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        del metadata
        for leaf in leaves:
            if leaf.value.dtype.type.__module__ != "numpy":
                raise ValueError(f"{leaf.path}: npz cannot hold {leaf.value.dtype}; write .safetensors instead")
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:  # np.savez cannot name an array "file"
            for leaf in leaves:
                with archive.open(f"{leaf.path}.npy", "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, leaf.value, allow_pickle=False)
