"""The entropy of blocks and its slopes, against dense definitions in float64 that share nothing with it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.training.block_entropy import block_entropy, entropy_centres
from lcq.training.hemp import hemp
from tests.training.entropy_oracles import bits, closed_form, dense_entropy, differentiable_entropy

RNG = np.random.default_rng(0)
FOUR, THREE = np.array([-1.3, -0.4, 0.1, 0.9]), np.array([-0.8, 0.0, 1.1])


@pytest.fixture(autouse=True)
def every_test_draws_the_same():
    """Whatever ran before it."""
    RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


def leaf(*shape):
    return RNG.uniform(-0.8, 0.9, shape)


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
    np.testing.assert_array_equal(lcq.extract(tx.init(w), w)["w"].dense(), forms["w"].dense())


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
