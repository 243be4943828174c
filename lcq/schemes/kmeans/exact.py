"""The global optimum of one-dimensional k-means, in float64 on the host, by dynamic programming.

Optimal cells are runs of the sorted numbers. With i learned and the first j frozen levels, the least error of the
first b numbers is

    F_ij(b) = min_{a <= b} min( F_{i-1,j}(a) + free(a, b),  F_{i,j-1}(a) + held_j(a, b) )
    free(a, b) = sum h x^2 - (sum h x)^2 / sum h,    held_j(a, b) = sum h (x - c_j)^2    over the numbers a, .., b - 1

with h the number of times that a number occurs, or the sum of their importances.
Both errors are Monge, so the best a rises with b: divide and conquer, all rows of one depth at a time.

All positions of a million numbers are too many. Let every boundary be known up to an interval [low, high]: the cell
between two boundaries contains at least the numbers from the first one's high to the second one's low, whose error is
also Monge. So the same recursion bounds all solutions through an interval from below. Intervals whose bound exceeds
the error of some solution are dropped, the others are cut into parts, until they are single positions and the recursion
is exact. Intervals start out at equal steps of the measure f^(1/3) dx, as levels do.

Exact means: up to rounding of sums in float64, about 1e-15 of the total sum of squares around the mean; a weight
that is 1e-16 of the others is lost in it.

Source: Wu 1991 and Gronlund et al., arXiv 1701.07204 (divide and conquer); the bounds on intervals are lcq's.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float64, Int

_FIRST = 1024
"""Intervals for every boundary in the first round."""

_PARTS = 8
"""Parts into which a round cuts each interval it keeps."""

_PASSES = 100
"""Lloyd passes that make a bound from above of a solution; each costs K searches."""

State = tuple[int, int]
Positions = Int[np.ndarray, " _"]
Numbers = Float64[np.ndarray, " _"]


class Sums(NamedTuple):
    """Running sums over the sorted distinct numbers: entry b is over the first b of them."""

    number: Numbers
    total: Numbers
    square: Numbers
    frozen: tuple[Numbers, ...]

    def free(self, start: Positions, stop: Positions) -> Numbers:
        """Error of a cell around its mean; 0 where stop <= start."""
        n = self.number[stop] - self.number[start]
        total = self.total[stop] - self.total[start]
        error = self.square[stop] - self.square[start] - total * total / np.where(n > 0, n, 1)
        return np.where(n > 0, np.maximum(error, 0), 0)

    def held(self, j: int) -> Callable[[Positions, Positions], Numbers]:
        """Error of a cell around frozen level j; 0 where stop <= start."""
        return lambda start, stop: np.maximum(self.frozen[j][stop] - self.frozen[j][start], 0)


def best_levels(
    x: Float[np.ndarray, " n"],
    k: int,
    fixed: tuple[float, ...] = (),
    importance: Float[np.ndarray, " n"] | None = None,
) -> Numbers:
    """The k levels, `fixed` among them, that minimise sum_i h_i min_k (x_i - c_k)^2.

    Args:
        x: finite numbers, at least one.
        k: how many levels.
        fixed: levels that are given.
        importance: h >= 0, not all zero; None for ones.

    Returns:
        Ascending levels; those that are not needed repeat the last one.
    """
    x = np.asarray(x, np.float64)
    if importance is None:
        values, counts = np.unique(x, return_counts=True)
    else:
        values, places = np.unique(x[importance > 0], return_inverse=True)
        counts = np.bincount(places, importance[importance > 0])
    free = np.setdiff1d(values, fixed)
    learned = k - len(fixed)
    if learned and len(free) > learned:
        middle = np.average(values, weights=counts)
        v, c = values - middle, np.sort(np.asarray(fixed, np.float64)) - middle
        frozen = tuple(_running(counts * (v - level) ** 2) for level in c)
        sums = Sums(_running(counts.astype(float)), _running(counts * v), _running(counts * v * v), frozen)
        free = _search(sums, v, learned, lambda cells: _polish(sums, v, c, cells)) + middle
    levels = np.sort(np.concatenate([fixed, free[:learned]]))
    return np.concatenate([levels, np.full(k - len(levels), levels[-1])])


def _search(sums: Sums, values: Numbers, learned: int, polish: Callable) -> Numbers:
    """Learned levels of an optimal solution: rounds of bounds on intervals, then the exact recursion."""
    last, end = len(sums.number) - 1, (learned, len(sums.frozen))
    steps = np.concatenate([[0], np.cumsum(np.cbrt(np.diff(values) ** 2))])  # levels crowd: f^(1/3) dx = step^(2/3)
    cuts = np.searchsorted(steps, np.linspace(0, steps[-1], _FIRST), side="right")
    edges = np.unique(np.concatenate([[0], cuts, [last + 1]]))
    states = [(i, j) for i in range(end[0] + 1) for j in range(end[1] + 1)]
    where = dict.fromkeys(states, (edges[:-1], edges[1:] - 1))
    where[0, 0], where[end] = (np.array([0]),) * 2, (np.array([last]),) * 2
    least = np.inf
    while True:
        bound, choice = _recursion(sums, where, states, backwards=False)
        levels, error = polish(_path(where, choice, end))
        if all(np.array_equal(low, high) for low, high in where.values()):
            return levels
        least = min(least, error)
        onward, _ = _recursion(sums, where, states, backwards=True)
        margin = least * (1 + 1e-9) + 1e-13 * sums.square[-1]
        for state, (low, high) in where.items():
            keep = bound[state] + onward[state] <= margin
            where[state] = _cut(low[keep], high[keep])


def _cut(low: Positions, high: Positions) -> tuple[Positions, Positions]:
    """Cuts every interval of positions into at most `_PARTS` parts."""
    edges = low[:, None] + (high - low + 1)[:, None] * np.arange(_PARTS + 1) // _PARTS
    first, last = edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1) - 1
    return first[first <= last], last[first <= last]


def _recursion(sums: Sums, where: dict, states: list[State], backwards: bool) -> tuple[dict, dict]:
    """The least error up to every interval of every state; from it to the end if `backwards`.

    Returns:
        {state: error} and {state: (whether the adjoining cell is learned, index of its other boundary's interval)}.
    """
    bound: dict[State, Numbers] = {}
    choice: dict[State, tuple[np.ndarray, np.ndarray]] = {}
    step = 1 if backwards else -1
    for i, j in reversed(states) if backwards else states:
        low, high = where[i, j]
        best = np.full(len(low), np.inf if bound else 0.0)
        learned, index = np.zeros(len(low), bool), np.zeros(len(low), int)
        for other, cost in (((i + step, j), sums.free), ((i, j + step), sums.held(j if backwards else j - 1))):
            value = bound.get(other, best[:0])
            if not len(value) or not len(low):
                continue
            if backwards:
                start, stop = high, where[other][0]
                least, at = _minima(len(low), value, lambda r, c, f=cost, a=start, b=stop: f(a[r], b[c]))
            else:
                start, stop = where[other][1], low
                least, at = _minima(len(low), value, lambda r, c, f=cost, a=start, b=stop: f(a[c], b[r]))
            better = least < best
            best, index = np.where(better, least, best), np.where(better, at, index)
            learned = np.where(better, other[1] == j, learned)
        bound[i, j], choice[i, j] = best, (learned, index)
    return bound, choice


def _minima(rows: int, value: Numbers, cost: Callable) -> tuple[Numbers, Positions]:
    """min_c value[c] + cost(r, c) and the first best c for every row r, for a Monge cost.

    The best c rises with r. All rows half way between two known ones are searched at once.
    """
    top = 1 << rows.bit_length()
    known = np.full(top + 1, len(value) - 1)  # row r is at place r + 1, between sentinels
    known[0] = 0
    least = np.empty(rows)
    step = top // 2
    while step:
        place = np.arange(step, rows + 1, 2 * step)
        first, last = known[place - step], known[place + step]
        count = last - first + 1
        start = np.cumsum(count) - count
        column = np.arange(start[-1] + count[-1]) + np.repeat(first - start, count)
        trial = value[column] + cost(np.repeat(place - 1, count), column)
        least[place - 1] = np.minimum.reduceat(trial, start)
        hits = np.flatnonzero(trial == np.repeat(least[place - 1], count))
        known[place] = column[hits[np.searchsorted(hits, start)]]
        step //= 2
    return least, known[1 : rows + 1]


def _path(where: dict, choice: dict, end: State) -> list[tuple[int, int]]:
    """Follows the choices back: (start, stop) of every learned cell; of intervals, the low ends."""
    (i, j), at, cells = end, 0, []
    stop = int(where[end][0][0])
    while i or j:
        learned, index = choice[i, j]
        i, j, at, cell = (i - 1, j, index[at], True) if learned[at] else (i, j - 1, index[at], False)
        start = min(int(where[i, j][0][at]), stop)
        if cell:
            cells.append((start, stop))
        stop = start
    return cells[::-1]


def _polish(sums: Sums, values: Numbers, fixed: Numbers, cells: list[tuple[int, int]]) -> tuple[Numbers, float]:
    """Learned levels of the cells after Lloyd's algorithm, and their error."""
    start, stop = np.array([(a, b) for a, b in cells if a < b]).T
    number = sums.number[stop] - sums.number[start]  # zero for weights that are lost in rounding
    means = (sums.total[stop] - sums.total[start]) / np.where(number > 0, number, 1)
    means = np.where(number > 0, means, values[start])
    levels = np.concatenate([means, fixed])
    free = np.argsort(levels, kind="stable") < len(means)
    levels.sort()
    for _ in range(_PASSES):
        edges = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2, side="right")
        start, stop = np.concatenate([[0], edges]), np.concatenate([edges, [len(values)]])
        count = sums.number[stop] - sums.number[start]
        means = (sums.total[stop] - sums.total[start]) / np.where(count > 0, count, 1)
        before, levels = levels, np.where(free & (count > 0), means, levels)
        if np.array_equal(before, levels):
            break
    error = np.sum(sums.free(start, stop)[free])
    for j, at in enumerate(np.flatnonzero(~free)):
        error += sums.held(j)(start[at], stop[at])
    return levels[free], float(error)


def _running(y: Numbers) -> Numbers:
    """0, y_0, y_0 + y_1, .."""
    return np.concatenate([[0.0], np.cumsum(y)])
