"""Codes on a grid, as a matrix [outputs, inputs] with a scale for each group of inputs: what other programs read.

    value[o, i] = scale[o, i // g] (code[o, i] - zero[o, i // g])

A fixed codebook is a grid if all its levels are whole multiples of one number: {-1, 1}, {-1, 0, 1}, -8 .. 7, powers of
two.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt

from lcq.forms import Codes
from lcq.forms.axes import letters
from lcq.forms.bitpack import width

_MOST = 1 << 16
_CHUNK = 1 << 20
"""Weights at once, of which it is told how far they moved."""

Lines = tuple[np.ndarray, np.ndarray | None]
"""A scale for each group, and what is added."""


class Grid(NamedTuple):
    """A grid with its codes.

    Attributes:
        codes: of each weight.
        scale: of each group, as the form has it.
        zero: of each group, in steps; None without zeros.
    """

    codes: UInt[np.ndarray, "outputs inputs"]
    scale: Float[np.ndarray, "outputs groups"]
    zero: Num[np.ndarray, "outputs groups"] | None


def is_grid(form: Codes) -> bool:
    """Whether levels are multiples of one number."""
    return form.values is not None and whole_levels(form.values) is not None


@functools.cache
def whole_levels(values: tuple[float, ...]) -> tuple[tuple[int, ...], float] | None:
    """Whole numbers n and a unit u > 0 with values = u n; None if |n| would be 2^16 or more.

    Example:
        >>> whole_levels((-1.0, -0.25, 0.0, 0.25, 1.0))
        ((-4, -1, 0, 1, 4), 0.25)
    """
    exact = [Fraction(v) for v in values]
    below = math.lcm(*(v.denominator for v in exact))
    step = math.gcd(*(int(v * below) for v in exact))
    if not step or max(abs(v) for v in exact) * below / step >= _MOST:
        return None
    return tuple(int(v * below) // step for v in exact), float(Fraction(step, below))


class Steps(NamedTuple):
    """What a grid's levels are, in steps.

    Attributes:
        shifted: whether there are zeros.
        levels: whole numbers, ascending or descending, what a code stands for; the lowest is 0 if there are zeros.
        unit: what the levels were divided by, negative if they were turned round, to need fewer bits.
        bits: of a code; without zeros so that -2^(b-1) .. 2^(b-1) - 1 has all levels.
    """

    shifted: bool
    levels: tuple[int, ...]
    unit: float
    bits: int


def steps_of(form: Codes) -> Steps:
    """The levels of a grid; arrays may be shape structs."""
    found = whole_levels(form.values or ())
    assert found is not None
    levels, unit = found
    if form.zero is not None:
        shifted = tuple(level - levels[0] for level in levels)
        return Steps(True, shifted, unit, max(width(shifted[-1] + 1), 1))
    plain, other = (max(width(max(-low, high + 1)) + 1, 2) for low, high in _ends(levels))
    steps = Steps(False, levels, unit, min(plain, other))
    return steps if plain <= other else turned(steps)


def turned(steps: Steps) -> Steps:
    """The same levels with a scale of the other sign."""
    return steps._replace(levels=tuple(-level for level in steps.levels), unit=-steps.unit)


def _ends(levels: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The lowest and the highest level, as they are and turned round."""
    return (levels[0], levels[-1]), (-levels[-1], -levels[0])


class Kind(NamedTuple):
    """What is known of a grid as a matrix before its codes are read.

    Attributes:
        outputs: rows of the matrix.
        inputs: columns.
        group: inputs that share a scale.
        steps: its levels.
    """

    outputs: int
    inputs: int
    group: int
    steps: Steps

    @property
    def words(self) -> str:
        """For reports."""
        return "by channel" if self.group == self.inputs else f"in groups of {self.group}"


