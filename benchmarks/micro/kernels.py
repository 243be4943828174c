"""How fast packed weights run: products of signs, weight-only products, whole nets, against float32 on the same cores.

    LCQ_DATA=folder python -m benchmarks.micro.kernels        results/kernels.json
    ... --cores 1 2 --widths 256 512                    what is measured; each pair in a process of its own
    ... --kept                                          results/kernels_kept.json: products with sparse weights

Within a process the contestants of a row take turns, and its figures are medians. Products of one row read weights
that are not in any cache: before each of them 256 MB of something else are read. Nothing else may run meanwhile.
`float32` is `jnp.dot` of the same logical shapes, `times` its time over the other's.

Vector width: XLA on CPUs prefers 256 bits; 512 takes XLA_FLAGS=--xla_cpu_prefer_vector_width=512, set before the first
computation. Memory: temporary bytes of the compiled call, as XLA states them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness.artifacts import find
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

FLUSH = 1 << 26
"""Floats, 256 MB, which no cache holds."""

SIGNS = [
    (1, 4096, 4096),
    (16, 1024, 1024),
    (16, 4096, 4096),
    (256, 1024, 1024),
    (256, 4096, 4096),
    (1024, 4096, 4096),
]
ROWS = (1, 4, 16, 64, 256)
SIZE = 4096


def times(contestants: dict[str, Callable[[], Any]], rounds: int, cold: bool) -> dict[str, float]:
    """Median milliseconds of each; they take turns."""
    import jax
    import jax.numpy as jnp

    other, read = jnp.zeros(FLUSH if cold else 1), jax.jit(jnp.sum)
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        jax.block_until_ready(run())
    for _ in range(rounds):
        for name, run in contestants.items():
            jax.block_until_ready(read(other))
            start = time.perf_counter()
            jax.block_until_ready(run())
            spent[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in spent.items()}


def row(kind: str, shape: Any, found: dict[str, float], **facts: Any) -> dict[str, Any]:
    against = found["float32"]
    made = {"kind": kind, "shape": list(shape), "milliseconds": {name: round(ms, 4) for name, ms in found.items()}}
    made["times"] = {name: round(against / ms, 2) for name, ms in found.items() if name != "float32"}
    print(made | facts, file=sys.stderr, flush=True)
    return made | facts


def temporary(fn: Any, *args: Any) -> int:
    import jax

    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def signs_rows() -> list[dict[str, Any]]:
    """Both operands signs; packed once, and packed in the call from float32 activations."""
    import jax
    import jax.numpy as jnp

    from lcq.forms.column_words import pack_signs
    from lcq.kernels.api import binary_matmul
    from lcq.kernels.signs import signs

    rows = []
    for m, k, n in SIGNS:
        x, w = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(((m, k), (k, n))))
        weights, words = signs(w), pack_signs(x)
        dot, product = jax.jit(jnp.dot), jax.jit(binary_matmul)
        packing = jax.jit(lambda x, weights: binary_matmul(pack_signs(x), weights))
        contestants = {
            "float32": lambda dot=dot, x=x, w=w: dot(x, w),
            "signs": lambda product=product, words=words, weights=weights: product(words, weights),
            "signs, packing included": lambda packing=packing, x=x, weights=weights: packing(x, weights),
        }
        rows.append(row("signs", (m, k, n), times(contestants, 15 if m > 16 else 41, m == 1), cold=m == 1))
    return rows


def convolution_rows() -> list[dict[str, Any]]:
    """A convolution of signs with signs, packing included."""
    import jax
    from flax import nnx

    from lcq.layers.nnx import BinaryConv, freeze

    layer = BinaryConv(256, 256, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    graph, state = nnx.split(freeze(layer))
    kernel, x = layer.kernel.get_value(), jax.random.normal(jax.random.key(0), (8, 28, 28, 256))
    layout = ("NHWC", "HWIO", "NHWC")
    dense = jax.jit(lambda w, x: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=layout))
    packed = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    contestants = {"float32": lambda: dense(kernel, x), "signs, packing included": lambda: packed(state, x)}
    return [row("signs, 3 x 3 convolution", (8, 28, 28, 256, 256), times(contestants, 15, False), cold=False)]


def weight_rows() -> list[dict[str, Any]]:
    """Float32 activations and codes of 4096 x 4096, prepacked once."""
    import jax
    import jax.numpy as jnp

    import lcq
    from lcq.kernels.api import matmul

    w = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    schemes = {
        "1 bit, learned": lcq.KMeans(2),
        "ternary": lcq.Ternary(),
        "uniform 4 bits": lcq.Uniform(4, per="channel"),
        "codebook of 16": lcq.KMeans(16),
    }
    forms = {name: scheme.project(w).prepack() for name, scheme in schemes.items()}
    dot, door = jax.jit(jnp.dot), jax.jit(matmul)
    dense = jax.jit(lambda x, form: jnp.dot(x, form.dense()))
    rows = []
    for m in ROWS:
        x = jax.random.normal(jax.random.key(1), (m, SIZE))
        contestants = {"float32": lambda x=x: dot(x, w)}
        contestants |= {name: lambda x=x, form=form: door(x, form) for name, form in forms.items()}
        coded = forms["codebook of 16"]
        contestants["codebook of 16, dense in the call"] = lambda x=x, coded=coded: dense(x, coded)
        memory = {name: temporary(f, x, coded) for name, f in (("door", matmul), ("dense in the call", dense))}
        found = times(contestants, 15 if m > 16 else 41, m == 1)
        rows.append(row("weights", (m, SIZE, SIZE), found, cold=m == 1, temporary_bytes=memory))
    return rows


def kept_rows() -> list[dict[str, Any]]:
    """Float32 activations and a part of the weights of 4096 x 4096, in lists."""
    import jax
    import jax.numpy as jnp

    import lcq
    from lcq.kernels.api import matmul

    w = jax.random.normal(jax.random.key(0), (SIZE, SIZE))
    ready = {kept: lcq.Prune(fraction=kept).project(w).prepack() for kept in (0.02, 0.05, 0.1)}
    dot, door, rows = jax.jit(jnp.dot), jax.jit(matmul), []
    for m in ROWS:
        x = jax.random.normal(jax.random.key(1), (m, SIZE))
        contestants = {"float32": lambda x=x: dot(x, w)}
        contestants |= {f"{kept:.0%} kept": lambda x=x, form=form: door(x, form) for kept, form in ready.items()}
        bytes_of = {
            f"{kept:.0%} kept": {"arguments": form.bits // 8, "temporary": temporary(matmul, x, form)}
            for kept, form in ready.items()
        }
        found = times(contestants, 15 if m > 16 else 41, m == 1)
        rows.append(row("kept weights", (m, SIZE, SIZE), found, cold=m == 1, bytes=bytes_of))
    return rows


def net_rows() -> list[dict[str, Any]]:
    """Whole nets: the compressed ResNet-20 with 2 values a layer, and an MLP; packed, and dense."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lcq
    from lcq.examples import models

    widths = (784, SIZE, SIZE, 10)
    keys = jax.random.split(jax.random.key(0), len(widths))
    shapes = zip(keys, widths[:-1], widths[1:], strict=False)
    mlp = {f"w{i}": jax.random.normal(key, (a, b)) / a**0.5 for i, (key, a, b) in enumerate(shapes)}

    def mlp_of(params: Any, x: Any) -> Any:
        for i in range(len(widths) - 2):
            x = jax.nn.relu(x @ params[f"w{i}"])
        return x @ params[f"w{len(widths) - 2}"]

    maker = "python -m benchmarks.experiments.resnet20 lc_k2 --out FOLDER"
    resnet = lcq.load(find("resnet20_lc_k2.lcq", maker))
    nets = [
        ("MLP 784-4096-4096-10", mlp_of, lcq.compress(mlp, [lcq.Rule(".*", lcq.KMeans(2))]), (1, 64), (784,)),
        ("ResNet-20", models.ResNet(20).apply, resnet, (1, 64), (32, 32, 3)),
    ]
    rows = []
    for name, fn, forms, batches, shape in nets:
        net, dense = lcq.packed(fn), jax.tree.map(jnp.asarray, lcq.decompress(forms))
        for m in batches:
            x = jax.random.normal(jax.random.key(1), (m, *shape))
            ready = net.prepack(forms, x)
            calls = {"float32": (jax.jit(fn), dense), "packed": (jax.jit(net), ready)}
            contestants = {key: lambda f=f, w=w, x=x: f(w, x) for key, (f, w) in calls.items()}
            found = times(contestants, 15, m == 1)
            got, wanted = (np.asarray(f(w, x), np.float64) for f, w in (calls["packed"], calls["float32"]))
            bytes_of = {
                key: {
                    "arguments": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w)),
                    "temporary": temporary(f, w, x),
                }
                for key, (f, w) in calls.items()
            }
            apart = float(np.abs(got - wanted).max() / np.abs(wanted).max())
            rows.append(row(name, (m, *shape), found, cold=m == 1, bytes=bytes_of, apart=apart))
    return rows


