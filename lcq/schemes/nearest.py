"""The nearest level of a fixed codebook.

    code(x) = argmin_k |x - a c_k|

A tie goes to the level nearer to zero, but away from zero itself, and at zero to the positive one.
"""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes


def thresholds(values: tuple[float, ...]) -> np.ndarray:
    """t_1 < .. < t_{K-1} in float32 with code(x) = #{k: x >= t_k} for every float32 x, ties as `Levels` says.

    x >= m and x > m for an exact midpoint m, which may fall between two float32 numbers, both become x >= t with t the
    least float32 that satisfies them.
    """
    c = np.asarray(values, np.float64)
    cuts = []
    for low, high in itertools.pairwise(c):
        middle = (low + high) / 2
        t = np.float32(middle)
        if np.float64(t) < middle:
            t = np.nextafter(t, np.float32(np.inf))
        upwards = low == 0 if middle > 0 else high != 0
        if np.float64(t) == middle and not (upwards or middle == 0):
            t = np.nextafter(t, np.float32(np.inf))
        cuts.append(t)
    return np.asarray(cuts, np.float32)


def nearest(x: Float[Array, "..."], values: tuple[float, ...]) -> Array:
    """Codes of the nearest levels, uint8 or uint16."""
    return _count(x, [jnp.asarray(t, x.dtype) for t in thresholds(values)], len(values))


def nearest_scaled(x: Array, values: tuple[float, ...], a: Array) -> Array:
    """Codes of the nearest of a * values, for a of either sign; a broadcasts against x."""
    if not mirrored(values):
        x, a = jnp.where(a < 0, -x, x), jnp.abs(a)
    if is_grid(values) and values[0] <= 0 <= values[-1]:  # round instead of comparing
        u = x / jnp.where(a > 0, a, 1)
        size = jnp.abs(u)
        whole = jnp.where(size == 0.5, 1, jnp.ceil(size - 0.5))
        codes = jnp.clip(jnp.where(u < 0, -whole, whole), values[0], values[-1]) - values[0]
        return codes.astype(jnp.int32).astype(code_dtype(len(values)))
    return _count(x, [a * jnp.asarray(t, x.dtype) for t in thresholds(values)], len(values))


def level_near(x: Array, values: tuple[float, ...], a: Array) -> Array:
    """The level c for which a c is nearest to x; of two as near either."""
    if is_grid(values):
        return jnp.clip(jnp.round(x * (1 / jnp.where(a == 0, 1, a))), values[0], values[-1])
    return Codes(nearest_scaled(x, values, a), values=values).dense()


def is_grid(values: tuple[float, ...]) -> bool:
    """Whether a codebook is consecutive whole numbers."""
    return values == tuple(range(int(values[0]), int(values[0]) + len(values)))


def mirrored(values: tuple[float, ...]) -> bool:
    """Whether a codebook is its own mirror image, so that the sign of its scale does not matter."""
    return values == tuple(-v for v in reversed(values))


def _count(x: Array, cuts: list[Array], k: int) -> Array:
    if k > 64 and all(t.size == 1 for t in cuts):
        t = jnp.stack([t.reshape(()) for t in cuts])
        return jnp.searchsorted(t, x, side="right").astype(code_dtype(k))
    codes = jnp.zeros(x.shape, code_dtype(k))
    for t in cuts:
        codes += (x >= t).astype(codes.dtype)
    return codes


def code_dtype(k: int) -> Any:
    return jnp.uint8 if k <= 256 else jnp.uint16
