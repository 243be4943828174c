"""Grids whose scales and least values are in steps, against searches in float64 that share no code with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms.steps import in_steps, steps_of
from lcq.plans.text import parse_scheme

RNG = np.random.default_rng(0)


def steps(bits, per, scale_bits=6):
    return lcq.Uniform(bits, per=per, zero_point=True, scale_bits=scale_bits)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def error(form, w):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(w, np.float64)) ** 2).sum()


def of_a_group(x, last):
    """The least squared error of a shifted grid, by trying: a least value that is not above 0, and a scale."""
    best = np.inf
    for m in np.linspace(0, -1.1 * min(x.min(), 0), 60):
        a = np.linspace(0.2, 1.2, 200)[:, None] * (x.max() + m) / last
        q = np.clip(np.round((x + m) / a), 0, last)
        best = min(best, ((x - (a * q - m)) ** 2).sum(1).min())
    return best


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_a_group_alone_comes_near_a_fine_search(bits):
    """Its scale is the largest that shares the unit, so rounding to steps costs nothing."""
    w = RNG.normal(size=(32, 6)).astype(np.float32) + 0.3
    best = sum(of_a_group(x, 2**bits - 1) for x in w.T.astype(np.float64))
    found = error(steps(bits, 32).project(jnp.asarray(w)), w)
    assert 0.98 * best <= found <= 1.05 * best


def test_what_is_a_shifted_grid_in_groups_is_found_again():
    """Codes of 4 bits, scales and least values of 6: nothing is lost but the rounding of units to 11 bits."""
    s, u = RNG.integers(20, 64, (2, 4, 5))
    s[0], u[0] = 63, 63
    q = RNG.integers(0, 16, (4, 32, 5))
    q[:, 0], q[:, 1] = 0, 15
    w = (s[:, None] * 0.001 * q - u[:, None] * 0.004).reshape(128, 5)
    form = steps(4, 32).project(jnp.asarray(w, jnp.float32))
    np.testing.assert_array_equal(form.codes, q.reshape(128, 5))
    np.testing.assert_allclose(form.dense(), w, atol=2.0**-11)
    found = form.pack()
    assert found.units.shape == (2, 1, 5) and form.bits == 640 * 4 + 2 * 20 * 6 + 2 * 5 * 32 == found.bits


def test_less_error_than_the_grids_of_as_many_bits():
    w = draw(512, 48)
    for bits, less in ((4, 0.82), (3, 0.86)):
        plain, form = lcq.Uniform(bits, per=32).project(w), steps(bits, 32).project(w)
        assert form.bits <= plain.bits and error(form, w) <= less * error(plain, w)


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("number", [-2.5, 2.5, 0.0])
def test_groups_of_equal_weights(bits, number):
    """Alone, of one weight, and beside others."""
    for per in (1, 4):
        form = steps(bits, per).project(jnp.full((8, 3), number))
        np.testing.assert_allclose(form.dense(), number, rtol=2.0**-10)
    w = draw(8, 3).at[:4].set(number)
    np.testing.assert_allclose(steps(bits, 4).project(w).dense()[:4], number, atol=0.1)


def test_size_and_dtype_of_weights_do_not_matter():
    w, far = draw(64, 6), draw(64, 6)
    form, warm = steps(3, 16).project(w), steps(3, 16).project(w + far)
    again = steps(3, 16).project(w, warm)
    for size in (2.0**-70, 2.0**70):
        np.testing.assert_array_equal(steps(3, 16).project(w * size).dense(), form.dense() * size)
        moved = dataclasses.replace(warm, scale=warm.scale * size)
        np.testing.assert_array_equal(steps(3, 16).project(w * size, moved).dense(), again.dense() * size)
    short = steps(3, 16).project(w.astype(jnp.bfloat16))
    assert short.scale.dtype == jnp.float32 and short.dense().dtype == jnp.bfloat16
    assert not steps(3, 16).project(jnp.zeros((64, 6))).dense().any()


@pytest.mark.parametrize("scale_bits", [2, 6, 8])
def test_steps_are_found_again_and_hold_the_largest(scale_bits):
    a, z = jnp.abs(draw(3, 7, 4)) * 10.0 ** RNG.integers(-9, 9, (3, 1, 4)), jnp.abs(draw(3, 7, 4))
    a = a.at[:, 2, 1].set(0)
    scale, zero = in_steps(a, z, scale_bits, (-2,))
    again = in_steps(scale, zero, scale_bits, (-2,))
    np.testing.assert_array_equal(scale, again[0])
    np.testing.assert_array_equal(zero, again[1])
    found = steps_of(scale, zero, scale_bits, (-2,))
    top = 2**scale_bits - 1
    assert (found.scale.max(1) == top).all() and (found.least.max(1) == top).all()
    assert (np.asarray(found.scale == 0) == np.asarray(a == 0)).all()
    np.testing.assert_allclose(scale.max(1), a.max(1), rtol=2.0**-11)
    assert np.abs(np.asarray(scale - a)).max() <= float((a.max(1) / top).max())


def test_layouts_of_one_leaf_have_equal_numbers(tmp_path):
    w = draw(2, 64, 6)
    (form,) = (lcq.compress({"w": w}, [lcq.Rule("w", steps(3, 8), stacked=1)])["w"],)
    assert form.scale.shape == (2, 8, 6) and form.along == (-2,)
    alone = jnp.stack([steps(3, 8).project(layer).dense() for layer in w])
    np.testing.assert_allclose(form.dense(), alone, atol=1e-6)
    lcq.save(tmp_path / "w.lcq", {"w": form})
    stored = lcq.load(tmp_path / "w.lcq")["w"]
    for other in (form.pack(), form.pack().unpack(), stored):
        np.testing.assert_array_equal(other.dense(), form.dense())
        assert other.bits == form.bits and other.one_per() == form.one_per() and "of 6 bits" in other.describe()
    for moved in (form, form.pack()):
        np.testing.assert_array_equal(moved.take_rows(jnp.array([1])).dense(), form.dense()[1:])
        np.testing.assert_array_equal(jax.vmap(lambda one: one.dense())(moved.unstack()), form.dense())
    tilted = lcq.compress({"w": w.swapaxes(1, 2)}, [lcq.Rule("w", steps(3, 8), stacked=1, layout="oi")])["w"]
    assert tilted.along == (-1,)
    np.testing.assert_allclose(tilted.dense().swapaxes(1, 2), form.dense(), atol=1e-6)


def test_the_page_on_files_says_what_is_stored(tmp_path):
    form = steps(3, 8, 5).project(draw(32, 6)).pack()

    def numbers(words, bits, shape):
        string = np.unpackbits(np.asarray(words).view(np.uint8), bitorder="little")[: bits * np.prod(shape)]
        return (string.reshape(-1, bits) << np.arange(bits)).sum(1).astype(np.float32).reshape(shape)

    s, u = (numbers(words, 5, (4, 6)) for words in (form.scale, form.zero))
    scale, least = np.asarray(form.units)[0] * s, np.asarray(form.units)[1] * u
    codes = numbers(form.codes, 3, (32, 6))
    wanted = scale.repeat(8, 0) * (codes - (least / scale).repeat(8, 0))
    np.testing.assert_array_equal(form.dense(), wanted)
    for coded in (False, True):
        lcq.save(tmp_path / "w.lcq", {"w": form}, coded=coded)
        np.testing.assert_array_equal(lcq.load(tmp_path / "w.lcq")["w"].dense(), wanted)


def test_a_file_that_was_changed_is_refused():
    form = steps(3, 8).project(draw(16, 4)).pack()
    form.check_stored()
    for changes, match in (
        ({"units": form.units[:1]}, "units: expected float32"),
        ({"blocks": (3, 4)}, "blocks: expected block counts that divide"),
        ({"along": (-3,)}, "along: expected axes"),
        ({"scale": form.scale[:0]}, "scale: expected uint32"),
        ({"zero": None}, "zero: expected uint32"),
        ({"scale_bits": 9}, "1 to 8 bits"),
    ):
        with pytest.raises(ValueError, match=match):
            dataclasses.replace(form, **changes).check_stored()


@pytest.mark.parametrize("method", ["rtn", "gptq", "descent"])
def test_quantize_keeps_scales_in_steps(method):
    x, w = draw(256, 32) @ draw(32, 32), draw(32, 12)
    done = lcq.quantize(lambda p, x: x @ p["w"], {"w": w}, [x], [lcq.Rule("w", steps(2, 8))], method)
    form = done.forms["w"]
    assert form.scale_bits == 6 and form.along == (-2,)
    np.testing.assert_array_equal(form.pack().dense(), form.dense())
    result = np.asarray(x, np.float64) @ (np.asarray(w, np.float64) - np.asarray(form.dense(), np.float64))
    found = (result**2).sum() / ((np.asarray(x, np.float64) @ np.asarray(w, np.float64)) ** 2).sum()
    np.testing.assert_allclose(found, done.records[0].error, rtol=1e-3)
    if method != "rtn":
        plain = lcq.compress({"w": w}, [lcq.Rule("w", steps(2, 8))])["w"].dense()
        assert found < 0.85 * ((np.asarray(x) @ np.asarray(w - plain)) ** 2).sum() / ((x @ w) ** 2).sum()
    (row,) = lcq.dry_run({"w": w}, [lcq.Rule("w", steps(2, 8))], lambda p, x: x @ p["w"], x).rows
    assert row.bits == form.bits


def test_lc_packed_and_words():
    w, x = draw(64, 8), draw(5, 64)
    form = steps(4, 16).project(w)
    better = steps(4, 16).project(w + 0.01, form)
    assert error(better, w + 0.01) <= error(form, w + 0.01)
    run = lcq.packed(lambda p, x: x @ p["w"])
    wanted = np.asarray(x, np.float64) @ np.asarray(form.dense(), np.float64)
    np.testing.assert_allclose(run({"w": form}, x), wanted, atol=1e-4)
    scheme = parse_scheme("Uniform(4, per=32, zero_point=True, scale_bits=6)")
    assert scheme == steps(4, 32)
    for wrong in (
        {"per": "channel", "zero_point": True},
        {"per": 32},
        {"per": 32, "zero_point": True, "scale_bits": 9},
    ):
        with pytest.raises(ValueError, match="scale_bits"):
            lcq.Uniform(4, **{"scale_bits": 6, **wrong})
