"""Equalized nets compute what they did, and their channels are as numpy makes them; linen, nnx and plain functions."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lcq
from lcq.examples import llama, models, transformers
from lcq.ptq.transforms import equalize

RNG = np.random.default_rng(0)


def uneven(tree):
    """Parameters whose channels differ in size; nothing is negative that is a variance."""
    return jax.tree.map(lambda a: jnp.asarray(a + 0.05, jnp.float32) * np.exp(RNG.normal(size=a.shape) / 2), tree)


def of_shapes(tree):
    """Likewise of trees of shapes; gains and what else is a vector are about 1."""
    return uneven(jax.tree.map(lambda a: RNG.normal(size=a.shape) / 9 if len(a.shape) > 1 else np.ones(a.shape), tree))


def unchanged(fn, params, batch, done, within=1e-5):
    run = jax.jit(fn)
    one, two = run(params, batch), run(done.params, batch)
    assert np.abs(one - two).max() <= within * np.abs(one).max()
    assert jax.tree.structure(done.params) == jax.tree.structure(params)


def applied(done):
    return [record for record in done.records if not record.reason]


def two_layers(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"].T


def numpy_factors(w1, w2):
    """The closed form for one pair of layers, w2 (out, in)."""
    a, b = np.abs(w1.astype(np.float64)).max(0), np.abs(w2.astype(np.float64)).max(0)
    return np.sqrt(b / a)


def test_one_pair_is_the_closed_form():
    params = uneven({"w1": RNG.normal(size=(4, 6)), "b1": RNG.normal(size=6), "w2": RNG.normal(size=(3, 6))})
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    done = equalize(two_layers, params, [x])
    s = numpy_factors(np.asarray(params["w1"]), np.asarray(params["w2"]))
    for name, wanted in (("w1", params["w1"] * s), ("b1", params["b1"] * s), ("w2", params["w2"] / s)):
        np.testing.assert_allclose(done.params[name], wanted, rtol=1e-5)
    unchanged(two_layers, params, x, done)
    first, last = done.records
    assert (first.transform, first.producers, first.consumers, first.size) == ("equalize", ("w1", "b1"), ("w2",), 6)
    assert first.after < first.before and last.reason == "the output of the function"


def test_channels_without_weights_on_one_side_stay():
    params = {"w1": np.ones((2, 3), np.float32), "b1": np.ones(3, np.float32), "w2": np.ones((1, 3), np.float32)}
    params["w1"][:, 0] = 0
    params["w2"][:, 1] = 0
    params["w2"][:, 2] = 4
    done = equalize(two_layers, params, [np.ones((1, 2), np.float32)])
    np.testing.assert_allclose(done.params["b1"], [1, 1, 2])


def test_the_gain_of_a_norm_takes_up_what_its_products_differ_by():
    def fn(p, x):
        y = llama.rms_norm(x, p["gain"], 1e-5)
        return jnp.tanh(y @ p["q"]) + y @ p["k"]

    params = uneven({"gain": RNG.normal(size=4), "q": RNG.normal(size=(4, 3)), "k": RNG.normal(size=(4, 3))})
    x = RNG.normal(size=(5, 4)).astype(np.float32)
    done = equalize(fn, params, [x])
    unchanged(fn, params, x, done)
    largest = np.maximum(*(np.abs(done.params[name]).max(1) for name in "qk"))
    before = np.maximum(*(np.abs(params[name]).max(1) for name in "qk"))
    np.testing.assert_allclose(largest, np.exp(np.log(before).mean()), rtol=1e-5)


def test_rules_say_what_counts():
    params = uneven({"w1": RNG.normal(size=(4, 6)), "b1": RNG.normal(size=6), "w2": RNG.normal(size=(3, 6))})
    x = np.ones((2, 4), np.float32)
    done = equalize(two_layers, params, [x], [lcq.Rule("w2", lcq.Uniform(4))])
    sizes = np.abs(done.params["w2"]).max(0)
    np.testing.assert_allclose(sizes, sizes[0], rtol=1e-5)  # w1 does not count, so all are alike
    unchanged(two_layers, params, x, done)
    other = equalize(two_layers, params, [x], [lcq.Rule("b1", lcq.Uniform(4))])
    assert other.records == () and all(
        a is b for a, b in zip(*map(jax.tree.leaves, (other.params, params)), strict=True)
    )


def test_forms_and_numbers_of_any_kind_stay():
    params = uneven({"w1": RNG.normal(size=(4, 6)), "b1": RNG.normal(size=6), "w2": RNG.normal(size=(3, 6))})
    mixed = {**params, "w2": lcq.Cast("bfloat16").project(params["w2"])}
    done = equalize(two_layers, mixed, [np.ones((2, 4), np.float32)])
    assert done.params["w2"] is mixed["w2"] and "add at" not in done.records[0].reason
    assert done.records[0].size == 0 and done.records[0].reason
    with pytest.raises(ValueError, match="w1: expected an array, which is scaled"):
        equalize(two_layers, {**params, "w1": jax.ShapeDtypeStruct((4, 6), jnp.float32)}, [np.ones((2, 4))])


def test_half_precision():
    params = uneven({"w1": RNG.normal(size=(4, 6)), "b1": RNG.normal(size=6), "w2": RNG.normal(size=(3, 6))})
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    done = equalize(two_layers, half, [jnp.ones((2, 4), jnp.bfloat16)])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(done.params)} == {"bfloat16"}


# Nets


def test_linen_residual_net():
    net = models.ResNet(8, width=4)
    image = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
    params = of_shapes(jax.eval_shape(net.init, jax.random.key(0), image))
    done = equalize(net.apply, params, [image])
    unchanged(net.apply, params, image, done)
    stream = next(r for r in applied(done) if "params/stage1_block0/conv1/kernel" in r.consumers)
    assert stream.producers[:2] == ("params/bn1/scale", "params/bn1/bias") and "params/dense/kernel" in stream.consumers
    assert len(applied(done)) == 13 and [r.reason for r in done.records if r.reason] == ["the output of the function"]


@pytest.mark.parametrize(("activation", "pairs"), [(jax.nn.relu, 2), (jnp.tanh, 0)])
def test_linen_lenet(activation, pairs):
    net = models.lenet300(activation)
    image = RNG.normal(size=(2, 4, 4)).astype(np.float32)
    params = of_shapes(jax.eval_shape(net.init, jax.random.key(0), image))
    done = equalize(net.apply, params, [image])
    unchanged(net.apply, params, image, done)
    assert len(applied(done)) == pairs and (pairs or "tanh at" in done.records[0].reason)


def test_nnx():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, 8, rngs=rngs)
            self.norm = nnx.RMSNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)
            self.last = nnx.Conv(8, 3, (2,), rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.attention(self.norm(nnx.relu(self.first(x))))))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    state = of_shapes(state)
    x = RNG.normal(size=(2, 5, 4)).astype(np.float32)

    def fn(p, x):
        return nnx.merge(graph, p)(x)

    done = equalize(fn, state, [x])
    unchanged(fn, state, x, done)
    moved = {(r.producers[0], r.consumers): r.size for r in applied(done)}
    qkv = tuple(f"attention/{name}/kernel" for name in ("query", "key", "value"))
    assert {frozenset(c) for _, c in moved} >= {
        frozenset(qkv),
        frozenset(["attention/out/kernel"]),
        frozenset(["last/kernel"]),
    }


def small_llama():
    width, hidden = 16, 24
    shapes = {"wq": (width, 16), "wk": (width, 8), "wv": (width, 8), "wo": (16, width), "w1": (width, hidden)}
    shapes |= {"w3": (width, hidden), "w2": (hidden, width), "attention_norm": (width,), "ffn_norm": (width,)}
    layers = {name: RNG.normal(size=(2, *shape)) / 4 for name, shape in shapes.items()}
    params = {"tok_embeddings": RNG.normal(size=(20, width)), "norm": np.ones(width), "layers": layers}
    return uneven(params), functools.partial(llama.logits, config=llama.Config(heads=4))


def test_stacked_llama():
    params, fn = small_llama()
    tokens = RNG.integers(0, 20, (2, 6)).astype(np.int32)
    done = equalize(fn, params, [tokens])
    unchanged(fn, params, tokens, done)
    layer = [(r.producers, r.consumers) for r in applied(done)][:4]
    assert layer == [
        (("layers/attention_norm[0]",), ("layers/wq[0]", "layers/wk[0]", "layers/wv[0]")),
        (("layers/wv[0]",), ("layers/wo[0]",)),
        (("layers/ffn_norm[0]",), ("layers/w1[0]", "layers/w3[0]")),
        (("layers/w3[0]",), ("layers/w2[0]",)),
    ]
    assert len(applied(done)) == 8
    assert any("tok_embeddings is used at gather" in r.reason for r in done.records)


@pytest.mark.skipif("LCQ_DATA" not in os.environ, reason="LCQ_DATA is not set")
def test_stories():
    arrays = np.load(Path(os.environ["LCQ_DATA"]) / "stories" / "stories260k_llama.npz")
    params = transformers.llama_from_llama2c(arrays)
    params = {name: leaf for name, leaf in params.items() if name[:5] != "layer" or name == "layer0"}
    fn = functools.partial(transformers.llama, heads=int(arrays["config"][3]))
    tokens = RNG.integers(0, 512, (2, 16)).astype(np.int32)
    done = equalize(fn, params, [tokens])
    unchanged(fn, params, tokens, done)
    assert len(applied(done)) == 4 and all(record.after < record.before for record in applied(done))
