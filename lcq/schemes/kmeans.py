"""Learned codebooks: one-dimensional k-means."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.base import Form, Quantizer
from lcq.blocks import Cut, Per, cut
from lcq.forms import Codes
from lcq.schemes.exact_kmeans import best_levels
from lcq.schemes.histogram import explore, summarise
from lcq.schemes.lloyd import Centres, assign, descend, lloyd_pass

_COLD = 150
"""Passes over a histogram, or over data that are no longer than one; a fifth of them over many short blocks."""

_SHORT = 1 << 18
"""Numbers up to which all of these passes are affordable."""

_WARM = 3
"""Passes over the data, at most, before the one that gives the codes; few, because a C step has a warm start."""


@dataclasses.dataclass(frozen=True)
class KMeans(Quantizer):
    """Projection on a codebook of K learned values: Pi(x) = argmin_{c, z} sum_i h_i (x_i - c_{z_i})^2, h = 1 or given.

    By default Lloyd's algorithm, sort-free, jit-able and vmap-able: a good local minimum, and x itself if x has at
    most K distinct values. Cold, it starts from density^(1/3) quantiles and converges on a histogram before it sees the
    data; warm, from the previous codebook: a few passes over the data, none of which raises the error. Sums of |x| must
    be finite in float32.

    Attributes:
        k: how many levels, 1 to 65,536.
        fixed: levels among the k that are given and do not move: (0.0,) prunes and quantizes at once.
        exact: the global minimum in float64 by dynamic programming, on the host; any warm start is ignored.
        per: what shares one codebook, see `lcq.blocks.block_counts`.

    Raises:
        ValueError: k out of range; fixed levels that are not finite and distinct, or more than k.

    Example:
        >>> KMeans(2).project(jnp.array([1.0, 2.0, 3.0, 9.0])).dense()
        Array([2., 2., 2., 9.], dtype=float32)
        >>> KMeans(2, fixed=(0,)).project(jnp.array([1.0, 2.0, 3.0, 9.0])).dense()
        Array([0., 0., 0., 9.], dtype=float32)

    Source: Lloyd 1982; Carreira-Perpinan & Idelbayev, arXiv 1707.04319, section 4.1; exact: Wu & Rokne 1989.
    """

    k: int
    fixed: tuple[float, ...] = ()
    exact: bool = False
    per: Per = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or not 1 <= self.k <= 65536:
            raise ValueError(f"wanted 1 to 65,536 levels; got k={self.k!r}; pass an int in that range")
        fixed = tuple(sorted(float(np.float32(v)) for v in self.fixed))
        if not all(map(math.isfinite, fixed)) or len(set(fixed)) < len(fixed) or len(fixed) > self.k:
            raise ValueError(
                f"wanted at most k={self.k} distinct finite fixed levels; got {self.fixed!r}; drop some or raise k"
            )
        object.__setattr__(self, "fixed", fixed)
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))

    @property
    def host(self) -> bool:
        return self.exact

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any, weights: Any = None) -> tuple[Form, ...]:
        del mu
        whole = cut(xs, self.per, weights)
        codes, levels = self.fit(whole, None if previous is None else previous[0].levels)
        leaves = zip(xs, codes, whole.counts, strict=True)
        return tuple(
            Codes(c.reshape(x.shape), levels=levels.reshape(*count, self.k), dtype=str(x.dtype))
            for x, c, count in leaves
        )

    def fit(self, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
        """Codes of every leaf, cut into blocks, and the levels they share; `warm` are those of an earlier fit."""
        return _solve_exactly(self, whole) if self.exact else _fit(self, whole, warm)


def _fit(scheme: KMeans, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
    """Codes of every leaf in blocks, and the levels they share."""
    stat, passes = whole.blocks[0].stat, _WARM
    learned = scheme.k - len(scheme.fixed)
    if warm is not None:
        centres = _freeze(warm.reshape(*stat, scheme.k), scheme.fixed)
    elif learned == 0:
        centres = _merge(jnp.zeros((*stat, 0), whole.leaves[0].dtype), scheme.fixed)
    else:
        short, levels = summarise(whole, learned)
        many = _COLD if sum(x.size for x in short.leaves) <= _SHORT else _COLD // 5
        centres = explore(short, _merge(levels, scheme.fixed), many)
        centres = Centres(*(a.reshape(*stat, scheme.k) for a in centres))
        passes = many if short is whole else _WARM
    if learned:
        centres = descend(whole, centres, passes)
    codes, centres, _ = lloyd_pass(whole, centres)
    return codes, centres.levels


def _solve_exactly(scheme: KMeans, whole: Cut) -> tuple[tuple[Array, ...], Array]:
    """The same by dynamic programming over every block, on the host."""
    rows, weights = whole.rows()
    each = [None] * len(rows) if weights is None else weights
    levels = np.stack([best_levels(x, scheme.k, scheme.fixed, h) for x, h in zip(rows, each, strict=True)])
    levels = levels.astype(whole.leaves[0].dtype).reshape(*whole.blocks[0].stat, scheme.k)
    shaped = [jnp.asarray(levels.reshape(*b.stat, scheme.k)) for b in whole.blocks]
    return tuple(assign(x, level) for x, level in zip(whole.leaves, shaped, strict=True)), shaped[0]


def _merge(levels: Array, fixed: tuple[float, ...]) -> Centres:
    """Free levels together with the fixed ones, in order."""
    frozen = jnp.zeros_like(levels.sum(-1, keepdims=True)) + jnp.asarray(fixed, levels.dtype)  # sharded like levels
    free = jnp.concatenate([jnp.ones_like(levels, bool), jnp.zeros_like(frozen, bool)], -1)
    return Centres(*jax.lax.sort((jnp.concatenate([levels, frozen], -1), free), num_keys=2))


def _freeze(levels: Array, fixed: tuple[float, ...]) -> Centres:
    """Levels of an earlier solution, the nearest one to each fixed level being frozen there."""
    free = jnp.ones_like(levels, bool)
    for value in fixed:
        distance = jnp.where(free, jnp.abs(levels - value), jnp.inf)
        here = jnp.arange(levels.shape[-1]) == jnp.argmin(distance, -1)[..., None]
        levels, free = jnp.where(here, value, levels), free & ~here
    return Centres(*jax.lax.sort((levels, free), num_keys=2)) if fixed else Centres(levels, free)
