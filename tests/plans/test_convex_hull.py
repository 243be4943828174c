"""The sweep over convex hulls, against every combination there is."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcq.plans.convex_hull import Point, along, sweep

# Small whole numbers make ties of every kind; halves of any float are awkward to add up.
points = st.builds(
    Point, st.integers(1, 12), st.one_of(st.integers(0, 12).map(float), st.floats(0, 1e6), st.floats(0, 1e-300))
)
problems = st.lists(st.lists(points, min_size=1, max_size=5), min_size=1, max_size=4)


def everything(problem):
    """(bits, distortion, choice) of every combination, exactly."""
    for places in itertools.product(*(range(len(each)) for each in problem)):
        chosen = [each[i] for each, i in zip(problem, places, strict=True)]
        yield sum(p.bits for p in chosen), sum(Fraction(p.distortion) for p in chosen), places


def stops_of(problem):
    first, steps = sweep(problem)
    stops = [tuple(first)]
    for thing, i in steps:
        stops.append((*stops[-1][:thing], i, *stops[-1][thing + 1 :]))
    return stops


@given(problems)
def test_every_stop_is_the_best_of_its_size(problem):
    every = {places: (bits, error) for bits, error, places in everything(problem)}
    stops = stops_of(problem)
    for stop in stops:
        size, error = every[stop]
        assert error == min(e for b, e in every.values() if b <= size)
    sizes, errors = zip(*(every[stop] for stop in stops), strict=True)
    assert sizes[0] == min(b for b, _ in every.values()) and errors[-1] == min(e for _, e in every.values())
    assert all(a < b for a, b in itertools.pairwise(sizes)) and all(a > b for a, b in itertools.pairwise(errors))
    assert list(along(problem, *sweep(problem))) == [(b, float(e)) for b, e in (every[stop] for stop in stops)]


@given(problems)
def test_no_stop_is_missing(problem):
    """For every lambda there is a stop that minimises sum D + lambda B, and the curve of the stops is convex."""
    every = [(bits, error) for bits, error, _ in everything(problem)]
    curve = [(b, Fraction(e)) for b, e in zip(*exactly(problem), strict=True)]
    slopes = [(e - f) / (c - b) for (b, e), (c, f) in itertools.pairwise(curve)]
    assert slopes == sorted(slopes, reverse=True) and all(slope > 0 for slope in slopes)
    for weight in [*slopes, *(s * Fraction(999, 1000) for s in slopes), Fraction(0), Fraction(10**9)]:
        assert min(e + weight * b for b, e in curve) == min(e + weight * b for b, e in every)


def exactly(problem):
    totals = {places: (bits, error) for bits, error, places in everything(problem)}
    return zip(*(totals[stop] for stop in stops_of(problem)), strict=True)


def test_ties_are_broken_by_place():
    twice = [Point(2, 1.0), Point(1, 3.0), Point(1, 3.0), Point(2, 1.0)]
    assert sweep([twice, twice]) == ([1, 1], [(0, 0), (1, 0)])
    assert sweep([[Point(3, 0.0)], twice[::-1]]) == ([0, 1], [(1, 0)])


def test_points_on_an_edge_are_stops_and_those_inside_are_not():
    edge = [Point(1, 3.0), Point(2, 2.0), Point(3, 1.0), Point(4, 0.9), Point(5, 0.0), Point(6, 0.0)]
    assert sweep([edge]) == ([0], [(0, 1), (0, 2), (0, 4)])
    assert sweep([edge[::-1]]) == ([5], [(0, 4), (0, 3), (0, 1)])


def test_a_gaussian_spends_like_water_filling():
    """D = s^2 4^-R in bits R a number: at a slope the distortions of all that are not empty are nearly equal."""
    sizes, spreads = np.array([1000, 1000, 500]), np.array([8.0, 1.0, 0.01])
    problem = [
        [Point(int(n) * r, float(n * s * s * 4.0**-r)) for r in range(9)] for n, s in zip(sizes, spreads, strict=True)
    ]
    first, steps = sweep(problem)
    assert first == [0, 0, 0]
    for count in range(4, len(steps)):
        place = list(first)
        for thing, i in steps[:count]:
            place[thing] = i
        if all(0 < i < 8 for i in place):
            each = spreads**2 * 4.0 ** -np.array(place)
            assert each.max() <= 4.0000001 * each.min()


@pytest.mark.parametrize("many", [2000])
def test_many_things_are_swept_quickly(many):
    rng = np.random.default_rng(0)
    problem = [
        [Point(int(b), float(d)) for b, d in zip(np.arange(1, 9) * n, 4.0 ** -np.arange(8) * s, strict=True)]
        for n, s in zip(rng.integers(1, 10**6, many), rng.lognormal(size=many), strict=True)
    ]
    curve = list(along(problem, *sweep(problem)))
    assert len(curve) == 7 * many + 1
