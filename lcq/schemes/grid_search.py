"""The scale of a grid of whole numbers around zero, for blocks that are long enough: candidates side by side.

    E(a) = sum_i (x_i - a c_i)^2,    c_i = clip(round(x_i / a), l, u)

Few candidates are enough, since the magnitudes say where to look: a min(-l, u) from their mean to a little above the
largest, where nothing is cut off any more. A first search gives the longer side of the grid to the larger end of the
block, a second one looks around the best of both signs. Last, its codes get their best scale, if that is better.

Errors of all candidates are summed in one pass over the numbers. On a CPU that is a loop over rows, of which each turn
adds several to an array of sums: XLA makes vectors of that, a tenth of the time of a reduction for each candidate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lcq.forms.blocks import Blocks
from lcq.forms.meshes import explicit_mesh, is_shared
from lcq.schemes.grouped import Cut
from lcq.schemes.scales import power_of_two, rounded_scale

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

_ROWS = 16
"""Rows in one turn of a loop. Of fewer, XLA would compute the index within the innermost loop, and make no vectors."""

_LANES = 512
"""Numbers side by side where a block has no other axis for them."""


class Grid(NamedTuple):
    """Whole numbers from low to high, around zero, and the format of scales."""

    low: float
    high: float
    dtype: str | None

    def code(self, u: Array) -> Array:
        """The nearest."""
        return jnp.round(jnp.clip(u, self.low, self.high))


def search_grid(whole: Cut, grid: Grid, warm: Array | None = None) -> Array:
    """The scale per block that minimises E, negative where the mirrored grid is better; at least as good as `warm`.

    Args:
        whole: leaves cut into the blocks that share a scale, without an importance: a few that weigh most are as
            rugged as a short block.
        grid: low <= -1, high >= 1.
        warm: scales to start from.
    """

    def everywhere(leaves: tuple[Array, ...], warm: Array | None) -> Array:
        return _search(_Plain(whole._replace(leaves=leaves), grid), warm)

    def by_rows(leaves: tuple[Array, ...], warm: Array | None) -> Array:
        return _search_rows(whole._replace(leaves=leaves), grid, warm)

    if is_shared(whole.leaves) or explicit_mesh(whole.leaves):
        return everywhere(whole.leaves, warm)  # loops over rows would move them
    return lax.platform_dependent(whole.leaves, warm, cpu=by_rows, default=everywhere)


def _search(numbers: "_Plain | _Rows", warm: Array | None) -> Array:
    grid = numbers.grid
    above, below = numbers.tops()
    unit = power_of_two(jnp.maximum(above, below))
    above, below, numbers = above / unit, below / unit, numbers.over(unit)
    longer, shorter = max(-grid.low, grid.high), min(-grid.low, grid.high)
    high = _BEYOND * jnp.maximum(above, below) / shorter
    low = jnp.minimum(numbers.mean() / shorter, high)
    least, range_ = jnp.log(jnp.where(low > 0, low, 1)), jnp.log(jnp.where(low > 0, high / low, 1))
    many = (_COLD if longer <= 8 else 2 * _COLD) if warm is None else _FEW
    tried = _spaced(jnp.ones_like(high), least, range_ / (many - 1), range(many))
    if longer > shorter:
        larger = jnp.where((above > below) == (-grid.low > grid.high), -tried, tried)
        tried = larger if longer <= _ALIKE * shorter else jnp.concatenate([tried, -tried])
    around, step = [p for p in range(-_NEAR, _NEAR + 1) if p], range_ / (many - 1) / (_NEAR + 1)
    if warm is not None:
        warm = warm / unit
        near = _spaced(warm, jnp.zeros_like(step), jnp.full_like(step, math.log(_STEP)), around)
        tried, step = jnp.concatenate([warm[None], near, tried]), jnp.full_like(step, math.log(_STEP) / 3)
    best = _best(numbers, [tried])
    tried = _spaced(best[0], jnp.zeros_like(step), step, around)
    both = [tried] if longer == shorter else [tried, -best[0][None], -tried]
    best = _best(numbers, both, *best)
    return _best(numbers, [numbers.fit(best[0])[None]], *best)[0] * unit


def _spaced(first: Array, least: Array, step: Array, powers: Iterable[int]) -> Float[Array, "T *stat"]:
    """first exp(least + p step) for every p."""
    p = jnp.array(list(powers), first.dtype).reshape(-1, *(1,) * first.ndim)
    return first * jnp.exp(least + p * step)


def _best(numbers: "_Plain | _Rows", tried: Sequence[Array], *best: Array) -> tuple[Array, Array]:
    """The candidate of the least error, rounded to its format, and that; of two the first."""
    scales = rounded_scale(jnp.concatenate(tried), numbers.grid.dtype)
    errors = numbers.errors(scales)
    if best:
        scales, errors = (jnp.concatenate([a[None], b]) for a, b in zip(best, (scales, errors), strict=True))
    least = jnp.min(errors, 0)
    number = lax.broadcasted_iota(jnp.int32, errors.shape, 0)
    first = jnp.min(jnp.where(errors == least, number, len(errors)), 0)
    return jnp.sum(jnp.where(number == first, scales, 0), 0), least


def _inverse(a: Array) -> Array:
    return 1 / jnp.where(a == 0, 1, a)


@dataclasses.dataclass(frozen=True)
class _Plain:
    """Sums over whole axes, wherever the leaves lie; one number per block, [*stat]."""

    whole: Cut
    grid: Grid

    def tops(self) -> tuple[Array, Array]:
        """The largest x, and the largest -x."""
        return self.whole.max(self.whole.leaves), self.whole.max([-x for x in self.whole.leaves])

    def over(self, unit: Array) -> Self:
        """The same numbers in another unit."""
        leaves = self._times(1 / unit)
        return dataclasses.replace(self, whole=self.whole._replace(leaves=tuple(leaves)))

    def mean(self) -> Array:
        """The mean of |x| where it is not zero."""
        count = self.whole.sum([(x != 0).astype(x.dtype) for x in self.whole.leaves])
        return self.whole.sum([jnp.abs(x) for x in self.whole.leaves]) / jnp.where(count > 0, count, 1)

    def errors(self, scales: Float[Array, "T *stat"]) -> Float[Array, "T *stat"]:
        """E of every candidate."""

        def error(a: Array) -> Array:
            return a**2 * self.whole.sum([(u - self.grid.code(u)) ** 2 for u in self._times(_inverse(a))])

        return lax.map(error, scales)

    def fit(self, a: Float[Array, "*stat"]) -> Float[Array, "*stat"]:
        """The best scale for the codes at a: a + sum (x - a c) c / sum c^2."""
        us = self._times(_inverse(a))
        rest = self.whole.sum([(u - self.grid.code(u)) * self.grid.code(u) for u in us])
        squares = self.whole.sum([self.grid.code(u) ** 2 for u in us])
        return a + a * rest / jnp.where(squares > 0, squares, 1)

    def _times(self, r: Array) -> list[Array]:
        return [x * here for x, here in zip(self.whole.leaves, self.whole.spread(r), strict=True)]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The same by loops over rows; of blocks without axes before the first that they are cut along.

    Attributes:
        leaves: [rows, *lanes].
        stat: the shape of one number per block; lanes are summed where it has a one.
        grid: as above.
    """

    leaves: tuple[Array, ...]
    stat: tuple[int, ...]
    grid: Grid

    def tops(self) -> tuple[Array, Array]:
        def top(sign: float) -> Array:
            return self._summed(lambda so_far, x: jnp.maximum(so_far, sign * x), jnp.maximum, jnp.max, start=-jnp.inf)

        return top(1.0), top(-1.0)

    def over(self, unit: Array) -> Self:
        return dataclasses.replace(self, leaves=tuple(x * (1 / unit) for x in self.leaves))

    def mean(self) -> Array:
        size = self._summed(lambda so_far, x: so_far + jnp.abs(x))
        count = self._summed(lambda so_far, x: so_far + (x != 0))
        return size / jnp.where(count > 0, count, 1)

    def errors(self, scales: Float[Array, "T *stat"]) -> Float[Array, "T *stat"]:
        r = _inverse(scales)

        def add(so_far: Array, x: Array) -> Array:
            u = x * r
            return so_far + (u - self.grid.code(u)) ** 2

        return scales**2 * self._summed(add, many=(len(scales),))

    def fit(self, a: Float[Array, "*stat"]) -> Float[Array, "*stat"]:
        r, code = _inverse(a), self.grid.code
        rest = self._summed(lambda so_far, x: so_far + (x * r - code(x * r)) * code(x * r))
        squares = self._summed(lambda so_far, x: so_far + code(x * r) ** 2)
        return a + a * rest / jnp.where(squares > 0, squares, 1)

    def _summed(
        self,
        add: Callable[..., Array],
        join: Callable[[Array, Array], Array] = jnp.add,
        reduce: Callable[..., Array] = jnp.sum,
        start: float = 0.0,
        many: tuple[int, ...] = (),
    ) -> Array:
        """`add` of every row of every leaf to [*many, *lanes], and what that comes to in the blocks, [*many, *stat]."""
        parts = []
        for leaf in self.leaves:
            first = 0 * leaf[0]  # sharded like the leaf
            sums = _over_rows(leaf, jnp.zeros((*many, *(1,) * first.ndim), first.dtype) + first + start, add)
            axes = [i + len(many) for i, n in enumerate(self.stat) if n == 1 and first.shape[i] > 1]
            parts.append(reduce(sums, axes, keepdims=True) if axes else sums)
        return functools.reduce(join, parts)


