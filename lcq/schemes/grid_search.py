"""The scale of a grid of whole numbers around zero, for blocks that are long enough: candidates side by side.

    E(a) = sum_i (x_i - a c_i)^2,    c_i = clip(round(x_i / a), l, u)

Few candidates are enough, since the magnitudes say where to look: a min(-l, u) from their mean to a little above the
largest, where nothing is cut off any more. A first search gives the longer side of the grid to the larger end of the
block, a second one looks around the best of both signs. Last, its codes get their best scale, if that is better.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from lcq.schemes.grid_sums import Everywhere, Grid, Rows, best_of, searched, spaced
from lcq.schemes.grouped import Cut
from lcq.schemes.scales import power_of_two

SHORTEST = 32
"""Numbers of a block from which this search is good enough; below, errors are too rugged for few candidates."""

_COLD = 40
"""Candidates of the first search, over the whole range; twice as many for grids of more than 16 values."""

_FEW = 16
"""Those over the whole range beside the ones around an earlier scale."""

_NEAR = 4
"""Candidates above the best so far, and below."""

_BEYOND = 1.05
"""How far scales are tried beyond the one that cuts nothing off."""

_ALIKE = 1.2
"""Ratio of the sides of a grid up to which the larger end tells the sign well enough for a start."""

_STEP = 1.015
"""Ratio of the candidates around an earlier scale."""


def search_grid(whole: Cut, grid: Grid, warm: Array | None = None) -> Array:
    """The scale per block that minimises E, negative where the mirrored grid is better; at least as good as `warm`.

    Args:
        whole: leaves cut into the blocks that share a scale, without an importance: a few that weigh most are as
            rugged as a short block.
        grid: low <= -1, high >= 1.
        warm: scales to start from.
    """

    return searched(whole, grid, _search, warm)


def _search(numbers: Everywhere | Rows, warm: Array | None) -> Array:
    grid = numbers.grid
    above, below = numbers.tops()
    unit = power_of_two(jnp.maximum(above, below))
    above, below, numbers = above / unit, below / unit, numbers.over(unit)
    longer, shorter = max(-grid.low, grid.high), min(-grid.low, grid.high)
    high = _BEYOND * jnp.maximum(above, below) / shorter
    low = jnp.minimum(numbers.mean() / shorter, high)
    least, range_ = jnp.log(jnp.where(low > 0, low, 1)), jnp.log(jnp.where(low > 0, high / low, 1))
    many = (_COLD if longer <= 8 else 2 * _COLD) if warm is None else _FEW
    tried = spaced(jnp.ones_like(high), least, range_ / (many - 1), range(many))
    if longer > shorter:
        larger = jnp.where((above > below) == (-grid.low > grid.high), -tried, tried)
        tried = larger if longer <= _ALIKE * shorter else jnp.concatenate([tried, -tried])
    around, step = [p for p in range(-_NEAR, _NEAR + 1) if p], range_ / (many - 1) / (_NEAR + 1)
    if warm is not None:
        warm = warm / unit
        near = spaced(warm, jnp.zeros_like(step), jnp.full_like(step, math.log(_STEP)), around)
        tried, step = jnp.concatenate([warm[None], near, tried]), jnp.full_like(step, math.log(_STEP) / 3)
    best = best_of(numbers, (tried,))
    tried = spaced(best[0], jnp.zeros_like(step), step, around)
    both = [tried] if longer == shorter else [tried, -best[0][None], -tried]
    best = best_of(numbers, (jnp.concatenate(both),), best)
    return best_of(numbers, (numbers.fit(best[0])[None],), best)[0] * unit
