"""Where to compress: paths of leaves, rules on them, and whole trees."""

from lcq.tree.compress import Size, compress, decompress, ratio, sizes
from lcq.tree.paths import flatten
from lcq.tree.rules import Rule, Task, resolve

__all__ = ["Rule", "Size", "Task", "compress", "decompress", "flatten", "ratio", "resolve", "sizes"]
