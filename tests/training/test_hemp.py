"""HEMP against dense definitions in float64 that share nothing with it: the entropy, its slopes, the update."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.training.block_entropy import block_entropy, entropy_centres
from lcq.training.ending import compress_warm
from lcq.training.hemp import HempState, hemp

RNG = np.random.default_rng(0)
FOUR, THREE = np.array([-1.3, -0.4, 0.1, 0.9]), np.array([-0.8, 0.0, 1.1])


@pytest.fixture(autouse=True)
def every_test_draws_the_same():
    """Whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def leaf(*shape):
    return RNG.uniform(-0.8, 0.9, shape)


# The oracles: every block's K^n memberships, one by one


def members(w, centres):
    """P_w of one weight, by going through the intervals."""
    p = np.zeros(len(centres))
    for b in range(1, len(centres)):
        if centres[b - 1] <= w < centres[b]:
            p[b] = (w - centres[b - 1]) / (centres[b] - centres[b - 1])
            p[b - 1] = 1 - p[b]
    if w >= centres[-1]:
        p[-1] = 1
    if w < centres[0]:
        p[0] = 1
    return p


def histogram(w, centres, order):
    """The sum over blocks, an array of K^n, and how many blocks there are."""
    flat = np.asarray(w, np.float64).ravel()
    many = len(flat) // order
    total = np.zeros((len(centres),) * order)
    for block in flat[: many * order].reshape(many, order):
        total += np.einsum(*itertools.chain(*((members(x, centres), [i]) for i, x in enumerate(block))), range(order))
    return total, many


def bits(total, many):
    p = total[total > 0] / many
    return -(p * np.log2(p)).sum() / total.ndim


def dense_entropy(pairs, order):
    """Pooled over pairs of leaves and centres; ranks count from the lowest."""
    size = max(len(c) for _, c in pairs)
    whole, all_blocks = np.zeros((size,) * order), 0
    for w, c in pairs:
        total, many = histogram(w, c, order)
        whole[tuple(slice(n) for n in total.shape)] += total
        all_blocks += many
    return bits(whole, all_blocks)


def differentiable_entropy(w, centres, order):
    """The same for one leaf, for autodiff: memberships as hats over the centres."""
    c = jnp.concatenate([centres[:1] - 1, centres, centres[-1:] + 1])
    x = w.reshape(-1)[: w.size // order * order, None]
    rising, falling = (x - c[:-2]) / (c[1:-1] - c[:-2]), (c[2:] - x) / (c[2:] - c[1:-1])
    hats = jnp.maximum(0, jnp.where(x < c[1:-1], rising, falling)).reshape(-1, order, len(centres))
    blocks = hats[:, 0]
    for i in range(1, order):
        blocks = (blocks[:, :, None] * hats[:, i, None, :]).reshape(len(blocks), -1)
    p = blocks.mean(0)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0)) / order


def closed_form(w, c):
    """dH_2/dw, weight by weight, from the formula."""
    total, many = histogram(w, c, 2)
    p, slopes = total / many, np.zeros(2 * many)
    with np.errstate(divide="ignore", invalid="ignore"):
        for i, pair in enumerate(w.ravel()[: 2 * many].reshape(many, 2)):
            for place, (mine, other) in enumerate((pair, pair[::-1])):
                b = int(np.searchsorted(c, mine, side="right"))
                here = p if place == 0 else p.T
                ratios = np.where(members(other, c) > 0, np.log2(here[b - 1] / here[b]), 0)
                slopes[2 * i + place] = (members(other, c) * ratios).sum() / (2 * many * (c[b] - c[b - 1]))
    return slopes


