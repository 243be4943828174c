"""HEMP against a plain loop in float64: the update, among other transformations, on a mesh."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.forms.base import is_form
from lcq.training.block_entropy import block_entropy, entropy_centres
from lcq.training.hemp import HempState, hemp
from tests.training.entropy_oracles import closed_form, dense_entropy

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def every_test_draws_the_same():
    """Whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def leaf(*shape):
    return RNG.uniform(-0.8, 0.9, shape)


# The update


def test_an_update_by_hand():
    """H_1 of p = (.475, .525): its slope is -log2(.525/.475)/4 = -.036097 for all; Q(w) = (0, 1, 1, 0)."""
    params, grads = {"w": jnp.array([0.2, 0.6, 0.9, 0.4])}, {"w": jnp.array([0.5, -2.0, 0.0, 0.25])}
    rules = [lcq.Rule("w", lcq.Levels((0.0, 1.0)))]
    tx = hemp(optax.sgd(0.1), rules, order=1, small=0)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    # S = (.5, 0, 1, .75), and the inner updates (-.05, .2, 0, -.025)
    expected = [-0.05 - 0.5 * (0.02 - 0.036097), 0.2, -(-0.01 - 0.036097), -0.025 - 0.75 * (0.04 - 0.036097)]
    np.testing.assert_allclose(updates["w"], expected, atol=2e-6)
    np.testing.assert_allclose(state.entropy, 0.998196, atol=2e-6)
    assert isinstance(state, HempState) and state.steps == 1

    stronger = hemp(optax.sgd(0.1), rules, order=1, small=0, entropy_weight=6.0, learning_rate=lambda n: 0.5 + n)
    state, update = stronger.init(params), jax.jit(stronger.update)
    updates, state = update(grads, state, params)
    expected = [-0.05 - 0.25 * (0.02 - 0.216580), 0.2, 0.1, -0.025 - 0.375 * (0.04 - 0.216580)]  # .9 is clipped to 1
    np.testing.assert_allclose(updates["w"], expected, atol=4e-6)
    updates, state = update(grads, state, params)
    np.testing.assert_allclose(updates["w"][0], -0.05 - 0.75 * (0.02 - 0.216580), atol=4e-6)


def two_means(x, levels=None):
    """Lloyd's algorithm, cold from the best split."""
    if levels is None:
        splits = [(np.sort(x)[:i], np.sort(x)[i:]) for i in range(1, len(x))]
        low, high = min(splits, key=lambda s: s[0].var() * len(s[0]) + s[1].var() * len(s[1]))
        levels = np.array([low.mean(), high.mean()])
    for _ in range(30):
        above = x > levels.mean()
        levels = np.array([x[~above].mean(), x[above].mean()])
    return levels


def test_a_run_is_the_plain_loop():
    """Momentum, a schedule, levels estimated again, a leaf that is too small to count, a leaf under no rule."""
    start = {"w": leaf(4, 6), "small": np.array([0.5, -0.6, 0.4, -0.5, 0.7]), "free": leaf(3)}
    targets = {name: leaf(*w.shape) for name, w in start.items()}
    rules = [lcq.Rule("w|small", lcq.KMeans(2))]
    tx = hemp(
        optax.sgd(0.05, momentum=0.5),
        rules,
        order=2,
        entropy_weight=lambda n: 0.3 / (1 + n),
        error_weight=0.2,
        learning_rate=0.5,
        every=3,
    )
    params = {name: jnp.asarray(w, jnp.float32) for name, w in start.items()}
    aims = {name: jnp.asarray(w, jnp.float32) for name, w in targets.items()}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.tree.map(jnp.subtract, params, aims), state, params)
        return (optax.apply_updates(params, updates), state), state.entropy

    (params, state), entropies = jax.lax.scan(step, (params, tx.init(params)), length=8)

    levels = {name: two_means(start[name].ravel()) for name in ("w", "small")}
    ws, speeds = dict(start), {name: 0 for name in start}
    for n in range(8):
        if n in (3, 6):
            levels = {name: two_means(ws[name].ravel(), levels[name]) for name in levels}
        inside = np.clip(ws["w"], *levels["w"])
        np.testing.assert_allclose(entropies[n], dense_entropy([(inside, levels["w"])], 2), rtol=1e-4)
        slopes = {"w": closed_form(np.clip(ws["w"], levels["w"][0], levels["w"][1] - 1e-12), levels["w"]).reshape(4, 6)}
        for name, w in list(ws.items()):
            gradient = w - targets[name]
            speeds[name] = gradient + 0.5 * speeds[name]
            ws[name] = w - 0.05 * speeds[name]
            if name in levels:
                nearest = levels[name][(w > levels[name].mean()).astype(int)]
                move = 0.2 * (w - nearest) + 0.3 / (1 + n) * slopes.get(name, 0)
                ws[name] = np.clip(ws[name] - 0.5 * np.maximum(0, 1 - abs(gradient)) * move, *levels[name])
    for name, w in ws.items():
        np.testing.assert_allclose(params[name], w, atol=2e-5, err_msg=name)
    for (form,), name in zip(state.codebooks, ("small", "w"), strict=True):
        np.testing.assert_allclose(np.ravel(form.levels), levels[name], atol=2e-5)


