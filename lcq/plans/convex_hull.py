"""The best choice of one candidate each for several things that share a budget, by their convex hulls.

    min over choices c of  sum_i D_i(c_i)   subject to   sum_i B_i(c_i) <= B

Thing i under a candidate c costs B_i(c) bits and is off by D_i(c). For every lambda >= 0 the choice that minimises
sum_i D_i + lambda B_i, which each thing can do on its own, is optimal for the size that it has: another of no more bits
and less distortion would have a smaller sum. The candidates that can win for some lambda are on the thing's lower
convex hull; as lambda falls from infinity to 0, each thing walks along its hull, and a step is due when lambda meets
its slope -dD/dB. So one sort of all steps by their slopes gives every such choice.

Source: Everett, Operations Research 11, 1963; Shoham & Gersho, "Efficient bit allocation for an arbitrary set of
quantizers", IEEE Trans. ASSP 36, 1988.
"""

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import NamedTuple


class Point(NamedTuple):
    """A thing under one candidate."""

    bits: int
    distortion: float


def sweep(points: Sequence[Sequence[Point]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Every choice that minimises sum_i D_i + lambda B_i for some lambda >= 0, by size.

    Args:
        points: of each thing, of each candidate.

    Returns:
        The choice with the fewest bits, a candidate's place for every thing; and the steps, (thing, its next
        candidate), each of which leads from one choice to the next. Of equal points the first is taken, of equal slopes
        that of the first thing.

    Example:
        >>> a, b = [Point(1, 8.0), Point(2, 2.0), Point(3, 1.0)], [Point(1, 4.0), Point(2, 1.0)]
        >>> sweep([a, b])
        ([0, 0], [(0, 1), (1, 1), (0, 2)])
    """
    hulls = [_hull(of_thing) for of_thing in points]
    steps = [
        (-_slope(of_thing[i], of_thing[j]), thing, j)
        for thing, (of_thing, hull) in enumerate(zip(points, hulls, strict=True))
        for i, j in itertools.pairwise(hull)
    ]
    steps.sort(key=lambda step: step[:2])  # stable, so that a thing goes along its hull in order
    return [hull[0] for hull in hulls], [(thing, j) for _, thing, j in steps]


def along(
    points: Sequence[Sequence[Point]], place: Sequence[int], steps: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, float]]:
    """Bits and distortion of the first choice, and after each step; sums are exact."""
    now = [of_thing[i] for of_thing, i in zip(points, place, strict=True)]
    bits, error = sum(point.bits for point in now), sum(Fraction(point.distortion) for point in now)
    yield bits, float(error)
    for thing, i in steps:
        old, now[thing] = now[thing], points[thing][i]
        bits += now[thing].bits - old.bits
        error += Fraction(now[thing].distortion) - Fraction(old.distortion)
        yield bits, float(error)


def _slope(a: Point, b: Point) -> Fraction:
    """-dD/dB from one point to the next, exactly: what a bit buys."""
    return (Fraction(a.distortion) - Fraction(b.distortion)) / (b.bits - a.bits)


def _hull(points: Sequence[Point]) -> list[int]:
    """The lower convex hull from the fewest bits to the least distortion, as places; points on its edges are kept."""
    hull: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if hull and points[i].distortion >= points[hull[-1]].distortion:
            continue
        while len(hull) > 1 and _slope(points[hull[-2]], points[hull[-1]]) < _slope(points[hull[-1]], points[i]):
            hull.pop()
        hull.append(i)
    return hull
