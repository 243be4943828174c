"""Codebooks with a rate, sum h (x - c)^2 + rate bits, against float64 oracles in numpy."""

import dataclasses
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.schemes import grouped
from lcq.schemes.kmeans import ecvq
from tests.schemes.kmeans.samples import N, arrays, distortion, gaussian, weigh

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
        cold = CODED.project(jnp.asarray(x), importance=jnp.asarray(h))
        for before in (CODED.project(jnp.asarray(x)), cold):
            sums = alternate(x, before.levels, before.codes, 0.25, 4, h)
            after = sum_with_bits(CODED.project(jnp.asarray(x), before, importance=jnp.asarray(h)), x, 0.25, h)
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
    ((table,),) = state.lagrangian.codebooks
    tables = ((dataclasses.replace(table, levels=near.levels),),)
    plain = state.lagrangian._replace(codes=({"w": near.codes},), codebooks=tables)
    after = lcq.metrics(lcq.training.c_step(state._replace(lagrangian=plain), w))
    assert after["distortion"] > 1.1 * float(jnp.sum((w["w"] - near.dense()) ** 2)) and after["kept_back"] == 0


@pytest.mark.parametrize(("power", "rate"), [(60, 0.25), (-60, 0.25), (117, 2.0**-108)])
def test_sizes_do_not_matter(power, rate):
    """Squares of such numbers overflow in float32, or vanish."""
    unit = 2.0**power
    x, scheme = gaussian(N).astype(np.float32), lcq.KMeans(6, fixed=(0.5,), rate=rate)
    large = lcq.KMeans(6, fixed=(unit / 2,), rate=rate * unit**2)
    cold = jax.jit(scheme.project)(x)
    before = dataclasses.replace(cold, levels=cold.levels + 0.125)
    for got, expected in (
        (jax.jit(large.project)(x * unit), cold),
        (
            jax.jit(large.project)(x * unit, dataclasses.replace(before, levels=before.levels * unit)),
            jax.jit(scheme.project)(x, before),
        ),
    ):
        np.testing.assert_array_equal(got.codes, expected.codes)
        np.testing.assert_array_equal(got.levels, expected.levels * unit)


def test_what_weighs_nothing_is_of_any_size():
    x, h = gaussian(N).astype(np.float32), jnp.asarray(np.arange(N) % 5 > 0, jnp.float32)
    far = jnp.where(h > 0, x * 2.0**-30, 3e38)
    form, other = (jax.jit(CODED.project)(a, importance=h) for a in (jnp.where(h > 0, x * 2.0**-30, 0), far))
    np.testing.assert_array_equal(form.levels, other.levels)
    assert np.isfinite(other.levels).all()


def test_a_rate_that_cannot_be_is_refused():
    for rate in (-1, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected a rate >= 0, finite"):
            lcq.KMeans(3, rate=rate)
    with pytest.raises(ValueError, match="no exact solver"):
        lcq.KMeans(3, exact=True, rate=0.1)
    with pytest.raises(ValueError, match="drop rate="):
        lcq.Prune(fraction=0.5, values=lcq.KMeans(3, rate=0.1)).project(jnp.ones(N))
