"""A cold start for k-means: a histogram stands in for the data, and its density^(1/3) quantiles for a random start.

The centres of an optimal codebook have a density proportional to f^(1/3), f the density of the data (Panter & Dite 1951;
Gersho & Gray 1992, section 5.6). Bins are equal in y = u / (1 + |u|), u = (x - mean) / s, s the mean of |x - mean|
times 4: nearly equal in x where the data are, wide in the tails, and no range to find first.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lcq.base import Cut, blocks
from lcq.schemes.lloyd import Points, cell_sum

_BINS = 4096
_COARSE = 64
_SPREAD = 4.0


def summarise(cut: Cut, k: int) -> tuple[Points, Float[Array, "*stat k"]]:
    """The data as weighted centres of bins, and k levels to start from.

    Args:
        cut: leaves that share the levels.
        k: how many levels.

    Returns:
        One leaf of points, [*counts of the first leaf, bins]; the data themselves where blocks are too short for a
        histogram to be shorter. Ascending levels for every block of these points.
    """
    size = sum(b.size for b in cut.blocks)
    fine = max(_BINS, 16 * k)
    bins = fine if size > 2 * fine else min(_COARSE, 1 << (size // 8).bit_length())
    mean = cut.sum([x / size for x in cut.leaves])
    scale = _SPREAD * cut.sum([jnp.abs(x - m) / size for x, m in zip(cut.leaves, cut.spread(mean), strict=True)])
    safe = jnp.where(scale > jnp.finfo(scale.dtype).tiny, scale, 1)
    count: Array | int = 0
    for x, m, s, block in zip(cut.leaves, cut.spread(mean), cut.spread(safe), cut.blocks, strict=True):
        y = (x - m) / (s + jnp.abs(x - m))
        place = jnp.clip((y + 1) * (bins / 2), 0, bins - 1).astype(jnp.uint16)
        count += cell_sum(jnp.ones(x.shape, jnp.int32), place, bins, block.stat).reshape(*cut.counts[0], 1, bins)
    mean, scale = (a.reshape(*cut.counts[0], 1, 1) for a in (mean, scale))
    levels = mean + scale * _quantiles(count, k)
    if bins < fine:
        return Points(cut), levels.reshape(*cut.blocks[0].stat, k)
    x = (mean + scale * _stretch((2 * jnp.arange(bins) + 1) / bins - 1))[..., 0, :]
    counts = (*cut.counts[0], 1)
    return Points(Cut((x,), (blocks(x.shape, counts),), (counts,)), (count[..., 0, :],)), levels


def _quantiles(count: Int[Array, "*counts bins"], k: int) -> Float[Array, "*counts k"]:
    """Quantiles (i + 1/2)/k of the measure f^(1/3) du, f from at most 64 bins, in units of u."""
    bins = min(_COARSE, count.shape[-1])
    mass = jnp.sum(count.reshape(*count.shape[:-1], bins, -1), -1).astype(jnp.float32)
    width = 2 / bins / (1 - jnp.abs((2 * jnp.arange(bins) + 1) / bins - 1)) ** 2
    mass = jnp.cbrt(mass * width**2)
    below = jnp.cumsum(mass, -1)
    target = (jnp.arange(k) + 0.5) / k * below[..., -1:]
    at = jnp.minimum(jnp.sum(below[..., None, :] < target[..., None], -1), bins - 1)
    rest = (jnp.take_along_axis(below, at, -1) - target) / jnp.take_along_axis(mass, at, -1)
    return _stretch(2 * (at + 1 - jnp.clip(rest, 0, 1)) / bins - 1, 1 / bins)


def _stretch(y: Array, margin: float = 0.0) -> Array:
    """u for y = u / (1 + |u|), kept away from infinity."""
    y = jnp.clip(y, margin - 1, 1 - margin)
    return y / (1 - jnp.abs(y))
