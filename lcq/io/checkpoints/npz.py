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

_NAMELESS = "; npz drops the names of dtypes such as bfloat16: write .safetensors instead"
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
            if not zipfile.is_zipfile(file):
                raise ValueError(
                    f"{path}: not an npz file, or damaged: no zip of arrays; get it again, or name it as what it is"
                )
            file.seek(0)
            try:
                with np.load(file, allow_pickle=False) as archive:
                    for name in archive.files:
                        if not isinstance(array := archive[name], np.ndarray):
                            raise ValueError("it is no array, but a file of another kind; leave it out")
                        arrays[name] = native(array)
            except _DAMAGED as error:
                if "dtype descriptor" in str(error):
                    raise ValueError(
                        f"{path}: {name}: expected numbers, got a dtype without a name{_NAMELESS}"
                    ) from error
                where = f"{path}: {name}" if name else path
                raise ValueError(f"{where}: not an npz file of numbers, or damaged: {error}") from error
        for name, array in arrays.items():
            if array.dtype not in DTYPES.values():
                hint = _NAMELESS if array.dtype.kind == "V" else "; leave it out, or convert it first"
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
