"""Layers at once or one after another: the same results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.tree.mapped import mapped


def step(x, extra):
    return {"sum": jnp.sum(x * extra["by"]), "twice": 2 * x, "number": 0.5}


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("width", [4, 1 << 16])
def test_it_is_vmap(layers, width):
    """Eager, under jit, of numpy's arrays and under another vmap; absent trees stay absent."""
    x = jnp.arange(layers * width, dtype=jnp.float32).reshape(layers, width) % 7
    given = x, {"by": x + 1, "none": None}
    wanted = jax.vmap(step)(*given)
    inside = jax.jit(lambda *a: mapped(step, *a))
    for found in (mapped(step, *given), inside(*given), mapped(step, *jax.tree.map(np.asarray, given))):
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    twice = jax.tree.map(lambda a: jnp.stack([a, a]), given)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a[1], b), jax.vmap(lambda *a: mapped(step, *a))(*twice), wanted
    )


@pytest.mark.parametrize("layers", [1, 2])
def test_large_layers_of_a_stack_are_compressed_as_alone(layers):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(layers, 256, 256)), jnp.float32)
    rule = lcq.Rule("w", lcq.Uniform(4, per=32), stacked=1)
    stack = lcq.compress({"w": w}, [rule])["w"]
    warm = jax.jit(lambda x: lcq.compress({"w": x}, [rule])["w"])(w)
    for i in range(layers):
        alone = lcq.compress({"w": w[i]}, [lcq.Rule("w", lcq.Uniform(4, per=32))])["w"]
        np.testing.assert_array_equal(stack.codes[i], alone.codes)
        np.testing.assert_array_equal(warm.dense()[i], alone.dense())
