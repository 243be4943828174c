"""Turned nets compute what they did, and large channels are gone; linen, nnx and plain functions."""

import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lcq
from lcq.examples import llama, transformers
from lcq.ptq.transforms import rotate
from lcq.ptq.transforms.orthogonal import orthogonal

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def unchanged(fn, params, batch, done):
    run = jax.jit(fn)
    one, two = run(params, batch), run(done.params, batch)
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    assert jax.tree.structure(done.params) == jax.tree.structure(params)


def turned(done):
    return [
        (r.size, r.producers, r.consumers, r.setting) for r in done.records if r.setting and "gain" not in r.setting
    ]


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 48, 64, 144])
def test_hadamard(size):
    matrix, kind = orthogonal(size, jax.random.key(1))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5)
    again, other = orthogonal(size, jax.random.key(1))[0], orthogonal(size, jax.random.key(2))[0]
    assert kind == "hadamard" and (matrix == again).all() and (size < 4 or (matrix != other).any())


@pytest.mark.parametrize("size", [3, 6, 7, 172])
def test_other_sizes(size):
    matrix, kind = orthogonal(size, jax.random.key(1))
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(size), atol=1e-12)
    assert kind == "gaussian"


def of_shapes(tree):
    """Parameters of these shapes: gains and biases about 1, kernels that keep the size of what goes in."""
    return jax.tree.map(lambda a: draw(*a.shape) / (1 + len(a.shape)) + (len(a.shape) == 1), tree)


def small_llama(head=True, layers=2):
    width, hidden = 16, 24
    shapes = {"wq": (width, 16), "wk": (width, 8), "wv": (width, 8), "wo": (16, width), "w1": (width, hidden)}
    stacked = {name: draw(layers, *shape) / 4 for name, shape in (shapes | {"w3": (16, 24), "w2": (24, 16)}).items()}
    stacked |= {"attention_norm": draw(layers, width), "ffn_norm": np.exp(draw(layers, width))}
    params = {"tok_embeddings": draw(20, width), "norm": np.exp(draw(width)), "layers": stacked}
    params |= {"output": draw(width, 20)} if head else {}
    return params, functools.partial(llama.logits, config=llama.Config(heads=4)), RNG.integers(0, 20, (2, 6))


def test_stacked_llama():
    params, fn, tokens = small_llama()
    params["layers"]["w2"][1, :, 5] *= 30
    done = rotate(fn, params, [tokens])
    unchanged(fn, params, tokens, done)
    stream, *heads = turned(done)
    assert (stream[0], stream[3]) == (16, "hadamard") and stream[1][0] == "tok_embeddings" and "output" in stream[2]
    assert [(size, set(a), set(b)) for size, a, b, _ in heads] == [
        (4, {f"layers/wv[{i}]"}, {f"layers/wo[{i}]"}) for i in (0, 0, 1, 1)
    ]
    assert sum(record.setting == "gain folded" for record in done.records) == 5
    for name in ("attention_norm", "ffn_norm"):
        assert (done.params["layers"][name] == 1).all()
    assert np.abs(done.params["layers"]["w2"]).max() < 0.7 * np.abs(params["layers"]["w2"]).max()


def test_a_tied_head_leaves_the_stream():
    params, fn, tokens = small_llama(head=False, layers=1)
    done = rotate(fn, params, [tokens])
    unchanged(fn, params, tokens, done)
    assert {size for size, *_ in turned(done)} == {4}
    np.testing.assert_array_equal(done.params["layers"]["ffn_norm"], params["layers"]["ffn_norm"])
    assert any("mul at" in r.reason and "tok_embeddings" in r.producers for r in done.records)
    uniform = {**params, "norm": np.full(16, 0.5, np.float32)}
    done = rotate(fn, uniform, [tokens])
    unchanged(fn, uniform, tokens, done)
    assert turned(done)[0][0] == 16


def mixed_up(p, x):
    return jax.nn.softmax(x @ x.T) @ (x @ p["v"]) @ p["o"] + jnp.tanh(x @ p["w"])


