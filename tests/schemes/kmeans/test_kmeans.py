"""Learned codebooks: float64 oracles in numpy, degenerate inputs, warm starts, blocks, joint leaves, sharding."""

import dataclasses
import math
import os
import re

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.schemes import grouped
from lcq.schemes.kmeans import ecvq, init, lloyd

N = 24  # most tests share this shape and four levels, and with them two compilations
FOUR = lcq.KMeans(4)
PARTLY = lcq.KMeans(4, fixed=(0, 1.25))
LLOYD_MAX = {3: 0.1902, 16: 0.00950}
arrays = hnp.arrays(np.float32, N, elements=st.floats(-8, 8, width=32, allow_subnormal=False))


def gaussian(n):
    """The n equally likely quantiles of a standard normal: a sample without noise."""
    return scipy.special.ndtri((np.arange(n) + 0.5) / n)


def distortion(form, x):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


def least(x, levels):
    """The error of the best codes for these levels."""
    levels = np.asarray(levels, np.float64).reshape(-1)
    return ((np.asarray(x, np.float64).reshape(-1, 1) - levels) ** 2).min(1).sum()


@pytest.mark.parametrize("k", [3, 16])
def test_lloyd_max_constants(k):
    x = np.random.default_rng(k).permutation(gaussian(100_000)).astype(np.float32)
    form = lcq.KMeans(k).project(jnp.asarray(x))
    assert distortion(form, x) / x.size == pytest.approx(LLOYD_MAX[k], rel=1e-3)
    wide = x.astype(np.float64)
    means = [wide[np.asarray(form.codes) == i].mean() for i in range(k)]
    np.testing.assert_allclose(form.levels[0], means, atol=1e-6)  # so the multipliers sum to 0 over every cell


def test_float32_sums_are_accurate_far_from_zero():
    x = (np.random.default_rng(0).permutation(gaussian(100_000)) + 100).astype(np.float32)
    form = lcq.KMeans(16).project(jnp.asarray(x))
    x = x.astype(np.float64)
    means = np.array([x[np.asarray(form.codes) == i].mean() for i in range(16)])
    assert distortion(form, x) == pytest.approx(((x - means[np.asarray(form.codes)]) ** 2).sum(), rel=1e-4)
    assert distortion(form, x) / x.size == pytest.approx(LLOYD_MAX[16], rel=5e-3)


def test_256_levels_are_no_worse_than_kmeans_plus_plus():
    rng = np.random.default_rng(0)
    x = np.sort(rng.laplace(size=20_000).astype(np.float32)).astype(np.float64)
    best = np.inf
    for _ in range(3):
        centres, near = [rng.choice(x)], np.full(x.shape, np.inf)
        for _ in range(255):
            near = np.minimum(near, (x - centres[-1]) ** 2)
            centres.append(rng.choice(x, p=near / near.sum()))
        for _ in range(30):
            codes = np.searchsorted(np.convolve(np.sort(centres), [0.5, 0.5], "valid"), x)
            count = np.bincount(codes, minlength=256)
            centres = np.where(count, np.bincount(codes, x, 256) / np.maximum(count, 1), np.sort(centres))
        best = min(best, least(x, centres))
    form = lcq.KMeans(256).project(jnp.asarray(x, jnp.float32))
    assert form.codes.dtype == jnp.uint8
    assert distortion(form, x) <= best


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


