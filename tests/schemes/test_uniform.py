"""Uniform grids against a fine grid search in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq


def distortion(form, x):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_grid_beats_a_fine_search_of_scales(bits):
    x = np.random.default_rng(bits).normal(size=3000).astype(np.float32)
    half = 2 ** (bits - 1)
    best = min(
        ((x - a * np.clip(np.round(x / a), -half, half - 1)) ** 2).sum(dtype=np.float64)
        for a in np.linspace(1e-3, np.abs(x).max(), 4000)
    )
    form = lcq.Uniform(bits).project(jnp.asarray(x))
    assert best * (0.98 if bits == 8 else 0.999) <= distortion(form, x) <= best * 1.001
    assert form.bits == 3000 * bits + 32


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_zero_point_comes_near_a_fine_search_of_both(bits):
    x = np.random.default_rng(bits).exponential(size=600).astype(np.float32) - 0.25
    last = 2**bits - 1
    best = min(
        ((x - a * (np.clip(np.round(x / a) + z, 0, last) - z)) ** 2).sum(dtype=np.float64)
        for a in np.linspace(0.02, 4, 600)
        for z in range(last + 1)
    )
    form = lcq.Uniform(bits, zero_point=True).project(jnp.asarray(x))
    assert distortion(form, x) <= best * 1.1
    zero = float(form.zero.reshape(()))
    assert zero == int(zero) and 0 <= zero <= last
    assert 0.0 in np.asarray(form.dense())


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("law", ["even", "heavy", "sparse"])
def test_weighted_grids_come_near_a_fine_search(bits, law):
    rng = np.random.default_rng(bits)
    x = rng.exponential(size=600).astype(np.float32) - 0.25
    h = {"even": np.ones(600), "heavy": rng.lognormal(sigma=2, size=600), "sparse": rng.random(600) < 0.1}[law]
    x[(h == 0) & (np.arange(600) % 7 == 0)] = 90  # what weighs nothing does not stretch the range
    h, last, half = h.astype(np.float32), 2**bits - 1, 2 ** (bits - 1)

    def best(low, high, zeros):
        grid = ((a, z) for a in np.linspace(0.02, 4, 600) for z in zeros)
        return min((h * (x - a * (np.clip(np.round(x / a) + z, low, high) - z)) ** 2).sum() for a, z in grid)

    def found(scheme):
        form = scheme.project(jnp.asarray(x), weights=jnp.asarray(h))
        return (h * (np.asarray(form.dense(), np.float64) - x) ** 2).sum()

    assert found(lcq.Uniform(bits, zero_point=True)) <= best(0, last, range(last + 1)) * 1.1
    if bits > 1:
        assert found(lcq.Uniform(bits)) <= best(-half, half - 1, [0]) * 1.001


def test_zero_is_represented_exactly():
    x = jnp.asarray([0.0, 0.3, 5.7, 2.2])
    assert lcq.Uniform(4, zero_point=True).project(x).dense()[0] == 0


def test_the_grid_beats_the_one_of_the_largest_weight():
    x = np.random.default_rng(0).standard_t(3, size=4000).astype(np.float32)
    a = np.abs(x).max() / 7
    largest = ((x - a * np.clip(np.round(x / a), -8, 7)) ** 2).sum(dtype=np.float64)
    for zero_point in (False, True):
        assert distortion(lcq.Uniform(4, zero_point=zero_point).project(jnp.asarray(x)), x) < 0.7 * largest


@pytest.mark.parametrize("zero_point", [False, True])
def test_warm_start_is_never_worse_and_blocks_are_alone(zero_point):
    x = jnp.asarray(np.random.default_rng(1).normal(size=(32, 3)), jnp.float32)
    scheme = lcq.Uniform(3, per=16, zero_point=zero_point)
    cold = scheme.project(x)
    y = x + 0.01
    warm = scheme.project(y, cold)
    at_old = lcq.Uniform(3, per=16, zero_point=zero_point).project(y)
    assert distortion(warm, y) <= distortion(at_old, y) * (1 + 1e-5)
    alone = lcq.Uniform(3, zero_point=zero_point).project(x[16:, 1])
    np.testing.assert_allclose(cold.dense()[16:, 1], alone.dense(), rtol=1e-6)


@pytest.mark.parametrize("x", [np.zeros((4, 2)), np.full(3, 2.5), np.full(3, -2.5), np.ones(())])
@pytest.mark.parametrize("zero_point", [False, True])
def test_degenerate_inputs(x, zero_point):
    form = jax.jit(lcq.Uniform(3, zero_point=zero_point).project)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(form.dense(), x, rtol=1e-6)


def test_bad_bits_are_refused():
    for make in (lambda: lcq.Uniform(1), lambda: lcq.Uniform(17), lambda: lcq.Uniform(0, zero_point=True)):
        with pytest.raises(ValueError, match="bits"):
            make()
