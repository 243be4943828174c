"""Checkpoints in .safetensors files, whole or in shards."""

from collections.abc import Sequence
from pathlib import Path

import safetensors.numpy

from lcq.forms.base import is_form
from lcq.io.atomic import replacing
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested
from lcq.io.checkpoints.quantized import FACTS, quantization_of, warn_of_scales, with_forms
from lcq.io.checkpoints.shards import is_sharded, read_tensors
from lcq.io.container import check_names
from lcq.io.facts import Facts
from lcq.io.tree_paths import Leaf


@CHECKPOINT_FORMATS.register("safetensors")
class Safetensors(CheckpointFormat):
    """A file of named arrays, or several with an index, see `lcq.io.checkpoints.shards`."""

    suffix = ".safetensors"
    holds_metadata = True

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        whole = Facts(
            "`.safetensors`, its index of shards, or the folder",
            "under their names, in their dtype, bfloat16 and float8 too",
            "by the `config.json` beside them",
            "shards that are not whole; float8_e8m0 and 4-bit floats",
        )
        return (whole, *FACTS)

    def recognises(self, path: Path) -> bool:
        return super().recognises(path) or (is_sharded(path) and not (path / "_METADATA").exists())

    def read(self, path: Path) -> Checkpoint:
        return _read(path, dense=True)

    def read_forms(self, path: Path) -> Checkpoint:
        return _read(path, dense=False)

    def read_lazily(self, path: Path) -> Checkpoint:
        return _read(path, dense=True, lazy=True)

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        check_names(leaf.path for leaf in leaves)
        data = safetensors.numpy.save({leaf.path: leaf.value for leaf in leaves}, metadata or None)
        with replacing(path) as file:
            file.write(data)


def _read(path: Path, *, dense: bool, lazy: bool = False) -> Checkpoint:
    tensors = read_tensors(path, lazy)
    config = quantization_of(path, tensors.arrays)
    if lazy and config is not None:
        raise ValueError(f"{path}: expected arrays for lazy=True, got codes; leave it out, codes are read whole")
    arrays = tensors.arrays if config is None else with_forms(path, tensors.arrays, config, dense=dense)
    warn_of_scales(path, {name: array for name, array in arrays.items() if not is_form(array)})
    of_torch = config is not None or tensors.metadata.get("format") == "pt"
    return Checkpoint(nested(path, arrays), tensors.metadata, "oi" if of_torch else None)
