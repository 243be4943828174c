"""Sums over blocks for many grids of whole numbers at once, those of candidates for a scale a and a shift z:

    E(a, z) = sum_i (x_i - a (q_i - z))^2,    q_i = clip(round(x_i / a + z), l, u)

Errors of all candidates are summed in one pass over the numbers. On a CPU that is a loop over rows, of which each turn
adds several to an array of sums: XLA makes vectors of that, a tenth of the time of a reduction for each candidate.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Self, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lcq.forms.blocks import Blocks
from lcq.forms.meshes import explicit_mesh, is_shared
from lcq.schemes.grouped import Cut
from lcq.schemes.scales import rounded_scale

_ROWS = 16
"""Rows in one turn of a loop. Of fewer, XLA would compute the index within the innermost loop, and make no vectors."""

_LANES = 512
"""Numbers side by side where a block has no other axis for them."""


Found = TypeVar("Found")


class Grid(NamedTuple):
    """Whole numbers from low to high, around zero, and the format of scales."""

    low: float
    high: float
    dtype: str | None

    def code(self, u: Array) -> Array:
        """The nearest."""
        return jnp.round(jnp.clip(u, self.low, self.high))


def spaced(first: Array, least: Array, step: Array, powers: Iterable[int]) -> Float[Array, "T *stat"]:
    """first exp(least + p step) for every p."""
    p = jnp.array(list(powers), first.dtype).reshape(-1, *(1,) * first.ndim)
    return first * jnp.exp(least + p * step)


def searched(whole: Cut, grid: Grid, search: Callable[[Any, Any], Found], warm: Any) -> Found:
    """What a search finds: by rows on a CPU; by sums over whole axes elsewhere, and where leaves are spread over
    devices, as loops over rows would move them.

    Args:
        whole: leaves cut into blocks, without an importance.
        grid: the grid.
        search: from sums and earlier numbers of blocks to new ones.
        warm: earlier ones, a tree of arrays [*stat], or None.
    """

    def everywhere(leaves: tuple[Array, ...], warm: Any) -> Found:
        return search(Everywhere(whole._replace(leaves=leaves), grid), warm)

    def by_rows(leaves: tuple[Array, ...], warm: Any) -> Found:
        return _by_turns(whole._replace(leaves=leaves), grid, search, warm)

    if is_shared(whole.leaves) or explicit_mesh(whole.leaves):
        return everywhere(whole.leaves, warm)
    found: Found = lax.platform_dependent(whole.leaves, warm, cpu=by_rows, default=everywhere)
    return found


def best_of(numbers: "Everywhere | Rows", tried: tuple[Array, ...], best: tuple[Array, ...] = ()) -> tuple[Array, ...]:
    """The candidate of the least error, its scale rounded to its format, and that error; of two the first.

    Args:
        numbers: the sums.
        tried: scales [T, *stat], and shifts likewise where the grid may be shifted.
        best: an earlier result, which comes first.
    """
    scales, *shifts = tried
    scales = rounded_scale(scales, numbers.grid.dtype)
    found = scales, *shifts, numbers.errors(scales, *shifts)
    if best:
        found = tuple(jnp.concatenate([a[None], b]) for a, b in zip(best, found, strict=True))
    *pairs, errors = found
    least = jnp.min(errors, 0)
    number = lax.broadcasted_iota(jnp.int32, errors.shape, 0)
    first = number == jnp.min(jnp.where(errors == least, number, len(errors)), 0)
    return *(jnp.sum(jnp.where(first, a, 0), 0) for a in pairs), least


def _by_turns(whole: Cut, grid: Grid, search: Callable[["Rows", Any], Found], warm: Any) -> Found:
    """`searched` by rows, for each index of the axes of blocks that come first, so that its numbers stay in a cache."""
    leaves, stats = zip(*(_rows(x, block) for x, block in zip(whole.leaves, whole.blocks, strict=True)), strict=True)
    outer, stat = len(leaves[0]), stats[0]
    turns = leaves, jax.tree.map(lambda a: a.reshape(outer, *stat), warm)

    def one(turn: tuple[tuple[Array, ...], Any]) -> Found:
        return search(Rows(turn[0], stat, grid), turn[1])

    found = one(jax.tree.map(lambda a: a[0], turns)) if outer == 1 else lax.map(one, turns)
    return jax.tree.map(lambda a: a.reshape(whole.blocks[0].stat), found)


def _inverse(a: Array) -> Array:
    return 1 / jnp.where(a == 0, 1, a)


@dataclasses.dataclass(frozen=True)
class Everywhere:
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

    def errors(self, scales: Float[Array, "T *stat"], shifts: Float[Array, "T *stat"] | None = None) -> Array:
        """E of every candidate, [T, *stat]."""

        def error(pair: tuple[Array, Array | None]) -> Array:
            us = self._placed(*pair)
            return pair[0] ** 2 * self.whole.sum([(u - self.grid.code(u)) ** 2 for u in us])

        return lax.map(error, (scales, shifts))

    def fit(self, a: Float[Array, "*stat"], z: Float[Array, "*stat"] | None = None) -> Float[Array, "*stat"]:
        """The best scale for the codes at (a, z): a + sum (x - a c) c / sum c^2, c = q - z."""
        zero = jnp.zeros_like(a) if z is None else z
        pairs = list(zip(self._placed(a, z), self.whole.spread(zero), strict=True))
        rest = self.whole.sum([(u - self.grid.code(u)) * (self.grid.code(u) - here) for u, here in pairs])
        squares = self.whole.sum([(self.grid.code(u) - here) ** 2 for u, here in pairs])
        return a + a * rest / jnp.where(squares > 0, squares, 1)

    def _placed(self, a: Array, z: Array | None) -> list[Array]:
        """x / a + z."""
        us = self._times(_inverse(a))
        return us if z is None else [u + here for u, here in zip(us, self.whole.spread(z), strict=True)]

    def _times(self, r: Array) -> list[Array]:
        return [x * here for x, here in zip(self.whole.leaves, self.whole.spread(r), strict=True)]


@dataclasses.dataclass(frozen=True)
class Rows:
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

    def errors(self, scales: Float[Array, "T *stat"], shifts: Float[Array, "T *stat"] | None = None) -> Array:
        r = _inverse(scales)

        def add(so_far: Array, x: Array) -> Array:
            u = x * r if shifts is None else x * r + shifts
            return so_far + (u - self.grid.code(u)) ** 2

        return scales**2 * self._summed(add, many=(len(scales),))

    def fit(self, a: Float[Array, "*stat"], z: Float[Array, "*stat"] | None = None) -> Float[Array, "*stat"]:
        r, zero = _inverse(a), 0.0 if z is None else z

        def code(x: Array) -> Array:
            return self.grid.code(x * r + zero) - zero

        rest = self._summed(lambda so_far, x: so_far + (x * r - code(x)) * code(x))
        squares = self._summed(lambda so_far, x: so_far + code(x) ** 2)
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