def weigh(seed, n=N):
    """Weights over many magnitudes, a fifth of them zero."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.2, 0, rng.lognormal(sigma=2, size=n)).astype(np.float32)


def weighted(form, x, h):
    return (h * (np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


@pytest.mark.parametrize("n", [N, 40_000])
def test_weighted_lloyd_comes_near_the_weighted_optimum_and_ends_at_weighted_means(n):
    for seed in range(4):
        x, h = np.random.default_rng(seed).laplace(size=n).astype(np.float32), weigh(seed, n)
        form = FOUR.project(jnp.asarray(x), weights=jnp.asarray(h))
        exact = lcq.KMeans(4, exact=True).project(jnp.asarray(x), weights=jnp.asarray(h))
        near = weighted(form, x, h) / weighted(exact, x, h)
        assert 1 - 1e-5 <= near <= (1.05 if n > N else 1.5)
        wide, h = x.astype(np.float64), h.astype(np.float64)
        means = [
            np.average(wide[np.asarray(form.codes) == i], weights=h[np.asarray(form.codes) == i]) for i in range(4)
        ]
        np.testing.assert_allclose(form.levels[0], means, atol=2e-3 if n > N else 1e-5)


def test_a_weighted_cold_start_goes_where_the_weight_is():
    x = np.random.default_rng(0).laplace(size=40_000).astype(np.float32)
    h = np.where(x > 3, 1, 1e-9).astype(np.float32)
    form = FOUR.project(jnp.asarray(x), weights=jnp.asarray(h))
    exact = lcq.KMeans(4, exact=True).project(jnp.asarray(x), weights=jnp.asarray(h))
    assert weighted(form, x, h) <= 1.01 * weighted(exact, x, h)


@hypothesis.given(arrays, arrays, st.integers(0, 99))
def test_a_weighted_warm_start_is_never_worse(x, other, seed):
    x, h = jnp.asarray(x), weigh(seed)
    for before in (FOUR.project(jnp.asarray(other)), FOUR.project(x, weights=jnp.asarray(h))):
        after = FOUR.project(x, before, weights=jnp.asarray(h))
        levels = np.asarray(before.levels, np.float64).reshape(-1)
        bound = (h * ((np.asarray(x, np.float64)[:, None] - levels) ** 2).min(1)).sum()
        assert np.all(np.diff(np.asarray(after.levels)) >= 0)
        assert weighted(after, x, h) <= bound * (1 + 1e-6) + 1e-10


@hypothesis.given(arrays, st.integers(0, 99), st.randoms(use_true_random=False))
def test_at_most_k_distinct_values_with_a_weight_are_returned(x, seed, random):
    h, values = weigh(seed), [random.choice([-2.5, 0.0, 1.0, 1e-3, 7.0]) for _ in range(4)]
    x = np.where(h > 0, [random.choice(values) for _ in range(N)], x).astype(np.float32)
    form = FOUR.project(jnp.asarray(x), weights=jnp.asarray(h))
    np.testing.assert_array_equal(np.asarray(form.dense())[h > 0], x[h > 0])
    assert np.isfinite(form.levels).all()


def test_fixed_levels_stay_under_weights():
    x, h = np.random.default_rng(0).normal(size=N).astype(np.float32), weigh(0)
    exact = lcq.KMeans(4, (0, 1.25), exact=True).project(jnp.asarray(x), weights=jnp.asarray(h))
    before = PARTLY.project(jnp.asarray(x))
    for start, most in ((None, 1.3 * weighted(exact, x, h)), (before, weighted(before, x, h))):
        form = PARTLY.project(jnp.asarray(x), start, weights=jnp.asarray(h))
        assert {0.0, 1.25} <= set(form.levels.ravel().tolist())
        assert weighted(exact, x, h) * (1 - 1e-6) <= weighted(form, x, h) <= most * (1 + 1e-6)


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


def test_exploring_longer_is_never_worse():
    x = np.exp(2 * np.random.default_rng(0).normal(size=300)).astype(np.float32)
    points, _ = init.summarise(grouped.cut((jnp.asarray(x),), None), 8)
    levels = jnp.linspace(x.min(), x.max(), 8)[None]
    start = lloyd.Centres(levels, jnp.ones(levels.shape, bool))
    errors = [least(x, init.explore(points, start, passes).levels) for passes in (0, 2, 60)]
    assert errors[0] > errors[1] > errors[2] / 0.95


def test_one_level_is_the_mean():
    x = jnp.arange(8.0)
    form = lcq.KMeans(1).project(x)
    assert form.levels.tolist() == [[3.5]] and not form.codes.any()
    assert lcq.KMeans(1).project(x + 1, form).levels.tolist() == [[4.5]]


def test_fixed_levels_stay_and_the_others_serve_the_rest():
    scheme = PARTLY
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.r_[rng.normal(-3, 0.1, N // 3), rng.normal(0, 0.1, N // 3), rng.normal(2, 0.1, N // 3)])
    form = scheme.project(x)
    assert {0.0, 1.25} <= set(form.levels.ravel().tolist())
    assert distortion(form, x) == pytest.approx(
        distortion(lcq.KMeans(4, (0, 1.25), exact=True).project(x), x), rel=1e-5
    )
    warm = scheme.project(x + 0.01, form)
    assert {0.0, 1.25} <= set(warm.levels.ravel().tolist())
    assert {0.0, 1.25} <= set(scheme.project(x + 9).levels.ravel().tolist())
    frozen = lcq.KMeans(2, fixed=(1, -1))
    np.testing.assert_array_equal(frozen.project(x).dense(), np.where(x > 0, 1, -1))
    some = jnp.asarray([0, 1.25, 7, -2] * (N // 4))
    np.testing.assert_array_equal(scheme.project(some, form).dense(), some)


def test_jit_is_eager():
    x = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.float32)
    eager, jitted = FOUR.project(x), jax.jit(FOUR.project)(x)
    np.testing.assert_array_equal(eager.codes, jitted.codes)
    np.testing.assert_array_equal(eager.levels, jitted.levels)


def test_vmap_is_a_loop():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, N)), jnp.float32).at[1].set(1).at[2, :20].set(0)
    many = jax.vmap(FOUR.project)(x)
    warm = jax.vmap(FOUR.project)(x + 0.1, many)
    for i in range(3):
        one = FOUR.project(x[i])
        np.testing.assert_array_equal(many.codes[i], one.codes)
        np.testing.assert_allclose(many.levels[i], one.levels, rtol=1e-6)
        np.testing.assert_array_equal(warm.codes[i], FOUR.project(x[i] + 0.1, one).codes)


def test_bfloat16_has_float32_statistics():
    x = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.bfloat16)
    form, wide = FOUR.project(x), FOUR.project(x.astype(jnp.float32))
    assert (form.dtype, form.levels.dtype, form.dense().dtype) == ("bfloat16", jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(form.codes, wide.codes)
    np.testing.assert_array_equal(form.levels, wide.levels)
    np.testing.assert_array_equal(FOUR.project(form.dense()).dense(), form.dense())


@pytest.mark.parametrize("per", ["channel", N // 2])
def test_every_block_has_the_codebook_it_would_have_alone(per):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
    parts, shape = {
        "channel": ([np.s_[:, j] for j in range(N)], (1, N, 4)),
        N // 2: ([np.s_[i : i + N // 2, j] for i in (0, N // 2) for j in range(N)], (2, N, 4)),
    }[per]
    form = lcq.KMeans(4, per=per).project(x)
    assert form.levels.shape == shape
    for i in range(0, len(parts), 5):
        alone = FOUR.project(x[parts[i]])
        np.testing.assert_array_equal(form.codes[parts[i]], alone.codes)
        np.testing.assert_allclose(form.levels.reshape(-1, 4)[i], alone.levels[0], rtol=1e-5)


def test_a_joint_task_is_the_concatenated_one():
    rng = np.random.default_rng(0)
    xs = tuple(jnp.asarray(rng.normal(i, 1, shape), jnp.float32) for i, shape in enumerate([(4, 3), (2, 3, 1), (6,)]))
    forms, whole = FOUR.project(xs), FOUR.project(jnp.concatenate([x.ravel() for x in xs]))
    assert [f.codes.shape for f in forms] == [x.shape for x in xs]
    assert [f.levels.shape for f in forms] == [(1, 1, 4), (1, 1, 1, 4), (1, 4)]
    for form in forms:
        np.testing.assert_allclose(form.levels.ravel(), whole.levels.ravel(), rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([f.codes.ravel() for f in forms]), whole.codes)
    with pytest.raises(ValueError, match="drop per= or joint="):
        lcq.KMeans(4, per="channel").project(xs[:2])


@pytest.mark.parametrize("per", [None, "channel"])
def test_sharded_leaves_give_the_same_codes_and_stay_where_they_are(per):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    scheme = lcq.KMeans(4, per=per)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
    there = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    whole, shared = scheme.project(x), scheme.project(there)
    np.testing.assert_array_equal(shared.codes, whole.codes)
    np.testing.assert_allclose(shared.levels, whole.levels, rtol=1e-5, atol=1e-6)
    assert shared.codes.sharding.is_equivalent_to(there.sharding, 2)
    text = jax.jit(scheme.project).lower(there, shared).compile().as_text()
    moved = [math.prod(map(int, d.split(","))) for d in re.findall(r"\[([\d,]+)\]\S* all-(?:gather|to-all)\(", text)]
    assert "all-reduce" in text and max(moved, default=0) <= whole.levels.size  # codebooks travel, leaves do not


def test_masked_sums_are_the_scattered_ones(monkeypatch):
    rng = np.random.default_rng(0)
    codes, values = jnp.asarray(rng.integers(0, 5, (3, 4, 6)), jnp.uint8), jnp.asarray(rng.normal(size=(3, 4, 6)))
    for stat in ((1, 1, 1), (3, 1, 6), (1, 4, 1)):
        scattered = lloyd.cell_sum(values, codes, 5, stat)
        with monkeypatch.context() as patch:
            patch.setattr(lloyd.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
            np.testing.assert_allclose(lloyd.cell_sum(values, codes, 5, stat), scattered, atol=1e-6)


def test_peak_memory_is_four_copies_of_the_leaf():
    x = jnp.zeros((512, 512))
    scheme = lcq.KMeans(16)
    form = jax.eval_shape(scheme.project, x)
    for args in ((x,), (x, form)):
        memory = jax.jit(scheme.project).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 4 * x.nbytes


def test_settings_are_checked_and_hash():
    assert hash(lcq.KMeans(3, fixed=(1, 0))) == hash(lcq.KMeans(3, fixed=(0.0, 1.0)))
    assert lcq.KMeans(3, fixed=(1, 0)) == lcq.KMeans(3, fixed=(0.0, 1.0))
    for bad in ({"k": 0}, {"k": 65537}, {"k": 1, "fixed": (0, 1)}, {"k": 3, "fixed": (0, 0)}):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            lcq.KMeans(**bad)
    with pytest.raises(ValueError, match="finite"):
        lcq.KMeans(3, fixed=(np.inf,))


# A rate: sum h (x - c)^2 + rate * bits, against float64 oracles in numpy

CODED = lcq.KMeans(6, rate=0.25)


def sum_with_bits(form, x, rate, h=1.0):
    """The sum that a rate asks to be least."""
    number = np.unique(form.codes, return_counts=True)[1]
    bits = (number * np.log2(form.codes.size / number)).sum()
    return (h * (np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum() + rate * bits


def least_with_bits(x, k, rate):
    """The least sum of all partitions into at most k runs, each of which costs its error and its own code."""
    x = np.sort(np.asarray(x, np.float64).ravel())
    total, square = (np.concatenate([[0], np.cumsum(v)]) for v in (x, x**2))
    start, stop = np.mgrid[: x.size + 1, : x.size + 1]
    m = np.maximum(stop - start, 1)
    cost = square[stop] - square[start] - (total[stop] - total[start]) ** 2 / m + rate * m * np.log2(x.size / m)
    cost[stop <= start] = np.inf
    best = reached = cost[0]
    for _ in range(k - 1):
        reached = (reached[:, None] + cost).min(0)
        best = np.minimum(best, reached)
    return best[-1]


def alternate(x, levels, codes, rate, passes, h=1.0):
    """The textbook's algorithm: cheapest codes, lengths, means. The sum after every pass."""
    x, levels, sums = np.asarray(x, np.float64).ravel(), np.array(levels, np.float64).ravel(), []
    number = np.bincount(np.asarray(codes).ravel(), minlength=levels.size)
    h = np.broadcast_to(np.asarray(h, np.float64), x.shape)
    for _ in range(passes):
        with np.errstate(divide="ignore"):
            lengths = np.log2(x.size / number)
        codes = (h[:, None] * (x[:, None] - levels) ** 2 + rate * lengths).argmin(1)
        number = np.bincount(codes, minlength=levels.size)
        mass = np.bincount(codes, h, levels.size)
        levels = np.where(mass > 0, np.bincount(codes, h * x, levels.size) / np.where(mass > 0, mass, 1), levels)
        some = number[number > 0]
        sums.append((h * (x - levels[codes]) ** 2).sum() + rate * (some * np.log2(x.size / some)).sum())
    return sums


