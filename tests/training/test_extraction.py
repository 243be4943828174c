"""One verb for every wrapper: what a run ends with is packed, and is that of the method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.forms.base import is_form

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
PARAMS = {"a": W, "b": 2 * W[:4], "bias": jnp.ones(6)}
RULES = [lcq.Rule("a", lcq.KMeans(3)), lcq.Rule("b", lcq.Prune(count=5))]
BASELINES = {
    "iterated_direct": lambda rules: lcq.training.iterated_direct(optax.sgd(0.1), rules, every=2),
    "straight_through_training": lambda rules: lcq.training.straight_through_training(optax.sgd(0.1), rules),
}


def ran(tx, params=PARAMS, steps=4):
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(jax.tree.map(lambda w: w - 0.5, params), state, params)
        params = optax.apply_updates(params, updates)
    return state, params


def assert_packed(forms):
    stored = [leaf for leaf in jax.tree.leaves(forms, is_leaf=is_form) if is_form(leaf)]
    assert stored and all(form.pack() is form for form in stored)


@pytest.mark.parametrize("name", BASELINES)
def test_of_the_baselines_it_is_the_projection_of_the_parameters(name):
    state, params = ran(optax.chain(optax.clip(5.0), BASELINES[name](RULES)))
    forms = lcq.extract(state, params)
    assert_packed(forms)
    dense, direct = lcq.decompress(forms), lcq.decompress(lcq.compress(params, RULES))
    for path in PARAMS:
        np.testing.assert_allclose(dense[path], params[path], rtol=1e-5, atol=1e-6)  # they are compressed already
        np.testing.assert_allclose(dense[path], direct[path], rtol=1e-5, atol=1e-6)
    averaged = {**params, "a": params["a"] + 0.01 * W}
    moved = np.asarray(lcq.extract(state, averaged)["a"].dense())
    assert len(np.unique(moved)) == 3 and not np.array_equal(moved, dense["a"])


def test_of_baselines_that_are_none_or_several():
    tx = BASELINES["iterated_direct"](RULES)
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="expected one state of iterated_direct or straight_through_training, got 2"):
        lcq.extract((state, state), PARAMS)
    with pytest.raises(ValueError, match=r"restore into tx.init\(params\)"):
        lcq.extract(state._replace(tasks=[]), PARAMS)
    with pytest.raises(ValueError, match="a: expected finite weights"):
        lcq.extract(state, {**PARAMS, "a": W.at[0, 0].set(jnp.nan)})
    with pytest.raises(ValueError, match="a: expected the parameters that IteratedState was given in init"):
        lcq.extract(state, {"b": PARAMS["b"]})


def test_of_smooth_binary_it_is_the_deployed_net_packed():
    binary = lcq.smooth_binary([lcq.Rule("a", lcq.Binary(per="channel"))])
    forms = lcq.extract(binary, PARAMS)
    assert_packed(forms)
    np.testing.assert_array_equal(forms["a"].dense(), binary.compress(PARAMS)["a"].dense())
    learned = jax.tree.map(lambda alpha: 3 * alpha, binary.alphas(PARAMS))
    tripled = lcq.extract(binary, PARAMS, alphas=learned)["a"].dense()
    np.testing.assert_allclose(tripled, 3 * forms["a"].dense(), rtol=1e-6)


def test_of_two_methods_on_other_leaves_it_is_both():
    rules = [lcq.Rule("a", lcq.KMeans(3)), lcq.Rule("b", lcq.KMeans(2))]
    tx = lcq.hemp(lcq.lc(optax.sgd(0.1), rules[1:], mu=1e3, every=1), rules[:1], order=1, small=0)
    state, params = ran(tx, steps=1)
    with pytest.warns(UserWarning, match="away from the compressed"):
        forms = lcq.extract(state, params)
    assert_packed(forms)
    alone = lcq.hemp(optax.sgd(0.1), rules[:1], order=1, small=0)
    np.testing.assert_array_equal(forms["a"].dense(), lcq.extract(alone.init(PARAMS), params)["a"].dense())
    assert forms["b"].size_of_table == 2 and forms["bias"] is params["bias"]


def test_settings_of_another_method_are_refused():
    state, params = ran(lcq.hemp(optax.sgd(0.1), RULES[:1], order=1, small=0), steps=1)
    with pytest.raises(ValueError, match="expected levels='trained' or 'fitted', got 'new'"):
        lcq.extract(state, params, levels="new")
    with pytest.raises(ValueError, match=r"expected alphas= with what lcq.smooth_binary returned"):
        lcq.extract(state, params, alphas={})
    with pytest.raises(ValueError, match="expected levels='fitted' with a state of hemp, got none"):
        lcq.extract(BASELINES["iterated_direct"](RULES).init(PARAMS), PARAMS, levels="fitted")
    with pytest.raises(ValueError, match=r"expected a state of lc, hemp, .* got none: .*restore into"):
        lcq.extract(optax.sgd(0.1).init(PARAMS), PARAMS)
