"""Trainings that go on where they were stopped: after every epoch all there is goes to one file, replaced whole."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization


def maker(recipe: Any, *files: str | Path) -> str:
    """What a checkpoint is of: a recipe, and the code in files and in folders of them."""
    sources = [path for file in map(Path, files) for path in (sorted(file.rglob("*.py")) if file.is_dir() else [file])]
    return f"{recipe!r} and code {digest(*(path.read_text() for path in sources))}"


def digest(*texts: str) -> str:
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:8]


def resume(path: Path, made_by: str, tree: Any) -> tuple[Any, dict[str, Any]]:
    """The tree and the log, {"seconds", "curve", "resumed_after"}, of a checkpoint by `made_by`, or as they begin."""
    log: dict[str, Any] = {"made_by": made_by, "seconds": 0.0, "curve": [], "resumed_after": []}
    if not path.exists():
        return tree, log
    saved = serialization.msgpack_restore(path.read_bytes())
    log = json.loads(saved["log"])
    if log["made_by"] != made_by:
        raise ValueError(f"{path} is by {log['made_by']}, got {made_by}; choose another --out")
    log["resumed_after"].append(len(log["curve"]))
    print("goes on after epoch", len(log["curve"]), flush=True)
    leaves = [jnp.array(saved["leaves"][str(i)]) for i in range(len(saved["leaves"]))]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves), log


def keep(path: Path, tree: Any, log: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    leaves = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    temporary.write_bytes(serialization.msgpack_serialize({"leaves": leaves, "log": json.dumps(log)}))
    os.replace(temporary, path)
