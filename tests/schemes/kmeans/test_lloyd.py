"""Lloyd's passes: cells, sums, spare levels, warm starts that are never worse, degenerate inputs."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.schemes.kmeans import lloyd
from tests.schemes.kmeans.samples import FOUR, PARTLY, N, arrays, distortion, least, weigh, weighted


@hypothesis.given(
    st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
    arrays,
)
def test_at_most_k_distinct_values_are_returned(values, random, other):
    hypothesis.assume(np.abs(values).max() < 1e30 * np.abs(np.diff([*values, 0])).max() or not any(values))
    x = jnp.asarray([random.choice(values) for _ in range(N)], jnp.float32)
    cold = FOUR.project(x)
    np.testing.assert_array_equal(cold.dense(), x)
    warm = FOUR.project(x, FOUR.project(jnp.asarray(other)))
    np.testing.assert_array_equal(warm.dense(), x)


@hypothesis.given(arrays, arrays)
def test_a_warm_start_is_never_worse(x, other):
    x = jnp.asarray(x)
    for before in (FOUR.project(jnp.asarray(other)), FOUR.project(x)):
        after = FOUR.project(x, before)
        assert np.all(np.diff(np.asarray(after.levels)) >= 0)
        assert distortion(after, x) <= least(x, before.levels) * (1 + 1e-6) + 1e-10


@hypothesis.given(arrays, arrays, st.integers(0, 99))
def test_a_weighted_warm_start_is_never_worse(x, other, seed):
    x, h = jnp.asarray(x), weigh(seed)
    for before in (FOUR.project(jnp.asarray(other)), FOUR.project(x, importance=jnp.asarray(h))):
        after = FOUR.project(x, before, importance=jnp.asarray(h))
        levels = np.asarray(before.levels, np.float64).reshape(-1)
        bound = (h * ((np.asarray(x, np.float64)[:, None] - levels) ** 2).min(1)).sum()
        assert np.all(np.diff(np.asarray(after.levels)) >= 0)
        assert weighted(after, x, h) <= bound * (1 + 1e-6) + 1e-10


@hypothesis.given(arrays, st.integers(0, 99), st.randoms(use_true_random=False))
def test_at_most_k_distinct_values_with_a_weight_are_returned(x, seed, random):
    h, values = weigh(seed), [random.choice([-2.5, 0.0, 1.0, 1e-3, 7.0]) for _ in range(4)]
    x = np.where(h > 0, [random.choice(values) for _ in range(N)], x).astype(np.float32)
    form = FOUR.project(jnp.asarray(x), importance=jnp.asarray(h))
    np.testing.assert_array_equal(np.asarray(form.dense())[h > 0], x[h > 0])
    assert np.isfinite(form.levels).all()


@hypothesis.given(arrays)
def test_projecting_twice_changes_nothing(x):
    form = FOUR.project(jnp.asarray(x))
    for again in (FOUR.project(form.dense()), FOUR.project(form.dense(), form)):
        np.testing.assert_array_equal(again.dense(), form.dense())


@pytest.mark.parametrize(
    "x", [np.full(N, 2.5), np.zeros(N), np.r_[1.0, np.zeros(N - 1)], np.arange(N) % 2 * 1e-20, [3.0]]
)
def test_degenerate_inputs_are_defined(x):
    x = jnp.asarray(x, jnp.float32)
    for form in (FOUR.project(x), FOUR.project(x, FOUR.project(x)), FOUR.project(x, FOUR.project(x + 1))):
        assert np.isfinite(form.levels).all()
        assert np.all(np.diff(np.asarray(form.levels)) >= 0)
        np.testing.assert_array_equal(form.dense(), x)


def test_a_number_on_a_level_or_a_midpoint():
    one, next_one = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    after = np.nextafter(next_one, np.float32(2))  # halfway between these two rounds up, between the others down
    for levels in ([0, one, next_one, 3], [one, next_one, next_one, 3], [0, next_one, after, 3]):
        levels = np.asarray(levels, np.float32)
        codes = lloyd.assign(jnp.asarray(levels), jnp.asarray(levels)[None])
        np.testing.assert_array_equal(levels[np.asarray(codes)], levels)
    codes = lloyd.assign(jnp.asarray([0.5, 0.50001, 2, 9]), jnp.asarray([[0.0, 1.0, 3.0, 3.0]]))
    assert codes.tolist() == [0, 1, 1, 3]


def test_a_spare_level_splits_neighbouring_numbers_and_either_side_of_a_fixed_level():
    one = np.where(np.arange(N) % 3, np.float32(1), np.nextafter(np.float32(1), np.float32(2)))
    for x in (one, np.where(one > 1, 1, one.max())):
        np.testing.assert_array_equal(FOUR.project(jnp.asarray(x), FOUR.project(jnp.full(N, 9.0))).dense(), x)
    before = PARTLY.project(jnp.asarray([0, 1.25, 5, 7] * (N // 4)))
    assert before.levels.tolist() == [[0, 1.25, 5, 7]]
    for value in (-1.0, 1.0):
        assert (PARTLY.project(jnp.full(N, value), before).dense() == value).all()


def test_masked_sums_are_the_scattered_ones(monkeypatch):
    rng = np.random.default_rng(0)
    codes, values = jnp.asarray(rng.integers(0, 5, (3, 4, 6)), jnp.uint8), jnp.asarray(rng.normal(size=(3, 4, 6)))
    for stat in ((1, 1, 1), (3, 1, 6), (1, 4, 1)):
        scattered = lloyd.cell_sum(values, codes, 5, stat)
        with monkeypatch.context() as patch:
            patch.setattr(lloyd.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
            np.testing.assert_allclose(lloyd.cell_sum(values, codes, 5, stat), scattered, atol=1e-6)
