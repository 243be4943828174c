"""The exact codebook against all assignments, and against the plain quadratic recursion."""

import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import lcq
from lcq.schemes.kmeans import exact
from lcq.schemes.kmeans.exact import best_levels

LLOYD_MAX = {2: 0.3634, 3: 0.1902, 4: 0.1175, 8: 0.03455, 16: 0.00950}


def least(x, levels):
    """The error of the best codes for these levels."""
    return ((np.asarray(x, np.float64).reshape(-1, 1) - np.asarray(levels, np.float64)) ** 2).min(1).sum()


def brute_force(x, k, fixed, h=1.0):
    """The least error over all k^n assignments, the last of the k cells being those of the fixed levels."""
    codes = np.array(list(itertools.product(range(k), repeat=len(x))))
    total = np.zeros(len(codes))
    for cell in range(k):
        inside = codes == cell
        if cell >= k - len(fixed):
            centre = np.full(len(codes), fixed[cell - k + len(fixed)])
        else:
            weight = (inside * h).sum(1)
            centre = (inside * h * x).sum(1) / np.where(weight > 0, weight, 1)
        total += (inside * h * (x - centre[:, None]) ** 2).sum(1)
    return total.min()


def quadratic(x, k, fixed=()):
    """The plain recursion over sorted numbers, O(k n^2): cells are runs, fixed levels in order among the others."""
    x, n, fixed = np.sort(x), len(x), sorted(fixed)
    own = np.full((n + 1, n + 1), np.inf)
    held = [own.copy() for _ in fixed]
    for a in range(n + 1):
        rest = x[a:] - x[min(a, n - 1)]
        size = np.arange(1, n - a + 1)
        own[a, a:] = np.r_[0, np.cumsum(rest**2) - np.cumsum(rest) ** 2 / size]
        for j, c in enumerate(fixed):
            held[j][a, a:] = np.r_[0, np.cumsum((x[a:] - c) ** 2)]
    table = {}
    for i, j in itertools.product(range(k - len(fixed) + 1), range(len(fixed) + 1)):
        ways = [np.r_[0, np.full(n, np.inf)]] if i == j == 0 else []
        ways += [(table[i - 1, j][:, None] + own).min(0)] if i else []
        ways += [(table[i, j - 1][:, None] + held[j - 1]).min(0)] if j else []
        table[i, j] = np.min(ways, 0)
    return table[k - len(fixed), len(fixed)][n]


@pytest.mark.parametrize("fixed", [(), (0.0,), (-1.0, 0.5), (-3.0, 0.0, 0.25)])
def test_brute_force(fixed):
    rng = np.random.default_rng(len(fixed))
    for k, n in ((1, 4), (2, 10), (3, 8), (4, 6)):
        if len(fixed) <= k:
            for x in (rng.normal(size=n), rng.integers(-2, 3, n).astype(float), np.exp(3 * rng.normal(size=n))):
                levels = best_levels(x, k, fixed)
                assert len(levels) == k and set(fixed) <= set(levels) and np.all(np.diff(levels) >= 0)
                assert least(x, levels) == pytest.approx(brute_force(x, k, fixed), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("fixed", [(), (0.0,), (-1.0, 0.5)])
def test_weighted_brute_force(fixed):
    rng = np.random.default_rng(len(fixed))
    for k, n in ((1, 4), (2, 10), (3, 8), (4, 6)):
        for x in (rng.normal(size=n), rng.integers(-2, 3, n).astype(float)):
            for h in (rng.lognormal(sigma=3, size=n), rng.integers(0, 3, n) + 0.0, np.r_[1e-5, 1e5, np.ones(n - 2)]):
                if len(fixed) <= k and h.any():
                    levels = best_levels(x, k, fixed, h)
                    error = (h * ((x[:, None] - levels) ** 2).min(1)).sum()
                    least = brute_force(x, k, fixed, h)
                    assert len(levels) == k and set(fixed) <= set(levels) and np.all(np.diff(levels) >= 0)
                    assert error == pytest.approx(least, rel=1e-9, abs=1e-13 * (h * x**2).sum())


def test_whole_weights_are_repetitions(monkeypatch):
    monkeypatch.setattr(exact, "_FIRST", 40)  # many rounds of bounds
    rng = np.random.default_rng(0)
    x, h = rng.standard_cauchy(size=400), rng.integers(0, 4, 400)
    for k, fixed in ((5, ()), (30, ()), (4, (0.0, 0.9))):
        weighted = best_levels(x, k, fixed, 0.37 * h)
        assert least(np.repeat(x, h), weighted) == pytest.approx(quadratic(np.repeat(x, h), k, fixed), rel=1e-9)


@pytest.mark.parametrize("first", [3, 40, 1024])
@pytest.mark.parametrize("law", ["normal", "standard_cauchy", "integers"])
def test_the_quadratic_recursion(monkeypatch, first, law):
    monkeypatch.setattr(exact, "_FIRST", first)  # few first intervals: many rounds of bounds
    monkeypatch.setattr(exact, "_PARTS", 2)
    rng = np.random.default_rng(first)
    for k, n, fixed in ((2, 500, ()), (5, 300, ()), (30, 400, ()), (4, 200, (0.0, 0.9))):
        x = np.rint(3 * rng.normal(size=n)) if law == "integers" else getattr(rng, law)(size=n)
        assert least(x, best_levels(x, k, fixed)) == pytest.approx(quadratic(x, k, fixed), rel=1e-9, abs=1e-12)


def test_two_thousand_numbers():
    x = np.random.default_rng(0).laplace(size=2000)
    assert least(x, best_levels(x, 16)) == pytest.approx(quadratic(x, 16), rel=1e-10)


@pytest.mark.parametrize("k", LLOYD_MAX)
def test_lloyd_max_constants(k):
    x = scipy.special.ndtri((np.arange(100_000) + 0.5) / 100_000)
    levels = best_levels(x, k)
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-3)
    codes = np.searchsorted((levels[1:] + levels[:-1]) / 2, x)
    assert ((x - levels[codes]) ** 2).mean() == pytest.approx(LLOYD_MAX[k], rel=1e-3)


