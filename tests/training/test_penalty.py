"""Penalty weights, and the couplings' fixed points on quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.training.penalty import gradient, linear_step, proximal


def test_gradient_is_that_of_the_penalty():
    w, delta, multiplier = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(0).normal(size=(3, 5)))
    mu = 0.3

    def penalty(w):
        return mu / 2 * jnp.sum((w - delta - multiplier / mu) ** 2)

    np.testing.assert_allclose(gradient(w, delta, multiplier, mu), jax.grad(penalty)(w), rtol=1e-5)
    np.testing.assert_allclose(gradient(w, delta, None, mu), mu * (w - delta), rtol=1e-6)


def test_proximal_minimises_its_objective():
    v, delta, multiplier = (jnp.asarray(a, jnp.float32) for a in np.random.default_rng(1).normal(size=(3, 5)))
    mu, s = 0.7, 2.0
    w = proximal(v, delta, multiplier, mu, s)
    np.testing.assert_allclose((w - v) / s + gradient(w, delta, multiplier, mu), jnp.zeros(5), atol=1e-6)


LINEAR = {
    "sgd": (lambda eta: optax.sgd(eta), 1.0),
    "momentum": (lambda eta: optax.sgd(eta, momentum=0.9), 10.0),
    "nesterov": (lambda eta: optax.sgd(eta, momentum=0.95, nesterov=True), 20.0),
    "slow momentum": (lambda eta: optax.sgd(eta, momentum=0.999), 1000.0),
    "ema": (lambda eta: optax.chain(optax.ema(0.9), optax.sgd(eta)), 1.0),
}


@pytest.mark.parametrize("name", LINEAR)
def test_linear_step_is_the_long_run_step(name):
    inner, per_rate = LINEAR[name]
    np.testing.assert_allclose(linear_step(inner)(None, 0.3), 0.3 * per_rate, rtol=1e-3)


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam,
        optax.sign_sgd,
        lambda eta: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(eta)),
        lambda eta: optax.sgd(eta, momentum=0.9999),  # linear, but not settled when it is asked
        lambda eta: optax.chain(optax.sgd(eta), optax.scale(-1.0)),
    ],
)
def test_linear_step_refuses_what_it_cannot_know(inner):
    with pytest.raises(ValueError, match=r"adam_step.*coupling='gradient'"):
        linear_step(inner)


CURVATURE = jnp.array([1.0, 0.1, 3.0, 0.5])
TARGET = jnp.array([1.0, -2.0, 0.3, -0.4])
OPTIMIZERS = {
    "sgd": (lambda eta: optax.sgd(eta), "proximal", 0.1),
    "momentum": (lambda eta: optax.sgd(eta, momentum=0.9), "proximal", 0.02),
    "nesterov": (lambda eta: optax.sgd(eta, momentum=0.9, nesterov=True), "proximal", 0.02),
    "adam": (lambda eta: optax.adam(eta, b2=0.99), lcq.training.adam_step(b2=0.99), 0.003),
}


@pytest.mark.parametrize("mu", [0.1, 50.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_proximal_ends_at_the_minimiser_of_the_l_step(name, mu):
    """L = sum h (w - a)^2 / 2: the L step's minimiser is (h a + mu Delta)/(h + mu), also for large eta mu."""
    inner, coupling, eta = OPTIMIZERS[name]
    rules = [lcq.Rule("w", lcq.Levels((-1.0, 1.0)))]
    tx = lcq.lc(inner, rules, mu=mu, every=None, learning_rate=eta, coupling=coupling)
    params = {"w": TARGET}

    def step(_, carry):
        params, state = carry
        updates, state = tx.update({"w": CURVATURE * (params["w"] - TARGET)}, state, params)
        return optax.apply_updates(params, updates), state

    params, _ = jax.jit(lambda c: jax.lax.fori_loop(0, 4000, step, c))((params, tx.init(params)))
    delta = jnp.sign(TARGET)
    np.testing.assert_allclose(params["w"], (CURVATURE * TARGET + mu * delta) / (CURVATURE + mu), atol=2e-3)


@pytest.mark.parametrize("inner", [optax.sgd, lambda eta: optax.chain(optax.adam(eta), optax.adam(eta))])
def test_adam_step_wants_one_adam(inner):
    tx = lcq.lc(
        inner,
        [lcq.Rule("w", lcq.Levels((-1.0, 1.0)))],
        mu=1.0,
        every=None,
        learning_rate=0.1,
        coupling=lcq.training.adam_step(),
    )
    params = {"w": TARGET}
    with pytest.raises(ValueError, match=r"one optax\.ScaleByAdamState"):
        tx.update(params, tx.init(params), params)
