"""Files of other programs: lcq's codes against each library's own quantizer, decoded by that library. Perplexity.

    LCQ_DATA=folder python -m benchmarks.experiments.exports stories
    ... smollm2 --gguf SmolLM2-135M-Instruct.Q4_1.gguf
    ... --keep folder              forms stay there, and a run that was killed goes on from there
    ... --grids "4 bits" --formats gguf onnx        some rows; those that are there already stay, unless --again
    ... --without-data             codes of lcq.compress instead: each matrix on its own, as the libraries do

Writes results/exports.json: for each net and format the perplexity with the library's own codes and with lcq's, in the
same format and bytes, and the share of the gap to float32 that lcq closes.

Dense kernels of all layers are quantized in groups of 32 inputs; embeddings and norms stay float32. lcq's codes are
those of `lcq.quantize` as it is by default, once for each grid: every format is given the same. Libraries round each
matrix on its own, by the largest weight or the smallest and largest of a group.

stories260K: calibration and evaluation of gpfq_transformers (all 100 stories). w2 has 172 inputs, of which 32 makes no
whole groups: it stays float32. Ternary codes have a scale for each output, 64 inputs; TQ2_0 and TQ1_0 have blocks of
256, which zeros fill. Where a library has no ternary quantizer its own codes have 2 bits.
SmolLM2-135M: the protocol of smollm2, a quarter of its windows (1,020 predictions); the first 2,048 tokens of the other
half of the text calibrate. Its weights are Q4_1's already, minimum and scale of each group of 32 being known, so that
rows with zeros would compare nothing: its own codes, in and out again, are results/smollm2_own.json. TQ2_0 has blocks
of 256 inputs: ternary are the down-projections alone.
    pip install gguf compressed-tensors qwix onnx onnx_ir onnxruntime torch
"""

import argparse
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import lcq
from benchmarks.experiments import gpfq_transformers, smollm2
from benchmarks.experiments.exports_peers import GROUP, PEERS, Weights
from benchmarks.harness.record import record, stored
from lcq.examples import llama

WINDOWS = 4
"""Of SmolLM2's 16, that are evaluated."""
CALIBRATION = 2048
FORMATS = {
    "4 bits": ("gguf", "compressed-tensors", "qwix", "onnx"),
    "4 bits, zeros": ("gguf", "compressed-tensors", "qwix", "onnx"),
    "3 bits": ("compressed-tensors", "qwix"),
    "2 bits": ("compressed-tensors", "qwix", "onnx"),
    "5 bits": ("gguf",),
    "ternary": ("gguf", "gguf TQ1_0", "compressed-tensors", "qwix", "onnx"),
}
GRIDS: dict[str, tuple[int, lcq.schemes.Scheme]] = {
    "4 bits": (4, lcq.Uniform(4, per=GROUP)),
    "4 bits, zeros": (4, lcq.Uniform(4, per=GROUP, zero_point=True)),
    "3 bits": (3, lcq.Uniform(3, per=GROUP)),
    "2 bits": (2, lcq.Uniform(2, per=GROUP)),
    "5 bits": (5, lcq.Uniform(5, per=GROUP)),
    "ternary": (2, lcq.Ternary(per=256)),
}


class Net(NamedTuple):
    """A language model.

    Attributes:
        quantized: forms and arrays by the name of a grid, and a folder from which a killed run goes on.
        matrices: of a tree, those that are quantized, by path and layer.
        put: the parameters with other matrices, by path and layer.
        nats: of parameters.
        params: in float32.
        grids: what is compared.
    """

    quantized: Callable[[str, Path | None], Any]
    matrices: Callable[[Any], dict[str, Any]]
    put: Callable[[Weights], Any]
    nats: Callable[[Any], float]
    params: Any
    grids: tuple[str, ...]


def stories(data: bool) -> Net:
    net = gpfq_transformers.load_stories()
    pattern = r"layer\d+/w[qkvo13]"

    def matrices(tree: Any) -> dict[str, Any]:
        return {
            f"{a}.{b}": tree[a][b] for a in tree if a.startswith("layer") for b in tree[a] if b in "wq wk wv wo w1 w3"
        }

    def put(weights: Weights) -> Any:
        params = {key: dict(value) if isinstance(value, dict) else value for key, value in net.params.items()}
        for path, weight in weights.items():
            layer, name = path.split(".")
            params[layer][name] = weight
        return params

    def quantized(name: str, resume: Path | None) -> Any:
        scheme = lcq.Ternary(per="channel") if name == "ternary" else GRIDS[name][1]
        rules = [lcq.Rule("tok_embeddings", None), lcq.Rule(pattern, scheme)]
        if not data:
            return lcq.compress(net.params, rules)
        return lcq.quantize(net.fn, net.params, net.batches(), rules, resume=resume).forms

    return Net(quantized, matrices, put, lambda p: net.evaluate(p)["nll"], net.params, tuple(GRIDS))


