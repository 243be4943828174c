"""The recursion on the inputs themselves, and when it is cheaper than statistics."""

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.rounding.sequential import cheaper, follow
from tests.ptq.rounding.oracles import SCHEMES, assert_codes, literal, path_error, problem, standard, tables


@pytest.mark.parametrize("name", ["zero points in groups", "learned in groups"])
@pytest.mark.parametrize("act_order", [False, True])
def test_follow_is_the_literal_recursion(name, act_order):
    (w, x, y), _ = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    by = np.argsort(-(y.astype(np.float64) ** 2).sum(0), kind="stable") if act_order else None
    expected, _, u = literal(w, x, y, tables(form, w), by)
    got, error = follow(jnp.asarray(w), jnp.asarray(x), jnp.asarray(y), form, act_order)
    assert_codes(got, expected)
    np.testing.assert_allclose(error, (u**2).sum(0), rtol=1e-4)


def test_follow_passes_over_dead_columns():
    w, x, y = problem(60, 20, 4)
    y[:, 7] = 0
    form = lcq.Uniform(3).project(jnp.asarray(w))
    for by in (False, True):
        got, error = follow(jnp.asarray(w), jnp.asarray(x), jnp.asarray(y), form, by)
        np.testing.assert_array_equal(got.codes[7], form.codes[7])
        np.testing.assert_allclose(error, path_error(w, x, y, got), rtol=1e-4)


def test_cheaper():
    assert cheaper(5000, 784, 500) == "blocked"
    assert cheaper(50_000, 9, 1, runs=1) == "follow"
    assert cheaper(50_000, 288, 32) == "follow"
    assert cheaper(50_000, 288, 64) == "blocked"
    assert cheaper(50_000, 288, 32, runs=16) == "blocked"
    assert cheaper(5000, 1024, 1024, limit=1 << 20) == "follow"
