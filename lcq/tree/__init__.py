"""Where to compress: paths of leaves, rules on them, and whole trees."""

from lcq.tree.aliases import Batch, Forms, Function, OptState, Params
from lcq.tree.compress import Size, compress, decompress, ratio, sizes
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Rules, Task, resolve

__all__ = [
    "Batch",
    "Forms",
    "Function",
    "OptState",
    "Params",
    "Rule",
    "Rules",
    "Size",
    "Task",
    "compress",
    "decompress",
    "flatten",
    "ratio",
    "resolve",
    "sizes",
]


def __dir__() -> list[str]:
    return sorted(__all__)
