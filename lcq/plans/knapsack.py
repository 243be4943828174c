"""The best choice of one candidate each for several things that share a budget, exactly where that can be done.

    min over choices c of  sum_i D_i(c_i)   subject to   sum_i B_i(c_i) <= B

The convex hulls (see `hull`) give this minimum for some sizes only. Between them it is searched for: things are decided
one after another, and of the partial choices, states of (bits, distortion), those are dropped that

- leave no room for the fewest bits of the things to come,
- take as many bits as another and distort as much, or
- cannot become better than the best choice known: D so far, and the convex hull of the things to come at the bits that
  are left, which no choice of theirs goes below, are together too much.

The last also drops candidates before the search: at the lambda where the budget ends, one that is worse than the best
of its thing in D + lambda B by more than the best known choice is above the bound takes no part in a better choice.
With many things hardly a candidate is left. If there are more states than `STATES`, those of the least bound are kept,
and the result is not known to be best.

Source: Dyer, Kayal & Walker, "A branch and bound algorithm for solving the multiple-choice knapsack problem", 1984;
Pisinger, "A minimal algorithm for the multiple-choice knapsack problem", 1995.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lcq.plans.convex_hull import Point, sweep

STATES = 2_000_000
"""How many states all stages together may keep."""

_SLACK = 1e-12  # relative, of sums of floats that are in different order


class Best(NamedTuple):
    """A choice, a candidate's place for each thing, and what no choice within the budget goes below."""

    places: list[int]
    bound: float


class _Hull(NamedTuple):
    """Bits and distortion of the corners of the convex hull of several things together."""

    bits: np.ndarray
    distortion: np.ndarray

    def at(self, bits: np.ndarray) -> np.ndarray:
        """The least distortion at so many bits, of mixtures of choices too; infinite below the fewest."""
        return np.where(bits < self.bits[0], np.inf, np.interp(bits, self.bits, self.distortion))


def best_choice(points: Sequence[Sequence[Point]], budget: int, states: int = STATES) -> Best:
    """The choice of least distortion within a budget; of equal ones any.

    Args:
        points: of each thing, of each candidate.
        budget: bits; at least the fewest possible.
        states: how many partial choices to keep.

    Returns:
        The choice. `bound` is its distortion if it is known to be the best.

    Example:
        >>> a, b = [Point(1, 9.0), Point(4, 1.0)], [Point(1, 8.0), Point(3, 3.0)]
        >>> best_choice([a, b], 4), best_choice([a, b], 5)
        (Best(places=[0, 1], bound=12.0), Best(places=[1, 0], bound=9.0))
    """
    known, slope = _start(points, budget)
    worst = math.fsum(of_thing[i].distortion for of_thing, i in zip(points, known, strict=True))
    bound = float(next(_hulls(points)).at(np.array([budget]))[0])
    excess = worst - bound + _SLACK * abs(worst)
    kept = [_candidates(of_thing, slope, excess) for of_thing in points]
    free = [i for i, places in enumerate(kept) if len(places) > 1]
    free.sort(key=lambda i: points[i][kept[i][-1]].distortion - points[i][kept[i][0]].distortion)
    fixed = [(i, places[0]) for i, places in enumerate(kept) if len(places) == 1]
    rest = budget - sum(points[i][j].bits for i, j in fixed)
    settled = math.fsum(points[i][j].distortion for i, j in fixed)
    found, whole = _search(
        [[points[i][j] for j in kept[i]] for i in free], rest, worst - settled, max(states // max(len(free), 1), 64)
    )
    if found is not None:
        known = list(known)
        for i, j in fixed:
            known[i] = j
        for i, j in zip(free, found, strict=True):
            known[i] = kept[i][j]
        worst = math.fsum(of_thing[i].distortion for of_thing, i in zip(points, known, strict=True))
    return Best(known, worst if whole else min(bound, worst))


def _start(points: Sequence[Sequence[Point]], budget: int) -> tuple[list[int], float]:
    """A good choice: along the hull, past steps that do not fit; and what a bit buys where the first did not."""
    place, steps = sweep(points)
    left = budget - sum(of_thing[i].bits for of_thing, i in zip(points, place, strict=True))
    slope = None
    for thing, j in steps:
        now, then = points[thing][place[thing]], points[thing][j]
        if then.bits - now.bits <= left:
            left -= then.bits - now.bits
            place[thing] = j
        elif slope is None:
            slope = (now.distortion - then.distortion) / (then.bits - now.bits)
    return place, slope or 0.0


def _candidates(of_thing: Sequence[Point], slope: float, excess: float) -> list[int]:
    """Places of the candidates that can be in a better choice, from the fewest bits on; at least one."""
    order = sorted(range(len(of_thing)), key=lambda i: of_thing[i])
    worth = [point.distortion + slope * point.bits for point in of_thing]
    most = min(worth) + excess
    most += _SLACK * abs(most)
    places: list[int] = []
    for i in order:
        if worth[i] <= most and (not places or of_thing[i].distortion < of_thing[places[-1]].distortion):
            places.append(i)
    return places or [worth.index(min(worth))]


def _hulls(points: Sequence[Sequence[Point]]) -> Iterator[_Hull]:
    """Of all things, of all but the first, and so on, and of none: the steps are sorted once."""
    place, steps = sweep(points)
    now, moves = list(place), list[tuple[float, float]]()
    for thing, j in steps:
        before, after = points[thing][now[thing]], points[thing][j]
        now[thing] = j
        moves.append((after.bits - before.bits, after.distortion - before.distortion))
    things, change = np.array([thing for thing, _ in steps]), np.array(moves).reshape(-1, 2)
    first = np.array([of_thing[i] for of_thing, i in zip(points, place, strict=True)]).reshape(-1, 2)
    for i in range(len(points) + 1):
        corners = np.cumsum(np.vstack([first[i:].sum(axis=0), change[things >= i]]), axis=0)
        yield _Hull(corners[:, 0], corners[:, 1])


def _search(points: list[list[Point]], budget: int, known: float, width: int) -> tuple[list[int] | None, bool]:
    """A choice that distorts less than the one that is known, if there is one, and whether nothing was left out."""
    bits, errors = np.zeros(1, np.int64), np.zeros(1)
    whole, hulls = True, _hulls(points)
    next(hulls)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for of_thing, behind in zip(points, hulls, strict=True):
        count = len(bits)
        bits = np.concatenate([bits + point.bits for point in of_thing])
        errors = np.concatenate([errors + point.distortion for point in of_thing])
        bounds = errors + behind.at(budget - bits)
        alive = np.flatnonzero(bounds < known - _SLACK * abs(known))
        alive = alive[np.lexsort((errors[alive], bits[alive]))]
        least = np.minimum.accumulate(errors[alive])
        alive = alive[np.append(True, errors[alive][1:] < least[:-1])] if alive.size else alive
        if alive.size > width:
            whole = False
            alive = np.sort(alive[np.argpartition(bounds[alive], width)[:width]])
        if not alive.size:
            return None, whole
        trail.append((alive % count, alive // count))
        bits, errors = bits[alive], errors[alive]
    if not trail:
        return None, whole
    at, chosen = int(np.argmin(errors)), []
    for parents, candidates in reversed(trail):
        chosen.append(int(candidates[at]))
        at = int(parents[at])
    return chosen[::-1], whole