def smollm(path: str, data: bool) -> Net:
    params, config, tokenizer = smollm2.load(path)
    text = (Path(os.environ["LCQ_DATA"]) / "stories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    first = re.split(r"\n\n(?=Once upon a time)", text[: len(text) // 2])
    clean = "\n\n".join(story for story in first if story.isascii())
    calibration = np.array(tokenizer.encode(clean)[:CALIBRATION], np.int32).reshape(-1, smollm2.TOKENS)
    windows = smollm2.windows(tokenizer.encode)[:WINDOWS]
    names = smollm2.KERNELS

    def matrices(tree: Any) -> dict[str, Any]:
        return {f"{i}.{name}": layer for name in names for i, layer in enumerate(_layers(tree["layers"][name]))}

    def put(weights: Weights) -> Any:
        layers = dict(params["layers"])
        for name in names:
            if f"0.{name}" in weights:
                layers[name] = np.stack([weights[f"{i}.{name}"] for i in range(len(layers[name]))])
        return params | {"layers": layers}

    def quantized(name: str, resume: Path | None) -> Any:
        which = "w2" if name == "ternary" else "w."
        rules = [lcq.Rule(f"layers/{which}", GRIDS[name][1], stacked=1)]
        if not data:
            return lcq.compress(params, rules)
        fn = functools.partial(llama.logits, config=config)
        return lcq.quantize(fn, params, np.split(calibration, 4), rules, resume=resume).forms

    def nats(tree: Any) -> float:
        return smollm2.nats(jax.tree.map(jax.numpy.asarray, tree), windows, config)

    return Net(quantized, matrices, put, nats, params, ("4 bits", "3 bits", "2 bits", "5 bits", "ternary"))


def _layers(leaf: Any) -> list[Any]:
    """The layers of a stacked leaf: arrays, or forms."""
    if not isinstance(leaf, lcq.forms.Codes):
        return list(np.asarray(leaf))
    whole = leaf.unpack()
    return [jax.tree.map(lambda array, i=i: np.asarray(array[i]), whole) for i in range(leaf.shape[0])]


def kept(net: Net, grid: str, file: Path | None) -> Any:
    """The net's forms, from a file if it is there, else made and put there."""
    if file is None or not file.exists():
        forms = net.quantized(grid, file and file.with_suffix(".parts"))
        if file is None:
            return forms
        lcq.save(file, forms)
    return lcq.load(file)


def run(name: str, net: Net, arguments: argparse.Namespace) -> None:
    """Rows of a net that are not there yet; decoded weights that are the same are evaluated once."""
    seen: dict[int, float] = {}

    def perplexity(weights: Weights) -> float:
        key = hash(tuple((path, np.ascontiguousarray(w).tobytes()) for path, w in sorted(weights.items())))
        seen[key] = seen.get(key) or float(np.exp(net.nats(net.put(weights))))
        return seen[key]

    suffix = ", no data" if arguments.without_data else ""
    there = {(row["net"], row["format"], row["grid"]) for row in stored("exports") if not arguments.again}
    dense: Weights = {}
    for which in [each for each in net.grids if each in arguments.grids]:
        label = which + suffix
        left = [each for each in FORMATS[which] if (name, each, label) not in there and each in arguments.formats]
        if not left:
            continue
        dense = dense or {path: np.asarray(w) for path, w in net.matrices(net.params).items()}
        reference = perplexity(dense)
        file = Path(arguments.keep, f"{name}_{label.replace(' ', '_')}.lcq") if arguments.keep else None
        bits, found = GRIDS[which][0], net.matrices(kept(net, which, file))
        forms = {path: form for path, form in found.items() if isinstance(form, lcq.forms.Codes)}
        groups = {path: form.shape[0] // form.scale.shape[0] for path, form in forms.items()}
        for format in left:
            peer = PEERS[format]
            own = {path: peer.own(dense[path], bits, "zeros" in which, groups[path]) for path in forms}
            ours = peer.decoded(forms, bits)
            slip = max(np.abs(ours[p] - np.asarray(f.dense())).max() / np.abs(ours[p]).max() for p, f in forms.items())
            row = {"net": name, "format": format, "grid": label, "float": reference}
            row |= {"own": perplexity(own), "lcq": perplexity(ours), "largest_slip": float(slip)}
            row["gap_closed"] = 1 - (row["lcq"] - reference) / (row["own"] - reference)
            print(row, flush=True)
            others = [old for old in stored("exports") if any(old[k] != row[k] for k in ("net", "format", "grid"))]
            record("exports", [*others, row], seeds=[0], smollm2_windows=WINDOWS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=["stories", "smollm2"])
    parser.add_argument("--gguf")
    parser.add_argument("--keep")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), choices=list(GRIDS))
    parser.add_argument("--formats", nargs="+", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--without-data", action="store_true")
    arguments = parser.parse_args()
    if arguments.net == "stories":
        run("stories260K", stories(not arguments.without_data), arguments)
    else:
        run("SmolLM2-135M", smollm(arguments.gguf, not arguments.without_data), arguments)


if __name__ == "__main__":
    main()
