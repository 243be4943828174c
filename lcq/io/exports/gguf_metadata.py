"""Metadata of a GGUF file: keys with dots as they are, and a llama's from the config.json of Hugging Face.

Source: gguf-py/gguf/constants.py, and llama.cpp's convert_hf_to_gguf.py.
"""

from collections.abc import Mapping

import numpy as np

from lcq.io.container import Json
from lcq.io.layouts.gguf_header import ALIGNMENT

_LLAMA = {
    "context_length": ("max_position_embeddings", np.uint32),
    "embedding_length": ("hidden_size", np.uint32),
    "block_count": ("num_hidden_layers", np.uint32),
    "feed_forward_length": ("intermediate_size", np.uint32),
    "attention.head_count": ("num_attention_heads", np.uint32),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", np.float32),
    "attention.head_count_kv": ("num_key_value_heads", np.uint32),
    "rope.freq_base": ("rope_theta", np.float32),
    "rope.dimension_count": ("head_dim", np.uint32),
    "vocab_size": ("vocab_size", np.uint32),
}
_NEEDED = 6
"""Keys without which llama.cpp does not load a llama."""


def metadata_of(config: Mapping[str, Json]) -> dict[str, Json]:
    """Metadata by key, also from the `fields` of a file that `lcq.io.open_gguf` read.

    Raises:
        ValueError: a config that says neither what the architecture is nor that it is a llama, or not enough of one.

    Example:
        >>> metadata_of({"general.architecture": "llama", "llama.block_count": 5})
        {'general.architecture': 'llama', 'llama.block_count': 5}
    """
    given = {key: getattr(value, "value", value) for key, value in config.items() if "." in key}
    if "general.alignment" in given:
        given["general.alignment"] = np.uint32(ALIGNMENT)
    if "general.architecture" in given:
        return given
    if config.get("model_type") != "llama":
        raise ValueError(
            f"config: expected general.architecture, or model_type 'llama', got {config.get('model_type')!r}; give "
            'config= metadata by key, such as {"general.architecture": "llama", ..}'
        )
    rope = config.get("rope_parameters") or {}
    said = {**config, "rope_theta": config.get("rope_theta", rope.get("rope_theta"))}
    lacking = [name for name, _ in list(_LLAMA.values())[:_NEEDED] if said.get(name) is None]
    if lacking:
        raise ValueError(f"config: expected {', '.join(lacking)} of a llama, got none; give the model's config.json")
    if config.get("rope_scaling") or rope.get("rope_type", "default") != "default":
        raise ValueError("config: expected rotary positions that are not scaled, got some; give GGUF's keys yourself")
    made = {"general.architecture": "llama", "general.quantization_version": np.uint32(2)}
    made |= {f"llama.{key}": kind(said[name]) for key, (name, kind) in _LLAMA.items() if said.get(name) is not None}
    return made | given
