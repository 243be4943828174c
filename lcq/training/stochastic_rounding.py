"""Rounding to bfloat16 at random, with the right mean: sums of small steps are not lost in a short format.

    Q(x) = up(x) with probability (x - down(x)) / (up(x) - down(x)), else down(x):    E Q(x) = x

down and up are the neighbours of x in the format. To the nearest, a step below half of a unit in the last place would
never be taken, however often it is tried.

Source: Gupta et al., "Deep learning with limited numerical precision", arXiv 1502.02551; bits by the last
steps of MurmurHash3.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Int, UInt32

from lcq.forms.blocks import explicit_sharding


def stochastic_bfloat16(
    x: Float[Array, "..."], turn: Int[Array, ""], before: UInt32[Array, ""] | int = 0
) -> BFloat16[Array, "..."]:
    """x in bfloat16, up or down at random; what is beyond the format's range becomes its largest number.

    The draw is a hash of the place in the array and of the turn: no key is kept, and a sharded array draws what it
    draws alone.

    Args:
        x: any numbers, rounded to float32 first.
        turn: a number that changes from call to call.
        before: how many numbers come before, of an array that this is a part of.
    """
    x = x.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    raised = bits + (_draws(x, turn, before) & jnp.uint32(0xFFFF))  # of the magnitude: the sign is a bit of its own
    y = jax.lax.bitcast_convert_type((raised >> 16).astype(jnp.uint16), jnp.bfloat16)
    most = float(jnp.finfo(jnp.bfloat16).max)
    largest = jnp.where(jnp.abs(x) < most, x, jnp.where(jnp.isnan(x), x, jnp.sign(x) * most)).astype(jnp.bfloat16)
    return jnp.where(jnp.abs(x) < most, y, largest)


def _draws(x: Array, turn: Array, before: Array | int) -> UInt32[Array, "..."]:
    """32 bits for each place."""
    place = jnp.zeros_like(x, jnp.uint32)
    for axis in range(x.ndim):
        here = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis, out_sharding=explicit_sharding(x))
        place += here * jnp.uint32(math.prod(x.shape[axis + 1 :]) % (1 << 32))
    place += jnp.asarray(before, jnp.uint32)
    return _mixed(_mixed(place) + _mixed(turn.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))


def _mixed(h: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
