"""Checkpoints in folders that orbax wrote."""

import importlib.util
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat
from lcq.io.tree_paths import Leaf, nest


@CHECKPOINT_FORMATS.register("orbax")
class Orbax(CheckpointFormat):
    """A folder; lists stay lists, tuples become lists."""

    suffix = ""
    holds_empty = True

    def recognises(self, path: Path) -> bool:
        return path.is_dir()

    def read(self, path: Path) -> Checkpoint:
        ocp = _orbax(path)
        if not (path / "_METADATA").exists():
            found = [file for depth in ("*", "*/*") for file in path.glob(f"{depth}/_METADATA")]
            inside = sorted(str(file.parent.relative_to(path)) for file in found)
            raise ValueError(f"{path}: no orbax checkpoint of a tree; those inside: {', '.join(inside[:8]) or 'none'}")
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path.absolute()).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            return Checkpoint(checkpointer.restore(path.absolute(), restore_args=as_numpy), {})

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        del metadata
        ocp = _orbax(path)
        if path.exists():
            raise ValueError(f"{path}: expected a new folder; it exists; remove it first")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), nest(leaves))


def _orbax(path: Path) -> ModuleType:
    if any(importlib.util.find_spec(name) is None for name in ("orbax", "orbax.checkpoint")):
        raise ValueError(f"{path}: a folder needs orbax; pip install orbax-checkpoint, or use .safetensors")
    import orbax.checkpoint

    return orbax.checkpoint
