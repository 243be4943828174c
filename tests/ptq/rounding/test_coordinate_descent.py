"""Coordinate descent against a plain float64 loop over inputs, and against every single change there is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.ptq.rounding.base import residual
from lcq.ptq.rounding.coordinate_descent import Descent, refitted
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.rtn import RTN
from lcq.ptq.rounding.spfq import SPFQ
from lcq.ptq.statistics import finish, gather
from lcq.schemes.levels import Levels
from lcq.schemes.uniform import Uniform


def problem(seed=0, inputs=20, neurons=5, samples=200):
    """(w, X, Y), inputs correlated, Y a little off."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(samples, inputs)) @ rng.normal(size=(inputs, inputs)) / inputs**0.5 + 0.3, 0)
    y = x + 0.1 * rng.normal(size=x.shape) * x
    return (a.astype(np.float32) for a in (rng.normal(size=(inputs, neurons)), x, y))


def loop(w, x, y, levels, q, sweeps):
    """q_t <- the level that makes ||X w - Y q|| least, all others fixed; levels [K, n]."""
    w, x, y, q = (np.array(a, np.float64) for a in (w, x, y, q))
    for _ in range(sweeps):
        for t in range(len(w)):
            rest = x @ w - y @ q + np.outer(y[:, t], q[t])
            errors = ((rest[:, None] - y[:, t, None, None] * levels) ** 2).sum(0)
            q[t] = levels[errors.argmin(0), np.arange(w.shape[1])]
    return q


@pytest.mark.parametrize("before", [RTN(), GPFQ(), Qronos(act_order=True)])
@pytest.mark.parametrize("sweeps", [1, 3])
def test_equals_a_loop_over_inputs(before, sweeps):
    w, x, y = problem()
    form = Levels((-1, 0, 1), scale=True, per="channel").project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    first = np.asarray(before.codes(jnp.asarray(w), statistics, form).dense())
    levels = np.array([[-1.0], [0.0], [1.0]]) * np.asarray(form.scale, np.float64).reshape(1, -1)
    done = np.asarray(Descent(before, sweeps, refit=False).codes(jnp.asarray(w), statistics, form).dense())
    np.testing.assert_allclose(done, loop(w, x, y, levels, first, sweeps), rtol=1e-6)


def test_ends_where_no_single_change_helps():
    w, x, y = problem(1)
    form = Uniform(3, per=4).project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    done = Descent(GPFQ(), 30, refit=False).codes(jnp.asarray(w), statistics, form)
    q, scale = np.asarray(done.dense(), np.float64), np.repeat(np.asarray(form.scale, np.float64), 4, axis=0)
    x, y, w = (a.astype(np.float64) for a in (x, y, w))
    least = ((x @ w - y @ q) ** 2).sum(0)
    for t in range(len(w)):
        for level in range(-4, 4):
            other = q.copy()
            other[t] = level * scale[t]
            assert (((x @ w - y @ other) ** 2).sum(0) >= least * (1 - 1e-6)).all()


def test_same_inputs_dead_inputs_and_groups():
    w, x, _ = problem(2)
    x[:, 3] = 0
    form = Uniform(2, per="channel").project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(x)))
    one = Descent(RTN(), 2, refit=False).codes(jnp.asarray(w), statistics, form)
    assert np.isfinite(one.dense()).all()
    assert (one.codes[3] == form.codes[3]).all()  # a dead input: nearest
    two = jax.vmap(Descent(RTN(), 2, refit=False).codes)(
        *jax.tree.map(lambda a: jnp.stack([a, a]), (w, statistics, form))
    )
    assert (two.codes == one.codes).all()


def test_wants_a_sweep():
    with pytest.raises(ValueError, match="at least one sweep"):
        Descent(sweeps=0)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (GPFQ(recursion="follow"), "on statistics, got GPFQ.*only GPFQ alone follows inputs"),
        (Qronos(search=False), r"without search= and shrink=, got Qronos\(search=False\); pass them to Descent"),
        (Qronos(shrink=0.0), r"got Qronos\(shrink=0.0\)"),
    ],
    ids=str,
)
def test_settings_of_the_method_before_that_would_not_count(before, message):
    with pytest.raises(ValueError, match=message):
        Descent(before)


def test_a_method_before_may_draw():
    assert Descent(RTN()).random_key(3) is None
    key = Descent(SPFQ(seed=1)).random_key(3)
    assert key == SPFQ(seed=1).random_key(3) and key != SPFQ(seed=1).random_key(2)


def test_scales_are_the_least_squares_of_their_codes():
    w, x, y = problem(3)
    form = Uniform(3, per=5, scale_dtype="float32").project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    pull = statistics.gram @ w + statistics.drift @ w
    done = refitted(form, statistics.gram, jnp.asarray(pull))
    codes = np.asarray(form.codes, np.float64) - 4
    for j in range(w.shape[1]):
        parts = np.stack([y[:, i : i + 5].astype(np.float64) @ codes[i : i + 5, j] for i in range(0, len(w), 5)], 1)
        best = np.linalg.lstsq(parts, x.astype(np.float64) @ w[:, j], rcond=None)[0]
        assert (best * form.scale[:, j] > 0).all()
        np.testing.assert_allclose(done.scale[:, j], best, rtol=1e-3)


def test_refitting_lowers_the_residual():
    w, x, y = problem(4)
    form = Levels((-1, 0, 1), scale=True, per="channel").project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x), difference=True))
    fixed, free = (
        residual(jnp.asarray(w), statistics, Descent(GPFQ(), 6, refit).codes(jnp.asarray(w), statistics, form))
        for refit in (False, True)
    )
    assert free.sum() < fixed.sum()


def test_a_shared_scale_stays():
    w, x, _ = problem(5)
    form = Levels((-1, 0, 1), scale=True).project(jnp.asarray(w))
    done = Descent(GPFQ(), 3).codes(jnp.asarray(w), finish(gather(jnp.asarray(x))), form)
    assert (done.scale == form.scale).all()


def test_two_sweeps_with_a_fit_between_equal_a_loop():
    w, x, y = problem(6)
    y = np.asarray(0.8 * y)  # a scale has to make up for it
    form = Levels((-1, 0, 1), scale=True, per="channel").project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    first = np.asarray(GPFQ().codes(jnp.asarray(w), statistics, form).dense())
    scale = np.asarray(form.scale, np.float64).reshape(-1)
    grid = np.array([[-1.0], [0.0], [1.0]])
    codes = np.round(loop(w, x, y, grid * scale, first, 1) / scale)
    target, made = x.astype(np.float64) @ w, y.astype(np.float64) @ codes
    scale = (made * target).sum(0) / (made**2).sum(0)
    expected = loop(w, x, y, grid * scale, codes * scale, 1)
    done = Descent(GPFQ(), 2).codes(jnp.asarray(w), statistics, form)
    np.testing.assert_allclose(done.scale.reshape(-1), scale, rtol=1e-4)
    np.testing.assert_allclose(done.dense(), expected, rtol=1e-4, atol=1e-6)


def test_a_dead_block_keeps_its_scale_and_the_others_are_fitted():
    w, x, y = problem(7)
    x[:, 5:10] = y[:, 5:10] = 0
    form = Uniform(3, per=5).project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    done = refitted(form, statistics.gram, jnp.asarray((statistics.gram + statistics.drift) @ w))
    np.testing.assert_array_equal(done.scale[1], form.scale[1])
    assert (np.asarray(done.scale)[[0, 2, 3]] != np.asarray(form.scale)[[0, 2, 3]]).any(0).all()