@pytest.mark.parametrize("scale", [0.5, 1.5, 6.0])  # of the numbers, for one program: as a rate over its square
def test_a_rate_comes_near_the_global_optimum(scale):
    x = (scale * np.random.default_rng(1).laplace(size=N)).astype(np.float32)
    form, best = CODED.project(jnp.asarray(x)), least_with_bits(x, 6, 0.25)
    assert best * (1 - 1e-5) <= sum_with_bits(form, x, 0.25) <= best * 1.1
    plain = lcq.KMeans(6).project(jnp.asarray(x))
    assert sum_with_bits(form, x, 0.25) <= alternate(x, plain.levels, plain.codes, 0.25, 50)[-1] * (1 + 1e-5)
    means = [x[np.asarray(form.codes) == i].mean() for i in np.unique(form.codes)]
    np.testing.assert_allclose(form.levels[0][np.unique(form.codes)], means, atol=1e-5)


def test_cold_starts_with_a_rate_are_near_the_global_optimum_of_many_samples():
    above = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        draw = (rng.laplace, rng.normal, rng.standard_cauchy)[seed % 3]
        x = np.clip(rng.choice([0.5, 1.5, 3, 6]) * draw(size=N), -30, 30).astype(np.float32)
        above.append(sum_with_bits(CODED.project(jnp.asarray(x)), x, 0.25) / least_with_bits(x, 6, 0.25))
    assert min(above) >= 1 - 1e-5 and max(above) < 1.1 and np.mean(above) < 1.02


