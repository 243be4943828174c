"""Penalty weights: their formulas, what is refused, and that a schedule for few updates brings w to Delta(Theta)."""

import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest

import lcq
from lcq.examples import data, models
from lcq.training.schedules import as_schedule


def test_geometric_is_the_formula_and_stops():
    mu = lcq.geometric(9e-5, 1.35, steps=24)
    for k in (0, 1, 10, 24):
        np.testing.assert_allclose(mu.at(jnp.int32(k)), 9e-5 * 1.35**k, rtol=2e-6)
    assert mu.at(jnp.int32(1000)) == mu.at(jnp.int32(24)) == mu.at(24)
    assert hash(mu) == hash(lcq.geometric(9e-5, 1.35, steps=24)) and not callable(mu)
    waiting = lcq.geometric(0.5, 2.0, steps=2, wait=3)
    assert [float(waiting.at(k)) for k in range(7)] == [0.5, 0.5, 0.5, 0.5, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("start, factor, steps", [(0.0, 1.1, 3), (1.0, -1.0, 3), (1.0, np.inf, 3), (1.0, 1.1, -1)])
def test_geometric_refuses_what_is_no_weight(start, factor, steps):
    with pytest.raises(ValueError, match="expected start > 0"):
        lcq.geometric(start, factor, steps=steps)


@pytest.mark.parametrize("factor", [2.0, 0.5])
def test_geometric_refuses_what_overflows_float32(factor):
    with pytest.raises(ValueError, match="fewer steps"):
        lcq.geometric(1.0, factor, steps=200)


@pytest.mark.parametrize("updates, every, steps", [(60, 10, 3), (300, 50, 3), (1000, 100, 5), (5000, 125, 23)])
def test_penalty_schedule_has_long_l_steps_and_a_constant_end(updates, every, steps):
    mu, found = lcq.penalty_schedule(updates, start=0.01, end=100.0)
    assert (found, mu.steps) == (every, steps)
    np.testing.assert_allclose(mu.at(0), 0.01, rtol=1e-6)
    c_steps = updates // every - 1
    assert c_steps - steps >= c_steps // 3
    np.testing.assert_allclose([mu.at(steps), mu.at(c_steps)], 100.0, rtol=1e-5)


def test_a_short_run_is_warned_of():
    """Gaps at 120 updates: 35 % by Adam at 1e-3 on the regression below, .4 % by momentum."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcq.penalty_schedule(300)
    with pytest.warns(UserWarning, match=r"120 updates may not .*: six L steps of 20 updates .* at least 300"):
        assert lcq.penalty_schedule(120).every == 20


UNFIT = [
    ({"updates": 59}, "at least 60"),
    ({"updates": 80 * 1437 / 64}, "whole number, got 1796.25; divide by //"),
    ({"start": 20.0}, "start < end"),
]


@pytest.mark.parametrize("settings, says", UNFIT)
def test_penalty_schedule_says_what_it_wants(monkeypatch, settings, says):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=says):
        lcq.penalty_schedule(**{"updates": 1000} | settings)


def images():
    """A classifier of digits, from random weights."""
    digits, net = data.digits(), models.MLP((24, 10))
    x, y = jnp.asarray(digits.x_train), jnp.asarray(digits.y_train)
    params = net.init(jax.random.key(0), x[:1])["params"]

    def loss(params, rows):
        logits = net.apply({"params": params}, x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]).mean()

    return params, loss, len(x)


def regression():
    """Two layers that fit noisy numbers, from random weights."""
    keys = jax.random.split(jax.random.key(5), 4)
    x = jax.random.normal(keys[0], (256, 8))
    y = jnp.sin(x @ jax.random.normal(keys[1], (8, 2)) / 2) + 0.1 * jax.random.normal(keys[3], (256, 2))
    params = {"a": jax.random.normal(keys[2], (8, 24)) / 3, "b": jax.random.normal(keys[3], (24, 2)) / 5}

    def loss(params, rows):
        return ((jnp.tanh(x[rows] @ params["a"]) @ params["b"] - y[rows]) ** 2).mean()

    return params, loss, len(x)


OPTIMIZERS = {
    "adam": lambda updates: optax.adam(3e-3),
    "slow adam": lambda updates: optax.adam(1e-3),
    "falling adam": lambda updates: optax.adam(optax.cosine_decay_schedule(3e-3, updates)),
    "sgd": lambda updates: optax.sgd(0.1),
    "momentum": lambda updates: optax.sgd(0.05, momentum=0.9),
}


RUNS = [
    *[(images, "adam", updates) for updates in (300, 1000, 5000)],
    *[(regression, "momentum", updates) for updates in (300, 1000, 5000)],
    (images, "slow adam", 300),
    (images, "sgd", 300),
    (regression, "falling adam", 300),
    (regression, "slow adam", 1000),
]


@pytest.mark.parametrize("task, optimizer, updates", RUNS)
def test_weights_arrive_in_few_updates(task, optimizer, updates):
    """A newcomer's first guesses left gaps of 28 and 41 %."""
    params, loss, size = task()
    mu, every = lcq.penalty_schedule(updates)
    rules = [lcq.Rule("(.*/)?kernel|a|b", lcq.KMeans(2))]
    tx, direct = lcq.lc(OPTIMIZERS[optimizer](updates), rules, mu=mu, every=every), lcq.compress(params, rules)

    def step(carry, rows):
        params, state = carry
        changes, state = tx.update(jax.grad(loss)(params, rows), state, params)
        return (optax.apply_updates(params, changes), state), None

    batches = jax.random.randint(jax.random.key(1), (updates, 64), 0, size)
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, tx.init(params)))
    assert lcq.metrics(lcq.training.c_step(state, params))["gap"] < 0.02
    before, after = (loss(lcq.decompress(forms), jnp.arange(size)) for forms in (direct, lcq.extract(state, params)))
    assert after < before


def test_a_function_of_the_number_of_c_steps_is_a_schedule():
    mu = optax.exponential_decay(0.1, 1, 1.5)
    params, rules = {"k": jnp.array([0.0, 0.1, 0.9, 1.2])}, [lcq.Rule("k", lcq.KMeans(2))]
    ends = []
    for weights in (mu, lcq.geometric(0.1, 1.5, steps=100)):
        tx = lcq.lc(optax.sgd(0.1), rules, mu=weights, every=2)
        w, state, update = params, tx.init(params), jax.jit(tx.update)
        for _ in range(9):
            changes, state = update(jax.tree.map(lambda a: a - 3, w), state, w)
            w = optax.apply_updates(w, changes)
        np.testing.assert_allclose(lcq.metrics(state)["penalty_weight"], 0.1 * 1.5**4, rtol=1e-5)
        assert update._cache_size() == 1
        ends.append(w["k"])
    np.testing.assert_allclose(*ends, rtol=1e-5)


def test_a_numpy_integer_of_updates_will_do(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    assert lcq.penalty_schedule(np.int64(1000)) == lcq.penalty_schedule(1000)


@pytest.mark.parametrize("mu", [lambda k: -1.0, lambda k: jnp.ones(3), "large", -1.0, 0, lcq.penalty_schedule(300)])
def test_what_is_no_schedule_is_refused(mu):
    with pytest.raises(ValueError, match="expected mu= a"):
        as_schedule(mu)
