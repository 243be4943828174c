"""Batch norm and sign folded into whole thresholds, against the unfolded computation on all whole numbers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lcq.kernels.columns import pack_signs
from lcq.layers import binary, frozen

RNG = np.random.default_rng(0)
COUNT, CHANNELS = 37, 200


def layer_with(alpha, bias):
    layer = frozen.freeze(jnp.ones((COUNT, CHANNELS)))
    return dataclasses.replace(layer, alpha=jnp.asarray(alpha), bias=None if bias is None else jnp.asarray(bias))


def bits(words, count=CHANNELS):
    each = (np.asarray(words)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return each.reshape(*words.shape[:-1], -1)[..., :count].astype(bool)


def all_sums():
    return jnp.broadcast_to(jnp.arange(-COUNT, COUNT + 1)[:, None], (2 * COUNT + 1, CHANNELS))


def test_thresholds_are_exact_where_ties_are():
    def pick(*values):
        return jnp.asarray(RNG.choice(np.array(values, np.float32), CHANNELS))

    alpha, b = pick(0, 0.25, 0.5, 1), pick(0, 0.5, -1, 2)
    gamma, beta = pick(-2, -0.5, 0, 0.5, 1), pick(-1, -0.5, 0, 0, 1, 2)
    mean, var = pick(-3, 0, 0.5, 2, 100), pick(0.25, 1, 4, 16)
    layer = layer_with(alpha, b)
    fold = jax.jit(functools.partial(frozen.fold_threshold, epsilon=0.0))
    threshold = fold(layer, mean=mean, var=var, scale=gamma, bias=beta)
    y = all_sums()
    alpha, b, gamma, beta, mean, var = (np.asarray(a, np.float64) for a in (alpha, b, gamma, beta, mean, var))
    z = np.asarray(y, np.float64) * alpha  # all numbers are short, so nothing is rounded
    z = gamma * (z + b - mean) / np.sqrt(var) + beta
    assert (z[:, gamma < 0] == 0).any() and (z[:, gamma > 0] == 0).any() and (z[:, gamma == 0] == 0).any()
    words = jax.jit(frozen.threshold_signs)(threshold, y)
    assert words.dtype == jnp.uint32 and words.shape == (2 * COUNT + 1, -(-CHANNELS // 32))
    np.testing.assert_array_equal(bits(words), z >= 0)
    assert not (bits(words, 224)[:, CHANNELS:]).any()


@pytest.mark.parametrize("given", ["all", "some"])
def test_thresholds_are_those_of_the_float32_layers_to_the_last_rounding(given):
    alpha, gamma, mean = (RNG.normal(size=CHANNELS).astype(np.float32) for _ in range(3))
    b = RNG.normal(size=CHANNELS).astype(np.float32) if given == "all" else None
    var = RNG.uniform(0.1, 3, CHANNELS).astype(np.float32)
    alpha, y = np.abs(alpha), all_sums()
    gamma = gamma if given == "all" else np.ones_like(gamma)
    # A beta that cancels the rest at some whole number, but for rounding.
    at = RNG.integers(-COUNT, COUNT, CHANNELS)
    beta = -gamma * (alpha * np.float64(at) + (0 if b is None else b) - mean) / np.sqrt(np.float64(var) + 1e-5)
    beta = beta.astype(np.float32)
    layer, norm = layer_with(alpha, b), {"mean": jnp.asarray(mean), "var": jnp.asarray(var)}
    params = {"scale": jnp.asarray(gamma), "bias": jnp.asarray(beta)}
    unfolded = nn.BatchNorm(use_running_average=True, epsilon=1e-5)
    z = unfolded.apply({"params": params, "batch_stats": norm}, binary.affine(y, layer.alpha, layer.bias, jnp.float32))
    assert (np.abs(z).min(0) < 1e-5).all()
    params = params if given == "all" else {"bias": params["bias"]}
    threshold = frozen.fold_threshold(layer, **norm, **params)
    np.testing.assert_array_equal(bits(frozen.threshold_signs(threshold, y)), np.asarray(z) >= 0)


def test_nothing_but_bits_between_two_layers():
    window = binary.window((3, 3))
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 40)), jnp.float32)
    w1, w2 = (RNG.normal(size=shape).astype(np.float32) for shape in ((3, 3, 40, 35), (3, 3, 35, 4)))
    b, mean, beta = (jnp.asarray(RNG.normal(size=35), jnp.float32) for _ in range(3))
    gamma = jnp.asarray(RNG.choice([-2, -0.3, 0, 0.7, 1.1], 35), jnp.float32)
    norm = {"mean": mean, "var": jnp.full(35, 9.0), "scale": gamma, "bias": beta}

    @jax.jit
    def prepared(w1, w2, b, norm):
        one = frozen.freeze(w1, b, window=window)
        return one, frozen.freeze(w2, window=window), frozen.fold_threshold(one, **norm)

    one, two, threshold = prepared(jnp.asarray(w1), jnp.asarray(w2), b, norm)

    def rest(words):
        return frozen.product(two, frozen.threshold_signs(threshold, frozen.product(one, words)))

    h = np.asarray(jax.jit(functools.partial(binary.conv, window=window))(x, jnp.asarray(w1), b), np.float64)
    h = np.asarray(gamma) * (h - np.asarray(mean)) / np.sqrt(9.0 + 1e-5) + np.asarray(beta)
    second = jax.jit(functools.partial(binary.conv, window=window, scale=False))
    y = second(jnp.asarray(h, jnp.float32), jnp.asarray(w2))
    np.testing.assert_array_equal(jax.jit(rest)(pack_signs(x)), y)
    assert "f32" not in str(jax.make_jaxpr(rest)(pack_signs(x)))


def test_numbers_of_batch_norm_are_one_for_each_channel():
    with pytest.raises(ValueError, match=r"scale: wanted \[200\].*got \[1\]"):
        frozen.fold_threshold(
            layer_with(jnp.ones(CHANNELS), None), mean=jnp.ones(CHANNELS), var=jnp.ones(CHANNELS), scale=jnp.ones(1)
        )
