"""Quantizing a decoder from disk, layer by layer: the shapes of a llama of 1.1e9 weights, random weights in bfloat16.

    python -m benchmarks.experiments.llama_1b make FOLDER          writes the net as sharded safetensors
    python -m benchmarks.experiments.llama_1b run FOLDER           quantizes it, and writes results/llama_1b.json

The shapes are those of TinyLlama: 22 layers of width 2,048, 32 heads with 4 of keys and values, 5,632 hidden units,
32,000 words. The seven kernels of each layer get 4 bits in groups of 32 by GPTQ as its paper has it, on 16 x 512
random tokens; embedding, head and norms stay. A run keeps its outcomes in FOLDER/run; one that was killed goes on there
when it is called again, and `--kill N` ends it by a signal after N products. Rows are one for each call, with the
seconds and the largest resident memory of that process; `digest` is of the file that `lcq.save` writes.

`--small` takes 2 layers of width 128, `--layers N` the first N.
"""

import argparse
import hashlib
import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.examples.llama import logits
from lcq.examples.llama_names import Config

SHAPES = {"layers": 22, "width": 2048, "hidden": 5632, "heads": 32, "kv": 4, "words": 32_000, "rows": 16, "tokens": 512}
SMALL = {"layers": 2, "width": 128, "hidden": 352, "heads": 8, "kv": 2, "words": 512, "rows": 8, "tokens": 32}
ROWS_A_BATCH = 2
METHOD = lcq.GPTQ(search=False, shrink=0.0)
RULES = [lcq.Rule("layers/w.", lcq.Uniform(4, per=32))]


def kernels(size: dict[str, int]) -> dict[str, tuple[int, int]]:
    d, h, kv = size["width"], size["hidden"], size["width"] * size["kv"] // size["heads"]
    each = {"wq": (d, d), "wk": (d, kv), "wv": (d, kv), "wo": (d, d), "w1": (d, h), "w3": (d, h), "w2": (h, d)}
    return {f"layers/{name}": shape for name, shape in each.items()}


def make(folder: Path, size: dict[str, int]) -> None:
    """A file for each leaf, and their index; norms in float32, so that activations are."""
    folder.mkdir(parents=True, exist_ok=True)
    layers, d = size["layers"], size["width"]
    shapes: dict[str, tuple[int, ...]] = {name: (layers, *shape) for name, shape in kernels(size).items()}
    shapes |= {"layers/attention_norm": (layers, d), "layers/ffn_norm": (layers, d), "norm": (d,)}
    shapes |= {"tok_embeddings": (size["words"], d), "output": (d, size["words"])}
    where = {}
    for number, (name, shape) in enumerate(shapes.items()):
        rng = np.random.default_rng(number)
        leaf = np.ones(shape, np.float32 if name.endswith("norm") else jnp.bfloat16)
        for i in range(shape[0]) if name in kernels(size) else ():
            leaf[i] = rng.normal(size=shape[1:], scale=shape[1] ** -0.5).astype(np.float32)
        for i in range(shape[0]) if name in ("tok_embeddings", "output") else ():
            leaf[i] = rng.normal(size=shape[1:], scale=d**-0.5 if name == "output" else 1).astype(np.float32)
        where[name] = f"model-{number:02}.safetensors"
        lcq.io.write(folder / where[name], {name: leaf})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def run(folder: Path, size: dict[str, int], kill: int, state: Path) -> dict[str, Any]:
    """One call of `quantize`, which goes on where a call before ended."""
    start, there = time.perf_counter(), len(list(state.glob("*.safetensors")))
    tokens = np.random.default_rng(0).integers(size["words"], size=(size["rows"], size["tokens"]))
    batches = list(tokens.reshape(-1, ROWS_A_BATCH, size["tokens"]).astype(np.int32))
    params = lcq.io.read(folder / "model.safetensors.index.json", lazy=True)
    leaves = lcq.tree.flatten(params)[0]
    config = Config(size["heads"])

    def progress(number: int, many: int, record: Any) -> None:
        what = f"{record.seconds:.1f} s, error {record.error:.2e}, {peak():.2f} GB"
        print(f"{number}/{many} {record.path} {what}", flush=True)
        if number == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    done = lcq.quantize(
        lambda p, t: logits(p, t, config), params, batches, RULES, METHOD, resume=state, progress=progress
    )
    quantized, cpu = time.perf_counter() - start, time.process_time()
    rounded = sum(leaf.size for name, leaf in leaves.items() if name in kernels(size))
    lcq.save(folder / "net.lcq", done.forms, coded=False)
    return {
        **size,
        "weights": sum(leaf.size for leaf in leaves.values()),
        "rounded_weights": rounded,
        "rows_a_batch": ROWS_A_BATCH,
        "method": str(METHOD),
        "products": len(done.records),
        "products_there_before": there,
        "seconds": quantized,
        "cpu_seconds": cpu,
        "seconds_of_products": sum(record.seconds for record in done.records),
        "largest_resident_gb": peak(),
        "largest_error": max(record.error for record in done.records),
        "digest": hashlib.sha256((folder / "net.lcq").read_bytes()).hexdigest(),
    }


def table() -> str:
    """A row for each call; resumed ones say how many products were there."""
    rows = []
    for row in stored("llama_1b"):
        there, many = row["products_there_before"], row["products"]
        rows.append(
            [
                f"{row['layers']} of {SHAPES['layers']} layers"
                + (f", resumed after {there} of {many}" if there else ""),
                f"{row['rounded_weights'] / 1e6:.0f}",
                f"{row['seconds'] / 60:.1f}",
                f"{row['cpu_seconds'] / 60:.1f}",
                f"{row['largest_resident_gb']:.1f}",
                row["digest"][:8],
            ]
        )
    head = ["run", "10^6 weights rounded", "minutes", "minutes of a core", "peak resident, GB", "sha256 of the file"]
    return grid(head, rows)


def peak() -> float:
    """The largest resident memory of this process so far, in units of 1e9 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--kill", type=int, default=0, help="after so many products")
    parser.add_argument("--state", default="run", help="name of the folder of outcomes, in FOLDER")
    given = parser.parse_args()
    size = SMALL if given.small else SHAPES
    size = size | {"layers": given.layers or size["layers"]}
    if given.what == "make":
        make(given.folder, size)
        return
    row = run(given.folder, size, given.kill, given.folder / given.state)
    print(row)
    record("llama_1b", [*stored("llama_1b"), row], seeds=[0], cores_used=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
