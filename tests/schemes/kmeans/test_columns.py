"""Passes over columns of many long blocks: the textbook's in float64, and those that move unused levels."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.schemes import grouped
from lcq.schemes.kmeans import columns, kmeans
from lcq.schemes.kmeans.exact import best_levels
from tests.schemes.kmeans.samples import weigh

SCHEME = lcq.KMeans(5, per="channel")


@pytest.fixture(autouse=True)
def every_leaf_is_large(monkeypatch):
    monkeypatch.setattr(columns, "_LARGE", 1)
    monkeypatch.setattr(columns, "_LANES", 8)  # several turns, the last one not full


def lloyd(x, levels, h):
    """Codes and levels after so many passes, and the means of the last codes."""
    levels = np.array(levels, np.float64)
    for _ in range(kmeans._WARM_COLUMNS + 1):
        codes = ((x[:, None] - levels) ** 2).argmin(1)
        levels = np.array([np.average(x[codes == k], weights=h[codes == k]) for k in range(len(levels))])
    return codes, levels


@pytest.mark.parametrize("weighted", [False, True])
def test_warm_passes_are_those_of_the_textbook(weighted):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 11)).astype(np.float32)
    h = rng.lognormal(size=(96, 1) if weighted else (1, 1)).astype(np.float32)
    given = {"importance": jnp.asarray(h)} if weighted else {}
    before = SCHEME.project(jnp.asarray(x))
    y = x + 0.1 * rng.normal(size=x.shape).astype(np.float32)
    after = SCHEME.project(jnp.asarray(y), before, **given)
    for j in range(11):
        wide = np.broadcast_to(h.astype(np.float64), x.shape)[:, j]
        codes, levels = lloyd(y[:, j].astype(np.float64), before.levels[0, j], wide)
        np.testing.assert_array_equal(after.codes[:, j], codes)
        np.testing.assert_allclose(after.levels[0, j], levels, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("draw", ["normal", "standard_cauchy"])
def test_a_cold_start_is_within_a_thousandth_of_the_best(draw, weighted):
    rng = np.random.default_rng(2)
    x = getattr(rng, draw)(size=(300, 11)).astype(np.float32)
    h = weigh(4, (300, 11)) if weighted else np.ones((300, 11), np.float32)
    form = SCHEME.project(jnp.asarray(x), **({"importance": jnp.asarray(h)} if weighted else {}))
    found = (h * (np.asarray(form.dense(), np.float64) - x) ** 2).sum()
    best = [best_levels(x[:, j], 5, (), h[:, j]) for j in range(11)]
    least = sum((h[:, j] * ((x[:, j, None] - best[j]) ** 2).min(1)).sum() for j in range(11))
    assert least * (1 - 1e-6) <= found <= least * (1.01 if weighted else 1.001)


def test_a_cold_start_meets_few_values_exactly():
    x = jnp.asarray(np.random.default_rng(3).choice([-3, 0.5, 0.50001, 2, 9], (400, 9)), jnp.float32)
    np.testing.assert_array_equal(SCHEME.project(x).dense(), x)


@pytest.mark.parametrize("warm", [False, True])
def test_sums_over_whole_axes_give_what_columns_do(warm):
    x = jnp.asarray(np.random.default_rng(4).normal(size=(200, 11)), jnp.float32)
    whole = grouped.cut((x,), "channel")
    levels = jnp.sort(x[:5].T[None]) if warm else None
    (codes,), found, mass = kmeans._few_passes(whole, levels, 5)
    solve = functools.partial(kmeans._few_column_passes, k=5)
    (same,), wanted, masses = columns.by_columns(whole, levels, solve)
    np.testing.assert_array_equal(codes, same)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(mass, masses)


def test_a_level_that_is_not_used_goes_where_it_is():
    rng = np.random.default_rng(1)
    before = SCHEME.project(jnp.asarray(rng.normal(size=(80, 9)) + 50, jnp.float32))
    x = jnp.asarray(rng.integers(0, 5, (80, 9)), jnp.float32)
    np.testing.assert_array_equal(SCHEME.project(x, before).dense(), x)


def test_a_leaf_of_few_numbers_or_of_few_blocks_is_not_large(monkeypatch):
    whole = grouped.cut((jnp.ones((70, 12)),), "channel")
    assert columns.is_large(whole, 5) and not columns.is_large(whole, 33)
    monkeypatch.setattr(columns, "_LANES", 13)
    assert not columns.is_large(whole, 5)
