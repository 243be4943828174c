"""Checkpoints in folders that orbax wrote."""

import collections
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
from jaxtyping import PyTree

from lcq.forms.validate import named
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat
from lcq.io.checkpoints.qarrays import from_qwix
from lcq.io.facts import Facts
from lcq.io.tree_paths import Leaf, is_empty, nest
from lcq.tree.paths import key_of


@CHECKPOINT_FORMATS.register("orbax")
class Orbax(CheckpointFormat):
    """A folder; lists stay lists, tuples become lists; strings in the tree are metadata by their paths."""

    suffix = ""
    holds_empty = True

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        facts = Facts(
            "a folder of orbax: a tree, or one in a folder as its v1 and managers write it",
            "lists stay lists; strings become metadata",
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
                kinds = jax.tree.map(
                    lambda m: str if isinstance(m, ocp.metadata.StringMetadata) else np.ndarray, metadata
                )
                how = jax.tree.map(lambda kind: ocp.RestoreArgs(restore_type=kind), kinds)
                found = checkpointer.restore(path.absolute(), restore_args=how)
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: not an orbax checkpoint of a tree, or damaged: {error!r:.300}; get it again"
            ) from error
        with named(str(path)):
            keys = [[key_of(key) for key in keys] for keys, _ in jax.tree_util.tree_flatten_with_path(found)[0]]
            _check_places(keys, "one was written over the other; save them again under other names")
        strings: dict[str, str] = {}
        return Checkpoint(_numbers(found, "", strings), strings)

    def read_forms(self, path: Path) -> Checkpoint:
        found = self.read(path)
        with named(str(path)):
            return found._replace(tree=from_qwix(found.tree))

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        del metadata
        ocp = _orbax(path)
        if path.exists():
            raise ValueError(f"{path}: expected a new folder; it exists; remove it first")
        if is_empty(leaves[0]) and not leaves[0].keys:
            raise ValueError(f"{path}: expected a tree with a leaf, got {nest(leaves)!r}; orbax cannot hold it")
        for leaf in leaves:
            if not is_empty(leaf) and not leaf.value.size:
                raise ValueError(
                    f"{leaf.path}: expected numbers, got an array {list(leaf.value.shape)} of none, which orbax cannot "
                    "hold; leave it out, or write .safetensors instead"
                )
        with named(str(path)):
            _check_places([leaf.keys for leaf in leaves], "orbax would write one over the other; rename one")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), nest(leaves))


def _numbers(tree: PyTree, above: str, strings: dict[str, str]) -> PyTree:
    """The tree without its strings, which go to `strings` by path; None takes their place in lists."""
    if isinstance(tree, str):
        strings[above.removesuffix("/")] = tree
        return None
    if isinstance(tree, dict):
        inside = {key: (_numbers(value, f"{above}{key}/", strings), value) for key, value in tree.items()}
        return {key: new for key, (new, value) in inside.items() if not isinstance(value, str)}
    if isinstance(tree, list):
        return [_numbers(value, f"{above}{i}/", strings) for i, value in enumerate(tree)]
    return tree


def _check_places(leaves: Iterable[Sequence[str | int]], remedy: str) -> None:
    """Raises ValueError if two leaves have one place: orbax joins keys by dots."""
    places = collections.defaultdict(list)
    for keys in leaves:
        places[".".join(map(str, keys))].append("/".join(map(str, keys)))
    for paths in places.values():
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1]}: orbax keeps both in one place; {remedy}")


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
