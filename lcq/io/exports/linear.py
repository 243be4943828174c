"""What formats of linear layers make of an item: the layer's name, whole codes of b bits, scales and zeros."""

import numpy as np

from lcq.forms import Codes
from lcq.io.exports.grids import Grid, Kind, grid_of, kind_of
from lcq.io.exports.leaves import Item
from lcq.io.exports.steps import moved, offset_of, rounded


def stem_of(item: Item) -> str:
    """The name of a layer, of a leaf that is its weight.

    Raises:
        ValueError: another name.
    """
    stem, dot, last = item.name.rpartition(".")
    if not dot or last != "weight":
        raise ValueError(
            f"expected a name that ends in .weight, got {item.name!r}; say lcq.io.Name({item.path!r}, "
            f"'{item.name}.weight', layout='io')"
        )
    return stem


def bits_of(item: Item, known: tuple[int, ...]) -> int:
    """Bits that a grid goes out with: those that its name says, or the fewest of `known` that hold it.

    Raises:
        ValueError: too many, or a type that is none.
    """
    assert isinstance(item.value, Codes)
    kind, types = kind_of(item.value, item.rule.layout), [f"int{bits}" for bits in known]
    fitting = [bits for bits in known if bits >= kind.steps.bits]
    if item.rule.type is not None:
        if item.rule.type not in types:
            raise ValueError(f"expected type= one of {', '.join(types)}, got {item.rule.type!r}")
        fitting = [bits for bits in fitting if f"int{bits}" == item.rule.type]
    if not fitting:
        raise ValueError(
            f"expected codes of at most {item.rule.type or max(known)} bits, got {kind.steps.bits}; compress with fewer"
        )
    return fitting[0]


def scale_dtype(form: Codes, kind: Kind) -> str:
    """The dtype of scales: the form's, or float32 where their unit is no power of two."""
    held = "float32" if form.scale is None else str(form.scale.dtype)
    return held if np.log2(abs(kind.steps.unit)) % 1 == 0 else "float32"


def encoded(item: Item, bits: int, dtype: str) -> tuple[Grid, float]:
    """Codes of b bits with scales in a dtype, and how far that moved the weights.

    Raises:
        ValueError: scales that the dtype cannot hold.
    """
    assert isinstance(item.value, Codes)
    kind = kind_of(item.value, item.rule.layout)
    offset = offset_of(kind.steps, bits)
    table = np.asarray(kind.steps.levels) + offset
    grid = grid_of(item.value, item.rule.layout, kind, table.astype(np.uint8), item.rule.heads)
    scale, old = rounded(grid.scale, dtype), grid.scale.astype(np.float64)
    new = scale.astype(np.float64)
    zero = None if grid.zero is None else grid.zero.astype(np.float64)
    shifts = (None, None) if zero is None else (-zero * new, -zero * old)
    apart = grid.codes.reshape(kind.outputs, -1, kind.group)
    error = moved(apart, np.arange(1 << bits, dtype=np.float32) - offset, (new, shifts[0]), (old, shifts[1]))
    return grid._replace(scale=scale), error
