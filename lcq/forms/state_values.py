"""What the states of a trellis stand for: the code of a `Trellis`.

A state is a number of `memory` bits, the last that were written down a path. Its value is near that of a Gaussian of
variance one, whatever the state before it was; so each code is a table of 2^memory numbers in no order:

computed    an affine function of the state mod 2^32, of which the four bytes are added up: no table, 8 operations on
            integers. Four equal steps of 0..255 have the mean 510 and the variance 4 (256^2 - 1) / 12
gaussian    the quantiles (i + 1/2) / 2^memory of a Gaussian, shuffled
learned     numbers that are stored beside the codes

Source: computed codes, Tseng et al., QTIP, arXiv 2406.11235, section 3.1; the constants here are lcq's.
"""

import functools
from statistics import NormalDist
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt, UInt32

Code = Literal["computed", "gaussian", "learned"]

CODES: tuple[str, ...] = get_args(Code)

_TIMES, _PLUS = 2032882385, 2198257139
"""Of the computed code: of random ones those of least error on a Gaussian at 2 bits."""

_MIDDLE, _SPREAD = 510.0, (4 * (256**2 - 1) / 12) ** 0.5
"""Mean and standard deviation of the sum of four bytes."""

_SHUFFLE = 2654435769
"""Odd: so multiples of it mod 2^32 are all distinct, and their order shuffles the states."""


def state_values(states: UInt[Array, "*s"], memory: int, code: str, table: Array | None = None) -> Float[Array, "*s"]:
    """The value of every state, in float32 or the table's dtype.

    Args:
        states: below 2^memory.
        memory: bits of a state.
        code: one of `CODES`.
        table: of the learned code, one number for each state.

    Example:
        >>> state_values(jnp.arange(4, dtype=jnp.uint16), 2, "gaussian").tolist()
        [1.1503493785858154, -0.3186393678188324, -1.1503493785858154, 0.3186393678188324]
    """
    if code == "computed":
        return (byte_sum(states.astype(jnp.uint32)) - _MIDDLE) * (1 / _SPREAD)
    if code == "gaussian":
        table = jnp.asarray(gaussian_table(memory))
    assert table is not None
    return table[states]


def table_of(memory: int, code: str) -> np.ndarray:
    """The values of all states; of a learned code those that it starts from."""
    if code != "computed":
        return gaussian_table(memory)
    hashed = np.arange(1 << memory, dtype=np.uint64) * _TIMES + _PLUS
    total = ((hashed[:, None] >> np.arange(0, 32, 8, dtype=np.uint64)) & np.uint64(255)).sum(1)
    return ((total.astype(np.float32) - np.float32(_MIDDLE)) * np.float32(1 / _SPREAD)).astype(np.float32)


def byte_sum(states: UInt32[Array, "*s"]) -> Float[Array, "*s"]:
    """The sum of the four bytes of the hash, from 0 to 1020."""
    hashed = states * jnp.uint32(_TIMES) + jnp.uint32(_PLUS)
    pairs = (hashed & jnp.uint32(0x00FF00FF)) + ((hashed >> 8) & jnp.uint32(0x00FF00FF))
    total = (pairs + (pairs >> 16)) & jnp.uint32(0x7FF)
    return jax.lax.bitcast_convert_type(total, jnp.int32).astype(jnp.float32)


def from_byte_sum(y: Array, total: Array) -> Array:
    """sum_k x_k value_k, of y = sum_k x_k byte_sum_k and total = sum_k x_k."""
    return (y - _MIDDLE * total) * (1 / _SPREAD)


@functools.cache
def gaussian_table(memory: int) -> np.ndarray:
    """Quantiles of a Gaussian in the order of a hash of the states."""
    size = 1 << memory
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / size) for i in range(size)], np.float32)
    hashed = (np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_SHUFFLE)) & np.uint64(0xFFFFFFFF)
    return quantiles[np.argsort(np.argsort(_mixed(hashed)))]


def _mixed(x: np.ndarray) -> np.ndarray:
    """One number of 32 bits for each, in no order: steps that can all be undone, so distinct ones stay distinct."""
    mask = np.uint64(0xFFFFFFFF)
    for shift, times in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        x = ((x ^ (x >> np.uint64(shift))) * np.uint64(times)) & mask
    return x
