"""Codes of products put together: every weight at its place, bit for bit, and blocks no smaller than they must be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.forms import Codes
from lcq.ptq.leaf_assembly import Assembly
from lcq.tracing.param_flow import trace


def left(p, x):
    return p["w"] @ x.T


def depthwise(p, x):
    numbers = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x[None], p["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=4)


def split(p, x):
    return sum((x @ part).sum() for part in jnp.split(p["w"], 3, axis=1))


def stack(p, x):
    return lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]


def heads(p, x):
    return jnp.einsum("bd,dchn->cbhn", x, p["w"])


def form_of(product, kind, dtype="float32"):
    """Random codes, and a codebook for every group."""
    rng = np.random.default_rng(product.number)
    g, _, many, n = product.shape
    blocks = {"neuron": (g, 1, n), "pair": (g, many // 2, n)}.get(kind.split()[0], (g, 1, 1))
    fields = {"scale": rng.uniform(1, 2, blocks), "zero": rng.uniform(1, 2, blocks)}
    fields["levels"] = np.sort(rng.normal(size=(*blocks, 3)))
    fields = {name: jnp.asarray(a, jnp.float32) for name, a in fields.items() if name in kind}
    codes = jnp.asarray(rng.integers(3, size=(g, many, n)), jnp.uint8)
    return Codes(codes, **fields, values=None if "levels" in fields else (-1.0, 0.0, 2.0), dtype=dtype)


CASES = {  # fn, shape, what has a codebook and which numbers it has; blocks along each axis
    "left, neurons": (left, (6, 4), "neuron scale", (6, 1)),
    "left, pairs of inputs": (left, (6, 4), "pair scale", (6, 2)),
    "left, zero points": (left, (6, 4), "neuron scale zero", (6, 1)),
    "depthwise, neurons": (depthwise, (3, 1, 8), "neuron scale", (1, 1, 8)),
    "depthwise, groups": (depthwise, (3, 1, 8), "group levels", (1, 1, 4)),
    "slices": (split, (4, 9), "all scale", (1, 3)),
    "slices, neurons, learned": (split, (4, 9), "neuron levels", (1, 9)),
    "stack": (stack, (3, 4, 4), "all scale", (3, 1, 1)),
    "stack, pairs of inputs": (stack, (3, 4, 4), "pair scale", (3, 2, 4)),
    "stack, learned": (stack, (3, 4, 4), "neuron levels", (3, 1, 4)),
    "stack, a fixed table": (stack, (3, 4, 4), "all", ()),
    "heads, neurons": (heads, (4, 2, 2, 3), "neuron scale zero", (1, 2, 2, 3)),
    "heads": (heads, (4, 2, 2, 3), "all levels", (1, 1, 1, 1)),
}


@pytest.mark.parametrize("case", CASES)
def test_every_weight_at_its_place(case):
    fn, shape, kind, blocks = CASES[case]
    leaf = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    assembly = Assembly(jnp.asarray(leaf))
    wanted = np.full(shape, np.nan, np.float32)
    for product in trace(fn, {"w": leaf}, jnp.zeros((5, 4)), ["w"]).products:
        form = form_of(product, kind)
        assembly.put(product, form)
        places = np.asarray(product.weights(jnp.asarray(product.weight.elements(shape))))
        wanted.reshape(-1)[places] = jax.vmap(Codes.dense)(form)
    np.testing.assert_array_equal(assembly.dense, wanted)
    whole = assembly.form()
    np.testing.assert_array_equal(whole.dense(), wanted)
    assert whole.codes.dtype == jnp.uint8 and whole.shape == shape
    numbers = [whole.scale, whole.zero, None if whole.levels is None else whole.levels[..., 0]]
    assert all(a is None or a.shape == blocks for a in numbers)
    assert [a is not None for a in numbers] == [name in kind for name in ("scale", "zero", "levels")]
    whole.pack().check_stored()


def test_equal_alphabets_are_stored_once():
    """Layers that happen to have the same scale."""
    leaf = jnp.zeros((3, 4, 4))
    assembly = Assembly(leaf)
    products = trace(stack, {"w": leaf}, jnp.zeros((5, 4)), ["w"]).products
    for product in products:
        assembly.put(product, form_of(products[0], "all scale"))
    assert assembly.form().scale.shape == (1, 1, 1)


def test_a_leaf_whose_rows_are_not_contiguous():
    leaf = np.asfortranarray(np.zeros((6, 4), np.float32))
    (product,) = trace(left, {"w": leaf}, jnp.zeros((5, 4)), ["w"]).products
    form = form_of(product, "neuron scale")
    assembly = Assembly(leaf)
    assembly.put(product, form)
    np.testing.assert_array_equal(assembly.dense, jax.vmap(Codes.dense)(form)[0].T)


def test_a_leaf_of_another_dtype_that_is_quantized_in_part():
    leaf = jnp.ones((3, 4, 4), jnp.bfloat16)
    first = trace(stack, {"w": leaf}, jnp.zeros((5, 4), jnp.bfloat16), ["w"]).products[0]
    form = form_of(first, "neuron scale", "bfloat16")
    assembly = Assembly(leaf)
    assembly.put(first, form)
    assert assembly.dense.dtype == jnp.bfloat16 and assembly.form().dense().dtype == jnp.bfloat16
    np.testing.assert_array_equal(assembly.dense[0], jax.vmap(Codes.dense)(form)[0])
    assert (assembly.dense[1:] == 1).all()
