"""How many of ten billion weights: whole numbers of 48 bits in two limbs, where JAX without x64 has none above 2^32.

    n = 2^h high + low,    low < 2^h,    h half the bits of a limb

Sums of at most 2^h low limbs fit into a limb, so marks are counted a few axes at a time and carried in between: sums
over whole axes, which on a mesh are small sums over its devices.
"""

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt

LIMB = jnp.uint32
"""What holds a limb. A test forces a shorter one."""

WHOLE = jnp.int32
"""What counts the numbers of cells, where these are few enough."""


class Count(NamedTuple):
    """A whole number, 2^h high + low, or an array of such."""

    high: UInt[Array, "..."]
    low: UInt[Array, "..."]


def count_of(number: int | Int[Array, "..."] | UInt[Array, "..."]) -> Count:
    """A number >= 0, in limbs; as an array it has at most the bits of one limb."""
    if isinstance(number, int):
        return Count(LIMB(number >> _half()), LIMB(number % (1 << _half())))
    return _carried(jnp.zeros_like(number, LIMB), number.astype(LIMB))


def count_marks(marks: Iterable[Bool[Array, "..."]]) -> Count:
    """How many marks are set, in all arrays."""
    return functools.reduce(plus, map(_marked, marks))


def count_parts(parts: Sequence[Int[Array, "*stat"]]) -> Count:
    """The sum of fewer than 2^h arrays of numbers >= 0, elementwise."""
    some = [count_of(part) for part in parts]
    return _carried(
        functools.reduce(operator.add, (c.high for c in some)), functools.reduce(operator.add, (c.low for c in some))
    )


def plus(a: Count, b: Count) -> Count:
    return _carried(a.high + b.high, a.low + b.low)


def minus(a: Count, b: Count) -> Count:
    """a - b of a >= b."""
    low = a.low + LIMB(1 << _half()) - b.low
    return _carried(a.high - b.high - LIMB(1), low)


def at_least(a: Count, b: Count) -> Bool[Array, "..."]:
    """a >= b."""
    return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def smaller(a: Count, b: Count) -> Count:
    """min(a, b)."""
    return Count(*(jnp.where(at_least(a, b), y, x) for x, y in zip(a, b, strict=True)))


def as_float(count: Count, dtype: DTypeLike) -> Float[Array, "..."]:
    """The nearest numbers of a format with at least h bits."""
    return count.high.astype(dtype) * (1 << _half()) + count.low.astype(dtype)


def _half() -> int:
    """h."""
    return 4 * jnp.dtype(LIMB).itemsize


def _carried(high: Array, low: Array) -> Count:
    """The number, whose low limb may be full."""
    return Count(high + (low >> _half()), low & LIMB((1 << _half()) - 1))


def _marked(mark: Bool[Array, "..."]) -> Count:
    """Of one array. Along the longest axis that allows it marks are counted in 16 bits: counts start as numbers of the
    marks' shape, and of 32 bits those would be as large as the scores."""
    most = 1 << _half()
    short = [axis for axis, length in enumerate(mark.shape) if length < most]
    axis = max(short or range(mark.ndim), key=lambda axis: mark.shape[axis], default=None)
    if axis is None:
        return count_of(mark.astype(LIMB))
    part = jnp.sum(mark, axis, dtype=jnp.uint16 if short else LIMB)
    count = count_of(part)
    while count.low.ndim:
        count = _summed(count, most)
    return count


def _summed(count: Count, most: int) -> Count:
    """Sums over the last axes, as many as fit, or over parts of one that is too long."""
    shape = count.low.shape
    first = next((i for i in range(len(shape)) if math.prod(shape[i:]) <= most), len(shape) - 1)
    axes = tuple(range(first, len(shape)))
    if shape[-1] <= most:
        return _carried(*(jnp.sum(limb, axes, dtype=LIMB) for limb in count))
    cuts = [(start, min(start + most, shape[-1])) for start in range(0, shape[-1], most)]
    parts = [Count(*(jax.lax.slice_in_dim(limb, *c, axis=-1) for limb in count)) for c in cuts]
    return functools.reduce(plus, (_carried(*(jnp.sum(limb, -1, dtype=LIMB) for limb in part)) for part in parts))
