"""Leaves of parameter trees by path, and what counts as a number there."""

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey
from jaxtyping import PyTree

from lcq.forms.base import is_form
from lcq.forms.dtypes import native
from lcq.tree.aliases import Leaves


def flatten(tree: PyTree) -> tuple[Leaves, jax.tree_util.PyTreeDef]:
    """Leaves of a parameter tree by path, forms counting as leaves, and the tree's structure.

    Raises:
        ValueError: two leaves with the same path.

    Example:
        >>> list(flatten({"dense0": {"kernel": 1., "bias": 2.}})[0])
        ['dense0/bias', 'dense0/kernel']
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_form)
    leaves: Leaves = {}
    for keys, (_, leaf) in zip(bare_keys([keys for keys, _ in pairs]), pairs, strict=True):
        path = "/".join(str(key_of(key)) for key in keys)
        leaf = native(leaf)
        if path in leaves:
            raise ValueError(f"{path}: two leaves have this path; rename one of them")
        leaves[path] = leaf
    return leaves, structure


def check_numbers(leaves: Leaves) -> None:
    """Refuses leaves that are neither arrays (or shape structs, or keys) nor forms nor numbers.

    Raises:
        ValueError: names the first.
    """
    for path, leaf in leaves.items():
        if not is_number(leaf):
            got = f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise ValueError(
                f"{path or 'params'}: expected an array, a form or a number, got {got}; leave it out of the tree, and "
                "close over it: lambda params, x: fn(params, it, x)"
            )


def is_number(leaf: object) -> bool:
    """Whether a leaf is an array of numbers, a shape struct, a key, a form or a number."""
    known = hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex) or is_form(leaf)
    return known and not (isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "OSUMm")


def bare_keys(all_keys: Sequence[KeyPath]) -> list[KeyPath]:
    """The keys of every leaf, without the one that a flax.nnx variable adds: a last attribute "value" with nothing
    beside it. So a parameter has one path whether it comes inside its variable or bare."""
    below = collections.Counter(keys[:i] for keys in all_keys for i in range(len(keys)))
    return [
        keys[:-1] if len(keys) > 1 and keys[-1] == GetAttrKey("value") and below[keys[:-1]] == 1 else keys
        for keys in all_keys
    ]


def key_of(key: object) -> Any:
    """The plain key, a string or a number, of one entry of a jax tree path."""
    match key:
        case DictKey() | FlattenedIndexKey():
            return key.key
        case SequenceKey():
            return key.idx
        case GetAttrKey():
            return key.name
    return str(key)


def leave_out(path: str) -> str:
    """The rule that leaves a leaf alone, as it is written."""
    return f"lcq.Rule({re.escape(path)!r}, None)"


def places_of_none(tree: PyTree) -> list[str]:
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is None or is_form(node))
    return ["/".join(str(key_of(key)) for key in keys) for keys, leaf in pairs if leaf is None]
