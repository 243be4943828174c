"""LC is not about nets: least squares and logistic regression against brute force over all codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq

N = 8
RNG = np.random.default_rng(3)
X = RNG.normal(size=(40, N))
LEAST_SQUARES = X @ RNG.normal(size=N) + RNG.normal(size=40)
LABELS = np.where(X @ RNG.normal(size=N) + RNG.normal(size=40) > 0, 1.0, -1.0)


def squares(w, x, y):
    return jnp.mean((jnp.dot(x, w, precision="highest") - y) ** 2) / 2


def logistic(w, x, y):
    return jnp.mean(jnp.logaddexp(0, -y * jnp.dot(x, w, precision="highest"))) + 0.01 * jnp.sum(w**2)


def brute_force(loss, y, newton):
    """min over all codes z of min over levels c of the loss at w = z c, by Newton's method in c."""
    codes = np.array(list(itertools.product([0, 1], repeat=N - 1)))
    z = jnp.asarray(np.stack([np.pad(codes, ((0, 0), (1, 0))), 1 - np.pad(codes, ((0, 0), (1, 0)))], -1), jnp.float32)

    def best(z):
        def f(c):
            return loss(jnp.dot(z, c, precision="highest"), X.astype(np.float32), y.astype(np.float32))

        def step(_, c):
            (a, b), (_, d) = jax.hessian(f)(c) + 1e-6 * jnp.eye(2)
            return c - jnp.dot(jnp.array([[d, -b], [-b, a]]), jax.grad(f)(c)) / (a * d - b * b)

        return f(jax.lax.fori_loop(0, newton, step, jnp.zeros(2)))

    return np.asarray(jax.jit(jax.vmap(best))(z))


@pytest.mark.parametrize(
    "loss, y, newton", [(squares, LEAST_SQUARES, 1), (logistic, LABELS, 8)], ids=["squares", "logistic"]
)
def test_lc_often_reaches_the_optimum(loss, y, newton):
    rules = [lcq.Rule("w", lcq.KMeans(2))]
    mu = lcq.geometric(0.02, 1.2, steps=40)
    tx = lcq.lc(optax.sgd, rules, mu=mu, every=30, learning_rate=0.3)
    x, y32 = X.astype(np.float32), y.astype(np.float32)

    def run(w):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(lambda p: loss(p["w"], x, y32))(params), state, params)
            return optax.apply_updates(params, updates), state

        params = {"w": w}
        params, state = jax.lax.fori_loop(0, 40 * 30, step, (params, tx.init(params)))
        return loss(params["w"], x, y32), lcq.metrics(state)["gap"]

    starts = jnp.asarray(np.random.default_rng(5).normal(size=(20, N)), jnp.float32)
    losses, gaps = jax.jit(jax.vmap(run))(starts)
    losses, all_codes = np.asarray(losses), brute_force(loss, y, newton)
    print(np.sort(losses), np.sort(all_codes)[:5], losses.max())
    assert np.all(gaps < 1e-4)
    assert np.mean(losses < all_codes.min() * 1.01) >= 0.5
    assert np.all(losses < np.quantile(all_codes, 0.1))
