"""Checkpoints in .safetensors files, whole or in shards."""

from pathlib import Path

import safetensors.numpy

from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested
from lcq.io.checkpoints.shards import is_sharded, read_tensors
from lcq.io.file import replacing
from lcq.io.tree_paths import Leaf


@CHECKPOINT_FORMATS.register("safetensors")
class Safetensors(CheckpointFormat):
    """A file of named arrays, or several with an index, see `lcq.io.checkpoints.shards`."""

    suffix = ".safetensors"
    holds_metadata = True

    def recognises(self, path: Path) -> bool:
        return super().recognises(path) or (is_sharded(path) and not (path / "_METADATA").exists())

    def read(self, path: Path) -> Checkpoint:
        tensors = read_tensors(path)
        return Checkpoint(nested(path, tensors.arrays), tensors.metadata)

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        data = safetensors.numpy.save({leaf.path: leaf.value for leaf in leaves}, metadata or None)
        with replacing(path) as file:
            file.write(data)
