"""Codes whose levels are whole steps of a scale, value = scale (step[code] - zero): what other programs read.

A fixed codebook is a grid if all its levels are whole multiples of one number: {-1, 1}, {-1, 0, 1}, -8 .. 7, powers of
two.
"""

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Num, Shaped, UInt

from lcq.forms import Codes
from lcq.forms.bitpack import width

_MOST = 1 << 16
_CHUNK = 1 << 20
"""Weights at once, of which it is told how far they moved."""
_SLIP = 1e-5
"""How far, in units, a multiple may be from a number: a zero, kept as minimum / scale, is rounded to float32."""

Lines = tuple[np.ndarray, np.ndarray | None]
"""A scale for each group, and what is added."""


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


def offset_of(steps: Steps, bits: int) -> int:
    """The code of 0 in b bits: half of all without zeros, and 0 with."""
    return 0 if steps.shifted else 1 << (bits - 1)


def blocks_of(form: Codes) -> tuple[int, ...]:
    """How many blocks there are along each axis."""
    return next((tuple(a.shape) for a in (form.scale, form.zero) if a is not None), (1,) * len(form.shape))


def in_steps(form: Codes, steps: Steps) -> tuple[np.ndarray, np.ndarray | None]:
    """Scales of one step, and zeros in steps, for each block of the leaf."""
    scale = np.ones(blocks_of(form), np.float32) if form.scale is None else np.asarray(form.scale)
    if steps.unit != 1:
        scale = _times(scale, steps.unit)
    if form.zero is None:
        return scale, None
    zero, found = np.asarray(form.zero), whole_levels(form.values or ())
    if found is not None and (steps.unit != 1 or found[0][0]):
        zero = zero.astype(np.float64) / steps.unit - found[0][0]
    return np.broadcast_to(scale, blocks_of(form)), np.broadcast_to(zero, blocks_of(form))


def _times(scale: Float[np.ndarray, "..."], unit: float) -> Float[np.ndarray, "..."]:
    """scale * unit in the same dtype if that is exact, else in float32."""
    wide = scale.astype(np.float64) * unit
    same = wide.astype(scale.dtype)
    return same if (same.astype(np.float64) == wide).all() else wide.astype(np.float32)


def whole_zeros(zero: Num[np.ndarray, "*groups"], bits: int) -> UInt[np.ndarray, "*groups"]:
    """Zeros as whole numbers below 2^bits.

    Raises:
        ValueError: others.
    """
    whole = np.round(zero)
    if not ((whole == zero) & (whole >= 0) & (whole < 1 << bits)).all():
        raise ValueError(
            f"expected zeros that are whole and below {1 << bits}, got some from {zero.min():.4g} to {zero.max():.4g}; "
            "compress with lcq.Uniform(bits, zero_point=True) and without scale_bits, or choose GGUF's Q4_1"
        )
    return whole.astype(np.uint8)


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


def in_units(
    numbers: Float[np.ndarray, "*many groups"], multiples: Sequence[int]
) -> tuple[Int[np.ndarray, "*many groups"], Float[np.ndarray, "*many 1"]]:
    """Numbers as whole multiples of units in float16, one for all along the last axis, and those units.

    If all are multiples of one unit, as what came from such blocks is, the smallest that does is found; else they are
    the nearest multiples of that of which the largest is the first of `multiples`.

    Args:
        numbers: of either sign, or at least 0.
        multiples: that the largest may be, the first before all others.

    Raises:
        ValueError: units that overflow.

    Example:
        >>> whole, unit = in_units(np.array([[0.5, 15.5, 3.0]]), range(63, 0, -1))
        >>> whole.tolist(), unit.tolist()
        ([[2, 62, 12]], [[0.25]])
    """
    flat = numbers.astype(np.float64).reshape(-1, numbers.shape[-1])
    largest = np.take_along_axis(flat, np.abs(flat).argmax(-1)[:, None], -1)
    unit, left = largest / multiples[0], np.flatnonzero(largest)
    for many in multiples:
        with np.errstate(over="ignore"):
            tried = (largest[left] / many).astype(np.float16).astype(np.float64)
        apart = flat[left] / np.where(tried == 0, np.inf, tried)
        fits = (tried[:, 0] != 0) & (np.abs(apart - np.round(apart)) <= _SLIP).all(-1)
        unit[left[fits]] = tried[fits]
        left = left[~fits]
    halves, _ = cast(unit, np.dtype(np.float16))
    whole = np.round(flat / np.where(halves == 0, np.inf, halves.astype(np.float64)))
    whole = whole.clip(min(0, *multiples), max(multiples)).astype(np.int16)
    return whole.reshape(numbers.shape), halves.reshape(*numbers.shape[:-1], 1)


def cast(numbers: Shaped[np.ndarray, "..."], dtype: np.dtype) -> tuple[np.ndarray, float]:
    """Numbers in another format, and how far that moved them, ||x' - x|| / ||x||.

    Raises:
        ValueError: some that overflow.
    """
    if numbers.dtype == dtype:
        return numbers, 0.0
    with np.errstate(over="ignore"):
        made = numbers.astype(dtype)
    before = numbers.astype(np.float64)
    if not np.isfinite(made).all() and np.isfinite(before).all():
        raise ValueError(
            f"expected numbers that {dtype} holds, got some up to {np.abs(before).max():.1e}; choose another type"
        )
    norm = float(np.linalg.norm(before))
    return made, float(np.linalg.norm(made.astype(np.float64) - before)) / norm if norm else 0.0


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
