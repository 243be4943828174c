"""GPTQ and Qronos against their definition: least squares, re-solved after every level."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.rounding import base
from lcq.ptq.rounding.gptq import GPTQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.statistics import finish, gather
from tests.ptq.rounding.oracles import assert_codes, literal, path_error, problem, qronos, resolved, standard, tables


@pytest.mark.parametrize(
    ("scheme", "act_order"), [(lcq.Uniform(4, per="channel"), False), (lcq.KMeans(6, per=10), True)]
)
@pytest.mark.parametrize("method", [GPTQ, Qronos])
def test_least_squares_re_solved(method, scheme, act_order):
    w, x, y = problem(90, 30)
    form = scheme.project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    wide = tuple(a.astype(np.float64) for a in (w, x, y))
    by = np.argsort(-(wide[2] ** 2).sum(0), kind="stable") if act_order else np.arange(30)
    damping, table = 0.03 * (wide[2] ** 2).sum(0).mean(), tables(form, w)[by]
    expected = np.zeros(w.shape, int)
    if method is GPTQ:
        expected[by] = resolved(wide[0][by], wide[2][:, by], damping, table)
    else:
        expected[by] = qronos(wide[0][by], wide[1][:, by], wide[2][:, by], damping, table)
    assert_codes(method(0.03, act_order).codes(jnp.asarray(w), statistics, form), expected)


def test_one_input():
    (w, x, y), _ = standard()
    w, x, y = w[:1], x[:, :1], y[:, :1]
    form = lcq.Uniform(3).project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    expected = literal(w, x, y, tables(form, w))[0]
    assert_codes(Qronos().codes(jnp.asarray(w), statistics, form), expected)
    assert_codes(GPTQ().codes(jnp.asarray(w), statistics, form), np.asarray(form.codes))


@pytest.mark.parametrize("method", [GPTQ, Qronos])
def test_a_failed_factorisation_is_no_code(method):
    """Of rank 4: damping grows to what has a root; where it may not, an error, and in a trace the nearest levels."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(40, 4)) @ rng.normal(size=(4, 24)), jnp.float32)
    w, statistics = jnp.asarray(rng.normal(size=(24, 5)), jnp.float32), finish(gather(y))
    form = lcq.Uniform(4, per="channel").project(w)
    got, damping = base.solved(method(1e-9), w, statistics, form, None)
    again = method(float(damping)).codes(w, statistics, form)
    np.testing.assert_array_equal(got.codes, again.codes)
    assert 1e-7 < damping < 1e-3 and path_error(w, y, y, got).sum() < 0.1 * path_error(w, y, y, form).sum()
    assert base.solved(method(0.01), w, statistics, form, None)[1] == np.float32(0.01)
    with pytest.raises(ValueError, match="max_damping="):
        method(1e-9, max_damping=1e-9).codes(w, statistics, form)
    traced = jax.jit(method(1e-9, max_damping=1e-9).codes)(w, statistics, form)
    np.testing.assert_array_equal(traced.codes, form.codes)
