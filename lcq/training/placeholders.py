"""What `optax.tree.map_params` passes to `init` in place of the parameters, or of each of them."""

import re
from typing import Any

import jax
import optax
from jaxtyping import PyTree

from lcq.tree.paths import bare_keys, key_of
from lcq.tree.rules import Rule

_placeholders: list[object] = []
optax.tree.map_params(lambda params: _placeholders.append(params), lambda leaf: leaf, None)
Placeholder = type(_placeholders[0])
"""What stands for the parameters."""
NO_PARAMETER: Any = 0
"""What the state then has in place of all else."""


def is_placeholder(node: object) -> bool:
    return isinstance(node, Placeholder)


def has_placeholders(params: PyTree) -> bool:
    """Whether a placeholder stands for a tree, or for leaves of it."""
    return any(map(is_placeholder, jax.tree.leaves(params, is_leaf=is_placeholder)))


def placeholder_trees(params: PyTree, rules: tuple[Rule, ...]) -> list[PyTree]:
    """What stands for trees shaped like the parameters that have an array for each selected leaf, one for each of the
    leaf-shaped arrays of the schemes; masked elsewhere, as the trees of the state are."""
    trees = max(rule.scheme.leaf_arrays for rule in rules if rule.scheme is not None)
    if is_placeholder(params):
        return [params] * trees
    pairs, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_placeholder)
    paths = ["/".join(str(key_of(key)) for key in keys) for keys in bare_keys([keys for keys, _ in pairs])]
    arrays = [_arrays(path, rules) for path in paths]
    masked = optax.MaskedNode()
    return [
        jax.tree.unflatten(structure, [leaf if i < n else masked for n, (_, leaf) in zip(arrays, pairs, strict=True)])
        for i in range(trees)
    ]


def _arrays(path: str, rules: tuple[Rule, ...]) -> int:
    """Leaf-shaped arrays of the leaf at a path."""
    rule = next((rule for rule in rules if re.fullmatch(rule.pattern, path)), None)
    return 0 if rule is None or rule.scheme is None else rule.scheme.leaf_arrays