def test_neighbours_are_merged_as_in_the_textbook():
    x = np.random.default_rng(3).laplace(size=60)
    many = np.sort(np.random.default_rng(4).laplace(size=14))
    cells = [c for c in (x[np.abs(x[:, None] - many).argmin(1) == i] for i in range(14)) if c.size]

    def cost(cells):
        return sum(((c - c.mean()) ** 2).sum() + 0.1 * c.size * np.log2(x.size / c.size) for c in cells)

    path = [cells]
    while len(path[-1]) > 1:
        now = path[-1]
        joined = [[*now[:i], np.concatenate(now[i : i + 2]), *now[i + 2 :]] for i in range(len(now) - 1)]
        path.append(min(joined, key=cost))
    best = min((cells for cells in path if len(cells) <= 5), key=cost)
    whole, price = grouped.cut((jnp.asarray(x, jnp.float32),), None), ecvq.Price(jnp.full((1, 1), 0.1), False)
    got = ecvq.merged_levels(whole, jnp.asarray(many[None], jnp.float32), 5, price)
    np.testing.assert_allclose(np.unique(got), [c.mean() for c in best], rtol=1e-4, atol=1e-5)


def test_clusters_keep_a_level_each_while_a_bit_is_cheap_and_share_one_when_it_is_dear():
    x = np.repeat([-5.0, 0.0, 4.0, 4.5], 6) + np.tile([-0.01, 0, 0.01], 8)
    for scale, many in ((5.0, 4), (0.5, 3), (0.05, 1)):
        form = CODED.project(jnp.asarray(scale * x, jnp.float32))
        assert len(np.unique(form.codes)) == many
        assert sum_with_bits(form, scale * x, 0.25) == pytest.approx(least_with_bits(scale * x, 6, 0.25), rel=1e-4)


