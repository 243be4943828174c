"""A product's rounding on statistics: each of its programs against a plain loop over groups, factors and folds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq import shrinkage
from lcq.ptq.rounding.codebook import scaled
from lcq.ptq.rounding.coordinate_descent import Descent
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.spfq import SPFQ
from lcq.ptq.sums import Sums
from tests.ptq.rounding.oracles import path_error, problem
from tests.ptq.test_shrinkage import K, folds_of

GROUPS, ROWS, INPUTS, NEURONS = 2, 80, 24, 4
KEY = jax.random.key(0)


def groups():
    """w, X, Y and a form of every group."""
    each = [problem(ROWS, INPUTS, NEURONS, seed=g) for g in range(GROUPS)]
    w, x, y = (jnp.asarray(np.stack(a), jnp.float32) for a in zip(*each, strict=True))
    return w, x, y, jax.vmap(lcq.Uniform(3, per="channel").project)(w)


def sums(method, centred=False):
    w, x, y, _ = groups()
    each = [folds_of(*group, np.arange(ROWS) * K // ROWS) for group in zip(w, x, y, strict=True)]
    return Sums(method, w, jax.tree.map(lambda *a: jnp.stack(a), *each), centred)


@pytest.mark.parametrize("method", [GPFQ(), SPFQ(), Qronos(act_order=True), Descent(refit=False)])
@pytest.mark.parametrize("columns", [1, NEURONS])
def test_losses_are_a_loop(method, columns):
    w, x, y, forms = groups()
    factors = jnp.asarray([0.8, 1.0, 1.3])[:, None, None] * jnp.linspace(0.9, 1.1, columns) * jnp.ones((GROUPS, 1))
    settled = sums(method).settled(np.zeros((GROUPS, 2), np.float32), careful=False)
    unknown = settled.folds.differences is None
    assert unknown
    got = settled.losses(forms, factors, KEY)
    for g in range(GROUPS):
        form = jax.tree.map(lambda a, g=g: a[g], forms)
        statistics = jax.tree.map(lambda a, g=g: a[g], settled.statistics)
        missing = (((np.asarray(x[g], np.float64) - y[g]) @ np.asarray(w[g], np.float64)) ** 2).sum(0)
        for factor, errors in zip(factors[:, g], got[:, g], strict=True):
            one = method.codes(w[g], statistics, scaled(form, factor), KEY)
            direct = path_error(*(np.asarray(a[g]) for a in (w, x, y)), one)
            np.testing.assert_allclose(errors + missing, direct, rtol=1e-3, atol=1e-5 * direct.max())


@pytest.mark.parametrize("centred", [True, False])
def test_held_is_a_loop(centred):
    w, _, _, forms = groups()
    whole, tried = sums(Qronos(), centred), (0.0, 0.3)
    errors, sizes = whole.held(forms, tried, None)
    assert errors.shape == (2, GROUPS) and sizes.shape == (GROUPS,)
    for g in range(GROUPS):
        form, here = (jax.tree.map(lambda a, g=g: a[g], tree) for tree in (forms, whole.folds))
        np.testing.assert_allclose(sizes[g], shrinkage.size(w[g], here), rtol=1e-5)
        for c, error in zip(tried, errors[:, g], strict=True):
            total = 0.0
            for k in range(K):
                statistics = shrinkage.without(here.moments, whole.noise[g], c, k, centred)
                total += float(shrinkage.judged(w[g], here, Qronos().codes(w[g], statistics, form), k, centred))
            np.testing.assert_allclose(error, total, rtol=1e-3)
