"""Trees that look like compressed ones and are none: dicts that were forms, and states of training."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import PyTree

from lcq.forms.base import FORMS, is_form
from lcq.forms.serialization import MARK, is_of_state, name_of


def check_restored(tree: PyTree) -> None:
    """Refuses a tree with dicts in place of forms, and one with a state of training.

    Checkpoints that are restored without a target give such dicts, and none but flax's says shapes and kinds. A dict
    with a single entry, as orbax makes of a `Cast`, may be anyone's and passes. A state holds forms of an earlier
    moment of a run, of some methods whole.

    Raises:
        ValueError: a dict with the fields of a form, or a state; says where it is.

    Example:
        >>> import lcq, flax.serialization as fs, jax.numpy as jnp
        >>> forms = {"w": lcq.KMeans(2).project(jnp.array([-1., 1., 3.]))}
        >>> check_restored(fs.msgpack_restore(fs.to_bytes(forms)))
        Traceback (most recent call last):
        ...
        ValueError: w: expected a form, got a dict that was Codes: it was restored without a target; ...
    """

    def is_one(node: PyTree) -> bool:
        return is_form(node) or is_of_state(node) or _kind(node) is not None

    for keys, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_one)[0]:
        if is_of_state(node):
            path = jax.tree_util.keystr(keys[:-1], simple=True, separator="/") or "the tree"
            raise ValueError(
                f"{path}: expected forms or arrays, got an optimizer state, which is that of a run; call "
                "lcq.extract(state, params) for what it ends with"
            )
        if (kind := _kind(node)) is not None:
            path = jax.tree_util.keystr(keys, simple=True, separator="/") or "the tree"
            raise ValueError(
                f"{path}: expected a form, got a dict that was {kind}: it was restored without a target; "
                "restore into a tree of forms, such as lcq.compress(params, rules), by "
                "flax.serialization.from_bytes(forms, data) or "
                "checkpointer.restore(path, forms), or use lcq.save and lcq.load, which need none"
            )


def _kind(node: Any) -> str | None:
    """The name of the form that a dict was, by its mark or by its fields."""
    if not isinstance(node, Mapping):
        return None
    if MARK in node and (name := name_of(node)) is not None:
        return name
    if set(node) == {"inner"} and isinstance(inner := node["inner"], Mapping):
        return "Rotated" if _kind(inner) else None
    if set(node) == {"parts"} and isinstance(parts := node["parts"], list | tuple | Mapping):
        some = list(parts.values() if isinstance(parts, Mapping) else parts)
        return "Sum" if some and all(_kind(part) or set(part) == _fields("Cast") for part in some) else None
    return next((name for name in FORMS if len(_fields(name)) > 1 and set(node) == _fields(name)), None)


def _fields(name: str) -> set[str]:
    return {f.name for f in dataclasses.fields(FORMS[name]) if not f.metadata.get("static")}