# Among others

RULES = [lcq.Rule("dense0/kernel", lcq.KMeans(3)), lcq.Rule("(.*/)?kernel", lcq.Uniform(2, per="channel"))]


SETTINGS = {"order": 2, "entropy_weight": 1.0, "error_weight": 0.05, "every": 4}


def test_around_lc_it_sees_the_gradients_of_the_loss(problem):
    rules = [lcq.Rule("(.*/)?kernel", lcq.KMeans(3))]
    inner = lcq.lc(optax.sgd(0.1), rules, mu=0.5, every=3)
    params, grads = problem.params, jax.tree.map(lambda g: 9 * g, jax.grad(problem.loss)(problem.params))
    tx = hemp(inner, rules, **SETTINGS)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    given, _ = jax.jit(inner.update)(grads, inner.init(params), params)
    plain = hemp(optax.set_to_zero(), rules, **SETTINGS)
    own, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    weights = {name: np.maximum(0, 1 - np.abs(grads[name]["kernel"])) for name in params}
    assert all((s < 0.99).any() for s in weights.values())
    levels = lcq.compress(params, rules)
    for name in params:
        low, high = levels[name]["kernel"].levels.ravel()[jnp.array([0, -1])]
        inside = np.clip(params[name]["kernel"] + given[name]["kernel"] + own[name]["kernel"], low, high)
        outside = np.asarray((params[name]["kernel"] < low) | (params[name]["kernel"] > high))
        np.testing.assert_allclose(
            np.where(outside, 0, updates[name]["kernel"]),
            np.where(outside, 0, inside - params[name]["kernel"]),
            atol=1e-6,
        )
    with pytest.warns(UserWarning, match="away from the compressed"):
        assert {type(form["kernel"]).__name__ for form in lcq.extract(state, params).values()} == {"Codes"}


@pytest.fixture(scope="module")
def ours(problem):
    return hemp(optax.sgd(0.1, momentum=0.9), RULES, **SETTINGS)


@pytest.fixture(scope="module")
def after(problem, ours):
    return problem.train(ours)


def test_it_trains_to_fewer_bits(problem, after):
    params, state = after
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((params, state)))
    bare, _ = problem.train(optax.sgd(0.1, momentum=0.9))
    forms, cold = lcq.extract(state, params), lcq.compress(bare, RULES)

    def entropy(forms):
        dense = lcq.decompress(forms)
        return float(block_entropy(dense, entropy_centres(dense, forms), 2))

    assert entropy(forms) < entropy(cold) - 0.05
    assert problem.loss(params) < problem.loss(problem.params) - 0.1
    assert problem.loss(lcq.decompress(forms)) < problem.loss(problem.params) - 0.1
    np.testing.assert_array_equal(forms["dense0"]["kernel"].levels, state.codebooks[0][0].levels)


def test_wrappers_and_donation_do_what_the_plain_loop_does(problem, ours, after):
    fresh = jax.tree.map(jnp.copy, problem.params)
    chex.assert_trees_all_close(problem.train(ours, params=fresh, donate=True), after, rtol=1e-5, atol=1e-6)
    params, state = problem.train(optax.MultiSteps(ours, 2), steps=20)
    chex.assert_trees_all_close((params, state.inner_opt_state), after, rtol=1e-5, atol=1e-6)
    assert lcq.extract(state, params)["dense0"]["kernel"].levels.shape == (1, 1, 3)
    labels = jax.tree.map_with_path(lambda keys, _: keys[-1].key, problem.params)
    parts = optax.partition({"kernel": ours, "bias": optax.sgd(0.1, momentum=0.9)}, labels)
    chex.assert_trees_all_close(problem.train(optax.chain(parts, optax.identity()))[0], after[0], rtol=1e-5, atol=1e-6)
    names = ("inner", "order", "every", "small", "pooled", "layout")
    injected = optax.inject_hyperparams(hemp, static_args=names)(optax.sgd(0.1, momentum=0.9), RULES, **SETTINGS)
    chex.assert_trees_all_close(problem.train(injected)[0], after[0], rtol=1e-5, atol=1e-6)


