"""Iterated direct compression and straight-through training against numpy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq

RULES = [lcq.Rule("w", lcq.Binary())]
TARGET = np.asarray([0.5, -1.0, 2.0, 0.1, -0.3])


def sign(x):
    return np.abs(x).mean() * np.where(x >= 0, 1, -1)


def run(tx, steps):
    params = {"w": jnp.asarray(TARGET + 1, jnp.float32), "b": jnp.zeros(1)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: 0.5 * jnp.sum((p["w"] - TARGET) ** 2) + jnp.sum((p["b"] - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    assert step._cache_size() == 1
    return params


def test_iterated_direct_is_the_plain_loop():
    w = TARGET + 1
    for i in range(14):
        w = w - 0.3 * (w - TARGET)
        if i % 4 == 3:
            w = sign(w)
    params = run(lcq.training.iterated_direct(optax.sgd(0.3), RULES, every=4), 14)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(params["b"], 1, atol=0.01)


def test_straight_through_is_the_plain_loop():
    v = TARGET + 1
    w = v
    for _ in range(9):
        v = v - 0.3 * (w - TARGET)
        w = sign(v)
    params = run(lcq.training.straight_through_training(optax.sgd(0.3), RULES), 9)
    np.testing.assert_allclose(params["w"], w, rtol=1e-5)
    np.testing.assert_allclose(lcq.compress(params, RULES)["w"].dense(), w, rtol=1e-5)


def test_params_are_needed_and_settings_checked():
    for tx in (
        lcq.training.straight_through_training(optax.sgd(0.1), RULES),
        lcq.training.iterated_direct(optax.sgd(0.1), RULES, every=1),
    ):
        params = {"w": jnp.ones(3)}
        with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
            tx.update(params, tx.init(params))
        with pytest.raises(ValueError, match="w: expected finite"):
            tx.init({"w": jnp.full(3, jnp.nan)})
    with pytest.raises(ValueError, match="every="):
        lcq.training.iterated_direct(optax.sgd(0.1), RULES, every=0)