def kind_of(form: Codes, layout: str | None) -> Kind:
    """What a grid will be as a matrix; arrays may be shape structs.

    Raises:
        ValueError: no layout, or axes that make no matrix.
    """
    outputs, inputs = matrix_shape(form.shape, layout)
    return Kind(outputs, inputs, _group(form.shape, _blocks(form), str(layout)), steps_of(form))


def _blocks(form: Codes) -> tuple[int, ...]:
    """How many blocks there are along each axis."""
    return next((tuple(a.shape) for a in (form.scale, form.zero) if a is not None), (1,) * len(form.shape))


def offset_of(steps: Steps, bits: int) -> int:
    """The code of 0 in b bits: half of all without zeros, and 0 with."""
    return 0 if steps.shifted else 1 << (bits - 1)


def in_steps(form: Codes, steps: Steps) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales of one step, and zeros in steps, for each block of the leaf."""
    scale = np.ones(_blocks(form), np.float32) if form.scale is None else np.asarray(form.scale)
    if steps.unit != 1:
        scale = _times(scale, steps.unit)
    if form.zero is None:
        return scale, None
    zero, found = np.asarray(form.zero), whole_levels(form.values or ())
    if found is not None and (steps.unit != 1 or found[0][0]):
        zero = zero.astype(np.float64) / steps.unit - found[0][0]
    return np.broadcast_to(scale, _blocks(form)), np.broadcast_to(zero, _blocks(form))


def grid_of(form: Codes, layout: str | None, kind: Kind, table: UInt[np.ndarray, " levels"], heads: int = 0) -> Grid:
    """A grid with the codes of another program.

    Args:
        form: in the working layout, in numpy.
        layout: of its axes.
        kind: as `kind_of` says.
        table: the other program's code for each of the form's.
        heads: as in `Name`.
    """
    codes = form.codes if (table == np.arange(table.size)).all() else table[form.codes]
    scale, zero = in_steps(form, kind.steps)
    order, groups = rotary_order(kind.outputs, heads), (kind.outputs, kind.inputs // kind.group)

    def each(numbers: np.ndarray) -> np.ndarray:
        return np.broadcast_to(per_row(numbers, form.shape, str(layout)), groups)[order]

    return Grid(as_matrix(codes, layout)[order], each(scale), None if zero is None else each(zero))


def _times(scale: Float[np.ndarray, "..."], unit: float) -> Float[np.ndarray, "..."]:
    """scale * unit in the same dtype if that is exact, else in float32."""
    wide = scale.astype(np.float64) * unit
    same = wide.astype(scale.dtype)
    return same if (same.astype(np.float64) == wide).all() else wide.astype(np.float32)


def matrix_shape(shape: Sequence[int], layout: str | None) -> tuple[int, int]:
    """Outputs and inputs of a leaf.

    Raises:
        ValueError: no layout, or one with a window.
    """
    if layout is None:
        raise ValueError(
            f"expected a name that says which axes of {list(shape)} are outputs and inputs, got none; say "
            "lcq.io.Name('PATTERN', 'TENSOR', layout='io'), or layout='oi'"
        )
    if len(shape) < 2:
        raise ValueError(f"expected codes of a matrix, got those of shape {list(shape)}; leave this leaf as it is")
    axes = letters(layout, len(shape))
    if set(axes) != {"o", "i"}:
        raise ValueError(f"expected a matrix, got axes {axes!r} of {list(shape)}; other programs' windows are no codes")
    outputs, inputs = (math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == which) for which in "oi")
    return outputs, inputs


def as_matrix(array: np.ndarray, layout: str | None) -> np.ndarray:
    """A leaf as a matrix [outputs, inputs]."""
    shape = matrix_shape(array.shape, layout)
    axes = letters(str(layout), array.ndim)
    return array.transpose([i for which in "oi" for i, axis in enumerate(axes) if axis == which]).reshape(shape)


def _group(shape: Sequence[int], counts: Sequence[int], layout: str) -> int:
    """Inputs that share a number: all, or neighbours along the last axis of inputs."""
    axes = letters(layout, len(shape))
    inputs = [(n, count) for n, count, axis in zip(shape, counts, axes, strict=True) if axis == "i"]
    if all(count == 1 for _, count in inputs):
        return math.prod(n for n, _ in inputs)
    length, count = inputs[-1]
    return length // count


def per_row(numbers: np.ndarray, shape: Sequence[int], layout: str) -> np.ndarray:
    """One number for each block of a leaf as one for each output, and each group of `_group` inputs."""
    axes, cut = letters(layout, len(shape)), _group(shape, numbers.shape, layout)
    inputs = math.prod(n for n, axis in zip(shape, axes, strict=True) if axis == "i")
    last = axes.rindex("i")
    for i, (length, axis) in enumerate(zip(shape, axes, strict=True)):
        if axis == "o" or (cut < inputs and i != last):
            numbers = np.repeat(numbers, length // numbers.shape[i], axis=i)
    return as_matrix(numbers, layout)


def rotary_order(outputs: int, heads: int) -> np.ndarray | slice:
    """Of outputs whose rotary pairs are halves of a head, which go where: pairs side by side.

    Raises:
        ValueError: heads that do not divide the outputs into pairs.

    Example:
        >>> rotary_order(8, 2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    if not heads:
        return slice(None)
    if outputs % (2 * heads):
        raise ValueError(f"expected outputs of {heads} heads of rotary pairs, got {outputs}; correct heads=")
    return np.arange(outputs).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def rounded(numbers: Float[np.ndarray, "..."], dtype: str) -> Float[np.ndarray, "..."]:
    """Scales in another format.

    Raises:
        ValueError: scales that overflow, or become 0.
    """
    with np.errstate(over="ignore"):
        made = numbers.astype(np.dtype(dtype))
    if not np.isfinite(made).all() or ((made == 0) & (numbers != 0)).any():
        sizes = np.abs(numbers[numbers != 0].astype(np.float64))
        raise ValueError(
            f"expected scales that {dtype} holds, got some from {sizes.min():.1e} to {sizes.max():.1e}; multiply these "
            "weights by a number, or choose a format with other scales"
        )
    return made


def moved(codes: UInt[np.ndarray, "rows groups g"], levels: Float[np.ndarray, " k"], new: Lines, old: Lines) -> float:
    """How far weights scale level(code) + shift are from what they were, ||w' - w|| / ||w||."""
    none = np.zeros((1, 1))
    (scale, shift), (before, at) = ([none if a is None else a.astype(np.float64) for a in line] for line in (new, old))
    if (scale == before).all() and (shift == at).all():
        return 0.0
    lines = [[np.broadcast_to(a, scale.shape) for a in line] for line in ((scale - before, shift - at), (before, at))]
    totals, many = [0.0, 0.0], max(1, _CHUNK // max(codes[:1].size, 1))
    for first in range(0, len(codes), many):
        rows = slice(first, first + many)
        values = levels.astype(np.float32)[codes[rows]]
        for i, (factor, added) in enumerate(lines):
            line = values * factor[rows, :, None].astype(np.float32) + added[rows, :, None].astype(np.float32)
            totals[i] += float(np.vdot(line, line))
    return math.sqrt(totals[0] / totals[1]) if totals[1] else 0.0


def whole_zeros(zero: Num[np.ndarray, "*groups"], bits: int) -> UInt[np.ndarray, "*groups"]:
    """Zeros as whole numbers below 2^bits.

    Raises:
        ValueError: others.
    """
    whole = np.round(zero)
    if not ((whole == zero) & (whole >= 0) & (whole < 1 << bits)).all():
        raise ValueError(
            f"expected zeros that are whole and below {1 << bits}, got some from {zero.min():.4g} to {zero.max():.4g}; "
            "compress with lcq.Uniform(bits, zero_point=True), or choose GGUF's Q4_1"
        )
    return whole.astype(np.uint8)