@pytest.mark.parametrize("x", [[2.5] * 7, [0.0] * 5, [3.0], [1, 2, 1, 2], [1e30, -1e30, 1], [1e-30, 1, 2e-30, 1e-30]])
def test_degenerate_inputs_are_returned(x):
    x = jnp.asarray(x, jnp.float32)
    for scheme in (lcq.KMeans(3, exact=True), lcq.KMeans(300, exact=True), lcq.KMeans(5, (0, 9), exact=True)):
        form = scheme.project(x)
        np.testing.assert_array_equal(form.dense(), x)
        assert np.all(np.diff(np.asarray(form.levels)) >= 0)
        assert form.codes.dtype == (jnp.uint16 if scheme.k > 256 else jnp.uint8)


def test_blocks_and_joint_leaves():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 4)).astype(np.float32)
    form = lcq.KMeans(2, exact=True, per="channel").project(jnp.asarray(x))
    assert form.levels.shape == (1, 4, 2)
    for j in range(4):
        error = ((np.asarray(form.dense(), np.float64) - x)[:, j] ** 2).sum()
        assert error == pytest.approx(quadratic(x[:, j].astype(float), 2), rel=1e-5)
    form = lcq.KMeans(2, exact=True, per=3).project(jnp.asarray(x))
    assert ((form.dense() - x)[3:, 1] ** 2).sum() == pytest.approx(quadratic(x[3:, 1].astype(float), 2), rel=1e-4)
    forms = lcq.KMeans(3, exact=True).project((jnp.asarray(x[:2]), jnp.asarray(x[2:].ravel())))
    error = sum(
        ((np.asarray(f.dense()).ravel() - y.ravel()) ** 2).sum() for f, y in zip(forms, (x[:2], x[2:]), strict=True)
    )
    assert error == pytest.approx(quadratic(x.ravel().astype(float), 3), rel=1e-4)
    assert [f.levels.shape for f in forms] == [(1, 1, 3), (1, 3)]


def test_the_exact_error_is_below_lloyds():
    x = jnp.asarray(np.random.default_rng(0).laplace(size=24), jnp.float32)
    exact, lloyd = (((s.project(x).dense() - x) ** 2).sum() for s in (lcq.KMeans(4, exact=True), lcq.KMeans(4)))
    assert exact <= lloyd * (1 + 1e-6) and lloyd <= 1.5 * exact


def test_a_trace_is_refused_and_a_million_numbers_are_not():
    with pytest.raises(ValueError, match="cannot run under jit"):
        jax.jit(lcq.KMeans(2, exact=True).project)(jnp.ones(3))
    x = np.random.default_rng(0).normal(size=1_000_000)
    start = time.process_time()
    best_levels(x, 16)
    assert time.process_time() - start < 10
