"""The loops that users copy: rates that start again, momentum at rest, the best kept, a stop."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.examples import data, models
from lcq.examples.train import cross_entropy, endless, evaluate, per_l_step, train, train_lc, without_momentum

RULES = [lcq.Rule("(.*/)?kernel", lcq.KMeans(2))]
SPLIT = data.digits()
NET = models.MLP((8, 10))


def apply(params, x):
    return NET.apply({"params": params}, x)


LOSS = cross_entropy(apply)
PARAMS = NET.init(jax.random.key(0), SPLIT.x_train[:1])["params"]


def batches():
    return endless(SPLIT.x_train, SPLIT.y_train, 64, seed=0)


def lc(inner=None, rules=RULES, rate=0.1, every=None):
    inner = inner or (lambda eta: optax.sgd(eta, momentum=0.9))
    return lcq.lc(inner, rules, mu=lcq.geometric(1e-2, 2.0, steps=20), every=every, learning_rate=rate)


def run(evaluate=lambda forms: 0.0, tx=None, loss=LOSS, **settings):
    return train_lc(loss, PARAMS, tx or lc(), batches(), evaluate=evaluate, **{"l_steps": 5, "every": 4} | settings)


def arrays(forms):
    return jax.tree.map(np.array, lcq.decompress(forms))


def test_train_says_how_many_batches_it_wants():
    with pytest.raises(ValueError, match="expected 3 batches, got 2"):
        train(LOSS, PARAMS, optax.sgd(0.1), _first(2), 3)


def _first(n):
    return [batch for _, batch in zip(range(n), batches(), strict=False)]


@pytest.mark.parametrize("every", [3, (5, 2)])
def test_rates_start_again_with_every_l_step(every):
    first, rest = every if isinstance(every, tuple) else (every, every)
    lengths = [first, *[rest] * 4]
    expected = [0.5 * 0.8**n * (1 - 0.1 * t) for n, length in enumerate(lengths) for t in range(length)]
    rate = per_l_step(lambda t: 0.5 * (1 - 0.1 * t), every, factor=0.8)
    np.testing.assert_allclose([rate(t) for t in range(sum(lengths))], expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(rate)(jnp.arange(sum(lengths))), expected, rtol=1e-6)


def test_an_optimizer_runs_at_these_rates_between_these_c_steps():
    """Against the same in numpy."""
    every, mu, factor = (3, 2), 0.5, 1.5

    def schedule(t):
        return 0.2 / (1 + t)

    tx = lcq.lc(
        optax.sgd, [lcq.Rule("w", lcq.KMeans(1))], mu=lcq.geometric(mu, factor, steps=9), every=None,
        learning_rate=per_l_step(schedule, every),
    )  # fmt: skip

    def loss(params, batch):
        return jnp.sum((params["w"] - jnp.array([1.0, 4.0])) ** 2) / 2

    result = train_lc(loss, {"w": jnp.array([0.0, 1.0])}, tx, [0] * 9, evaluate=lambda forms: 0, l_steps=4, every=every)
    w, multiplier, gaps = np.array([0.0, 1.0]), np.zeros(2), []
    level = w.mean()
    for n in range(4):
        for t in range(3 if n == 0 else 2):
            slope = w - np.array([1.0, 4.0]) + mu * (w - level) - multiplier
            w = w - min(schedule(t), 1 / mu) * slope
        level = (w - multiplier / mu).mean()
        multiplier = multiplier - mu * (w - level)
        gaps.append(np.sum((w - level) ** 2) / np.sum(w**2))
        mu *= factor
    np.testing.assert_allclose(result.last.params["w"], w, rtol=1e-5)
    np.testing.assert_allclose([step.gap for step in result.history], gaps, rtol=1e-4)


def test_train_lc_is_the_plain_loop_with_c_steps_in_update():
    """The same updates and Theta as lc(every=4) in `train`, in one compilation; what is given stays valid."""
    before = jax.tree.map(np.array, PARAMS)
    seen = []
    loss = chex.assert_max_traces(LOSS, n=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # early forms are far away, which is no news
        result = run(evaluate=lambda forms: seen.append(arrays(forms)) or -len(seen), loss=loss)
    states = []

    def keep(number, now):
        return number % 4 or states.append(arrays(lcq.extract(now.opt_state, now.params)))

    with pytest.warns(UserWarning, match="away from the compressed"):
        plain = train(LOSS, PARAMS, lc(every=4), batches(), 20, on_step=keep)
    chex.assert_trees_all_close(result.last.params, plain.params, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(seen, states, strict=True):
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(arrays(result.forms), seen[-1])
    chex.assert_trees_all_equal(PARAMS, before)
    assert result.number == 4 and len(result.history) == 5


def test_the_best_is_kept_though_later_ones_are_worse(tmp_path):
    seen = []
    scores = iter([3.0, 1.0, 2.0, 1.0, 5.0])
    result = run(evaluate=lambda forms: seen.append(arrays(forms)) or next(scores))
    assert result.number == 1 and [step.score for step in result.history] == [3, 1, 2, 1, 5]
    chex.assert_trees_all_equal(arrays(result.forms), seen[1])
    assert not np.array_equal(seen[1]["dense0"]["bias"], seen[4]["dense0"]["bias"])
    lcq.save(tmp_path / "net.lcq", result.forms)
    better = run(evaluate=lambda forms: evaluate(apply, forms, SPLIT.x_test, SPLIT.y_test).loss, l_steps=2)
    assert better.history[better.number].score == evaluate(apply, better.forms, SPLIT.x_test, SPLIT.y_test).loss


def test_it_stops_on_the_gap():
    result = run(l_steps=40, stop_gap=0.01)
    gaps = [step.gap for step in result.history]
    assert 1 < len(gaps) < 40 and gaps[-1] <= 0.01 < min(gaps[:-1])
    after = train_lc(LOSS, PARAMS, lc(), batches(), evaluate=lambda forms: 0, l_steps=len(gaps), every=4)
    chex.assert_trees_all_equal(after.last, result.last)


@pytest.mark.parametrize("name", ["trace", "mu"])
def test_momentum_starts_from_rest(name):
    inner = {"trace": lambda eta: optax.sgd(eta, momentum=0.9), "mu": optax.adam}[name]
    tx = lc(inner, rate=0.01)
    step = jax.jit(lambda params, state, batch: tx.update(jax.grad(LOSS)(params, batch), state, params))
    for reset in (True, False):
        params, state, upcoming = PARAMS, tx.init(PARAMS), batches()
        for updates in (3, 2, 2):
            for _ in range(updates):
                change, state = step(params, state, next(upcoming))
                params = optax.apply_updates(params, change)
            state = lcq.training.c_step(state, params)
            if reset:
                state = optax.tree.set(state, **{name: jax.tree.map(jnp.zeros_like, params)})
        ran = run(tx=tx, l_steps=3, every=(3, 2), reset_momentum=reset).last
        chex.assert_trees_all_close(ran.params, params, rtol=1e-5, atol=1e-6)
        chex.assert_trees_all_close(optax.tree.get(ran.opt_state, name), optax.tree.get(state, name), atol=1e-6)
    assert all(np.any(a) for a in jax.tree.leaves(optax.tree.get(state, name)))
    state = jax.tree.map(lambda a: a + 1, state)
    rest = without_momentum(state)
    assert jax.tree.structure(rest) == jax.tree.structure(state)
    chex.assert_trees_all_equal(optax.tree.set(rest, **{name: 0}), optax.tree.set(state, **{name: 0}))
    with pytest.raises(ValueError, match="optimizer with momentum"):
        without_momentum(optax.sgd(0.1).init(PARAMS))


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="expected 4 batches, got 2"):
        train_lc(LOSS, PARAMS, lc(), _first(6), evaluate=lambda forms: 0, l_steps=2, every=4)
    with pytest.raises(ValueError, match="every=None"):
        run(tx=lc(every=4))
    with pytest.raises(ValueError, match="L step 0: expected a number from evaluate, got NaN"):
        run(evaluate=lambda forms: np.nan)
    with pytest.raises(ValueError, match="expected finite weights"):
        run(loss=lambda params, batch: LOSS(params, batch) * jnp.inf)


def test_schemes_solved_on_the_host():
    result = run(tx=lc(rules=[lcq.Rule("dense1/kernel", lcq.KMeans(2, exact=True))]), l_steps=2)
    assert len(np.unique(result.forms["dense1"]["kernel"].dense())) == 2