@hypothesis.given(arrays, arrays)
def test_four_warm_passes_with_a_rate_are_those_of_the_textbook(x, other):
    before = CODED.project(jnp.asarray(other))
    start = sum_with_bits(before, x, 0.25)
    sums = alternate(x, before.levels, before.codes, 0.25, 4)
    after = CODED.project(jnp.asarray(x), before)
    assert np.all(np.diff(np.asarray(after.levels)) >= 0)
    assert sum_with_bits(after, x, 0.25) <= start * (1 + 1e-5) + 1e-6
    assert all(b <= a * (1 + 1e-9) + 1e-9 for a, b in zip([start, *sums], sums, strict=False))
    if len(np.unique(x)) == N and np.abs(x).max() < 8:  # ties may go either way in float32
        assert sum_with_bits(after, x, 0.25) <= max(sums[0], sums[-1] * (1 + 1e-3))


def test_a_rate_and_weights():
    for seed in range(6):
        x, h = np.random.default_rng(seed).laplace(size=N).astype(np.float32), weigh(seed)
        cold = CODED.project(jnp.asarray(x), weights=jnp.asarray(h))
        for before in (CODED.project(jnp.asarray(x)), cold):
            sums = alternate(x, before.levels, before.codes, 0.25, 4, h)
            after = sum_with_bits(CODED.project(jnp.asarray(x), before, weights=jnp.asarray(h)), x, 0.25, h)
            assert after <= sum_with_bits(before, x, 0.25, h) * (1 + 1e-5)
            assert after == pytest.approx(sums[-1], rel=1e-4)


