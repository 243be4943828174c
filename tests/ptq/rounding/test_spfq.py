"""Stochastic rounding: without bias, along the path, with a key."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.rounding.spfq import SPFQ
from lcq.ptq.statistics import Statistics
from tests.ptq.rounding.oracles import SCHEMES, M, N, n, standard, tables


@pytest.mark.parametrize("scheme", [lcq.Uniform(3), lcq.Uniform(2, zero_point=True), lcq.Levels((-2, 0, 0.5, 3))])
def test_spfq_is_unbiased(scheme):
    many = 40_000
    w = jnp.linspace(-2, 2, 4)[:, None] * jnp.ones(many)
    form = dataclasses.replace(scheme.project(w))
    statistics = Statistics(jnp.eye(4), None, None, jnp.zeros(4), jnp.zeros(4), 1)  # then z = w
    got = np.asarray(SPFQ().codes(w, statistics, form, jax.random.key(0)).dense(), np.float64)
    levels = tables(form, np.zeros((4, many)))[0, 0]
    inside = np.clip(np.asarray(w)[:, 0], levels[0], levels[-1])
    np.testing.assert_allclose(got.mean(1), inside, atol=5 * np.diff(levels).max() / 2 / many**0.5)
    for row, z in zip(got, inside, strict=True):
        around = {levels[levels <= z].max(), levels[levels >= z].min()}
        assert set(np.round(row, 4)) <= set(np.round(list(around), 4))


def test_spfq_follows_the_path():
    (w, x, y), statistics = standard()
    form = SCHEMES["learned in groups"].project(jnp.asarray(w))
    first, again, other = (SPFQ().codes(jnp.asarray(w), statistics, form, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.codes, again.codes)
    assert (np.asarray(first.codes) != np.asarray(other.codes)).mean() > 0.1
    table, q = tables(form, w), np.asarray(first.dense(), np.float64)
    u = np.zeros((M, n))
    for t in range(N):
        u = u + np.outer(x[:, t], w[t].astype(np.float64))
        z = y[:, t].astype(np.float64) @ u / (y[:, t].astype(np.float64) @ y[:, t])
        u = u - np.outer(y[:, t], q[t])
        between = (table[t] > np.minimum(z, q[t])[:, None] + 1e-4) & (table[t] < np.maximum(z, q[t])[:, None] - 1e-4)
        assert not between.any()
    with pytest.raises(ValueError, match="key"):
        SPFQ().codes(jnp.asarray(w), statistics, form)