def test_key_rules_and_forms():
    params, x = {"v": draw(4, 8), "o": draw(8, 4), "w": draw(4, 4)}, draw(5, 4)
    one, two, other = (rotate(mixed_up, params, [x], key=key).params["v"] for key in (0, jax.random.key(0), 1))
    assert (one == two).all() and (one != other).any()
    done = rotate(mixed_up, params, [x], [lcq.Rule("w", lcq.Uniform(4))])
    assert done.params["v"] is params["v"] and "tanh at" in done.records[0].reason
    form = lcq.Cast("bfloat16").project(jnp.asarray(params["o"]))
    done = rotate(mixed_up, {**params, "o": form}, [x])
    assert done.params["o"] is form and not turned(done)
    half = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params)
    assert {leaf.dtype.name for leaf in rotate(mixed_up, half, [x]).params.values()} == {"bfloat16"}


def test_linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(12, name="first")(x)
            y = nn.RMSNorm(name="norm")(x)
            x = x + nn.Dense(12, name="down")(nn.silu(nn.Dense(20, name="up")(y)))
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=12, name="attention")(nn.RMSNorm()(x))
            return nn.Dense(3, name="last")(nn.RMSNorm(use_scale=False)(x))

    net, x = Net(), draw(2, 5, 4)
    params = of_shapes(jax.eval_shape(net.init, jax.random.key(0), x))
    done = rotate(net.apply, params, [x])
    unchanged(net.apply, params, x, done)
    sizes = sorted(size for size, *_ in turned(done))
    assert sizes == [6, 6, 6, 6, 12]  # values, queries and keys of both heads, and the stream
    biases = [np.asarray(tree["params"]["first"]["bias"]) for tree in (params, done.params)]
    assert np.abs(biases[0] - biases[1]).max() > 0.01


def test_nnx_with_layer_norm():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(8, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=rngs)

        def __call__(self, x):
            return x + self.attention(self.norm(x))

    graph, state = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    state = of_shapes(state)
    x = draw(2, 5, 8)

    def fn(p, x):
        return nnx.merge(graph, p)(x)

    done = rotate(fn, state, [x])
    unchanged(fn, state, x, done)
    assert {(size, kind) for size, *_, kind in turned(done)} == {(4, "hadamard")}
    assert all("add at" in record.reason for record in done.records if not record.setting)


def test_bert():
    def dense(a, b):
        return {"kernel": draw(a, b) / a**0.5, "bias": draw(b) / 4}

    layer = {name: dense(8, 8) for name in ("query", "key", "value", "output")}
    layer |= {name: {"scale": np.exp(draw(8)), "bias": draw(8)} for name in ("attention_norm", "norm")}
    layer |= {"up": dense(8, 12), "down": dense(12, 8)}
    tables = {"word": draw(9, 8), "position": draw(6, 8), "type": draw(2, 8), "norm": layer["norm"]}
    params, tokens = {"embeddings": tables, "layer0": layer}, RNG.integers(0, 9, (2, 5))
    fn = functools.partial(transformers.bert, heads=2)
    done = rotate(fn, params, [tokens])
    unchanged(fn, params, tokens, done)
    assert sorted(size for size, *_ in turned(done)) == [4, 4, 4, 4]
    assert any("add at" in record.reason for record in done.records)  # to what a layer norm made


@pytest.mark.skipif("LCQ_DATA" not in os.environ, reason="LCQ_DATA is not set")
def test_stories():
    arrays = np.load(Path(os.environ["LCQ_DATA"]) / "stories" / "stories260k_llama.npz")
    params = transformers.llama_from_llama2c(arrays)
    params["output"] = params["tok_embeddings"].T.copy()
    params = {name: leaf for name, leaf in params.items() if name[:5] != "layer" or name == "layer0"}
    fn = functools.partial(transformers.llama, heads=int(arrays["config"][3]))
    tokens = RNG.integers(0, 512, (2, 16)).astype(np.int32)
    done = rotate(fn, params, [tokens])
    unchanged(fn, params, tokens, done)
    assert sorted(size for size, *_ in turned(done)) == [8] * 4 + [64]