# The entropy


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_the_value_is_the_dense_definition(order):
    leaves = {"a": (leaf(5, 7), FOUR), "b": (leaf(3, 3, 2, 2), THREE), "c": (leaf(11), FOUR), "tiny": (leaf(1), FOUR)}
    params = {name: jnp.asarray(w, jnp.float32) for name, (w, _) in leaves.items()}
    centres = {name: jnp.asarray(c, jnp.float32) for name, (_, c) in leaves.items()}
    params |= {"unused": jnp.zeros(3)}
    expected = dense_entropy(leaves.values(), order)
    found = block_entropy(params, centres | {"unused": None}, order)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)

    parts = [(dense_entropy([pair], order), pair[0].size // order) for pair in leaves.values() if pair[0].size >= order]
    mean = sum(h * many for h, many in parts) / sum(many for _, many in parts)
    np.testing.assert_allclose(block_entropy(params, centres, order, pooled=False), mean, rtol=1e-5)

    kernel = leaves["b"][0].transpose(3, 2, 0, 1)
    swapped = dense_entropy([(leaves["a"][0].T, FOUR), (kernel, THREE), *list(leaves.values())[2:]], order)
    np.testing.assert_allclose(block_entropy(params, centres, order, layout="torch"), swapped, rtol=1e-5)
    assert (abs(swapped - expected) > 1e-4) == (order > 1)


@pytest.mark.parametrize("order, size", [(1, 7), (2, 4), (2, 20), (3, 5), (4, 3)])
def test_the_gradient_is_that_of_the_dense_definition(order, size):
    w, c = leaf(50), np.sort(RNG.uniform(-0.7, 0.8, size))
    c[0], c[-1] = -1, 1.2
    with jax.enable_x64(True):
        args = jnp.asarray(w), jnp.asarray(c)
        found = jax.jit(jax.value_and_grad(lambda w, c: block_entropy({"w": w}, {"w": c}, order), (0, 1)))(*args)
        expected = jax.jit(jax.value_and_grad(lambda w, c: differentiable_entropy(w, c, order), (0, 1)))(*args)
        assert found[0].dtype == jnp.float64
        chex.assert_trees_all_close(found, expected, rtol=1e-12, atol=1e-12)
        if order == 2:
            np.testing.assert_allclose(found[1][0], closed_form(w, c), rtol=1e-12, atol=1e-14)


def test_the_gradient_is_the_finite_difference_in_every_block_and_leaf():
    """Channels with centres of their own, two leaves in one histogram, and one each."""
    w, v, h = leaf(8, 2), leaf(9), 1e-6
    c = np.stack([FOUR, FOUR[::-1] * -1.2])
    # A channel's weights keep their ranks if both are mapped to one codebook, piece by piece.
    for pooled in (True, False):

        def entropy(w, v, pooled=pooled):
            ranks = np.stack([np.interp(w[:, i], c[i], np.arange(4.0)) for i in (0, 1)], 1)
            pairs = [(ranks, np.arange(4.0)), (v, THREE)]
            if pooled:
                return dense_entropy(pairs, 3)
            return (5 * dense_entropy(pairs[:1], 3) + 3 * dense_entropy(pairs[1:], 3)) / 8

        slope = np.array([(entropy(w + e, v) - entropy(w - e, v)) / (2 * h) for e in h * np.eye(16).reshape(16, 8, 2)])
        with jax.enable_x64(True):
            centres = {"w": jnp.asarray(c)[None], "v": jnp.asarray(THREE)}
            params = {"w": jnp.asarray(w), "v": jnp.asarray(v)}
            found = jax.jit(jax.value_and_grad(lambda p, c, mode=pooled: block_entropy(p, c, 3, pooled=mode)))
            value, found = found(params, centres)
        np.testing.assert_allclose(value, entropy(w, v), rtol=1e-12)
        np.testing.assert_allclose(found["w"].ravel(), slope, rtol=1e-6, atol=1e-8)
        assert (found["w"].ravel()[15:] == 0).all() and (slope[:15] != 0).all()  # the remainder


def test_on_centres_outside_of_them_and_beside_empty_bins():
    c = jnp.array([0.0, 1.0, 2.0, 3.0])
    slope_of = jax.jit(jax.value_and_grad(block_entropy), static_argnums=2)
    value, slope = slope_of(jnp.array([0.0, 0.0, 3.0, -1.0, 7.0, 1.5, 3.0]), c, 1)
    np.testing.assert_allclose(value, bits(np.array([3, 0.5, 0.5, 3]), 7), rtol=1e-6)
    log2 = np.log2(np.array([3, 0.5, 0.5, 3]) / 7)
    up = (log2[:-1] - log2[1:]) / 7
    # From above on a centre, from below on the last one, none outside.
    np.testing.assert_allclose(slope, [up[0], up[0], up[2], 0, 0, up[1], up[2]], rtol=1e-5, atol=1e-7)

    on_levels, slope = slope_of(jnp.array([0.0, 2.0, 0.0, 2.0]), c, 2)
    assert on_levels == 0
    bound = np.log2(2 / np.finfo(np.float32).eps) / (2 * 2)
    np.testing.assert_allclose(slope, [bound] * 4, rtol=1e-6)  # all leave the full bin for an empty one
    equal = jnp.ones(3)
    value, slope = slope_of(equal, equal, 1)
    assert value == 0 and (slope == 0).all()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_of_compressed_weights_it_is_what_a_coder_of_their_codes_needs(order):
    params = {"kernel": jnp.asarray(leaf(3, 3, 4, 5), jnp.float32), "bias": jnp.ones(4)}
    for scheme in (lcq.KMeans(5), lcq.KMeans(3, per="channel"), lcq.Uniform(2, per="channel", zero_point=True)):
        forms = lcq.compress(params, [lcq.Rule("kernel", scheme)])
        codes = np.asarray(forms["kernel"].codes).ravel()
        blocks = codes[: len(codes) // order * order].reshape(-1, order)
        many = np.unique(blocks, axis=0, return_counts=True)[1]
        p = many / len(blocks)
        dense = lcq.decompress(forms)
        found = block_entropy(dense, entropy_centres(dense, forms), order)
        np.testing.assert_allclose(found, -(p * np.log2(p)).sum() / order, rtol=1e-4)


def test_levels_ascend_where_a_scale_is_negative():
    w = {"w": jnp.array([[-2.0, 2.0], [1.0, -1.0], [0.1, 0.2], [-1.0, 1.0]])}
    forms = lcq.compress(w, [lcq.Rule("w", lcq.Uniform(2, per="channel"))])
    assert forms["w"].scale[0, 0] > 0 > forms["w"].scale[0, 1]
    centres = entropy_centres(w, forms)["w"]
    np.testing.assert_allclose(centres[0, :, 1:-1], [[-2, -1, 0, 1], [-1, 0, 1, 2]], atol=1e-6)
    tx = hemp(optax.sgd(0.0), [lcq.Rule("w", lcq.Uniform(2, per="channel"))], small=0)
    np.testing.assert_array_equal(compress_warm(tx.init(w), w)["w"].dense(), forms["w"].dense())


def test_centres_lie_around_all_weights():
    w = {"w": jnp.array([[-3.0, 1.0], [0.0, 2.0], [1.0, 9.0], [2.0, 4.0]])}
    forms = lcq.compress(w, [lcq.Rule("w", lcq.Levels((-1.0, 0.0, 1.5, 2.0)))])
    np.testing.assert_allclose(entropy_centres(w, forms)["w"], [-4.01, -1, 0, 1.5, 2, 9.51], rtol=1e-6)
    forms = lcq.compress(w, [lcq.Rule("w", lcq.Binary(per="channel"))])
    found = entropy_centres(w, forms)["w"]
    np.testing.assert_allclose(found, [[[-6.01, -1.5, 1.5, 5.01], [-12.01, -4, 4, 17.01]]], rtol=1e-6)
    forms = lcq.compress(w, [lcq.Rule("w", lcq.KMeans(1))])
    np.testing.assert_allclose(entropy_centres(w, forms)["w"], [-3.01, 2, 9.01], rtol=1e-6)
    with pytest.raises(ValueError, match=r"w: expected a form with a codebook.*got Factors"):
        entropy_centres(w, lcq.compress(w, [lcq.Rule("w", lcq.LowRank(1))]))


@pytest.mark.parametrize(
    "params, centres, order, message",
    [
        ({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, 0, "order= an int >= 1"),
        ({"w": jnp.ones(3)}, {"v": jnp.ones(3)}, 1, "v: expected centres of a leaf"),
        ({"w": jnp.ones(3)}, {"w": jnp.ones(1)}, 1, r"w: expected two or more .* got float32\[1\]"),
        ({"w": jnp.ones(3)}, {"w": jnp.ones((2, 4))}, 1, r"w: .* blocks that divide \[3\]"),
        ({"w": jnp.ones(3, int)}, {"w": jnp.ones(3)}, 1, "w: expected a floating-point array of weights, got int32"),
        ({"w": lcq.Binary().project(jnp.ones(3))}, {"w": jnp.ones(3)}, 1, "w: expected .* of weights, got Codes"),
        ({"w": jnp.ones(3)}, {"w": lcq.Binary().project(jnp.ones(3))}, 1, "w: expected .* centres, .*, got Codes"),
        ({"w": [jnp.ones(3)]}, {"w": [0.0]}, 1, "w/0: expected floating-point centres, an array, got float"),
        ({"w": jnp.ones(3)}, {"w": jnp.array([0, jnp.nan])}, 1, r"w: expected finite, ascending .* got \[ 0. nan\]"),
        ({"w": jnp.ones(3)}, {"w": jnp.array([1.0, 0.0])}, 1, "w: expected finite, ascending centres"),
        ({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, True, "order= an int >= 1, got True"),
        ({"w": jnp.ones(3)}, {"w": jnp.arange(3)}, 1, "w: expected floating-point centres, an array, got int32"),
        ({"w": jnp.ones(3)}, {"w": None}, 1, "expected a leaf of at least order = 1"),
        ({"w": jnp.ones(3)}, {"w": jnp.ones(3)}, 4, "expected a leaf of at least order = 4"),
        ({"w": jnp.ones(9)}, {"w": jnp.ones(300)}, 3, "K = 300 centres at order n = 3"),
    ],
)
def test_what_has_no_entropy_is_refused(params, centres, order, message):
    with pytest.raises(ValueError, match=message):
        block_entropy(params, centres, order)


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
    for (form,), name in zip(state.tables, ("small", "w"), strict=True):
        np.testing.assert_allclose(np.ravel(form.levels), levels[name], atol=2e-5)


# Among others


RULES = [lcq.Rule("dense0/kernel", lcq.KMeans(3)), lcq.Rule("(.*/)?kernel", lcq.Uniform(2, per="channel"))]
SETTINGS = {"order": 2, "entropy_weight": 1.0, "error_weight": 0.05, "every": 4}


def moved(params, state, problem):
    return {name: np.asarray(params[name]["kernel"] - problem.params[name]["kernel"]) for name in params}


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
    forms, cold = compress_warm(state, params), lcq.compress(bare, RULES)

    def entropy(forms):
        dense = lcq.decompress(forms)
        return float(block_entropy(dense, entropy_centres(dense, forms), 2))

    assert entropy(forms) < entropy(cold) - 0.05
    assert problem.loss(params) < problem.loss(problem.params) - 0.1
    assert problem.loss(lcq.decompress(forms)) < problem.loss(problem.params) - 0.1
    np.testing.assert_array_equal(forms["dense0"]["kernel"].levels, state.tables[0][0].levels)


def test_wrappers_and_donation_do_what_the_plain_loop_does(problem, ours, after):
    fresh = jax.tree.map(jnp.copy, problem.params)
    chex.assert_trees_all_close(problem.train(ours, params=fresh, donate=True), after, rtol=1e-5, atol=1e-6)
    params, state = problem.train(optax.MultiSteps(ours, 2), steps=20)
    chex.assert_trees_all_close((params, state.inner_opt_state), after, rtol=1e-5, atol=1e-6)
    assert compress_warm(state, params)["dense0"]["kernel"].levels.shape == (1, 1, 3)
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
    chex.assert_trees_all_equal(zeroed.tables, state.tables)
    shapes = {leaf.shape for leaf in jax.tree.leaves((state.tables, state.entropy, state.steps))}
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
    form = compress_warm(state, params)
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
    forms = compress_warm(state, params)
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
    chex.assert_trees_all_equal(after.tables, state.tables)


@pytest.mark.parametrize(
    "rules, settings, message",
    [
        ([], {}, "hemp wants a rule with a scheme"),
        ([lcq.Rule("w", lcq.Prune(kept=0.1))], {}, "expected schemes with a codebook"),
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
        compress_warm(tx.init(params), {"v": params["w"]})
    with pytest.raises(ValueError, match=r"expected one HEMP state .* got 0: was the optimizer made by lcq.hemp"):
        compress_warm(optax.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match="got 2: pass the part"):
        compress_warm((tx.init(params), tx.init(params)), params)
    with pytest.raises(ValueError, match="w: expected finite"):
        compress_warm(tx.init(params), {"w": jnp.full(30, jnp.inf)})
