"""Two transformers as plain functions of nested dicts of arrays: a decoder (llama) and an encoder (BERT).

Weights are (in, out) as in `x @ w`. Layers are "layer0", "layer1", ...; how many there are, and all widths, are read
off the parameters, only the number of heads is not. `lcq.examples.llama` is the decoder with layers stacked, a cache,
and the names of checkpoints.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lcq.examples.llama import attention, logits
from lcq.examples.llama_names import Config


def llama(
    params: Mapping[str, Any],
    tokens: Int[Array | np.ndarray, "n t"],
    *,
    heads: int,
    eps: float = 1e-5,
    theta: float = 10000.0,
) -> Float[Array, "n t vocab"]:
    """Logits of the token after each of `tokens`: pre-norm blocks of causal attention and a SwiGLU, tied embedding.

    Args:
        params: "tok_embeddings" (vocab, d), read by rows and as the head; "norm" (d,); and a layer "attention_norm",
            "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3". Several query heads share a head of keys and values
            if wk and wv are narrower than wq.
        tokens: sentences of the same length, each from its first token on.
        heads: of the queries.
        eps: of the RMS norms.
        theta: of the rotary embedding of neighbours, see `lcq.examples.llama.rope`.

    Source: Touvron et al., arXiv 2302.13971; grouped queries: Ainslie et al., arXiv 2305.13245.
    """
    tree = {**params, "layers": list(_layers(params))}
    return logits(tree, tokens, Config(heads, eps, theta))


def bert(
    params: Mapping[str, Any],
    tokens: Int[Array | np.ndarray, "n t"],
    mask: Bool[Array | np.ndarray, "n t"] | None = None,
    *,
    heads: int,
    eps: float = 1e-12,
) -> Float[Array, "n t d"]:
    """States of the last layer: post-norm blocks of attention in both directions and a gelu.

    Args:
        params: "embeddings" with "word", "position", "type" and "norm"; and a layer "query", "key", "value", "output",
            "attention_norm", "up", "down", "norm": dense layers {"kernel", "bias"}, norms {"scale", "bias"}.
        tokens: sentences, [CLS] first and [SEP] last.
        mask: True at tokens, False at padding, to which nothing attends; None: no padding.
        heads: of the attention.
        eps: of the layer norms.

    Source: Devlin et al., arXiv 1810.04805.
    """
    e = params["embeddings"]
    x = jnp.take(e["word"], tokens, axis=0) + e["position"][: tokens.shape[1]] + e["type"][0]
    x = _layer_norm(x, e["norm"], eps)
    allowed = jnp.asarray(True if mask is None else mask[:, None, None, None, :])
    for p in _layers(params):
        q, k, v = (_dense(x, p[name]).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
        x = _layer_norm(x + _dense(attention(q, k, v, allowed), p["output"]), p["attention_norm"], eps)
        y = jax.nn.gelu(_dense(x, p["up"]), approximate=False)
        x = _layer_norm(x + _dense(y, p["down"]), p["norm"], eps)
    return x


def sentence_vectors(
    params: Mapping[str, Any],
    tokens: Int[Array | np.ndarray, "n t"],
    mask: Bool[Array | np.ndarray, "n t"] | None = None,
    *,
    heads: int,
) -> Float[Array, "n d"]:
    """Unit vectors whose inner products say how alike sentences are: the mean of `bert` over tokens, normalised.

    Args:
        params: of `bert`.
        tokens: likewise.
        mask: likewise; the mean leaves padding out.
        heads: likewise.

    Source: Reimers and Gurevych, arXiv 1908.10084.
    """
    x = bert(params, tokens, mask, heads=heads)
    x = x.sum(1) if mask is None else (x * mask[..., None]).sum(1)
    return x / jnp.linalg.norm(x, axis=1, keepdims=True)


def llama_from_llama2c(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `llama` from the arrays of a llama2.c checkpoint: stacked layers, weights (out, in).

    Args:
        arrays: "tok_embeddings", "norm", and under the names of `llama` those of all layers; others are left out.
    """
    single = ("tok_embeddings", "norm")
    stacks = ("attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3")
    params: dict[str, Any] = {name: arrays[name] for name in single}
    for i in range(len(arrays["wq"])):
        params[f"layer{i}"] = {name: arrays[name][i].T for name in stacks}
    return params


def bert_from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `bert` from the state_dict of the `BertModel` of Hugging Face's transformers; without its pooler.

    Args:
        state: arrays under PyTorch's names, "encoder.layer.0.attention.self.query.weight" and so on.
    """

    def dense(name: str) -> dict[str, Any]:
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name: str) -> dict[str, Any]:
        return {"scale": state[f"{name}.LayerNorm.weight"], "bias": state[f"{name}.LayerNorm.bias"]}

    names = {"word": "word", "position": "position", "type": "token_type"}
    embeddings = {key: state[f"embeddings.{name}_embeddings.weight"] for key, name in names.items()}
    params: dict[str, Any] = {"embeddings": {**embeddings, "norm": norm("embeddings")}}
    while f"encoder.layer.{len(params) - 1}.output.dense.weight" in state:
        old = f"encoder.layer.{len(params) - 1}"
        params[f"layer{len(params) - 1}"] = {
            **{key: dense(f"{old}.attention.self.{key}") for key in ("query", "key", "value")},
            "output": dense(f"{old}.attention.output.dense"),
            "attention_norm": norm(f"{old}.attention.output"),
            "up": dense(f"{old}.intermediate.dense"),
            "down": dense(f"{old}.output.dense"),
            "norm": norm(f"{old}.output"),
        }
    return params


def _layers(params: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (params[f"layer{i}"] for i in range(sum(name.startswith("layer") for name in params)))


def _dense(x: Array, p: Mapping[str, Any]) -> Array:
    return x @ p["kernel"] + p["bias"]


def _layer_norm(x: Array, p: Mapping[str, Any], eps: float) -> Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]
