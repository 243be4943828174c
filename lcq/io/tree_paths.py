"""The places of a tree's leaves, as files keep them: plain keys with their kinds.

A kind is a letter per key: d a dict's key, s a place in a sequence, a an attribute.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.tree_util import DictKey
from jaxtyping import PyTree

from lcq.forms.base import is_form
from lcq.tree.paths import bare_keys, key_of

DEPTH = 64
"""Most keys in a path."""


class Leaf(NamedTuple):
    """A place in a tree and what is there: an array, a form, or a container that holds nothing."""

    keys: tuple[str | int, ...]
    kinds: str
    value: PyTree

    @property
    def path(self) -> str:
        return "/".join(map(str, self.keys))


def flatten(tree: PyTree) -> tuple[list[Leaf], jax.tree_util.PyTreeDef]:
    """The leaves of a tree, forms and empty containers among them, and its structure.

    Raises:
        ValueError: keys that a file cannot hold, or two leaves with one path.
    """
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda n: is_form(n) or _is_empty(n))
    leaves = []
    for keys, (_, value) in zip(bare_keys([keys for keys, _ in pairs]), pairs, strict=True):
        plain = tuple(key_of(key) for key in keys)
        if len(keys) > DEPTH or not all(type(k) is int or (type(k) is str and k.isprintable()) for k in plain):
            raise ValueError(f"expected at most {DEPTH} keys, each an integer or a printable string, got {plain!r}")
        leaves.append(Leaf(plain, "".join(map(_kind, keys)), value))
    check_paths(leaves)
    return leaves, structure


def is_empty(leaf: Leaf) -> bool:
    """Whether there is a container without leaves, None included."""
    return not is_form(leaf.value) and _is_empty(leaf.value)


def _is_empty(node: PyTree) -> bool:
    return not jax.tree.leaves(node, is_leaf=lambda n: n is not node)


def _kind(key: object) -> str:
    if isinstance(key, DictKey):
        return "d"
    return "s" if isinstance(key_of(key), int) else "a"


def check_paths(leaves: Sequence[Leaf]) -> None:
    """Raises ValueError if two leaves have one path."""
    for path, count in collections.Counter(leaf.path for leaf in leaves).most_common(1):
        if count > 1:
            raise ValueError(f"{path[:200]!r}: {count} leaves have this path; rename all but one")


def nest(leaves: Sequence[Leaf], above: str = "") -> PyTree:
    """Leaves as nested dicts: an attribute is a string key; a sequence, also a tuple, is a list.

    Raises:
        ValueError: keys that contradict each other.
    """
    if len(leaves) == 1 and not leaves[0].keys:
        return leaves[0].value
    groups: dict[str | int, list[Leaf]] = {}
    for leaf in leaves:
        if not leaf.keys:
            raise ValueError(f"{above[1:]}: a leaf and a branch have this path")
        groups.setdefault(leaf.keys[0], []).append(Leaf(leaf.keys[1:], leaf.kinds[1:], leaf.value))
    tree = {key: nest(group, f"{above}/{key}") for key, group in groups.items()}
    kinds = {leaf.kinds[0] for leaf in leaves}
    if "s" not in kinds:
        if len({type(key) for key in tree}) > 1:
            raise ValueError(f"{above[1:]}: expected keys of one type, got {list(tree)[:8]}")
        return tree
    if kinds != {"s"} or set(tree) != set(range(len(tree))):
        raise ValueError(f"{above[1:]}: expected places 0 to {len(tree) - 1} of a sequence, got {list(tree)[:8]}")
    return [tree[i] for i in range(len(tree))]
