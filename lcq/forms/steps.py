"""Scales and least values in few bits: whole multiples of units that many blocks share.

    a = A s,    m = M u,    s and u whole numbers from 0 to 2^b - 1,    Delta = a q - m

A unit is the largest of the numbers that share it over 2^b - 1, rounded to 11 bits. Its multiples are exact in float32,
so the same units and multiples are found again in a and m; and the last bits of sums, which depend on how a leaf is
sharded, seldom matter.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8


class Steps(NamedTuple):
    """What is stored of the scales and zeros of blocks.

    Attributes:
        scale: s.
        least: u.
        units: A and M, one of each for the blocks along some axes.
    """

    scale: UInt8[Array | np.ndarray, "*blocks"]
    least: UInt8[Array | np.ndarray, "*blocks"]
    units: Float[Array | np.ndarray, "2 *some"]


def steps_of(
    scale: Float[Array | np.ndarray, "*blocks"],
    zero: Float[Array | np.ndarray, "*blocks"],
    bits: int,
    along: tuple[int, ...],
) -> Steps:
    """The nearest multiples; of a scale that is not 0 at least one.

    Args:
        scale: a, at least 0.
        zero: m / a, at least 0.
        bits: b, at most 8.
        along: axes along which blocks share units, counted from the end.
    """
    top = (1 << bits) - 1
    scale, zero = (jnp.asarray(a, jnp.float32) for a in (scale, zero))
    least = scale * zero
    units = [jax.lax.reduce_precision(a.max(along, keepdims=True) / top, 8, 10) for a in (scale, least)]
    s, u = (jnp.round(a / jnp.where(unit > 0, unit, 1)) for a, unit in zip((scale, least), units, strict=True))
    s = jnp.clip(s, (scale > 0).astype(s.dtype), top)
    return Steps(s.astype(jnp.uint8), jnp.clip(u, 0, top).astype(jnp.uint8), jnp.stack(units))


def from_steps(steps: Steps) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"]]:
    """Scales and zeros, for which `steps_of` gives the same again."""
    units = jnp.asarray(steps.units)
    scale, least = (unit * jnp.asarray(a, jnp.float32) for unit, a in zip(units, steps[:2], strict=True))
    return scale, jnp.where(scale > 0, least / jnp.where(scale > 0, scale, 1), 0)


def in_steps(
    scale: Float[Array | np.ndarray, "*blocks"],
    zero: Float[Array | np.ndarray, "*blocks"],
    bits: int,
    along: tuple[int, ...],
) -> tuple[Float[Array, "*blocks"], Float[Array, "*blocks"]]:
    """Scales and zeros as they can be stored."""
    return from_steps(steps_of(scale, zero, bits, along))