def test_corners_are_those_of_the_cheapest_codes():
    rng = np.random.default_rng(0)
    x = np.linspace(-4, 4, 2001)
    for _ in range(20):
        levels = np.sort(rng.normal(size=9)).astype(np.float32)
        costs = np.where(rng.random(9) < 0.2, np.inf, rng.exponential(size=9)).astype(np.float32)
        costs[3] = 0.5
        cuts = np.asarray(ecvq.corners(jnp.asarray(levels), jnp.asarray(costs)))
        assert (np.diff(cuts[np.isfinite(cuts)]) >= 0).all()
        paid = (x[:, None] - levels.astype(np.float64)) ** 2 + costs
        chosen = paid[np.arange(x.size), np.searchsorted(cuts, x)]
        np.testing.assert_allclose(chosen, paid.min(1), atol=1e-5)


def test_entropy_coded_gaussian_is_near_the_limit_of_theory():
    x = np.random.default_rng(0).permutation(gaussian(60_000)).astype(np.float32)
    form, plain = (lcq.KMeans(16, rate=rate).project(jnp.asarray(x)) for rate in (0.1286, 0.0))
    entropies = []
    for each in (form, plain):
        share = np.unique(each.codes, return_counts=True)[1] / x.size
        entropies.append(-(share * np.log2(share)).sum())
    assert entropies[0] == pytest.approx(2, abs=0.1)
    limit = math.pi * math.e / 6 * 2 ** (-2 * entropies[0])  # of uniform steps, from above within 0.1 dB
    assert abs(10 * math.log10(distortion(form, x) / x.size / limit)) < 0.15
    assert distortion(plain, x) / x.size > 1.2 * math.pi * math.e / 6 * 2 ** (-2 * entropies[1])  # Lloyd and Max lose


def test_a_rate_with_blocks_leaves_and_fixed_levels():
    x = jnp.asarray(np.random.default_rng(0).laplace(size=(N, 2)), jnp.float32)
    alone = [CODED.project(x[:, j]) for j in range(2)]
    per = lcq.KMeans(6, rate=0.25, per="channel").project(x)
    parts = CODED.project((x[:5, 0], x[5:, 0]))
    np.testing.assert_array_equal(np.concatenate([p.codes for p in parts]), alone[0].codes)
    for j in range(2):
        np.testing.assert_array_equal(per.codes[:, j], alone[j].codes)
        np.testing.assert_allclose(per.levels[0, j], alone[j].levels[0], rtol=1e-5, atol=1e-6)
    partly = lcq.KMeans(6, fixed=(0, 1.25), rate=0.25)
    before = partly.project(x)
    after = partly.project(x + 0.1, before)
    assert {0.0, 1.25} <= set(before.levels.ravel().tolist()) & set(after.levels.ravel().tolist())
    assert sum_with_bits(after, x + 0.1, 0.25) <= sum_with_bits(before, x + 0.1, 0.25)


def test_lc_with_a_rate_lowers_the_entropy_and_closes_the_gap():
    rng = np.random.default_rng(0)
    target = jnp.asarray(rng.laplace(size=200), jnp.float32)
    scheme = lcq.KMeans(16, rate=0.05)
    rules = [lcq.Rule("w", scheme)]
    tx = lcq.lc(optax.sgd, rules, mu=lcq.geometric(0.1, 1.3, steps=20), every=20, learning_rate=0.3)

    def step(_, carry):
        params, state = carry
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": target}
    params, state = jax.jit(lambda c: jax.lax.fori_loop(0, 400, step, c))((params, tx.init(params)))
    form, plain = lcq.extract(state, params)["w"].unpack(), lcq.KMeans(16).project(target)
    bits = [
        (n * np.log2(200 / n)).sum() / 200 for n in (np.unique(f.codes, return_counts=True)[1] for f in (form, plain))
    ]
    assert lcq.metrics(state)["gap"] < 1e-3 and bits[0] < 0.9 * bits[1]


def test_what_a_rate_charges_is_the_length_of_the_codes():
    rng = np.random.default_rng(1)
    x, other = (jnp.asarray(rng.normal(size=(12, 6)) ** 3, jnp.float32) for _ in range(2))

    def bits(columns):
        counts = [np.unique(column, return_counts=True)[1] for column in columns]
        return sum(float((n * np.log2(n.sum() / n)).sum()) for n in counts)

    plain, channel = lcq.KMeans(5, rate=0.2), lcq.KMeans(5, rate=0.2, per="channel")
    form, columns, pair = plain.project(x), channel.project(x), plain.project((x, other))
    assert float(plain.charge((form,), 1.0)) == pytest.approx(0.2 * bits([form.codes.ravel()]), rel=1e-5)
    assert float(channel.charge((columns,), 1.0)) == pytest.approx(0.2 * bits(np.asarray(columns.codes).T), rel=1e-5)
    joined = np.concatenate([np.ravel(each.codes) for each in pair])
    assert float(plain.charge(pair, 1.0)) == pytest.approx(0.2 * bits([joined]), rel=1e-5)
    assert lcq.KMeans(5).charge((form,), 1.0) == 0


