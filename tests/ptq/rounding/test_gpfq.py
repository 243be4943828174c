"""GPFQ and its thresholds against the literal recursion."""

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.rounding import base
from lcq.ptq.rounding.gpfq import GPFQ, SparseGPFQ
from lcq.ptq.rounding.gptq import GPTQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.statistics import finish, gather
from tests.ptq.rounding.oracles import (
    SCHEMES,
    M,
    N,
    assert_codes,
    correct,
    error_form,
    literal,
    n,
    nearest,
    problem,
    standard,
    tables,
)


def test_error_form_is_the_literal_recursion():
    for seed in range(5):
        w, x, y = (a.astype(np.float64) for a in problem(100, 40, 8, seed=seed))
        table = np.broadcast_to(np.linspace(-2, 2, 5), (*w.shape, 5))
        assert (literal(w, x, y, table)[0] == error_form(w, y.T @ y, y.T @ (x - y), table)[0]).all()


@pytest.mark.parametrize("name", SCHEMES)
def test_gpfq_is_the_literal_recursion(name):
    (w, x, y), statistics = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    expected, _, u = literal(w, x, y, tables(form, w))
    got = GPFQ().codes(jnp.asarray(w), statistics, form)
    assert_codes(got, expected)
    assert got.codes.dtype == form.codes.dtype
    np.testing.assert_allclose(base.residual(jnp.asarray(w), statistics, got), (u**2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["zero points in groups", "learned in groups"])
def test_act_order(name):
    (w, x, y), statistics = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    order = np.argsort(-(y.astype(np.float64) ** 2).sum(0), kind="stable")
    expected = literal(w, x, y, tables(form, w), order)[0]
    assert_codes(GPFQ(act_order=True).codes(jnp.asarray(w), statistics, form), expected)


def test_codes_in_float32_are_those_of_float64():
    w, x, y = problem(600, 300, 64, seed=1)
    form = lcq.Uniform(4, per="channel").project(jnp.asarray(w))
    wide = x.astype(np.float64), y.astype(np.float64)
    expected, margins = error_form(w, wide[1].T @ wide[1], wide[1].T @ (wide[0] - wide[1]), tables(form, w))
    got = GPFQ().codes(jnp.asarray(w), finish(gather(jnp.asarray(y), jnp.asarray(x))), form)
    assert (np.asarray(got.codes) == expected).mean() >= 0.9999
    assert_codes(got, expected, margins)


def test_equal_inputs_need_no_drift():
    w, _, y = problem(60, 12, 4)
    w, y = jnp.asarray(w), jnp.asarray(y)
    form = lcq.Uniform(3).project(w)
    for method in (GPFQ(), Qronos()):
        alone, both = (method.codes(w, finish(gather(*args)), form) for args in ((y,), (y, y)))
        np.testing.assert_array_equal(alone.codes, both.codes)


# Thresholds


def test_soft_threshold():
    (w, x, y), statistics = standard()
    form = SCHEMES["grid"].project(jnp.asarray(w))
    limit = 0.7 * np.abs(np.asarray(form.scale, np.float64)[0])

    def shrink(z):
        return np.sign(z) * np.maximum(np.abs(z) - limit, 0)

    expected = literal(w, x, y, tables(form, w), shrink=shrink)[0]
    assert_codes(SparseGPFQ(0.7).codes(jnp.asarray(w), statistics, form), expected)


def test_hard_threshold():
    (w, x, y), statistics = standard()
    form = SCHEMES["grid"].project(jnp.asarray(w))
    got = SparseGPFQ(1.6, "hard").codes(jnp.asarray(w), statistics, form)
    a, down = np.abs(np.asarray(form.scale, np.float64)[0]), np.asarray(form.scale[0] < 0)
    assert down.any() and not down.all()
    w, x, y = (b.astype(np.float64) for b in (w, x, y))
    u, qs = np.zeros((M, n)), []
    for t in range(N):
        u = u + np.outer(x[:, t], w[t])
        z = y[:, t] @ u / (y[:, t] @ y[:, t])
        steps = np.minimum(np.round((np.abs(z) - 1.6 * a) / a), np.where((z < 0) != down, 7, 6))
        qs.append(np.where(np.abs(z) <= 1.6 * a, 0, np.sign(z) * (1.6 * a + a * steps)))
        u = u - np.outer(y[:, t], qs[-1])
    np.testing.assert_allclose(got.dense(), qs, rtol=1e-6)
    assert got.size_of_table == form.size_of_table
    assert (np.asarray(qs) == 0).mean() > (np.asarray(form.dense()) == 0).mean()


def test_thresholds_that_make_no_sense():
    (w, _, _), statistics = standard()
    for name in ("learned", "zero points in groups", "frozen"):
        with pytest.raises(ValueError, match="integer grid around 0"):
            SparseGPFQ(1.0, "hard").codes(jnp.asarray(w), statistics, SCHEMES[name].project(jnp.asarray(w)))
    for make in (lambda: SparseGPFQ(-1.0), lambda: SparseGPFQ(0.0, "hard"), lambda: GPTQ(0.0), lambda: Qronos(-1.0)):
        with pytest.raises(ValueError, match="expected"):
            make()


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_centred(offset):
    w, x, y = problem(offset=offset)
    form = SCHEMES["grid"].project(jnp.asarray(w))
    halves = gather(jnp.asarray(y[:100]), jnp.asarray(x[:100]), difference=True)
    statistics = finish(gather(jnp.asarray(y[100:]), jnp.asarray(x[100:]), halves, difference=True), centred=True)
    centred = tuple(a.astype(np.float64) - a.mean(0, dtype=np.float64) for a in (x, y))
    expected = literal(w, *centred, tables(form, w))[0]
    got = GPFQ().codes(jnp.asarray(w), statistics, form)
    wrong = np.asarray(got.codes) != expected
    assert wrong.mean() < 1e-3
    if not offset:
        assert not wrong.any()
    bias = np.asarray(correct(jnp.asarray(w), statistics, got), np.float64)
    error = x.astype(np.float64) @ w - y.astype(np.float64) @ np.asarray(got.dense(), np.float64) - bias
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-4 * (1 + offset))
    np.testing.assert_allclose(base.residual(jnp.asarray(w), statistics, got), (error**2).sum(0), rtol=1e-3)


def test_short_weights_use_what_dense_gives():
    (w, x, y), statistics = standard()
    short = jnp.asarray(w, jnp.bfloat16)
    form = lcq.Uniform(4, per="channel").project(short)
    exact, v = tables(form, w), np.asarray(short, np.float64)
    table = np.asarray(jnp.asarray(exact.astype(np.float32), jnp.bfloat16), np.float64)
    u, qs = np.zeros((M, n)), []
    for t in range(N):
        u = u + np.outer(x[:, t], v[t])
        k = nearest(y[:, t].astype(np.float64) @ u / (y[:, t].astype(np.float64) @ y[:, t]), exact[t])[0]
        qs.append(table[t, np.arange(n), k])
        u = u - np.outer(y[:, t], qs[-1])
    got = GPFQ().codes(short, statistics, form)
    assert got.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(got.dense(), np.float64), qs)
