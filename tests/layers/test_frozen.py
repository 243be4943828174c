"""Batch norm and sign folded into whole thresholds, against the unfolded computation on all whole numbers."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lcq.forms.column_words import pack_signs
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


def short(*values, size):
    """Numbers of few digits, of which float32 computes without rounding, so that ties are ties."""
    return RNG.choice(np.array(values, np.float32), size)


def norm_of(n):
    return {
        "mean": short(-3, 0, 0.5, 2, size=n),
        "var": short(0.25, 1, 4, 16, size=n),
        "scale": short(-2, -0.5, 0, 0.5, 1, size=n),
        "bias": short(-1, -0.5, 0, 1, 2, size=n),
    }


def signs_of(x):
    return np.where(np.asarray(x, np.float64) >= 0, 1, -1)


def convolve(s, t):
    """A window of 3 x 3, zeros around the image."""
    _, h, w, _ = s.shape
    s = np.pad(s, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(s[:, i : i + h, j : j + w] @ t[i, j] for i in range(3) for j in range(3))


def normed(y, norm):
    norm = {name: np.asarray(a, np.float64) for name, a in norm.items()}
    return norm["scale"] * (y - norm["mean"]) / np.sqrt(norm["var"]) + norm["bias"]


def test_a_net_of_layers_with_batch_norm_is_bits_until_its_end():
    x = jnp.asarray(RNG.normal(size=(2, 5, 6, 40)), jnp.float32)
    shapes = (3, 3, 40, 35), (3, 3, 35, 20), (600, 4)
    kernels = [short(-0.5, 0.5, size=shape) for shape in shapes]
    biases = [short(0, 0.5, -1, 2, size=shape[-1]) for shape in shapes]
    norms = [norm_of(35), norm_of(20), None]
    window = binary.window((3, 3))

    @jax.jit
    def prepared(kernels, biases, norms):
        given = zip(kernels, biases, (window, window, None), norms, strict=True)
        return [
            frozen.freeze(w, b, window=window, norm=None if norm is None else {**norm, "epsilon": 0.0})
            for w, b, window, norm in given
        ]

    layers = prepared(*jax.tree.map(jnp.asarray, (kernels, biases, norms)))
    assert all(layer.alpha is layer.bias is None for layer in layers[:2])

    def net(layers, x):
        h = frozen.apply(layers[1], frozen.apply(layers[0], x))
        assert h.shape == (2, 5, 6, 20) and h.dtype == bool
        return frozen.apply(layers[2], h.reshape(2, -1))

    s, ties = signs_of(x), []
    for t, b, norm in zip(kernels[:2], biases[:2], norms[:2], strict=True):
        z = normed(0.5 * convolve(s, signs_of(t)) + b, norm)
        ties += [(z[..., np.sign(norm["scale"]) == side] == 0).any() for side in (-1, 0, 1)]
        s = signs_of(z)
    assert all(ties)
    y = jax.jit(net)(layers, x)
    np.testing.assert_array_equal(y, 0.5 * (s.reshape(2, -1) @ signs_of(kernels[2])) + biases[2])
    floats = set(re.findall(r"f32\[([\d,]*)\]", str(jax.make_jaxpr(net)(layers, x))))
    assert floats <= {"", "2,5,6,40", "2,4", "4", "1,4"}, floats


def test_bits_keep_their_places_in_another_shape():
    x = RNG.normal(size=(2, 3, 37))
    packed = frozen.Bits(pack_signs(jnp.asarray(x)), 37)
    for shape in ((6, 37), (2, -1), (3, 2, 37), (222,)):
        moved = packed.reshape(*shape)
        assert moved.shape == x.reshape(shape).shape
        np.testing.assert_array_equal(bits(moved.words, moved.channels), x.reshape(shape) >= 0)


def test_bits_of_another_layer_are_refused():
    layer = frozen.freeze(jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"expected floating-point x \[.., 5\], got bool\[2, 4\]"):
        frozen.apply(layer, frozen.Bits(jnp.zeros((2, 1), jnp.uint32), 4))


def test_numbers_of_batch_norm_are_one_for_each_channel():
    with pytest.raises(ValueError, match=r"scale: expected \[200\].*got \[1\]"):
        frozen.fold_threshold(
            layer_with(jnp.ones(CHANNELS), None), mean=jnp.ones(CHANNELS), var=jnp.ones(CHANNELS), scale=jnp.ones(1)
        )
