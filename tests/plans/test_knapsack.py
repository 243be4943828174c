"""The exact choice within a budget, against every combination, exactly summed."""

import itertools
import time
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lcq.plans.convex_hull import Point
from lcq.plans.knapsack import best_choice

# Small whole numbers make ties of every kind; halves of any float are awkward to add up.
points = st.builds(
    Point, st.integers(1, 12), st.one_of(st.integers(0, 12).map(float), st.floats(0, 1e6), st.floats(0, 1e-300))
)
problems = st.lists(st.lists(points, min_size=1, max_size=5), min_size=1, max_size=5)


def cost(problem, places):
    chosen = [each[i] for each, i in zip(problem, places, strict=True)]
    return sum(p.bits for p in chosen), sum(Fraction(p.distortion) for p in chosen)


def least(problem, budget):
    """Of all combinations, with sums that are exact."""
    every = (cost(problem, places) for places in itertools.product(*(range(len(each)) for each in problem)))
    return min(error for bits, error in every if bits <= budget)


@given(problems, st.data())
def test_nothing_within_the_budget_is_better(problem, data):
    fewest = sum(min(p.bits for p in each) for each in problem)
    budget = data.draw(st.integers(fewest, fewest + 40))
    best = best_choice(problem, budget)
    bits, error = cost(problem, best.places)
    wanted = least(problem, budget)
    assert bits <= budget and wanted <= error <= wanted * (1 + Fraction(1e-9))
    assert best.bound == pytest.approx(float(error), rel=1e-12)


def drawn(rng, things, candidates):
    """Rates and distortions as those of quantizers: about 2^(-2 rate), of leaves of very different sizes."""
    sizes = np.exp(rng.normal(7, 2, things)).astype(int) + 8
    rates = rng.uniform(0.3, 8, (things, candidates))
    far = (
        sizes[:, None] * 4.0**-rates * np.exp(rng.normal(0, 0.5, (things, candidates)) + rng.normal(0, 2, (things, 1)))
    )
    return [
        [Point(int(n * r) + 64, float(d)) for r, d in zip(*each, strict=True)]
        for n, *each in zip(sizes, rates, far, strict=True)
    ]


def by_bits(problem, budget, grain):
    """Dynamic programming over every number of bits, in grains that all sizes are multiples of."""
    table = np.zeros(budget // grain + 1)
    for each in problem:
        new = np.full_like(table, np.inf)
        for p in each:
            n = p.bits // grain
            if n < len(table):
                new[n:] = np.minimum(new[n:], table[: len(table) - n] + p.distortion)
        table = new
    return table[-1]


@pytest.mark.parametrize("things", [3, 12, 40])
@pytest.mark.parametrize("seed", range(4))
def test_many_things_against_dynamic_programming(things, seed):
    rng = np.random.default_rng(seed)
    problem = [[Point(64 * -(-p.bits // 64), p.distortion) for p in each] for each in drawn(rng, things, 5)]
    fewest, most = (sum(of(p.bits for p in each) for each in problem) for of in (min, max))
    for share in (0.05, 0.3, 0.7):
        budget = fewest + int(share * (most - fewest))
        best = best_choice(problem, budget)
        bits, error = cost(problem, best.places)
        wanted = by_bits(problem, budget, 64)
        assert bits <= budget and float(error) <= 1.0001 * wanted
        assert best.bound <= wanted * (1 + 1e-9)


def test_thousands_of_things_are_near_the_bound_and_do_not_take_long():
    problem = drawn(np.random.default_rng(0), 3000, 4)
    fewest = sum(min(p.bits for p in each) for each in problem)
    start = time.process_time()
    best = best_choice(problem, 2 * fewest)
    bits, error = cost(problem, best.places)
    assert bits <= 2 * fewest and float(error) <= 1.0001 * best.bound and time.process_time() - start < 10


def test_few_states_still_give_a_choice_and_an_honest_bound():
    problem = drawn(np.random.default_rng(1), 30, 6)
    budget = 2 * sum(min(p.bits for p in each) for each in problem)
    whole, few = best_choice(problem, budget), best_choice(problem, budget, states=1)
    assert float(cost(problem, few.places)[1]) >= float(cost(problem, whole.places)[1]) >= few.bound
