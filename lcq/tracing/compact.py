"""Changes of layout of arrays that are stored once along every axis on which they do not depend.

A compact array of an array of shape [2, 5, 8] may have shape [1, 1, 8]: numpy broadcasts it to the array.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lcq.tracing.equation import Content, Equation

_Shape = tuple[int, ...]


def shrunk(a: np.ndarray) -> np.ndarray:
    """With one element along every axis on which it does not depend."""
    for axis in range(a.ndim):
        first = a.take([0], axis) if a.shape[axis] > 1 else a
        if a.shape[axis] > 1 and (a == first).all():
            a = first
    return a


def full(a: np.ndarray, shape: _Shape, axes: Sequence[int]) -> np.ndarray:
    """Of full length along these axes."""
    return np.broadcast_to(a, [n if axis in axes else a.shape[axis] for axis, n in enumerate(shape)])


def moved(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray] | None:
    """The compact arrays of the results of an equation that moves elements; None if it is no such, or not known.

    Args:
        eqn: the equation.
        a: compact, of its first operand.
        shape: of that operand.
        rest: the other operands where their values are known, else None.
    """
    rule = _RULES.get(eqn.primitive.name)
    return None if rule is None else rule(eqn, a, shape, rest)


def joined(parts: Sequence[np.ndarray], shapes: Sequence[_Shape], axis: int) -> np.ndarray:
    """A concatenation."""
    rank = len(shapes[0])
    depends = [axis, *(i for i in range(rank) if i != axis and any(part.shape[i] > 1 for part in parts))]
    return np.concatenate([full(part, shape, depends) for part, shape in zip(parts, shapes, strict=True)], axis)


def stacked(parts: Sequence[np.ndarray], shape: _Shape, axis: int) -> np.ndarray:
    """Along a new axis."""
    depends = [i for i in range(len(shape)) if any(part.shape[i] > 1 for part in parts)]
    return np.stack([full(part, shape, depends) for part in parts], axis)


def padded(eqn: Equation, a: np.ndarray, shape: _Shape, value: int) -> np.ndarray:
    """With this value where the equation pads."""
    config = eqn.params["padding_config"]
    axes = [axis for axis, each in enumerate(config) if tuple(each) != (0, 0, 0)]
    a = full(a, shape, axes)
    for axis in axes:
        low, high, inside = map(int, config[axis])
        length = a.shape[axis]
        wide = np.full((*a.shape[:axis], length + inside * max(length - 1, 0), *a.shape[axis + 1 :]), value, a.dtype)
        np.moveaxis(wide, axis, 0)[:: inside + 1] = np.moveaxis(a, axis, 0)
        a = np.moveaxis(
            np.moveaxis(wide, axis, 0)[max(-low, 0) : len(np.moveaxis(wide, axis, 0)) - max(-high, 0)], 0, axis
        )
        edges = [(0, 0)] * a.ndim
        edges[axis] = (max(low, 0), max(high, 0))
        a = np.pad(a, edges, constant_values=value)
    return a


def reshaped(lengths: Sequence[int], before: _Shape, after: _Shape) -> tuple[list[int], list[int]]:
    """Along which axes a compact array is made full before a reshape, and its lengths after it.

    Axes are merged and split in blocks of equal size; those of an empty array are all one block.

    Args:
        lengths: of the compact array.
        before: the shape of the array.
        after: its new shape.

    Example:
        >>> reshaped((1, 1, 6), (2, 4, 6), (8, 2, 3))
        ([2], [1, 2, 3])
    """
    if 0 in before:
        return list(range(len(before))), list(after)
    axes: list[int] = []
    found: list[int] = []
    i = j = 0
    while i < len(before) or j < len(after):
        first, begin, one, two = i, j, 1, 1
        if i < len(before):
            one, i = before[i], i + 1
        if j < len(after):
            two, j = after[j], j + 1
        while one != two:
            if one < two:
                one, i = one * before[i], i + 1
            else:
                two, j = two * after[j], j + 1
        depends = any(lengths[axis] > 1 for axis in range(first, i))
        axes.extend(range(first, i) if depends else ())
        found.extend(after[begin:j] if depends else [1] * (j - begin))
    return axes, found


def taken(a: np.ndarray, i: int) -> np.ndarray:
    """Slice i along the first axis."""
    return a[i if a.shape[0] > 1 else 0]


def _same(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    return [a]


def _broadcast(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    lengths = [1] * len(eqn.params["shape"])
    for axis, length in zip(eqn.params["broadcast_dimensions"], a.shape, strict=True):
        lengths[axis] = length
    return [a.reshape(lengths)]


def _transposed(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    return [a.transpose(eqn.params["permutation"])]


def _reversed(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    return [np.flip(a, eqn.params["dimensions"])]


def _squeezed(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    return [a.squeeze(tuple(eqn.params["dimensions"]))]


def _expanded(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    return [np.expand_dims(a, tuple(eqn.params["dimensions"]))]


def _reshaped(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray] | None:
    """Axes are merged and split in blocks of equal size; only blocks on which the array depends get their length."""
    if eqn.params.get("dimensions") is not None:
        return None
    axes, lengths = reshaped(a.shape, shape, tuple(eqn.params["new_sizes"]))
    return [full(a, shape, axes).reshape(lengths)]


def _sliced(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    parts = zip(a.shape, start, limit, eqn.params["strides"] or [1] * len(start), strict=True)
    return [a[tuple(slice(None) if length == 1 else slice(*each) for length, *each in parts)]]


def _split(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    return [a] * len(sizes) if a.shape[axis] == 1 else np.split(a, np.cumsum(sizes)[:-1], axis)


def _unstacked(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray]:
    axis = eqn.params["axis"]
    return [a.take(i if a.shape[axis] > 1 else 0, axis) for i in range(shape[axis])]


def _dynamic(eqn: Equation, a: np.ndarray, shape: _Shape, rest: Sequence[Content]) -> list[np.ndarray] | None:
    index = []
    for length, whole, size, start in zip(a.shape, shape, eqn.params["slice_sizes"], rest, strict=True):
        if length == 1 or size == whole:
            index.append(slice(None))
        elif start is None:
            return None
        else:
            begin = min(max(int(start), 0), whole - size)
            index.append(slice(begin, begin + size))
    return [a[tuple(index)]]


_RULES: dict[str, Callable[..., list[np.ndarray] | None]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transposed,
    "rev": _reversed,
    "squeeze": _squeezed,
    "expand_dims": _expanded,
    "reshape": _reshaped,
    "slice": _sliced,
    "split": _split,
    "unstack": _unstacked,
    "dynamic_slice": _dynamic,
    **dict.fromkeys(
        ("stop_gradient", "name", "sharding_constraint", "copy", "copy_p", "reduce_precision", "reshard", "device_put"),
        _same,
    ),
}
