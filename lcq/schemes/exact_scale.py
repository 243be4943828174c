"""The best scale of a fixed codebook in float64 on the host: a sweep over all scales where a code changes.

    a = argmin_a sum_i h_i min_k (x_i - a c_k)^2

Source: Idelbayev et al., CVPR 2021.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.schemes.grouped import Cut
from lcq.schemes.nearest import mirrored


def exact_scales(whole: Cut, values: tuple[float, ...], dtype: str | None) -> Array:
    """`exact_scale` of every block, on the host; of the numbers of a format beside it the best."""
    rows, importance = whole.rows()
    scales = []
    for i, row in enumerate(rows):
        h = None if importance is None else importance[i]
        near = exact_scale(row, values, h) * np.array([1, 1 - 2.0**-8, 1 + 2.0**-8][: 1 if dtype is None else 3])
        near = near.astype(jnp.dtype(dtype or np.float64)).astype(np.float64)
        scales.append(near[np.argmin([_error(row, values, a, h) for a in near])])
    return jnp.asarray(np.array(scales).reshape(whole.blocks[0].stat), whole.leaves[0].dtype)


def _error(x: np.ndarray, values: tuple[float, ...], a: float, importance: np.ndarray | None) -> float:
    """sum_i h_i min_k (x_i - a c_k)^2."""
    levels = np.sort(a * np.asarray(values, np.float64))
    near = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return float(((x - near) ** 2 * (1 if importance is None else importance)).sum())


def exact_scale(x: np.ndarray, values: tuple[float, ...], importance: np.ndarray | None = None) -> float:
    """The a that minimises sum_i h_i min_k (x_i - a c_k)^2, in float64; h = 1 without an importance.

    Positive unless a negative one is better: that is the best for -x, negated.
    """
    h = np.ones_like(x) if importance is None else importance
    (a, gain), (b, other) = _sweep(x, values, h), (0.0, 0.0) if mirrored(values) else _sweep(-x, values, h)
    return a if gain >= other else -b


def _sweep(x: np.ndarray, values: tuple[float, ...], h: np.ndarray) -> tuple[float, float]:
    """The best a >= 0, and the gain A^2/B that is to be maximised.

    Sweeps a from infinity down: every x_i starts at the level nearest to zero and moves outward where a passes x_i/m,
    m a midpoint of the sign of x_i; A and B then only grow. Source: Idelbayev et al., CVPR 2021; the sweep is lcq's.
    """
    c = np.asarray(values, np.float64)
    middles, gains, gains2 = (c[1:] + c[:-1]) / 2, np.diff(c), np.diff(c**2)
    raise_at, da, db = [], [], []
    up, down = ((x[side], h[side]) for side in (x > 0, x < 0))
    for m, g, g2 in zip(middles, gains, gains2, strict=True):
        if m != 0:
            (side, often), sign = (up, 1.0) if m > 0 else (down, -1.0)
            raise_at.append(side / m)
            da.append(sign * side * often * g)
            db.append(sign * often * g2)
    start_up = c[np.searchsorted(middles, 0, side="right")]
    start_down = c[np.searchsorted(middles, 0, side="left")]
    a0 = start_up * (up[0] * up[1]).sum() + start_down * (down[0] * down[1]).sum()
    b0 = start_up**2 * up[1].sum() + start_down**2 * down[1].sum()
    if raise_at:
        order = np.argsort(-np.concatenate(raise_at), kind="stable")
        a0 = np.concatenate([[a0], a0 + np.cumsum(np.concatenate(da)[order])])
        b0 = np.concatenate([[b0], b0 + np.cumsum(np.concatenate(db)[order])])
    numerator, denominator = np.atleast_1d(a0), np.atleast_1d(b0)
    fine = (numerator > 0) & (denominator > 0)
    gain = np.where(fine, numerator**2 / np.where(fine, denominator, 1), 0)
    best = int(np.argmax(gain))
    return (float(numerator[best] / denominator[best]) if gain[best] > 0 else 0.0), float(gain[best])
