"""Checkpoints in folders that orbax wrote."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np

from lcq.forms.validate import named
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat
from lcq.io.checkpoints.qarrays import from_qwix
from lcq.io.facts import Facts
from lcq.io.tree_paths import Leaf, nest


@CHECKPOINT_FORMATS.register("orbax")
class Orbax(CheckpointFormat):
    """A folder; lists stay lists, tuples become lists."""

    suffix = ""
    holds_empty = True

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        facts = Facts(
            "a folder of orbax: a tree, or one in a folder as its v1 and managers write it",
            "lists stay lists",
            "`{qvalue, scale, zero_point}` of qwix",
            "several trees: name one",
        )
        return (facts,)

    def recognises(self, path: Path) -> bool:
        return path.is_dir()

    def read(self, path: Path) -> Checkpoint:
        ocp = _orbax(path)
        path = _tree_in(path)
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                metadata = checkpointer.metadata(path.absolute()).item_metadata.tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
                return Checkpoint(checkpointer.restore(path.absolute(), restore_args=as_numpy), {})
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not an orbax checkpoint of a tree, or damaged: {error!r:.300}; get it again"
            ) from error

    def read_forms(self, path: Path) -> Checkpoint:
        found = self.read(path)
        with named(str(path)):
            return found._replace(tree=from_qwix(found.tree))

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        del metadata
        ocp = _orbax(path)
        if path.exists():
            raise ValueError(f"{path}: expected a new folder; it exists; remove it first")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), nest(leaves))


def _tree_in(path: Path) -> Path:
    """The folder of a tree: this one, or its only item, as orbax's v1 and the `CheckpointManager` write it."""
    if (path / "_METADATA").exists():
        return path
    items = [file.parent for file in path.glob("*/_METADATA")]
    if len(items) == 1 and (path / "_CHECKPOINT_METADATA").exists():
        return items[0]
    inside = sorted(str(item.relative_to(path)) for item in [*items, *(f.parent for f in path.glob("*/*/_METADATA"))])
    raise ValueError(f"{path}: no orbax checkpoint of a tree; those inside: {', '.join(inside[:8]) or 'none'}")


def _orbax(path: Path) -> ModuleType:
    if any(importlib.util.find_spec(name) is None for name in ("orbax", "orbax.checkpoint")):
        raise ValueError(f"{path}: a folder needs orbax; pip install orbax-checkpoint, or use .safetensors")
    import orbax.checkpoint

    return orbax.checkpoint