def test_the_state_maps_like_the_parameters(problem, ours, after):
    _, state = after
    same = optax.tree.map_params(ours, lambda leaf: leaf, state)
    chex.assert_trees_all_equal(same, state)
    zeroed = optax.tree.map_params(ours, jnp.zeros_like, state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeroed.inner))
    chex.assert_trees_all_equal(zeroed.codebooks, state.codebooks)
    shapes = {leaf.shape for leaf in jax.tree.leaves((state.codebooks, state.entropy, state.steps))}
    assert shapes == {(1, 1, 3), (1, 10), ()}


def test_bfloat16_joint_and_stacked_leaves():
    """A stacked leaf is its layers, each with its levels; joint leaves share theirs; both in 16 bits too."""
    layers = {"a": leaf(6, 4), "b": leaf(6, 4) * 3}
    stacked = {
        "both": jnp.asarray(np.stack(list(layers.values())), jnp.float32),
        "j": jnp.ones((2, 3)),
        "k": jnp.ones(9),
    }
    stacked |= {"j": jnp.asarray(leaf(2, 9), jnp.float32), "k": jnp.asarray(leaf(8), jnp.float32)}
    rules = [lcq.Rule("both", lcq.KMeans(3), stacked=1), lcq.Rule("j|k", lcq.KMeans(3), joint=True)]
    tx = hemp(optax.sgd(0.1), rules, order=2, small=0, every=1)
    params, state, update = stacked, tx.init(stacked), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    alone = {name: jnp.asarray(w, jnp.float32) for name, w in layers.items()} | {"j": stacked["j"], "k": stacked["k"]}
    single = hemp(optax.sgd(0.1), [lcq.Rule("[ab]", lcq.KMeans(3)), rules[1]], order=2, small=0, every=1)
    one, its, update_one = alone, single.init(alone), jax.jit(single.update)
    for _ in range(3):
        updates, its = update_one(jax.tree.map(jnp.zeros_like, one), its, one)
        one = optax.apply_updates(one, updates)
    np.testing.assert_allclose(params["both"], np.stack([one["a"], one["b"]]), atol=1e-6)
    np.testing.assert_allclose(state.entropy, its.entropy, rtol=1e-6)
    form = lcq.extract(state, params)
    np.testing.assert_array_equal(form["j"].levels.ravel(), form["k"].levels.ravel())

    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), stacked)
    updates, state = update(jax.tree.map(jnp.zeros_like, half), tx.init(half), half)
    full, _ = update(jax.tree.map(jnp.zeros_like, stacked), tx.init(stacked), stacked)
    assert {u.dtype for u in updates.values()} == {jnp.bfloat16.dtype}
    for name in updates:
        np.testing.assert_allclose(updates[name].astype(np.float32), full[name], atol=0.02)


@pytest.mark.parametrize("explicit", [False, True])
def test_on_a_mesh_it_is_the_same_run(explicit):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,))
    start = {"kernel": jnp.asarray(leaf(16, 5), jnp.float32), "bias": jnp.zeros(5)}
    tx = hemp(optax.sgd(0.1), [lcq.Rule("kernel", lcq.KMeans(4))], order=3, every=2)

    def run(params):
        state = jax.jit(tx.init)(params) if explicit else tx.init(params)
        update = jax.jit(lambda g, s, p: tx.update(g, s, p))
        for _ in range(4):
            updates, state = update(params, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        return params, state.entropy

    expected = run(start)
    with jax.set_mesh(mesh):
        specs = {"kernel": P("data"), "bias": P()}
        sharded = jax.tree.map(lambda w, s: jax.device_put(w, NamedSharding(mesh, s)), start, specs)
        found = run(sharded)
        assert found[0]["kernel"].sharding.is_equivalent_to(sharded["kernel"].sharding, 2)
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-6)


