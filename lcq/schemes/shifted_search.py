"""The scale and zero of a grid of whole numbers that may be shifted: candidates side by side.

    E(a, z) = sum_i (x_i - a (q_i - z))^2,    q_i = clip(round(x_i / a + z), 0, l),    0 <= z <= l whole

Scales run from where the grid spans the mean magnitude to a little beyond the range [min(x, 0), max(x, 0)], and z puts
its ends where they are. Then neighbours of the best are tried, of the scale and of z; last, its codes get their best
scale, twice, if that is better.
"""

import math

import jax.numpy as jnp
from jaxtyping import Array

from lcq.schemes.grid_sums import Everywhere, Grid, Rows, best_of, searched, spaced
from lcq.schemes.grouped import Cut
from lcq.schemes.scales import power_of_two

_COLD = 40
"""Candidates of the first search, over the whole range; twice as many for grids of more than 16 values."""

_FEW = 16
"""Those over the whole range beside an earlier solution and the ones around it."""

_NEAR = 4
"""Candidates above the best so far, and below."""

_BEYOND = 1.05
"""How far scales are tried beyond the one that cuts nothing off."""

_STEP = 1.015
"""Ratio of the candidates around an earlier scale."""

_FITS = 2
"""Times that the codes get their best scale."""

Pair = tuple[Array, Array]
"""Scales a >= 0, and zeros."""


def search_shifted(whole: Cut, last: int, warm: Pair | None, dtype: str | None) -> Pair:
    """The scale and zero per block of least E; at least as good as `warm`.

    Args:
        whole: leaves cut into the blocks that share them, without an importance.
        last: l.
        warm: where to start from.
        dtype: the format of scales; only its numbers are tried.
    """
    return searched(whole, Grid(0, last, dtype), _search, warm)


def _search(numbers: Everywhere | Rows, warm: Pair | None) -> Pair:
    grid = numbers.grid
    above, below = (jnp.maximum(top, 0) for top in numbers.tops())
    unit = power_of_two(jnp.maximum(above, below))
    above, below, numbers = above / unit, below / unit, numbers.over(unit)
    reach = above + below
    zero = jnp.clip(jnp.round(grid.high * below / jnp.where(reach > 0, reach, 1)), 0, grid.high)
    high = _BEYOND * reach / grid.high
    low = jnp.minimum(numbers.mean() / grid.high, high)
    least, range_ = jnp.log(jnp.where(low > 0, low, 1)), jnp.log(jnp.where(low > 0, high / low, 1))
    many = _FEW if warm is not None else _COLD if grid.high < 16 else 2 * _COLD
    scales = spaced(jnp.ones_like(high), least, range_ / (many - 1), range(many))
    zeros, step = jnp.broadcast_to(zero, scales.shape), range_ / (many - 1) / (_NEAR + 1)
    around = [p for p in range(-_NEAR, _NEAR + 1) if p]
    if warm is not None:
        before, shift = warm[0] / unit, warm[1]
        step = jnp.full_like(step, math.log(_STEP))
        near = jnp.concatenate([before[None], spaced(before, jnp.zeros_like(step), step, around)])
        scales, step = jnp.concatenate([near, scales]), step / 3
        zeros = jnp.concatenate([jnp.broadcast_to(shift, near.shape), zeros])
    best = best_of(numbers, (scales, zeros))
    scales = spaced(best[0], jnp.zeros_like(step), step, around)
    beside = spaced(best[0], jnp.zeros_like(step), 2 * step, (-2, -1, 0, 1, 2))
    moved = [jnp.clip(best[1] + jnp.array(by, zero.dtype), 0, grid.high) for by in (-1, 1)]
    shifts = [jnp.broadcast_to(best[1], scales.shape), *(jnp.broadcast_to(z, beside.shape) for z in moved)]
    best = best_of(numbers, (jnp.concatenate([scales, beside, beside]), jnp.concatenate(shifts)), best)
    for _ in range(_FITS):
        best = best_of(numbers, (numbers.fit(*best[:2])[None], best[1][None]), best)
    return best[0] * unit, best[1]
