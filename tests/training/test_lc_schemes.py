"""LC with schemes that prune, lower the rank and add, on least squares: it ends where the problem is stationary.

Oracles are the conditions of an optimum in the gradient of the loss alone, in float64; at the end the multipliers are
that gradient.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.training.augmented_lagrangian import theta

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(40, 5)) * [1, 0.8, 1.2, 0.6, 1]
TRUE = np.outer([2, -1, 0.5, 0, 1], [1, 0, -1.5]) + RNG.normal(size=(5, 3)) / 3
TARGETS = INPUTS @ TRUE + RNG.normal(size=(40, 3)) / 9
BEST = np.linalg.lstsq(INPUTS, TARGETS, rcond=None)[0]
ALPHA = 0.2


def loss(w):
    return ((INPUTS @ w - TARGETS) ** 2).sum() / 80


def slope(w):
    return INPUTS.T @ (INPUTS @ w - TARGETS) / 40


SCHEMES = {
    "kept": lcq.Prune(count=6),
    "kept columns": lcq.PruneGroups("channel", count=2),
    "radius": lcq.L1Ball(4.0),
    "l0": lcq.L0Penalty(ALPHA / 8),
    "l1": lcq.L1Penalty(ALPHA),
    "rank": lcq.LowRank(1),
    "ranks": lcq.LowRank(penalty=0.05, unit=1.0),
    "sum": lcq.Additive(lcq.KMeans(2), lcq.Prune(count=3)),
}


@pytest.fixture(scope="module", params=SCHEMES)
def end(request):
    """The name of a scheme, and weights and state after a run of LC."""
    rules = [lcq.Rule("w", SCHEMES[request.param])]
    tx = lcq.lc(optax.sgd, rules, mu=lcq.geometric(0.05, 1.25, steps=40), every=25, learning_rate=0.3)
    x, y = jnp.asarray(INPUTS, jnp.float32), jnp.asarray(TARGETS, jnp.float32)

    def step(_, carry):
        params, state = carry
        away = jnp.dot(x, params["w"], precision="highest") - y
        updates, state = tx.update({"w": jnp.dot(x.T, away, precision="highest") / 40}, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.asarray(BEST, jnp.float32)}
    params, state = jax.jit(lambda c: jax.lax.fori_loop(0, 40 * 25, step, c))((params, tx.init(params)))
    return request.param, params, state


def test_the_weights_become_compressed_and_the_multipliers_are_the_gradient(end):
    name, params, state = end
    metrics = lcq.metrics(state)
    assert metrics["gap"] < 1e-3 and metrics["kept_back"] == metrics["skipped"] == 0
    delta = np.asarray(lcq.extract(state, params)["w"].dense(), np.float64)
    direct = lcq.Prune(count=6).project(jnp.asarray(BEST, jnp.float32)).dense() if name == "kept" else None
    assert direct is None or loss(delta) < loss(np.asarray(direct, np.float64))
    np.testing.assert_allclose(state.lagrangian.multipliers["w"], slope(delta), atol=2e-3)


def test_multipliers_are_mu_times_what_the_projection_moved(end):
    _, params, state = end
    mu, before = float(lcq.metrics(state)["penalty_weight"]), state.lagrangian.multipliers["w"]
    after = lcq.training.c_step(state, params)
    ((form,),) = theta(after.lagrangian)
    x = params["w"] - before / mu
    np.testing.assert_allclose(after.lagrangian.multipliers["w"], mu * (form.dense() - x), rtol=1e-4, atol=1e-6)
    if isinstance(form, lcq.forms.Sparse) and form.levels is None:
        moved = np.asarray(after.lagrangian.multipliers["w"])[np.asarray(form.mask)]
        assert not moved.any() or set(np.sign(moved * np.asarray(x)[np.asarray(form.mask)])) == {-1}


def test_the_end_is_stationary(end):
    name, params, state = end
    form = lcq.extract(state, params)["w"].unpack()
    delta = np.asarray(form.dense(), np.float64)
    g, near = slope(delta), 5e-3
    if name in ("kept", "kept columns", "l0"):
        mask = np.asarray(form.mask)
        assert abs(g[mask]).max() < near < abs(g[~mask]).max()
        assert mask.sum() == {"kept": 6, "kept columns": 10}.get(name, mask.sum())
    elif name in ("radius", "l1"):  # convex: this is the optimum
        tau = ALPHA if name == "l1" else abs(g[delta != 0]).mean()
        np.testing.assert_allclose(g[delta != 0], -tau * np.sign(delta[delta != 0]), atol=near)
        assert abs(g).max() <= tau + near and (delta == 0).any()
        assert name == "l1" or abs(delta).sum() == pytest.approx(4, rel=1e-5)
    elif name in ("rank", "ranks"):
        left, right = (np.asarray(a, np.float64)[..., : int(form.rank.item())] for a in (form.left, form.right.T))
        assert 1 <= form.rank < 3 and abs(left.T @ g).max() < near and abs(g @ right).max() < near
    else:
        codes, mask = np.asarray(form.parts[0].codes), np.asarray(form.parts[1].mask)
        assert mask.sum() == 3 and abs(g[mask]).max() < near
        assert all(abs(g[(codes == k) & ~mask].sum()) < near for k in (0, 1))
