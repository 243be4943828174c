"""Short blocks get the best codebook that there is: against the plain recursion over sorted numbers, in float64."""

import operator

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.schemes.kmeans import columns, short

N, FOUR = 26, lcq.KMeans(4)  # no other test has leaves of this length, of which programs are kept
arrays = hnp.arrays(np.float32, N, elements=st.floats(-8, 8, width=32, allow_subnormal=False))


@pytest.fixture(autouse=True, scope="module")
def few_are_many():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short, "are_many", lambda cut: True)
        yield


def least(x, k, h=None):
    """The least error of k cells, each a run of the sorted numbers."""
    x, h = np.asarray(x, np.float64), np.ones(len(x)) if h is None else np.asarray(h, np.float64)
    order = np.argsort(x)
    x, h, n = x[order], h[order], len(x)
    cost = np.zeros((n + 1, n + 1))
    for a in range(n):
        for b in range(a + 1, n + 1):
            mass = h[a:b].sum()
            mean = (h[a:b] * x[a:b]).sum() / mass if mass else 0
            cost[a, b] = (h[a:b] * (x[a:b] - mean) ** 2).sum()
    best = cost[0]
    for _ in range(k - 1):
        best = np.array([min(best[a] + cost[a, b] for a in range(b + 1)) for b in range(n + 1)])
    return best[n]


def paid(form, x, h=1.0):
    return (h * (np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


def draw(law, seed, size):
    rng = np.random.default_rng(seed)
    x = {"normal": rng.normal, "cauchy": rng.standard_cauchy}.get(law, rng.normal)(size=size)
    return np.rint(2 * x).astype(np.float32) if law == "whole" else np.clip(x, -50, 50).astype(np.float32)


@pytest.mark.parametrize("law", ["normal", "cauchy", "whole"])
@pytest.mark.parametrize(("n", "k"), [(32, 16), (21, 3), (13, 1)])
def test_the_best_of_all_codebooks_is_found(law, n, k):
    x = draw(law, n + k, (n, 5))
    form = lcq.KMeans(k, per="channel").project(jnp.asarray(x))
    best = [least(column, k) for column in x.T]
    got = [((np.asarray(form.dense(), np.float64) - x)[:, j] ** 2).sum() for j in range(5)]
    np.testing.assert_allclose(got, best, rtol=1e-4, atol=1e-9)
    assert (np.diff(np.asarray(form.levels)) >= 0).all()
    for j in range(5):
        for c in np.unique(form.codes[:, j]):
            mean = x[np.asarray(form.codes)[:, j] == c, j].astype(np.float64).mean()
            assert float(form.levels[0, j, c]) == pytest.approx(mean, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_with_an_importance_too(seed):
    x, rng = draw("normal", seed, N), np.random.default_rng(seed)
    h = np.where(rng.random(N) < 0.3, 0, rng.lognormal(sigma=1.5, size=N)).astype(np.float32)
    form = FOUR.project(jnp.asarray(x), importance=jnp.asarray(h))
    assert paid(form, x, h) == pytest.approx(least(x, 4, h), rel=1e-4)


def test_blocks_along_any_axis_of_one_leaf_or_several_are_taken_side_by_side(monkeypatch):
    monkeypatch.setattr(columns, "_LANES", 8)  # several turns, the last one not full
    x = draw("normal", 0, (5, 32, 3))
    for per, axes in (((1, 32, 1), (1,)), ((5, 4, 1), (0, 1))):
        form = lcq.KMeans(3, per=per).project(jnp.asarray(x))
        split = x.reshape(5 // per[0], per[0], 32 // per[1], per[1], 3 // per[2], per[2])
        each = split.transpose(0, 2, 4, 1, 3, 5).reshape(-1, np.prod(per))
        assert form.levels.shape[-1] == 3
        assert paid(form, x) == pytest.approx(sum(least(block, 3) for block in each), rel=1e-4), axes
    pair = jnp.asarray(x[0, :4]), jnp.asarray(x[1, :9, 0])
    forms = FOUR.project(pair)
    both = np.concatenate([np.ravel(a) for a in pair])
    assert sum(paid(f, a) for f, a in zip(forms, pair, strict=True)) == pytest.approx(least(both, 4), rel=1e-4)


@pytest.mark.parametrize("power", [-100, 124])
def test_sizes_do_not_matter(power):
    """Sums of such numbers overflow in float32, or their squares vanish."""
    x, other = (0.5 + np.abs(draw("normal", seed, N)) for seed in (1, 2))
    h = np.where(np.arange(N) % 5, 1, 0).astype(np.float32)
    unit = np.float32(2.0**power)
    for weight in (None, h):
        cold, far = (FOUR.project(jnp.asarray(a), importance=weight) for a in (x, other * unit))
        warm = FOUR.project(jnp.asarray(x * unit), far, importance=weight)
        for form in (FOUR.project(jnp.asarray(x * unit), importance=weight), warm):
            np.testing.assert_array_equal(np.asarray(form.levels), np.asarray(cold.levels) * unit)
            np.testing.assert_array_equal(form.codes, cold.codes)
    lost = jnp.asarray(np.where(h > 0, x, 3e38))
    np.testing.assert_array_equal(
        FOUR.project(lost, importance=h).levels, FOUR.project(jnp.asarray(x), importance=h).levels
    )


@hypothesis.given(arrays, arrays)
def test_a_warm_start_is_never_worse(x, other):
    x = jnp.asarray(x)
    for before in (FOUR.project(jnp.asarray(other)), FOUR.project(x)):
        after = FOUR.project(x, before)
        levels = np.asarray(before.levels, np.float64).reshape(-1)
        bound = ((np.asarray(x, np.float64)[:, None] - levels) ** 2).min(1).sum()
        assert paid(after, x) <= bound * (1 + 1e-6) + 1e-10


sizes = st.floats(2.0**-90, 2.0**20, width=32)  # in units of the largest the least is a normal number


@hypothesis.given(st.lists(sizes | sizes.map(operator.neg) | st.just(0.0), min_size=1, max_size=4), arrays)
def test_at_most_k_distinct_values_are_returned(values, other):
    x = jnp.asarray(np.resize(np.asarray(values, np.float32), N))
    form = FOUR.project(x)
    np.testing.assert_array_equal(form.dense(), x)
    np.testing.assert_array_equal(FOUR.project(x, FOUR.project(jnp.asarray(other))).dense(), x)


@pytest.mark.parametrize(("x", "levels"), [([3, -1, 2], [-1, 2, 3, 3, 3]), ([2, 1], [1, 2, 2, 2, 2]), ([7], [7] * 5)])
def test_fewer_numbers_than_levels(x, levels):
    form = lcq.KMeans(5).project(jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(form.dense(), x)
    assert form.levels.tolist() == [levels]


def test_stacked_layers_are_a_loop_over_them_and_what_stops_gradients_is_none():
    x = jnp.asarray(draw("cauchy", 5, (3, N)))
    form = jax.vmap(FOUR.project)(x)
    for i in range(3):
        alone = FOUR.project(x[i])
        np.testing.assert_array_equal(form.codes[i], alone.codes)
        np.testing.assert_allclose(form.levels[i], alone.levels, rtol=1e-6)
    slope = jax.grad(lambda x: jnp.sum(jax.lax.stop_gradient(FOUR.project(x).dense() - x) * x))(x[0])
    np.testing.assert_allclose(slope, FOUR.project(x[0]).dense() - x[0], atol=1e-6)
