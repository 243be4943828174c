"""Equations on concatenated arrays, as equations on their pieces: what a kernel made of several parameters is.

    X [W1 W2] = [X W1, X W2]        joined along the outputs
    [X1 X2] [W1; W2] = X1 W1 + X2 W2        joined along the inputs
    [Y1 Y2] + [b1 b2] = [Y1 + b1, Y2 + b2]

Each function here takes an equation and says how it acts on pieces; None if it does not act on them one by one.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lcq.tracing.equation import Content, Equation
from lcq.tracing.jaxpr import IN_PLACE

JOINS = {"concatenate": "dimension", "stack": "axis"}
"""Primitives that join arrays, and their parameter that says along which axis."""

RESHAPES = {"reshape", "squeeze", "expand_dims", "broadcast_in_dim"}


class Joint(NamedTuple):
    """How an array is a concatenation.

    Attributes:
        axis: The axis along which the pieces are joined.
        lengths: The lengths of the pieces on that axis.
    """

    axis: int
    lengths: tuple[int, ...]


class Moved(NamedTuple):
    """An output after a change of layout.

    Attributes:
        axis: The axis along which its pieces are joined.
        pieces: The numbers of the pieces they come from, and how: array -> array.
    """

    axis: int
    pieces: tuple[tuple[int, Callable[[Content], Content]], ...]


def moved(eqn: Equation, joint: Joint, shape: Sequence[int], rest: Sequence[Content] = ()) -> list[Moved] | None:
    """A change of layout of a joined array of this shape: for each of its outputs the pieces.

    Args:
        eqn: the equation.
        joint: how its first operand is joined.
        shape: of that.
        rest: its other operands, numbers.
    """
    name, params = eqn.primitive.name, eqn.params

    def all_by(function: Callable[[Content], Content], axis: int = joint.axis, turned: bool = False) -> list[Moved]:
        pieces = [(i, function) for i in range(len(joint.lengths))]
        return [Moved(axis, tuple(pieces[::-1] if turned else pieces))]

    if name in IN_PLACE:
        whole = eqn.primitive.get_bind_params(params)
        return all_by(lambda a: eqn.primitive.bind(a, **whole))
    if name == "transpose":
        order = tuple(params["permutation"])
        return all_by(lambda a: jnp.transpose(a, order), order.index(joint.axis))
    if name == "rev":
        axes = params["dimensions"]
        return all_by(lambda a: jax.lax.rev(a, axes), turned=joint.axis in axes)
    if name == "broadcast_in_dim" and not rest and math.prod(params["shape"]) > math.prod(shape):
        return _broadcast(joint, params["shape"], params["broadcast_dimensions"])
    if name in RESHAPES and (name != "reshape" or params["dimensions"] is None):
        return _reshaped(joint, shape, eqn.outvars[0].aval.shape)
    if name == "slice" and all(step == 1 for step in params["strides"] or ()):
        return [_sliced(joint, params["start_indices"], params["limit_indices"])]
    if name == "dynamic_slice":
        sizes = params["slice_sizes"]
        starts = [max(0, min(int(i), n - m)) for i, n, m in zip(rest, shape, sizes, strict=True)]
        return [_sliced(joint, starts, [i + m for i, m in zip(starts, sizes, strict=True)])]
    if name in ("split", "unstack"):
        axis = params["axis"]
        parts = []
        for start, end in _spans([int(n) for n in params["sizes"]] if name == "split" else [1] * shape[axis]):
            starts, limits = [0] * len(shape), list(shape)
            starts[axis], limits[axis] = start, end
            part = _sliced(joint, starts, limits)
            parts.append(part if name == "split" else _squeezed(part, axis))
        return parts
    return None


def taken(joint: Joint, shape: Sequence[int], i: int) -> Moved:
    """Slice i along the first axis, without that axis."""
    return _squeezed(_sliced(joint, [i, *[0] * (len(shape) - 1)], [i + 1, *shape[1:]]), 0)


def _squeezed(part: Moved, axis: int) -> Moved:
    """Without an axis of length 1; of the axis along which it is joined only one piece is left."""
    pieces = [(i, lambda a, f=f: jnp.squeeze(f(a), axis)) for i, f in part.pieces]
    return Moved(part.axis - (part.axis > axis), tuple(pieces))


def _reshaped(joint: Joint, shape: Sequence[int], new: Sequence[int]) -> list[Moved] | None:
    """A reshape that leaves the pieces one after another along some axis."""
    if math.prod(new) != math.prod(shape):
        return None
    before, after = math.prod(shape[: joint.axis]), math.prod(shape[joint.axis + 1 :])
    for axis in range(len(new)):
        rest = math.prod(new[axis + 1 :])
        if math.prod(new[:axis]) == before and rest and all(n * after % rest == 0 for n in joint.lengths):
            lengths = [n * after // rest for n in joint.lengths]
            shapes = [(*new[:axis], n, *new[axis + 1 :]) for n in lengths]
            return [Moved(axis, tuple((i, functools.partial(jnp.reshape, shape=to)) for i, to in enumerate(shapes)))]
    return None


def _broadcast(joint: Joint, new: Sequence[int], places: Sequence[int]) -> list[Moved] | None:
    """A broadcast that makes the pieces larger along other axes than that along which they are joined."""
    axis = places[joint.axis]
    if new[axis] != sum(joint.lengths):
        return None
    shapes = [(*new[:axis], n, *new[axis + 1 :]) for n in joint.lengths]
    made = [functools.partial(jax.lax.broadcast_in_dim, shape=to, broadcast_dimensions=places) for to in shapes]
    return [Moved(axis, tuple(enumerate(made)))]


def _sliced(joint: Joint, starts: Sequence[int], limits: Sequence[int]) -> Moved:
    pieces = []
    for i, (first, end) in enumerate(_spans(joint.lengths)):
        low, high = max(starts[joint.axis], first) - first, min(limits[joint.axis], end) - first
        if low < high:
            here, there = list(starts), list(limits)
            here[joint.axis], there[joint.axis] = low, high
            pieces.append((i, lambda a, here=here, there=there: jax.lax.slice(a, here, there)))
    return Moved(joint.axis, tuple(pieces))


def _spans(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Where each of several parts begins and ends."""
    ends = list(itertools.accumulate(lengths))
    return list(zip([0, *ends], ends, strict=False))