def _search_rows(whole: Cut, grid: Grid, warm: Array | None) -> Array:
    """The search for each index of the axes of blocks that come first, so that its numbers stay in a cache."""
    leaves, stats = zip(*(_rows(x, block) for x, block in zip(whole.leaves, whole.blocks, strict=True)), strict=True)
    outer, stat = len(leaves[0]), stats[0]
    turns = (leaves, () if warm is None else (warm.reshape(outer, *stat),))

    def one(turn: tuple[tuple[Array, ...], tuple[Array, ...]]) -> Array:
        return _search(_Rows(turn[0], stat, grid), *(turn[1] or (None,)))

    found = one(jax.tree.map(lambda a: a[0], turns)) if outer == 1 else lax.map(one, turns)
    return found.reshape(whole.blocks[0].stat)


def _rows(x: Array, block: Blocks) -> tuple[Float[Array, "outer rows *lanes"], tuple[int, ...]]:
    """Rows run along the first axes within a block, lanes along what comes after; the shape of one number per block
    there. Of a block without such axes pieces of its rows are lanes, and zeros fill up the last."""
    first = block.axes[0]
    last = next((i for i in range(first, x.ndim) if i not in block.axes), x.ndim)
    outer, rows = math.prod(x.shape[:first]), math.prod(x.shape[first:last])
    if last < x.ndim:
        return x.reshape(outer, rows, *x.shape[last:]), block.stat[last:]
    wide = min(_LANES, rows)
    return jnp.pad(x.reshape(outer, rows), ((0, 0), (0, -rows % wide))).reshape(outer, -1, wide), (1,)


def _over_rows(leaf: Array, start: Array, add: Callable[[Array, Array], Array]) -> Array:
    """add(.. add(start, x_0) .., x_n)."""

    def several(turn: Array, so_far: Array) -> Array:
        rows = lax.dynamic_slice_in_dim(leaf, turn * _ROWS, _ROWS)
        return functools.reduce(add, [rows[i] for i in range(_ROWS)], so_far)

    turns = len(leaf) // _ROWS
    so_far = lax.fori_loop(0, turns, several, start) if turns else start
    return functools.reduce(add, [leaf[i] for i in range(turns * _ROWS, len(leaf))], so_far)
