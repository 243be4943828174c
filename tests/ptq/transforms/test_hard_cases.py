"""Nets and numbers that transforms could take for what they are not: the function stays, or a record says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq.transforms import activation_aware, equalize, rotate

X = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)


def draw(**shapes):
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def aware(fn, params, batches):
    return activation_aware(fn, params, batches, [lcq.Rule("w2", lcq.Uniform(3, per="channel"))], grid=3)


TRANSFORMS = pytest.mark.parametrize("transform", [equalize, rotate, aware], ids=lambda each: each.__name__)


def same(fn, params, other, *batches):
    for batch in batches:
        one, two = fn(params, batch), fn(other, batch)
        np.testing.assert_allclose(two, one, atol=1e-5 * float(jnp.abs(one).max()))


def norm(x):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-3)


def two_layers(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]


@TRANSFORMS
def test_batches_of_several_lengths(transform):
    """Rows of a table that the first batch does not reach are moved like the others, or none is."""

    def fn(p, x):
        y = x @ p["w1"] + p["place"][: len(x)]
        return (norm(y) if transform is rotate else jax.nn.relu(y)) @ p["w2"]

    params, longer = draw(w1=(4, 6), place=(7, 6), w2=(6, 3)), np.ones((7, 4), np.float32)
    params["w1"][:, 2] *= 9
    done = transform(fn, params, [X, longer])
    assert np.abs(done.params["place"] - params["place"]).max() > 0.01
    same(fn, params, done.params, X, longer)
    done = transform(fn, params, [X])
    same(fn, params, done.params, X, longer)
    assert any("place is used in part, 30 of 42 elements; pass a batch" in record.reason for record in done.records)


@TRANSFORMS
def test_another_function_of_other_lengths(transform):
    def fn(p, x):
        y = x @ p["w1"]
        return (jnp.tanh(y) if len(x) > 5 else y) @ p["w2"]

    params, longer = draw(w1=(4, 6), w2=(6, 3)), np.ones((7, 4), np.float32)
    done = transform(fn, params, [X, longer])
    assert done.params["w1"] is params["w1"] and not any(record.setting for record in done.records)


@pytest.mark.parametrize("transform", [equalize, rotate])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_elements_that_are_not_finite(transform, number):
    def fn(p, x):
        return (x @ p["w1"] + p["b1"]) @ p["w2"]

    params = draw(w1=(4, 6), b1=(6,), w2=(6, 3))
    params["b1"][2] = number
    done = transform(fn, params, [X])
    assert all(done.params[name] is params[name] for name in params)
    assert any(record.reason == "b1 has NaN or infinite elements" for record in done.records)


@pytest.mark.parametrize("transform", [equalize, rotate])
def test_numbers_and_nothing(transform):
    """Python's numbers stay, and leaves without elements are in nobody's way."""

    def fn(p, x):
        y = (x @ p["w1"]) * p["alpha"] + (x[:, :0] * p["none"]).sum()
        return (norm(y) if transform is rotate else jax.nn.relu(y)) @ p["w2"] * p["two"]

    params = {**draw(w1=(4, 6), w2=(6, 3), none=(0,)), "alpha": 0.5, "two": 2}
    done = transform(fn, params, [X])
    assert (done.params["alpha"], done.params["two"]) == (0.5, 2)
    same(fn, params, done.params, X)
    if transform is equalize:
        assert np.abs(done.params["w1"] - params["w1"]).max() > 0.01


def test_settings():
    params = draw(w1=(4, 6), b1=(6,), w2=(6, 3))
    with pytest.raises(ValueError, match="grid: expected at least one alpha to choose from, got 0"):
        activation_aware(two_layers, params, [X], [lcq.Rule("w2", lcq.Uniform(3))], grid=0)
    with pytest.raises(ValueError, match="sweeps: expected at least one, got 0"):
        equalize(two_layers, params, [X], sweeps=0)

    def fn(p, x):
        return (x @ p["w1"] + p["b1"]) @ p["w2"]

    one, two = (rotate(fn, params, [X], key=key).params["w1"] for key in (np.int64(3), 3))
    np.testing.assert_array_equal(one, two)


def test_gains_of_either_sign():
    """Where |gain| is what counts a negative gain is not folded; elsewhere it is."""
    params = draw(**{"in": (4, 6), "gain": (6,), "w2": (6, 3)})
    params["gain"][:2] = -2, 3
    for of in (jnp.abs, jnp.negative):

        def fn(p, x, of=of):
            return jnp.tanh((norm(x @ p["in"]) * of(p["gain"])) @ p["w2"])

        done = rotate(fn, params, [X])
        same(fn, params, done.params, X)
        assert any(record.setting == "gain folded" for record in done.records) == (of is jnp.negative)


@TRANSFORMS
def test_a_leaf_that_would_overflow(transform):
    """In float16 a bias that is large beside its weights has no room for their factors, nor have full rows to turn."""
    params = draw(w1=(4, 6), b1=(6,), w2=(6, 3))
    if transform is rotate:
        params["w2"][:, 1] = 60000
    else:
        params["w1"][:, 2] *= 1e-4 if transform is equalize else 1e-3
        params["b1"][2] = 3000
        params["w2"][2] *= 100 if transform is equalize else 1
    half = jax.tree.map(lambda a: a.astype(np.float16), params)

    def fn(p, x):
        y = x.astype(jnp.float32) @ p["w1"] + p["b1"]
        return (y if transform is rotate else jax.nn.relu(y)) @ p["w2"]

    done = transform(fn, half, [X])
    assert any(record.reason.endswith("would leave the range of float16") for record in done.records)
    assert all(done.params[name] is half[name] for name in half)
