"""Which axes of a leaf are its outputs and which its inputs: a layout, and what it makes of `per`.

A layout has a letter for each axis: "o" outputs, whose every index is a channel; "i" inputs, along which groups run;
any other letter a window, such as h and w of a filter. Kernels of JAX, the default, are "io" and "hwio"; those of
PyTorch "oi" and "oihw"; attention in flax has "ioo", [inputs, heads, units], and "iio" for its output.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_WINDOW = 16
"""Pixels of a window along one axis, at most, where nothing else says what the axis is."""


def check_layout(layout: str) -> None:
    """Raises ValueError unless this is a layout."""
    letters = isinstance(layout, str) and layout.isascii() and layout.isalpha() and layout.islower()
    if not letters or "o" not in layout or "i" not in layout:
        raise ValueError(
            "expected layout= a letter for each axis, o outputs, i inputs, others a window, such as 'oi' or 'hwio', "
            f"got {layout!r}"
        )


def letters(layout: str, rank: int) -> str:
    """The letter of each of `rank` axes; those that a layout does not name are a window behind its inputs.

    Example:
        >>> letters("oi", 4), letters("io", 3)
        ('oiww', 'wio')
    """
    if len(layout) > rank:
        raise ValueError(f"layout={layout!r} names {len(layout)} axes, got {rank}")
    window = "w" * (rank - len(layout))
    return layout + window if layout[0] == "o" else window + layout


def block_lengths(per: Any, layout: str, rank: int) -> Any:
    """`per` of leaves with another layout, as lengths along their axes.

    Example:
        >>> block_lengths("channel", "oi", 2), block_lengths(32, "oi", 2), block_lengths(32, "ioo", 3)
        ((1, 0), (1, 32), (32, 1, 1))
    """
    if per is None or isinstance(per, tuple):
        return per
    axes = letters(layout, rank)
    if per == "channel":
        return tuple(int(axis == "o") for axis in axes)
    last = axes.rindex("i")
    return tuple(int(per) if i == last else int(axis in "io") for i, axis in enumerate(axes))


def checked_along(along: Any) -> tuple[int, ...] | None:
    """The axes that a scheme runs along, as a tuple; None for its own choice.

    Raises:
        ValueError: none, the same twice, or one that is not counted from the end.

    Example:
        >>> checked_along([-2, -3])
        (-2, -3)
    """
    if along is None:
        return None
    axes = tuple(along) if isinstance(along, Sequence) else ()
    if not axes or len(set(axes)) < len(axes) or not all(isinstance(axis, int) and axis < 0 for axis in axes):
        raise ValueError(f"expected along= distinct axes counted from the end, such as (-2,), got {along!r}")
    return axes


def outputs_last(layout: str, rank: int) -> bool:
    """Whether the last axis are the outputs, and no other is."""
    return letters(layout, rank).find("o") == rank - 1


def inputs_axis(layout: str, rank: int) -> int:
    """The last of the axes of inputs, counted from the end."""
    return letters(layout, rank).rindex("i") - rank


def shares(shape: Sequence[int], counts: Sequence[int]) -> str:
    """Along which axes of a leaf blocks are told apart, in words; "" for a single block.

    Example:
        >>> shares((64, 16), (2, 16)), shares((3, 3, 8, 16), (1, 1, 1, 16))
        ('32 of axis 0, axis 1', 'axis 3')
    """
    apart = [
        f"axis {i}" if count == length else f"{length // count} of axis {i}"
        for i, (length, count) in enumerate(zip(shape, counts, strict=True))
        if count > 1
    ]
    return ", ".join(apart)


def mixes_layers(path: str, shapes: Mapping[str, Sequence[int]], stacked: int) -> bool:
    """Whether the first axis of a leaf, after the stacked ones, seems to count layers or experts, not pixels.

    What the leaves beside it have in common says so, or that it is too long for a window; of three axes only a bias of
    as many numbers as the last, or a name, says that it is a window.

    Args:
        path: of the leaf.
        shapes: of all leaves of the tree, by path.
        stacked: axes that are said to be stacked.
    """
    shape = tuple(shapes[path][stacked:])
    if len(shape) < 3:
        return False
    *above, _ = _parts(path)
    beside = {name: tuple(s[stacked:]) for name, s in shapes.items() if name != path and _parts(name)[:-1] == above}
    if (shape[0], shape[-1]) in beside.values() or _stack_together(path, shapes, stacked):
        return True
    biases = [s for name, s in beside.items() if _parts(name)[-1].startswith("b")]
    if stacked or shape[-1:] in biases or shape[1:] in biases:
        return False
    if len(shape) == 3:
        return "conv" not in path.lower()
    window = shape[:-2]
    return max(window) > _WINDOW or (len(window) == 3 and 1 != window[0] != window[1] == window[2])


def _stack_together(path: str, shapes: Mapping[str, Sequence[int]], stacked: int) -> bool:
    """Whether all leaves below one node begin with the same axis, what would be vectors without it too."""
    above = _parts(path)[:-1]
    for depth in range(len(above), -1, -1):
        below = [tuple(s[stacked:]) for name, s in shapes.items() if _parts(name)[:depth] == above[:depth]]
        if len({s[:1] for s in below}) == 1 and len({len(s) for s in below}) > 1 and min(map(len, below)) > 1:
            return True
    return False


def _parts(path: str) -> list[str]:
    """Keys of a path, those that a checkpoint has joined by dots apart."""
    return re.split(r"[/.]", path)


def warning(path: str, shape: Sequence[int], per: str | int, stacked: int, before: int, after: int) -> str:
    """What `stacked` would change for a leaf whose first axis seems to count layers.

    Args:
        path: of the leaf.
        shape: of the leaf.
        per: of its rule.
        stacked: likewise.
        before: scales or codebooks that it gets.
        after: with another stacked axis.
    """
    rest = len(shape) - stacked
    lengths = (1, *(0,) * (rest - 3), per, 1) if isinstance(per, int) else (1, *(0,) * (rest - 2), 1)
    layouts = {3: "'wio' for a window, 'ioo' or 'iio' for heads", 4: "'hwio' or 'oihw' for filters"}
    return (
        f"{path}: per={per!r} without stacked={stacked + 1}: axis {len(shape) - 1} of {list(shape)} is the channel, "
        f"and all {shape[stacked]} of axis {stacked} share each of {before:,} scales or codebooks; if they are layers "
        f"or experts, lcq.Rule(..., stacked={stacked + 1}), or per={lengths}, gives each its own, {after:,} in all; if "
        f"not, say so with layout=, {layouts.get(rest, 'a letter for each axis')}"
    )
