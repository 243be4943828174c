"""One fixed rotation for every length, without a matrix: signs, then a Hadamard and a Hartley transform.

    R = diag(s) T,    T = H_{2^a} (x) C_m / sqrt(N),    N = 2^a m, m odd
    H_1 = 1, H_2k = [[H_k, H_k], [H_k, -H_k]],    C_m[i, j] = cos(2 pi i j / m) + sin(2 pi i j / m)

T is symmetric and its own inverse, and no entry is larger than sqrt(2 / N). So R' x = T (s x) and R x = s (T x). Signs
are the highest bits of a hash of the place: (i + 1) 0x9E3779B1 + seed 0x85EBCA77, then twice x ^= x >> 16, x *=
0x7FEB352D, and x ^= x >> 16, all modulo 2^32; 1 is -1.

N numbers take N (p + q) multiplications, p q = N the two factors that T is cut into, p a power of two near sqrt(N).

Source: Sylvester's matrices; Hartley, Proc. IRE 30 (1942); signs and Hadamard for weights: Tseng et al., QuIP#, arXiv
2402.04396.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Inexact, Num

from lcq.forms.dtypes import own_promotion, wider

MOST = 2048
"""The largest odd factor m of a length: its matrix is kept whole."""


@own_promotion()
def turned(x: Num[Array, "..."], axes: Sequence[int], seed: int) -> Inexact[Array, "..."]:
    """R'x along some axes taken together, in float32 or wider; what x R is along the last one of a row.

    Example:
        >>> x = jnp.array([1.0, 0.0, 0.0, 0.0])
        >>> turned(x, (-1,), 0).round(4).tolist()
        [-0.5, -0.5, -0.5, -0.5]
        >>> bool(jnp.allclose(turned_back(turned(x, (-1,), 0), (-1,), 0), x, atol=1e-6))
        True
    """
    return _along(lambda rows: _transformed(rows * signs(rows.shape[-1], seed).astype(rows.dtype)), x, axes)


@own_promotion()
def turned_back(x: Num[Array, "..."], axes: Sequence[int], seed: int) -> Inexact[Array, "..."]:
    """R x along some axes taken together: undoes `turned`."""
    return _along(lambda rows: _transformed(rows) * signs(rows.shape[-1], seed).astype(rows.dtype), x, axes)


def check_length(length: int) -> None:
    """Raises ValueError if there is no rotation of so many numbers."""
    if length < 1:
        raise ValueError(f"expected at least one input, got {length}; leave an empty leaf out of the rules")
    if (odd := length // (length & -length)) > MOST:
        raise ValueError(
            f"expected a number of inputs whose odd factor is at most {MOST:,}, got {length:,} = {length // odd} x "
            f"{odd:,}; use the scheme without Rotated, or pad the inputs"
        )


def signs(size: int, seed: int) -> np.ndarray:
    """s, one for each place, int8.

    Example:
        >>> signs(8, 0).tolist()
        [-1, -1, -1, -1, 1, -1, -1, 1]
    """
    mask = np.uint64(0xFFFFFFFF)
    x = (np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B1) + np.uint64(seed * 0x85EBCA77 % 2**32)) & mask
    for _ in range(2):
        x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    x ^= x >> np.uint64(16)
    return (1 - 2 * (x >> np.uint64(31)).astype(np.int8)).astype(np.int8)


def _along(change: Callable[[Array], Array], x: Array, axes: Sequence[int]) -> Array:
    run = [axis % x.ndim for axis in axes]
    order = [*(axis for axis in range(x.ndim) if axis not in run), *run]
    moved = x.transpose(order)
    rows = moved.reshape(*moved.shape[: x.ndim - len(run)], -1).astype(wider(x.dtype, jnp.float32))
    return change(rows).reshape(moved.shape).transpose([int(i) for i in np.argsort(order)])


def _transformed(x: Inexact[Array, "*rows N"]) -> Inexact[Array, "*rows N"]:
    """T x."""
    p, q = _factors(x.shape[-1])
    cut = x.reshape(*x.shape[:-1], p, q)
    left, right = (jnp.asarray(_matrix(size), x.dtype) for size in (p, q))
    cut = jnp.matmul(jnp.matmul(left, cut, precision="highest"), right, precision="highest")
    return cut.reshape(x.shape)


def _factors(size: int) -> tuple[int, int]:
    """(p, q), p a power of two."""
    most, near = (size & -size).bit_length() - 1, round(math.log2(size) / 2)
    p = 1 << min(most, near)
    return p, size // p


@functools.lru_cache(maxsize=64)
def _matrix(size: int) -> np.ndarray:
    """H (x) C / sqrt(size), float64."""
    two = size & -size
    m = size // two
    angle = 2 * np.pi * (np.outer(np.arange(m), np.arange(m)) % m) / m
    made = np.cos(angle) + np.sin(angle)
    while len(made) < size:
        made = np.block([[made, made], [made, -made]])
    return made / math.sqrt(size)
