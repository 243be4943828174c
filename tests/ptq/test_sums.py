"""A product's rounding on statistics: each of its programs against a plain loop over groups and folds."""

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
    return Sums(method, w, jax.tree.map(lambda *a: jnp.stack(a), *each), centred).looked()


@pytest.mark.parametrize("method", [GPFQ(), SPFQ(), Qronos(act_order=True), Descent(refit=False)])
@pytest.mark.parametrize("columns", [1, NEURONS])
def test_codes_and_losses_are_those_of_each_group(method, columns):
    w, x, y, forms = groups()
    settled = sums(method).settled(np.zeros((GROUPS, 2), np.float32), careful=False).ready()
    unknown = settled.folds.differences is None
    assert unknown
    for factor in (0.8, 1.0, 1.3):
        factors = np.float32(factor) * np.linspace(0.9, 1.1, columns, dtype=np.float32) * np.ones((GROUPS, 1), "f4")
        found, got = settled.tried(forms, factors, KEY)
        for g in range(GROUPS):
            form, given = (jax.tree.map(lambda a, g=g: a[g], tree) for tree in (found, forms))
            statistics = jax.tree.map(lambda a, g=g: a[g], settled.statistics)
            missing = (((np.asarray(x[g], np.float64) - y[g]) @ np.asarray(w[g], np.float64)) ** 2).sum(0)
            one = method.codes(w[g], statistics, scaled(given, jnp.asarray(factors[g])), KEY)
            np.testing.assert_array_equal(form.codes, one.codes)
            direct = path_error(*(np.asarray(a[g]) for a in (w, x, y)), one)
            np.testing.assert_allclose(got[g] + missing, direct, rtol=1e-3, atol=1e-5 * direct.max())


@pytest.mark.parametrize("centred", [True, False])
def test_held_is_a_loop(centred):
    w, _, _, forms = groups()
    whole, tried = sums(Qronos(), centred), (0.0, 0.3)
    found = [whole.held(forms, np.array(c), None) for c in (tried, tried[::-1])]  # another for each group
    errors, sizes = np.array([[found[g][0][g], found[1 - g][0][g]] for g in range(GROUPS)]).T, found[0][1]
    for g in range(GROUPS):
        form, here = (jax.tree.map(lambda a, g=g: a[g], tree) for tree in (forms, whole.folds))
        outputs = (np.asarray(a[g], np.float64) for a in groups()[1:2])
        np.testing.assert_allclose(sizes[g], ((next(outputs) @ np.asarray(w[g], np.float64)) ** 2).sum(), rtol=1e-4)
        for c, error in zip(tried, errors[:, g], strict=True):
            total = 0.0
            for k in range(K):
                share = shrinkage.shares(whole.noise[g], c, K / (K - 1))
                statistics = shrinkage.shrunk(
                    shrinkage.together(here.moments, jnp.arange(K) != k), jnp.asarray(share), centred
                )
                codes = Qronos().codes(w[g], statistics, form)
                total += float(shrinkage.judged(w[g], here, codes, k, centred)[0])
            np.testing.assert_allclose(error, total, rtol=1e-3)


def test_as_many_folds_judge_as_have_enough_rows(monkeypatch):
    w, x, _, forms = groups()
    monkeypatch.setattr(shrinkage, "_ENOUGH", 1)
    _, sizes = sums(Qronos()).held(forms, np.zeros(GROUPS), None)
    outputs = np.einsum("gmi,gij->gmj", *(np.asarray(a, np.float64) for a in (x[:, : 2 * ROWS // K], w)))
    np.testing.assert_allclose(sizes, (outputs**2).sum((1, 2)), rtol=1e-4)