def test_a_c_step_may_pay_distance_for_bits():
    """From the plain codebook, the nearest that there is, a C step with a rate goes on to a cheaper one."""
    w = {"w": jnp.asarray(np.random.default_rng(2).normal(size=400), jnp.float32)}
    rules = [lcq.Rule("w", lcq.KMeans(16, rate=0.1))]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=1.0, every=None, multipliers=False)
    state = tx.init(w)
    near = lcq.KMeans(16).project(w["w"])
    ((table,),) = state.lagrangian.tables
    tables = ((dataclasses.replace(table, levels=near.levels),),)
    plain = state.lagrangian._replace(codes=({"w": near.codes},), tables=tables)
    after = lcq.metrics(lcq.training.c_step(state._replace(lagrangian=plain), w))
    assert after["distortion"] > 1.1 * float(jnp.sum((w["w"] - near.dense()) ** 2)) and after["kept_back"] == 0


def test_a_rate_that_cannot_be_is_refused():
    for rate in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected a rate >= 0, finite"):
            lcq.KMeans(3, rate=rate)
    with pytest.raises(ValueError, match="no exact solver"):
        lcq.KMeans(3, exact=True, rate=0.1)
    with pytest.raises(ValueError, match="drop rate="):
        lcq.Prune(kept=0.5, values=lcq.KMeans(3, rate=0.1)).project(jnp.ones(N))


@pytest.mark.skipif("LCQ_DATA" not in os.environ, reason="real data: set LCQ_DATA to the folder that holds it")
@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("net", ["resnet20_cifar10", "lenet300_tanh_mnist"])
def test_codebooks_of_real_kernels(net, k):
    kernels = np.load(f"{os.environ['LCQ_DATA']}/{net}.npz")
    for name in kernels.files:
        if kernels[name].ndim in (2, 4):
            x = jnp.asarray(kernels[name])
            found, best = (distortion(s.project(x), x) for s in (lcq.KMeans(k), lcq.KMeans(k, exact=True)))
            assert found <= 1.0005 * best, name


@pytest.mark.parametrize("k", [4, 16])
@pytest.mark.parametrize(
    "scheme", [{}, {"per": "channel"}, {"per": 16}, {"fixed": (0.0,)}], ids=["whole", "channel", "group", "fixed"]
)
def test_heavy_tails_come_close_to_the_optimum(scheme, k):
    """Few numbers far out, which a bin must not join with others, in every way that a codebook is shared."""
    x = jnp.asarray(np.random.default_rng(k).standard_t(3, size=(64, 36)), jnp.float32)
    found, best = (distortion(lcq.KMeans(k, **scheme, exact=e).project(x), x) for e in (False, True))
    assert found <= 1.002 * best


@pytest.mark.parametrize("weighted", [False, True])
def test_joint_and_weighted_codebooks_come_close_to_the_optimum(weighted):
    rng = np.random.default_rng(0)
    xs = tuple(jnp.asarray(rng.standard_t(3, size=shape), jnp.float32) for shape in ((48, 20), (700,)))
    hs = tuple(jnp.asarray(rng.lognormal(size=x.shape), jnp.float32) for x in xs) if weighted else None

    def of(scheme):
        forms = scheme.project(xs, weights=hs)
        each = hs or (1.0, 1.0)
        return sum(float((h * (f.dense() - x) ** 2).sum()) for f, x, h in zip(forms, xs, each, strict=True))

    assert of(lcq.KMeans(16)) <= 1.002 * of(lcq.KMeans(16, exact=True))


@pytest.mark.parametrize(("size", "k"), [(64, 4), (256, 4), (256, 8)])
def test_short_leaves_take_little_effort_and_come_close_to_the_optimum(size, k):
    x = jnp.asarray(np.random.default_rng(size).standard_t(3, size=size), jnp.float32)
    found, best = (distortion(lcq.KMeans(k, exact=e).project(x), x) for e in (False, True))
    assert found <= 1.002 * best and init._few_runs(k, size, 1) <= 128  # 512 cost 15 times the rest
