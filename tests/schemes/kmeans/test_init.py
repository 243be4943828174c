"""Cold starts come close to the optimum: of samples, of real kernels, with weights, joint, and short."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.schemes import grouped
from lcq.schemes.kmeans import init, lloyd
from tests.schemes.kmeans.samples import FOUR, N, distortion, least, weigh, weighted


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


@pytest.mark.parametrize("n", [N, 40_000])
def test_weighted_lloyd_comes_near_the_weighted_optimum_and_ends_at_weighted_means(n):
    for seed in range(4):
        x, h = np.random.default_rng(seed).laplace(size=n).astype(np.float32), weigh(seed, n)
        form = FOUR.project(jnp.asarray(x), importance=jnp.asarray(h))
        exact = lcq.KMeans(4, exact=True).project(jnp.asarray(x), importance=jnp.asarray(h))
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
    form = FOUR.project(jnp.asarray(x), importance=jnp.asarray(h))
    exact = lcq.KMeans(4, exact=True).project(jnp.asarray(x), importance=jnp.asarray(h))
    assert weighted(form, x, h) <= 1.01 * weighted(exact, x, h)


def test_exploring_longer_is_never_worse():
    x = np.exp(2 * np.random.default_rng(0).normal(size=300)).astype(np.float32)
    points, _ = init.summarise(grouped.cut((jnp.asarray(x),), None), 8)
    levels = jnp.linspace(x.min(), x.max(), 8)[None]
    start = lloyd.Centres(levels, jnp.ones(levels.shape, bool))
    errors = [least(x, init.explore(points, start, passes).levels) for passes in (0, 2, 60)]
    assert errors[0] > errors[1] > errors[2] / 0.95


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
        forms = scheme.project(xs, importance=hs)
        each = hs or (1.0, 1.0)
        return sum(float((h * (f.dense() - x) ** 2).sum()) for f, x, h in zip(forms, xs, each, strict=True))

    assert of(lcq.KMeans(16)) <= 1.002 * of(lcq.KMeans(16, exact=True))


@pytest.mark.parametrize(("size", "k"), [(64, 4), (256, 4), (256, 8)])
def test_short_leaves_take_little_effort_and_come_close_to_the_optimum(size, k):
    x = jnp.asarray(np.random.default_rng(size).standard_t(3, size=size), jnp.float32)
    found, best = (distortion(lcq.KMeans(k, exact=e).project(x), x) for e in (False, True))
    assert found <= 1.002 * best and init._few_runs(k, size, 1) <= 128  # 512 cost 15 times the rest
