"""Operations of a function's products, counted by hand; what is followed to them is in test_param_flow.py."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lcq.tracing.flops import flops


def shapes(**kwargs):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in kwargs.items()}


def test_of_a_net():
    """Of a dense and a grouped convolutional layer, a scan over layers and a head; not of scores, lookups and norms."""

    def fn(p, tokens):
        x = p["embed"][tokens] * p["norm"]
        x = lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"), feature_group_count=2
        )
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x + p["bias"], p["stack"])[0]
        scores = jnp.einsum("bsd,btd->bst", x, x)
        return jnp.einsum("bst,btd,vd->bsv", scores, x, p["embed"])

    params = shapes(embed=(7, 4), norm=(4,), kernel=(3, 2, 4), bias=(4,), stack=(3, 4, 4))
    found = flops(fn, params, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    layers = [("stack", "dot", (1, 10, 4, 4), 2 * 10 * 4 * 4)] * 3
    head = ("embed", "dot", (1, 10, 4, 7), 2 * 10 * 4 * 7)
    assert list(map(tuple, found)) == [("kernel", "conv", (2, 10, 6, 2), 2 * 2 * 10 * 6 * 2), *layers, head]


def test_of_what_cannot_be_seen():
    loop = functools.partial(lax.while_loop, lambda x: x.sum() > 0)
    with pytest.raises(ValueError, match=r"^w: .* w -> while at"):
        flops(lambda p, x: loop(lambda x: x @ p["w"], x), shapes(w=(4, 4)), jax.ShapeDtypeStruct((5, 4), jnp.float32))
