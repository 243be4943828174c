import functools
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from lcq.examples import transformers

needs_data = pytest.mark.skipif(
    "LCQ_DATA" not in os.environ, reason="real data: set LCQ_DATA to the folder that holds it"
)

HEADS, WIDTH = 4, 6
TOKENS = np.array([[1, 5, 3, 9, 9, 2, 0], [1, 8, 8, 4, 7, 6, 3]], np.int32)


def filled(shapes, seed=0):
    """A tree of random arrays; what is a scale lies around 1."""
    rng = np.random.default_rng(seed)

    def fill(path, shape):
        around = 1.0 if path[-1].key in ("attention_norm", "ffn_norm", "norm", "scale") else 0.0
        return (around + 0.3 * rng.normal(size=shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(fill, shapes, is_leaf=lambda x: isinstance(x, tuple))


def llama_params(kv_heads, layers=2, vocab=11, hidden=20):
    d = HEADS * WIDTH
    layer = {"attention_norm": (d,), "wq": (d, d), "wk": (d, kv_heads * WIDTH), "wv": (d, kv_heads * WIDTH)}
    layer |= {"wo": (d, d), "ffn_norm": (d,), "w1": (d, hidden), "w2": (hidden, d), "w3": (d, hidden)}
    shapes = {"tok_embeddings": (vocab, d), "norm": (d,), **{f"layer{i}": layer for i in range(layers)}}
    return filled(shapes)


def bert_params(layers=2, vocab=11, positions=16, hidden=20):
    d = HEADS * WIDTH
    norm = {"scale": (d,), "bias": (d,)}
    layer = {name: {"kernel": (d, d), "bias": (d,)} for name in ("query", "key", "value", "output")}
    layer |= {"up": {"kernel": (d, hidden), "bias": (hidden,)}, "down": {"kernel": (hidden, d), "bias": (d,)}}
    layer |= {"attention_norm": norm, "norm": norm}
    embeddings = {"word": (vocab, d), "position": (positions, d), "type": (2, d), "norm": norm}
    return filled({"embeddings": embeddings, **{f"layer{i}": layer for i in range(layers)}})


# The same, one token and one head at a time, in float64


def softmax(scores):
    e = np.exp(np.array(scores) - max(scores))
    return e / e.sum()


def rms(x, scale):
    return np.array([v / np.sqrt(np.mean(v**2) + 1e-5) * scale for v in x])


def layer_norm(x, p):
    return np.array([(v - v.mean()) / np.sqrt(v.var() + 1e-12) * p["scale"] + p["bias"] for v in x])


def turned(v, position):
    """Pairs of v as complex numbers, turned."""
    z = (v[0::2] + 1j * v[1::2]) * np.exp(1j * position * 10000.0 ** (-np.arange(0, len(v), 2) / len(v)))
    return np.stack([z.real, z.imag], 1).ravel()


def attention(q, k, v, shared, sees):
    """One sentence; head h reads the keys of head h // shared, token i sees token j if sees(i, j)."""
    out = np.zeros_like(q)
    for i in range(len(q)):
        for h in range(HEADS):
            own, there = (slice(a * WIDTH, (a + 1) * WIDTH) for a in (h, h // shared))
            seen = [j for j in range(len(q)) if sees(i, j)]
            weights = softmax([q[i, own] @ k[j, there] / np.sqrt(WIDTH) for j in seen])
            out[i, own] = sum(w * v[j, there] for w, j in zip(weights, seen, strict=True))
    return out


def slow_llama(params, sentence, kv_heads):
    params = jax.tree.map(lambda a: a.astype(np.float64), params)
    x = np.array([params["tok_embeddings"][token] for token in sentence])
    for i in range(len(params) - 2):
        p = params[f"layer{i}"]
        y = rms(x, p["attention_norm"])
        q, k = (
            np.array([np.concatenate([turned(u, t) for u in row.reshape(-1, WIDTH)]) for t, row in enumerate(y @ w)])
            for w in (p["wq"], p["wk"])
        )
        x = x + attention(q, k, y @ p["wv"], HEADS // kv_heads, lambda i, j: j <= i) @ p["wo"]
        y = rms(x, p["ffn_norm"])
        gate = y @ p["w1"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ p["w3"])) @ p["w2"]
    return rms(x, params["norm"]) @ params["tok_embeddings"].T


def slow_bert(params, sentence):
    params = jax.tree.map(lambda a: a.astype(np.float64), params)
    e = params["embeddings"]
    x = np.array([e["word"][token] + e["position"][t] + e["type"][0] for t, token in enumerate(sentence)])
    x = layer_norm(x, e["norm"])
    for i in range(len(params) - 1):
        p = params[f"layer{i}"]
        q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name in ("query", "key", "value"))
        y = attention(q, k, v, 1, lambda i, j: True) @ p["output"]["kernel"] + p["output"]["bias"]
        x = layer_norm(x + y, p["attention_norm"])
        y = x @ p["up"]["kernel"] + p["up"]["bias"]
        y = y * (1 + erf(y / np.sqrt(2))) / 2
        x = layer_norm(x + y @ p["down"]["kernel"] + p["down"]["bias"], p["norm"])
    return x


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_llama_against_a_loop(kv_heads):
    params = llama_params(kv_heads)
    logits = transformers.llama(params, TOKENS, heads=HEADS)
    slow = [slow_llama(params, sentence, kv_heads) for sentence in TOKENS]
    np.testing.assert_allclose(logits, slow, rtol=1e-4, atol=1e-4)


def test_bert_against_a_loop():
    params = bert_params()
    states = transformers.bert(params, TOKENS, heads=HEADS)
    np.testing.assert_allclose(states, [slow_bert(params, s) for s in TOKENS], rtol=1e-4, atol=1e-4)


def test_sentence_vectors_are_normalised_means():
    params = bert_params()
    means = np.array([slow_bert(params, s).mean(0) for s in TOKENS])
    vectors = transformers.sentence_vectors(params, TOKENS, heads=HEADS)
    np.testing.assert_allclose(vectors, means / np.linalg.norm(means, axis=1, keepdims=True), rtol=1e-4, atol=1e-5)


def test_llama_does_not_look_ahead():
    f = jax.jit(functools.partial(transformers.llama, heads=HEADS))
    params, changed = llama_params(2), TOKENS.copy()
    changed[:, 4] = 10
    before, after = f(params, TOKENS), f(params, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (jnp.abs(before - after).max(-1)[:, 4:] > 1e-3).all()
    np.testing.assert_allclose(before[:, :4], f(params, TOKENS[:, :4]), rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing():
    params = bert_params()
    padded = np.pad(TOKENS, ((0, 0), (0, 3)), constant_values=9)
    mask = np.arange(10) < np.array([[7], [7]])
    vectors = transformers.sentence_vectors(params, padded, mask, heads=HEADS)
    np.testing.assert_allclose(vectors, transformers.sentence_vectors(params, TOKENS, heads=HEADS), atol=1e-5)


def test_llama_from_llama2c_turns_stacks_into_layers():
    params = llama_params(2)
    layers = [params["layer0"], params["layer1"]]
    arrays = {name: np.stack([layer[name].T for layer in layers]) for name in layers[0]}
    arrays |= {"tok_embeddings": params["tok_embeddings"], "norm": params["norm"], "config": np.zeros(7)}
    jax.tree.map(np.testing.assert_array_equal, transformers.llama_from_llama2c(arrays), params)


def test_bert_from_torch_has_every_parameter():
    params = bert_params()
    names = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value"}
    names |= {"output": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
    names |= {"attention_norm": "attention.output.LayerNorm", "norm": "output.LayerNorm"}
    state = {"pooler.dense.weight": np.zeros((2, 2))}
    for key, name in {"word": "word", "position": "position", "type": "token_type"}.items():
        state[f"embeddings.{name}_embeddings.weight"] = params["embeddings"][key]
    modules = {"embeddings.LayerNorm": params["embeddings"]["norm"]}
    modules |= {f"encoder.layer.{i}.{name}": params[f"layer{i}"][key] for i in (0, 1) for key, name in names.items()}
    for name, module in modules.items():
        state[f"{name}.bias"] = module["bias"]
        state[f"{name}.weight"] = module["kernel"].T if "kernel" in module else module["scale"]
    jax.tree.map(np.testing.assert_array_equal, transformers.bert_from_torch(state), params)


@needs_data
def test_stories260k_scores_as_published():
    folder = Path(os.environ["LCQ_DATA"]) / "stories"
    params = transformers.llama_from_llama2c(np.load(folder / "stories260k_llama.npz"))
    given = np.load(folder / "tinystories_eval_tok512.npz")
    ends = np.cumsum(given["lengths"])
    starts = ends - given["lengths"]
    # The k-th token of story i is at starts[i] + k; what lies behind a story counts for nothing.
    at = starts[:, None] + np.arange(max(given["lengths"]))
    inside = at < ends[:, None]
    tokens = given["tokens"].astype(np.int32)[np.where(inside, at, 0)]

    @jax.jit
    def losses(tokens):
        logs = jax.nn.log_softmax(transformers.llama(params, tokens, heads=8)[:, :-1])
        return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=2)[..., 0]

    all_losses = np.concatenate([losses(part) for part in np.split(tokens, 5)])
    assert all_losses[inside[:, 1:]].mean() == pytest.approx(1.388, abs=5e-4)
