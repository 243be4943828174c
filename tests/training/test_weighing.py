"""A search for the largest weight that will do."""

import itertools
import math

import pytest

import lcq


@pytest.mark.parametrize("edge", [0.003, 0.7, 1.0, 37.5])
def test_it_ends_within_a_factor_below_the_edge(edge):
    found = lcq.training.largest_weight(lambda weight: float(weight > edge), 0.5, factor=1.1, most=30)
    assert edge / 1.1 <= found.weight <= edge
    weights = [trial.weight for trial in found.trials]
    assert weights[0] == 1 and len(set(weights)) == len(weights)
    steps = [b / a for a, b in itertools.pairwise(weights)]
    assert steps[0] == (2 if edge >= 1 else 0.5)


def test_runs_are_counted_and_nan_will_not_do():
    runs = []
    found = lcq.training.largest_weight(lambda weight: runs.append(weight) or weight, 1e9, most=5)
    assert found.weight == 16 and len(runs) == 5
    assert lcq.training.largest_weight(lambda weight: math.nan if weight > 3 else 0.0, 1.0).weight <= 3


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match=r"a score of at most 1, got none in 3 runs \(1: 2, 0.5: 2, 0.25: 2\)"):
        lcq.training.largest_weight(lambda weight: 2.0, 1.0, most=3)
    for settings in ({"start": 0.0}, {"factor": 1.0}, {"most": 0}):
        with pytest.raises(ValueError, match="expected start > 0, factor > 1 and most >= 1"):
            lcq.training.largest_weight(lambda weight: weight, 1.0, **settings)
    with pytest.raises(ValueError, match="expected a limit, got NaN"):
        lcq.training.largest_weight(lambda weight: pytest.fail("a run for nothing"), math.nan)
