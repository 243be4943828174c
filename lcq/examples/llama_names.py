"""A llama's parameters by the names of checkpoints, and what they do not say: `Config`.

    ours             Hugging Face, model.layers.N.      llama.cpp, blk.N.
    attention_norm   input_layernorm                    attn_norm
    wq wk wv wo      self_attn.{q,k,v,o}_proj           attn_q attn_k attn_v attn_output
    ffn_norm         post_attention_layernorm           ffn_norm
    w1 w3 w2         mlp.{gate,up,down}_proj            ffn_gate ffn_up ffn_down

Weights of both are (out, in), ours (in, out). Hugging Face's queries and keys are for pairs of halves, llama.cpp's for
neighbours: nothing is permuted, `Config.halves` says which.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lcq
from lcq.io.container import read_object
from lcq.tree.aliases import Forms, Params

_TOP = {
    "hf": {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"},
    "gguf": {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"},
}
_LAYER = {
    "hf": {
        "attention_norm": "input_layernorm",
        "wq": "self_attn.q_proj",
        "wk": "self_attn.k_proj",
        "wv": "self_attn.v_proj",
        "wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "w1": "mlp.gate_proj",
        "w2": "mlp.down_proj",
        "w3": "mlp.up_proj",
    },
    "gguf": {
        "attention_norm": "attn_norm",
        "wq": "attn_q",
        "wk": "attn_k",
        "wv": "attn_v",
        "wo": "attn_output",
        "ffn_norm": "ffn_norm",
        "w1": "ffn_gate",
        "w2": "ffn_down",
        "w3": "ffn_up",
    },
}
_PREFIX = {"hf": "model.layers.", "gguf": "blk."}
_OF_NO_USE = re.compile(r".*rotary_emb\.inv_freq")
_NEEDED = ("llama.attention.head_count", "llama.attention.layer_norm_rms_epsilon")
_KNOWN = ("llama", "mistral", "smollm")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a llama's parameters do not say of it.

    Attributes:
        heads: of the queries.
        eps: of the RMS norms.
        theta: of the rotary embedding.
        halves: pairs that it turns are (i, i + w/2), as in Hugging Face's checkpoints; else (2i, 2i+1).
    """

    heads: int
    eps: float = 1e-5
    theta: float = 10000.0
    halves: bool = False


def by_layers(params: Params) -> Params:
    """Parameters as `llama` takes them, of a checkpoint's flat dict: transposed, the layers a list; others as they are.

    Args:
        params: a tree with "layers", or arrays by the names of Hugging Face or llama.cpp.

    Raises:
        ValueError: names that are missing, or that no llama has, such as those of biases.

    Example:
        >>> flat = {"token_embd.weight": np.ones((5, 2)), "output_norm.weight": np.ones(2)}
        >>> sorted(by_layers(flat))
        ['layers', 'norm', 'tok_embeddings']
    """
    if "layers" in params:
        return params
    kind = "gguf" if "token_embd.weight" in params else "hf"
    left = {name for name in params if not _OF_NO_USE.fullmatch(name)}

    def take(name: str) -> Any:
        if f"{name}.weight" not in params:
            raise ValueError(
                f"{name}.weight: expected this parameter of a llama, got {', '.join(list(params)[:4])}, ..; give the "
                "flat dict of a checkpoint of Hugging Face or llama.cpp, or a tree with 'layers'"
            )
        left.discard(f"{name}.weight")
        return params[f"{name}.weight"]

    def turned(name: str) -> Any:
        weight = take(name)
        return weight.T if len(weight.shape) == 2 else weight

    top = _TOP[kind]
    tree = {"tok_embeddings": take(top["tok_embeddings"]), "norm": take(top["norm"])}
    if f"{top['output']}.weight" in params:
        tree["output"] = turned(top["output"])
    found = re.compile(re.escape(_PREFIX[kind]) + r"(\d+)\.")
    count = 1 + max((int(match[1]) for name in left if (match := found.match(name))), default=-1)
    tree["layers"] = [
        {ours: turned(f"{_PREFIX[kind]}{i}.{name}") for ours, name in _LAYER[kind].items()} for i in range(count)
    ]
    if left:
        raise ValueError(
            f"{min(left)}: expected parameters of a llama, which has no such one ({len(left)} in all); this net needs "
            "a function of its own"
        )
    return tree


def stacked(params: Params) -> Params:
    """The same with the layers stacked, for a scan; copies.

    Args:
        params: as of `by_layers`, of arrays.

    Example:
        >>> stacked({"layers": [{"wq": np.zeros((3, 4))}] * 2})["layers"]["wq"].shape
        (2, 3, 4)
    """
    tree = by_layers(params)
    if isinstance(tree["layers"], Mapping):
        return tree
    return {**tree, "layers": jax.tree.map(lambda *layers: np.stack(layers), *tree["layers"])}


