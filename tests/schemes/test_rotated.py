"""Schemes in turned coordinates: a projection there, and what it is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.forms.rotation import check_length, turned
from lcq.plans.text import format_scheme, parse_scheme

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def error(form, w):
    return float(((np.asarray(form.dense(), np.float64) - np.asarray(w, np.float64)) ** 2).sum())


def test_it_is_the_projection_of_turned_weights():
    w, inner = draw(48, 6), lcq.KMeans(4, exact=True)
    form = lcq.Rotated(inner, seed=2).project(w)
    expected = inner.project(turned(w, (-2,), 2))
    np.testing.assert_array_equal(form.inner.dense(), expected.dense())
    np.testing.assert_allclose(error(form, w), error(expected, turned(w, (-2,), 2)), rtol=1e-5)


def test_an_input_that_stands_out_costs_nothing():
    w = draw(64, 16).at[5].multiply(50)
    grid = lcq.Uniform(3, per="channel")
    assert error(lcq.Rotated(grid).project(w), w) < 0.4 * error(grid.project(w), w)


def test_weights_that_look_gaussian_gain_nothing():
    w, grid = draw(256, 64), lcq.Uniform(3, per="channel")
    assert 0.9 < error(lcq.Rotated(grid).project(w), w) / error(grid.project(w), w) < 1.1


def test_which_axes_are_inputs():
    kernel = draw(3, 3, 4, 5)
    grid = lcq.Uniform(4, per="channel")
    assert lcq.Rotated(grid).project(kernel).axes == (-4, -3, -2)
    assert lcq.Rotated(grid).project(draw(16)).axes == (-1,)
    assert lcq.Rotated(grid, along=(-2,)).project(kernel).axes == (-2,)
    rule = lcq.Rule("w", lcq.Rotated(grid), layout="oi")
    made = lcq.compress({"w": draw(16, 5).T}, [rule])["w"]
    assert made.axes == (-1,) and made.inner.scale.shape == (5, 1)


def test_a_number_is_its_own_input(tmp_path):
    params = {"w": draw(4, 2), "temperature": jnp.asarray(0.5)}
    made = lcq.compress(params, [lcq.Rule(".*", lcq.Rotated(lcq.KMeans(2, exact=True)))])
    assert made["temperature"].axes == () and float(made["temperature"].dense()) == 0.5
    lcq.save(tmp_path / "net.lcq", made)
    assert float(lcq.load(tmp_path / "net.lcq")["temperature"].dense()) == 0.5


def test_importance_is_the_mean_over_inputs():
    """So an importance of outputs counts in a codebook for all of them."""
    w = draw(32, 8)
    h = jnp.where(jnp.arange(8) < 4, 1.0, 0.0)
    form = lcq.Rotated(lcq.KMeans(4)).project(w, importance=h)
    expected = lcq.KMeans(4).project(turned(w, (-2,), 0), importance=h)
    np.testing.assert_array_equal(form.inner.levels, expected.levels)
    same = lcq.Rotated(lcq.KMeans(4)).project(w, importance=draw(32, 1) ** 2)
    np.testing.assert_allclose(same.inner.levels, lcq.Rotated(lcq.KMeans(4)).project(w).inner.levels, rtol=1e-5)


def test_dtypes_stacks_joint_leaves_and_costs():
    w = {"a": draw(2, 16, 4).astype(jnp.bfloat16), "b": draw(16, 4)}
    made = lcq.compress(w, [lcq.Rule("a", lcq.Rotated(lcq.Uniform(4, per="channel")), stacked=1)])["a"]
    assert made.dense().dtype == jnp.bfloat16 and made.axes == (-2,) and made.inner.scale.shape == (2, 1, 4)
    joint = lcq.compress({"a": draw(16, 4), "b": w["b"]}, [lcq.Rule(".*", lcq.Rotated(lcq.KMeans(4)), joint=True)])
    assert joint["a"].shared == joint["b"].shared and joint["a"].shared_bits == joint["a"].inner.shared_bits
    np.testing.assert_array_equal(joint["a"].inner.levels, joint["b"].inner.levels)
    with pytest.raises(ValueError, match="mu"):
        lcq.Rotated(lcq.L0Penalty(0.5)).project(w["b"])
    assert lcq.Rotated(lcq.LowRank(2)).project(w["b"], mu=1.0).shape == (16, 4)


def test_lc_trains_in_turned_coordinates():
    target = draw(32, 4).at[3].multiply(8)
    rules = [lcq.Rule("w", lcq.Rotated(lcq.Uniform(3, per="channel")))]
    tx = lcq.lc(optax.sgd(0.3), rules, mu=lcq.geometric(0.1, 1.5, steps=10), every=10)
    params = {"w": jnp.zeros_like(target)}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: 0.5 * jnp.sum((p["w"] - target) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):
        params, state = step(params, state)
    found = lcq.extract(state, params)["w"]
    assert error(found, target) <= 1.01 * error(rules[0].scheme.project(target), target)


def test_texts():
    scheme = lcq.Rotated(lcq.Trellis(2, per="channel"), seed=4)
    assert format_scheme(scheme) == "Rotated(Trellis(2, per='channel'), seed=4)"
    assert parse_scheme(format_scheme(scheme)) == scheme


@pytest.mark.parametrize(
    "settings",
    [
        {"scheme": lcq.Rotated(lcq.KMeans(2))},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": True},
        {"along": ()},
        {"along": (1,)},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="expected"):
        lcq.Rotated(**{"scheme": lcq.KMeans(2), **settings})


def test_a_length_without_a_rotation_is_named():
    with pytest.raises(
        ValueError, match=r"w: expected a number of inputs whose odd factor is at most 2,048, got 4,099"
    ):
        lcq.compress({"w": jnp.ones((4099, 2))}, [lcq.Rule("w", lcq.Rotated(lcq.Binary()))])


def test_leaves_without_inputs_are_refused():
    with pytest.raises(ValueError, match="at least one weight"):
        lcq.compress({"w": jnp.ones((0, 2))}, [lcq.Rule("w", lcq.Rotated(lcq.Binary()))])
    with pytest.raises(ValueError, match="expected at least one input, got 0"):
        check_length(0)
