"""The error of one layer falls with its width, as Lybrand & Saab prove; and what the layers of VGG16 cost.

python -m benchmarks.experiments.gpfq_theorem    writes results/gpfq_theorem.json, gpfq_vgg16.json and gpfq_theorem.png

Width: X [m, N] and w [N] Gaussian, m = 32, levels {-2, 0, 2}, so that w is mostly inside; ||Xw - Xq||^2 / ||Xw||^2 of
GPFQ and of nearest rounding, mean over 64 neurons and 5 draws. The theorem (Lybrand & Saab, arXiv 2010.15979) has it
fall as (log N)/N for fixed m; nearest rounding's does not fall.

VGG16: random weights and inputs of its 16 layers' shapes, 4 bits, 4,096 rows (the fully connected ones 1,024), no
search of the scale; seconds once compiled, and bytes of the statistics where there are any.
"""

import itertools
import resource
import time
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

import lcq
from benchmarks.harness.record import RESULTS, record

SAMPLES, NEURONS, DRAWS = 32, 64, 5
WIDTHS = tuple(2**i for i in range(6, 14))

_CHANNELS = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16 = [(f"conv{i + 1}", 9 * a, b, 4096) for i, (a, b) in enumerate(itertools.pairwise(_CHANNELS))] + [
    ("dense1", 25_088, 4096, 1024),
    ("dense2", 4096, 4096, 1024),
    ("dense3", 4096, 1000, 1024),
]
"""Name, inputs N, neurons n, rows m."""


def error(width: int, method: str, seed: int) -> float:
    """||X w - X q||^2 / ||X w||^2."""
    keys = jax.random.split(jax.random.key(seed))
    x = jax.random.normal(keys[0], (SAMPLES, width))
    w = {"w": jax.random.normal(keys[1], (width, NEURONS))}
    rule = lcq.Rule("w", lcq.Levels((-2, 0, 2)))
    return (
        lcq.quantize(lambda w, x: x @ w["w"], w, [x], [rule], "rtn" if method == "nearest" else method).records[0].error
    )


def cost(name: str, inputs: int, neurons: int, rows: int) -> dict[str, Any]:
    """Seconds of statistics and rounding of one layer."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.nn.relu(jax.random.normal(keys[0], (rows, inputs)))
    w = {"w": jax.random.normal(keys[1], (inputs, neurons)) / inputs**0.5}
    rules = [lcq.Rule("w", lcq.Uniform(4, per="channel"))]
    for _ in range(2):  # the first compiles
        start = time.perf_counter()
        done = lcq.quantize(lambda w, x: x @ w["w"], w, [x], rules, lcq.Descent(search=False)).records[0]
        seconds = time.perf_counter() - start
    return {
        "layer": name,
        "inputs": inputs,
        "neurons": neurons,
        "rows": rows,
        "recursion": done.recursion,
        "seconds": seconds,
        "statistics_bytes": 4 * inputs**2 if done.recursion == "blocked" else 0,  # X is Y: no D
        "error": done.error,
        "peak_resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def draw(rows: list[dict[str, Any]]) -> None:
    """Both errors against the width, and the theorem's rate through the last point."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    widths = np.array([row["width"] for row in rows])
    for method, marker in (("nearest", "s-"), ("gpfq", "o-")):
        axes.loglog(widths, [row[method] for row in rows], marker, label=method)
    rate = np.log(widths) / widths
    axes.loglog(widths, rows[-1]["gpfq"] * rate / rate[-1], "k--", lw=1, label="(log N) / N")
    axes.set(xlabel="width N of the layer", ylabel=r"$\|Xw - Xq\|^2 / \|Xw\|^2$")
    axes.legend()
    figure.savefig(RESULTS / "gpfq_theorem.png", dpi=150)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for width in WIDTHS:
        by_method = {m: float(np.mean([error(width, m, seed) for seed in range(DRAWS)])) for m in ("nearest", "gpfq")}
        rows.append({"width": width, "samples": SAMPLES, **by_method})
        print(rows[-1], flush=True)
    slope = float(np.polyfit(np.log(WIDTHS[3:]), np.log([row["gpfq"] for row in rows[3:]]), 1)[0])
    record("gpfq_theorem", rows, seeds=range(DRAWS), slope=slope)
    draw(rows)
    layers = []
    for layer in VGG16:
        layers.append(cost(*layer))
        print(layers[-1], flush=True)
    record("gpfq_vgg16", layers, seeds=[0])


if __name__ == "__main__":
    main()