def to_huggingface(params: Params, config: Config, context: int = 2048) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flat dict of a folder of Hugging Face, weights (out, in) and pairs of halves, and its config.json.

    Args:
        params: as of `by_layers`, of arrays.
        config: what they do not say.
        context: tokens that the net was trained on at once.

    Example:
        >>> square, one = np.ones((2, 2)), np.ones(2)
        >>> layer = dict.fromkeys(("wq", "wk", "wv", "wo", "w1", "w2", "w3"), square)
        >>> layer |= {"attention_norm": one, "ffn_norm": one}
        >>> flat, said = to_huggingface({"tok_embeddings": square, "norm": one, "layers": [layer]}, Config(1))
        >>> list(flat)[2:4], said["hidden_size"]
        (['model.layers.0.input_layernorm.weight', 'model.layers.0.self_attn.q_proj.weight'], 2)
    """
    tree = by_layers(params)
    layers = tree["layers"]
    if isinstance(layers, Mapping):
        layers = [{name: array[i] for name, array in layers.items()} for i in range(len(layers["wq"]))]
    hidden, queries = layers[0]["wq"].shape
    width = queries // config.heads

    def turned(name: str, weight: Any) -> Any:
        weight = np.asarray(weight)
        if weight.ndim < 2:
            return weight
        if name in ("wq", "wk") and not config.halves:  # neighbours to halves
            apart = weight.reshape(len(weight), -1, width // 2, 2)
            weight = apart.swapaxes(2, 3).reshape(weight.shape)
        return np.ascontiguousarray(weight.T)

    flat = {f"{name}.weight": np.asarray(tree[ours]) for ours, name in _TOP["hf"].items() if ours != "output"}
    for i, layer in enumerate(layers):
        prefix = f"{_PREFIX['hf']}{i}."
        flat |= {f"{prefix}{name}.weight": turned(ours, layer[ours]) for ours, name in _LAYER["hf"].items()}
    if "output" in tree:
        flat[f"{_TOP['hf']['output']}.weight"] = turned("output", tree["output"])
    said = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": layers[0]["w1"].shape[1],
        "num_hidden_layers": len(layers),
        "num_attention_heads": config.heads,
        "num_key_value_heads": layers[0]["wk"].shape[1] // width,
        "head_dim": width,
        "vocab_size": len(tree["tok_embeddings"]),
        "max_position_embeddings": context,
        "rms_norm_eps": config.eps,
        "rope_theta": config.theta,
        "hidden_act": "silu",
        "tie_word_embeddings": "output" not in tree,
    }
    return flat, said


def from_llama2c(arrays: Mapping[str, np.ndarray]) -> Params:
    """The stacked tree of a llama2.c checkpoint: weights of all layers (layers, out, in), pairs of neighbours.

    Args:
        arrays: "tok_embeddings", "norm", and by our names those of all layers; others are left out.
    """
    tree: dict[str, Any] = {name: arrays[name] for name in ("tok_embeddings", "norm")}
    layers = {name: arrays[name] for name in _LAYER["hf"]}
    return tree | {"layers": {k: a.swapaxes(-1, -2) if a.ndim == 3 else a for k, a in layers.items()}}


def load(path: str | os.PathLike[str], *, forms: bool = False) -> tuple[Forms, Config]:
    """The flat dict of a checkpoint, and its `Config`: of a folder of Hugging Face, or a .gguf file.

    Args:
        path: of the folder or file.
        forms: whether weights that are codes in it stay codes, see `lcq.io.read`; else they are made dense.

    Raises:
        ValueError: a net that is no llama, or one with rotary embeddings that are scaled; what `lcq.io.read` refuses.
    """
    path = Path(path)
    checkpoint = lcq.io.read_checkpoint(path, forms=forms)
    return checkpoint.tree, config_from_gguf(checkpoint.metadata) if path.suffix == ".gguf" else read_config(path)


def read_config(folder: str | os.PathLike[str]) -> Config:
    """`Config` of the config.json in a folder of Hugging Face.

    Raises:
        ValueError: a net that is no llama, or one that this decoder does not compute; a config.json that is no object.
        FileNotFoundError: no config.json there.
    """
    path = Path(folder) / "config.json"
    said: dict[str, Any] = dict(read_object(path))
    rotary = said.get("rope_parameters") or {}
    expected = {
        "model_type": _KNOWN,
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "sliding_window": (None,),
    }
    for name, fine in expected.items():
        if said.get(name, fine[0]) not in fine:
            raise ValueError(f"{path}: {name}: expected {' or '.join(map(str, fine))}, got {said[name]!r:.80}")
    if rotary.get("rope_type", "default") != "default":
        raise ValueError(f"{path}: rope_type: expected default, got {rotary['rope_type']!r:.80}")
    if "num_attention_heads" not in said:
        raise ValueError(f"{path}: expected num_attention_heads of a llama, got none; give the model's config.json")
    theta = said.get("rope_theta") or rotary.get("rope_theta", 10000.0)
    return Config(said["num_attention_heads"], said.get("rms_norm_eps", 1e-6), theta, halves=True)


def config_from_gguf(metadata: Mapping[str, str]) -> Config:
    """`Config` of the metadata of a .gguf file, as `lcq.io.read_checkpoint` gives them.

    Raises:
        ValueError: an architecture that is not llama, rotary embeddings that are scaled, or metadata that are missing.

    Example:
        >>> config_from_gguf({"general.architecture": "llama", "llama.attention.head_count": "9",
        ...                   "llama.attention.layer_norm_rms_epsilon": "1e-05", "llama.rope.freq_base": "100000.0"})
        Config(heads=9, eps=1e-05, theta=100000.0, halves=False)
    """
    if (name := metadata.get("general.architecture")) != "llama":
        raise ValueError(f"general.architecture: expected llama, got {name!r:.80}")
    if (kind := metadata.get("llama.rope.scaling.type", "none")) != "none":
        raise ValueError(f"llama.rope.scaling.type: expected none, got {kind!r:.80}")
    if lacking := [key for key in _NEEDED if key not in metadata]:
        raise ValueError(f"expected {', '.join(lacking)} in the metadata of a llama, got none; get the file again")
    eps, theta = metadata["llama.attention.layer_norm_rms_epsilon"], metadata.get("llama.rope.freq_base", "10000")
    return Config(int(metadata["llama.attention.head_count"]), float(eps), float(theta))