def test_any_codebook_is_estimated_again_from_the_last(problem):
    """A rate counts codes, which the state does not keep; a codebook of many levels is searched another way."""
    rules = [
        lcq.Rule("dense0/kernel", lcq.KMeans(20, rate=1e-4)),
        lcq.Rule(".*/kernel", lcq.Uniform(3, zero_point=True)),
    ]
    tx = hemp(optax.sgd(0.1), rules, order=2, every=1, entropy_weight=0.1)
    params, state = problem.train(tx, steps=3)
    forms = jax.tree.map(
        lambda leaf: leaf.unpack() if is_form(leaf) else leaf, lcq.extract(state, params), is_leaf=is_form
    )
    levels = {"dense0": forms["dense0"]["kernel"].levels.ravel(), "dense1": None}
    levels["dense1"] = (jnp.arange(8.0) - forms["dense1"]["kernel"].zero.ravel()) * forms["dense1"][
        "kernel"
    ].scale.ravel()
    kernels = {name: np.clip(params[name]["kernel"], level[0], level[-1]) for name, level in levels.items()}
    expected = dense_entropy([(kernels[name], np.asarray(levels[name])) for name in levels], 2)
    np.testing.assert_allclose(block_entropy(kernels, levels, 2), expected, rtol=1e-4)
    assert abs(state.entropy - expected) < 0.3


def test_levels_stay_if_weights_are_not_finite():
    params = {"w": jnp.asarray(leaf(60), jnp.float32)}
    tx = hemp(optax.sgd(0.1), [lcq.Rule("w", lcq.KMeans(3))], every=1)
    update = jax.jit(tx.update)
    _, state = update(params, tx.init(params), params)
    _, after = update(params, state, {"w": params["w"].at[3].set(jnp.nan)})
    chex.assert_trees_all_equal(after.codebooks, state.codebooks)


@pytest.mark.parametrize(
    "rules, settings, message",
    [
        ([], {}, "hemp wants a rule with a scheme"),
        ([lcq.Rule("w", lcq.Prune(fraction=0.1))], {}, "expected schemes with a codebook"),
        ([lcq.Rule("w", lcq.KMeans(2, exact=True))], {"every": 2}, "solved on the host"),
        ([lcq.Rule("w", lcq.KMeans(2))], {"every": 0}, "every= a positive int"),
        ([lcq.Rule("w", lcq.KMeans(2))], {"order": 0}, "order= an int >= 1"),
        ([lcq.Rule("w", lcq.KMeans(2))], {"small": -1}, "small= a number"),
        ([lcq.Rule("w", lcq.KMeans(2))], {"entropy_weight": -1.0}, "entropy_weight= a number >= 0"),
        ([lcq.Rule("w", lcq.KMeans(2))], {"error_weight": float("nan")}, "error_weight= a number >= 0"),
        ([lcq.Rule("w", lcq.KMeans(2), stacked=1)], {"layout": "torch"}, "without stacked axes"),
    ],
)
def test_settings_are_checked(rules, settings, message):
    with pytest.raises(ValueError, match=message):
        hemp(optax.sgd(0.1), rules, **settings)


def test_parameters_and_states_are_checked():
    params, rules = {"w": jnp.asarray(leaf(30), jnp.float32)}, [lcq.Rule("w", lcq.KMeans(2))]
    tx = hemp(optax.sgd(0.1), rules)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match="w: expected finite"):
        tx.init({"w": jnp.full(30, jnp.nan)})
    with pytest.raises(ValueError, match="more than 10 weights for each of its levels"):
        tx.init({"w": jnp.ones(20)})
    with pytest.raises(ValueError, match="w: expected a codebook of two or more levels"):
        hemp(optax.sgd(0.1), [lcq.Rule("w", lcq.KMeans(1))]).init(params)
    with pytest.raises(ValueError, match="K = 16 centres at order n = 9"):
        hemp(optax.sgd(0.1), [lcq.Rule("w", lcq.KMeans(16))], order=9, small=0).init(params)
    with pytest.raises(ValueError, match="w: expected the gradient of the loss"):
        tx.update({"w": None}, tx.init(params), params)
    with pytest.raises(ValueError, match="w: expected the parameters that hemp was given"):
        lcq.extract(tx.init(params), {"v": params["w"]})
    with pytest.raises(ValueError, match=r"expected a state of lc, hemp, .* none: .* was the optimizer made by one"):
        lcq.extract(optax.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match="got 2: pass the part"):
        lcq.extract((tx.init(params), tx.init(params)), params)
    with pytest.raises(ValueError, match="w: expected finite"):
        lcq.extract(tx.init(params), {"w": jnp.full(30, jnp.inf)})