SIGN_TARGETS = {
    (1, 4096, 4096): "15 (25)",
    (256, 1024, 1024): "8 (10); 14 (18)",
    (256, 4096, 4096): "8 (10); 14 (18)",
}
WEIGHT_TARGETS = {"1 bit, learned": "4 (15)", "ternary": "4 (8)", "uniform 4 bits": "4 (8)", "codebook of 16": ""}


def table() -> str:
    """How many times faster than float32: one and two cores, both vector widths."""
    rows = stored("kernels") + stored("kernels_kept")
    runs = list(dict.fromkeys((row["cores"], row["vector_bits"]) for row in rows))
    lines: dict[tuple[str, str], dict[Any, str]] = {}
    for row in rows:
        m, *rest = row["shape"]
        for name, times in row["times"].items():
            if row["kind"] == "signs":
                if "packing" in name:
                    continue
                label = f"{name}: {m} x {rest[0]} x {rest[1]}", SIGN_TARGETS.get(tuple(row["shape"]), "1")
            elif row["kind"] in ("weights", "kept weights"):
                if m not in (1, 64):
                    continue
                target = WEIGHT_TARGETS.get(name, "") if m == 1 else ".9"
                label = f"{name}: {m} x {rest[0]} x {rest[1]}", target if row["kind"] == "weights" else ""
            elif row["kind"].endswith("convolution"):
                label = f"{row['kind']} 256 to 256, 28 x 28, batch of {m}, packing included", "6 (8)"
            else:
                label = f"{row['kind']}, batch of {m}: {name}", ""
            lines.setdefault(label, {})[row["cores"], row["vector_bits"]] = f"{times:.{1 + (times < 2)}f}"
    head = ["times faster than float32", *(f"{c} core{'s' * (c > 1)}, {v} bits" for c, v in runs), "goal (hoped for)"]
    cells = [[name, *(found.get(run, "") for run in runs), target] for (name, target), found in lines.items()]
    return grid(head, cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--kept", action="store_true", help="products with sparse weights, and nothing else")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a process of its own: rows to stdout
    args = parser.parse_args()
    if args.one:
        print(
            json.dumps(kept_rows() if args.kept else [*signs_rows(), *convolution_rows(), *weight_rows(), *net_rows()])
        )
        return

    here = sorted(os.sched_getaffinity(0))
    rows = []
    for cores in args.cores:
        for width in args.widths:
            flags = f"--xla_cpu_prefer_vector_width={width}"
            child = [sys.executable, "-m", "benchmarks.micro.kernels", "--one", *(["--kept"] if args.kept else [])]
            os.sched_setaffinity(0, here[:cores])  # the child inherits it
            out = subprocess.run(child, env={**os.environ, "XLA_FLAGS": flags}, stdout=subprocess.PIPE, check=True)
            rows += [{"cores": cores, "vector_bits": width, **found} for found in json.loads(out.stdout)]
    os.sched_setaffinity(0, here)
    record("kernels_kept" if args.kept else "kernels", rows)


if __name__ == "__main__":
    main()
