"""Uniform grids against a fine grid search in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq


def distortion(form, x):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_grid_beats_a_fine_search_of_scales(bits):
    x = np.random.default_rng(bits).normal(size=3000).astype(np.float32)
    half = 2 ** (bits - 1)
    best = min(
        ((x - a * np.clip(np.round(x / a), -half, half - 1)) ** 2).sum(dtype=np.float64)
        for a in np.abs(x).max() / half * np.linspace(0.2, 2.2, 4000)
        for a in (a, -a)
    )
    form = lcq.Uniform(bits).project(jnp.asarray(x))
    assert best * 0.999 <= distortion(form, x) <= best * (1.003 if bits == 8 else 1.001)
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
        signed = (-1, 1) if zeros == [0] else (1,)
        grid = ((s * a, z) for s in signed for a in np.linspace(0.02, 4, 600) for z in zeros)
        return min((h * (x - a * (np.clip(np.round(x / a) + z, low, high) - z)) ** 2).sum() for a, z in grid)

    def found(scheme):
        form = scheme.project(jnp.asarray(x), importance=jnp.asarray(h))
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
    scheme = lcq.Uniform(3, per=16, zero_point=zero_point, scale_dtype="float32")
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


def best_of_all(x, bits, zeros=(0,), symmetric=False):
    """min over codes and 40,000 scales of both signs, and over zeros, of sum (x - a (q - z))^2."""
    half = 0 if len(zeros) > 1 else 2 ** (bits - 1)
    levels = np.arange(symmetric - half, 2**bits - half, dtype=np.float64)
    scales = np.abs(x).max() / (2**bits - 1) * np.linspace(0.3, 4 * 2**bits, 20_000)
    best = (x**2).sum()
    for z in zeros:
        for a in (scales[:, None],) if symmetric else (scales[:, None], -scales[:, None]):
            codes = np.clip(np.round(x.ravel() / a) + z, levels[0], levels[-1])
            best = min(best, ((x.ravel() - a * (codes - z)) ** 2).sum(1).min())
    return best


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_each_group_has_the_better_sign(bits, symmetric):
    x = np.random.default_rng(bits).normal(size=(64, 3)).astype(np.float32)
    form = lcq.Uniform(bits, per=16, symmetric=symmetric).project(jnp.asarray(x))
    rest = ((np.asarray(form.dense(), np.float64) - x) ** 2).reshape(4, 16, 3).sum(1)
    parts = x.astype(np.float64).reshape(4, 16, 3)
    best = [[best_of_all(parts[i, :, j], bits, symmetric=symmetric) for j in range(3)] for i in range(4)]
    assert (rest <= np.array(best) * 1.002 + 1e-12).all()
    assert bool((form.scale < 0).any()) is not symmetric and form.size_of_table == 2**bits - symmetric


def test_a_grid_and_its_mirror_image():
    w = jnp.array([[-2.0], [1.0], [0.1], [-1.0]])
    a, b = (distortion(lcq.compress({"w": s * w}, [lcq.Rule("w", lcq.Uniform(2))])["w"], s * w) for s in (1, -1))
    assert abs(a - b) < 1e-6
    r = np.random.default_rng(0).normal(size=(4096, 32)).astype(np.float32)
    form = lcq.compress({"w": jnp.asarray(r)}, [lcq.Rule("w", lcq.Uniform(4, per=32))])["w"]
    assert distortion(form, r) < 0.0070 * (r.astype(np.float64) ** 2).sum()


@pytest.mark.parametrize("scheme", [lcq.Uniform(4, zero_point=True), lcq.Uniform(1, zero_point=True), lcq.Uniform(3)])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e20, 2e37])
def test_grids_of_tiny_weights(scheme, size):
    w = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    x = w * np.float32(size)
    for per in (None, "channel", 32):
        scheme = dataclasses.replace(scheme, per=per)
        whole = scheme.project(jnp.asarray(w)).dense()
        found = np.asarray(scheme.project(jnp.asarray(x)).dense(), np.float64) / np.float64(np.float32(size))
        assert ((found - w) ** 2).sum() <= ((np.asarray(whole, np.float64) - w) ** 2).sum() * 1.001


def test_a_symmetric_grid_has_no_zero_point():
    with pytest.raises(ValueError, match="got both"):
        lcq.Uniform(4, symmetric=True, zero_point=True)


def test_whole_zeros_take_the_width_of_the_codes():
    x = np.random.default_rng(5).exponential(size=(64, 6)).astype(np.float32) - 0.25
    form = lcq.Uniform(4, per=32, zero_point=True).project(jnp.asarray(x))
    stored = form.pack()
    assert form.zero.dtype == jnp.uint8 and form.zero.shape == (2, 6)
    assert stored.zero.dtype == jnp.uint32 and stored.zero.shape == (2,)
    assert form.bits == stored.bits == 64 * 6 * 4 + 12 * (16 + 4)
    np.testing.assert_array_equal(stored.dense(), form.dense())
    np.testing.assert_array_equal(stored.unpack().zero, form.zero)
    stored.check_stored()
    with pytest.raises(ValueError, match="zero: expected uint32"):
        dataclasses.replace(stored, zero=stored.zero[:1]).check_stored()
    dense = (np.asarray(form.codes, np.float32) - np.repeat(form.zero, 32, 0)) * np.repeat(
        np.asarray(form.scale, np.float32), 32, 0
    )
    np.testing.assert_array_equal(form.dense(), dense)


def test_forms_with_zeros_in_float32_as_files_had_them():
    x = np.random.default_rng(6).normal(size=(64, 6)).astype(np.float32)
    form = lcq.Uniform(4, per=32, zero_point=True).project(jnp.asarray(x))
    old = dataclasses.replace(form, zero=form.zero.astype(jnp.float32), scale=form.scale.astype(jnp.float32)).pack()
    old.check_stored()
    assert old.zero.dtype == jnp.float32 and old.bits == 64 * 6 * 4 + 12 * 64
    np.testing.assert_array_equal(old.dense(), form.dense())


@pytest.mark.parametrize("dtype", [None, "float16", "float32"])
def test_bits_of_a_weight(dtype):
    x, wide = jnp.ones((64, 8)), 32 if dtype == "float32" else 16
    for zero_point, extra in ((False, 0), (True, 4)):
        scheme = lcq.Uniform(4, per=32, zero_point=zero_point, scale_dtype=dtype)
        forms = lcq.compress({"w": x}, [lcq.Rule("w", scheme)])
        assert forms["w"].bits == forms["w"].pack().bits == 64 * 8 * 4 + 16 * (wide + extra)
        assert lcq.sizes(forms)["w"].bits == forms["w"].bits
