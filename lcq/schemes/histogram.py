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


def summarise(cut: Cut, k: int) -> tuple[Points, Float[Array, "*counts k"]]:
    """The data as at most 4096 (or 16 k) weighted means of bins per block, and k levels to start from.

    Args:
        cut: leaves that share the levels.
        k: how many levels.

    Returns:
        One leaf of points of shape [*counts of the first leaf, bins], and ascending levels.
    """
    bins = 1 << (min(max(_BINS, 16 * k), sum(b.size for b in cut.blocks)).bit_length() - 1)
    size = sum(b.size for b in cut.blocks)
    mean = cut.sum([x / size for x in cut.leaves])
    offset = [x - m for x, m in zip(cut.leaves, cut.spread(mean), strict=True)]
    scale = _SPREAD * cut.sum([jnp.abs(d) / size for d in offset])
    safe = jnp.where(scale > jnp.finfo(scale.dtype).tiny, scale, 1)
    count, total = 0, 0
    for d, s, block in zip(offset, cut.spread(safe), cut.blocks, strict=True):
        y = d / (s + jnp.abs(d))
        place = jnp.clip((y + 1) * (bins / 2), 0, bins - 1).astype(jnp.int32)
        shape = (*cut.counts[0], bins)
        count = count + cell_sum(jnp.ones_like(place), place, bins, block.stat).reshape(shape)
        total = total + cell_sum(d, place, bins, block.stat).reshape(shape)
    centre = mean.reshape(cut.counts[0])[..., None]
    x = centre + total / jnp.maximum(count, 1)
    levels = centre + scale.reshape(centre.shape) * _quantiles(count, k)
    whole = Cut((x,), (blocks(x.shape, (*cut.counts[0], 1)),), ((*cut.counts[0], 1),))
    return Points(whole, (count,)), levels


def _quantiles(count: Int[Array, "*counts bins"], k: int) -> Float[Array, "*counts k"]:
    """Quantiles (i + 1/2)/k of the measure f^(1/3) du, f from coarse bins, in units of u."""
    bins = min(_COARSE, count.shape[-1])
    mass = jnp.sum(count.reshape(*count.shape[:-1], bins, -1), -1).astype(jnp.float32)
    edges = (2 * jnp.arange(bins) + 1) / bins - 1
    width = 2 / bins / (1 - jnp.abs(edges)) ** 2
    mass = jnp.cbrt(mass * width**2)
    below = jnp.cumsum(mass, -1)
    target = (jnp.arange(k) + 0.5) / k * below[..., -1:]
    at = jnp.minimum(jnp.sum(below[..., None, :] < target[..., None], -1), bins - 1)
    inside = 1 - (jnp.take_along_axis(below, at, -1) - target) / jnp.take_along_axis(mass, at, -1)
    y = jnp.clip(2 * (at + jnp.clip(inside, 0, 1)) / bins - 1, -1 + 1 / bins, 1 - 1 / bins)
    return y / (1 - jnp.abs(y))