def product(eqn: Equation, side: int, joint: Joint) -> Callable[..., Content] | None:
    """A product whose operand `side` is joined, as a function of the other operand and of each piece."""
    params = eqn.primitive.get_bind_params(eqn.params)

    def one(x: Content, w: Content) -> Content:
        return eqn.primitive.bind(*((x, w) if side else (w, x)), **params)

    found = (_dot if eqn.primitive.name == "dot_general" else _convolution)(eqn, side, joint.axis)
    if found is None:
        return None
    axis, onto = found

    def whole(x: Content, *pieces: Content) -> Content:
        cuts = [x if axis is None else jax.lax.slice_in_dim(x, a, b, axis=axis) for a, b in _spans(joint.lengths)]
        results = [one(a, w) for a, w in zip(cuts, pieces, strict=True)]
        return sum(results[1:], results[0]) if onto is None else jnp.concatenate(results, onto)

    return whole


def added(eqn: Equation, side: int, joint: Joint) -> Callable[..., Content]:
    """A sum or difference whose operand `side` is joined, as a function of the other operand and of each piece."""
    params = eqn.primitive.get_bind_params(eqn.params)

    def whole(other: Content, *pieces: Content) -> Content:
        cuts = [jax.lax.slice_in_dim(other, a, b, axis=joint.axis) for a, b in _spans(joint.lengths)]
        pairs = [(cut, piece) if side else (piece, cut) for cut, piece in zip(cuts, pieces, strict=True)]
        return jnp.concatenate([eqn.primitive.bind(*pair, **params) for pair in pairs], joint.axis)

    return whole


def _dot(eqn: Equation, side: int, axis: int) -> tuple[int | None, int | None]:
    """The axis of the other operand that is cut like the pieces, and of the result along which it is joined."""
    contract, batch = eqn.params["dimension_numbers"]
    other = 1 - side
    if axis in contract[side]:
        return contract[other][contract[side].index(axis)], None
    if axis in batch[side]:
        place = batch[side].index(axis)
        return batch[other][place], place
    ranks = [len(var.aval.shape) for var in eqn.invars]
    free = [i for i in range(ranks[side]) if i not in (*contract[side], *batch[side])]
    before = ranks[0] - len(contract[0]) if side else len(batch[0])  # the batch axes, then those of the first operand
    return None, before + free.index(axis)


def _convolution(eqn: Equation, side: int, axis: int) -> tuple[int | None, int | None] | None:
    spec = eqn.params["dimension_numbers"]
    if side == 0 or eqn.params["feature_group_count"] > 1 or eqn.params["batch_group_count"] > 1:
        return None
    if axis == spec.rhs_spec[0]:
        return None, spec.out_spec[1]
    return (spec.lhs_spec[1], None) if axis == spec.rhs_spec[1] else None
