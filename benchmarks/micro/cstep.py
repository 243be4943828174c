"""What a C step of `lcq.KMeans` costs, and how good it is: 1e6 Gaussian weights, and the kernels of two trained nets.

    python -m benchmarks.micro.cstep [rounds]        results/cstep.json

Time: inside jit, K = 16, cold and from the codebook of slightly different weights, beside one `jnp.sort` of the same
array: interleaved in one process, medians over rounds of every seed. Exact: the eager dynamic program, cpu seconds.
Distortion: relative to the variance, beside the Lloyd-Max constant, on the 1e6 equally likely quantiles of a Gaussian
(a sample of that size has a noise of .15 %), and on samples beside the exact optimum. K-means++: K = 256, n = 1e5, the
best of 5 runs. Kernels: how far the cold C step is above the exact optimum on every kernel of ResNet-20 and LeNet300
(in LCQ_DATA), the worst and the median, and how many are more than .05 % above. Memory: temporary and output bytes of
the compiled step over bytes of the leaf.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

SEEDS, SIZE, ROUNDS, RESTARTS, ITERATIONS = (0, 1, 2), 1_000_000, 15, 5, 100
NETS = ("resnet20_cifar10", "lenet300_tanh_mnist")
CONSTANTS = {2: 0.3634, 3: 0.1902, 4: 0.1175, 8: 0.03455, 16: 0.00950}


def sample(seed: int, size: int = SIZE) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(size), jnp.float32)


def relative(form: Any, x: jax.Array) -> float:
    """||x - Delta||^2 / ||x - mean||^2 in float64."""
    wide = np.asarray(x, np.float64)
    return float(((wide - np.asarray(form.dense(), np.float64)) ** 2).mean() / wide.var())


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def times(rounds: int) -> list[dict[str, Any]]:
    """Seconds of a sort, a cold and a warm C step, and the median ratios to the sort of the same round."""
    scheme = lcq.KMeans(16)
    sort, cold, warm = jax.jit(jnp.sort), jax.jit(scheme.project), jax.jit(lambda x, form: scheme.project(x, form))
    seconds: dict[str, list[float]] = {"sort": [], "cold": [], "warm": []}
    memory = {}
    for seed in SEEDS:
        before = cold(sample(seed))
        x = sample(seed) + 0.02 * sample(seed + 100)
        runs = {"sort": lambda x=x: sort(x), "cold": lambda x=x: cold(x), "warm": lambda x=x, f=before: warm(x, f)}
        for run in runs.values():
            timed(run)
        for _ in range(rounds):
            for name, run in runs.items():
                seconds[name].append(timed(run)[0])
        for name, step, args in (("cold", cold, (x,)), ("warm", warm, (x, before))):
            used = step.lower(*args).compile().memory_analysis()
            memory[name] = (used.temp_size_in_bytes + used.output_size_in_bytes) / x.nbytes
    rows = []
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds["sort"], strict=True)]
        row = {"what": name, "k": 16, "seconds": statistics.median(found), "of_a_sort": statistics.median(ratios)}
        rows.append({**row, "copies_of_the_leaf": memory.get(name)})
    return rows


def exact() -> list[dict[str, Any]]:
    """Cpu seconds of the exact solution, and how far the cold C step is from it."""
    rows = []
    for seed in SEEDS:
        x, start = sample(seed), time.process_time()
        best = lcq.KMeans(16, exact=True).project(x)
        spent = time.process_time() - start
        excess = relative(lcq.KMeans(16).project(x), x) / relative(best, x) - 1
        rows.append({"what": "exact", "k": 16, "seed": seed, "cpu_seconds": spent, "excess_of_cold": excess})
    return rows


def constants() -> list[dict[str, Any]]:
    """Relative distortion of cold C steps on Gaussian quantiles."""
    order = np.random.default_rng(0).permutation(SIZE)
    x = jnp.asarray(scipy.special.ndtri((order + 0.5) / SIZE), jnp.float32)
    rows = []
    for k, constant in CONSTANTS.items():
        found = relative(lcq.KMeans(k).project(x), x)
        best = relative(lcq.KMeans(k, exact=True).project(x), x)
        rows.append({"what": "lloyd_max", "k": k, "constant": constant, "cold": found, "exact": best})
    return rows


def kmeans_plus_plus(x: np.ndarray, k: int, rng: np.random.Generator) -> float:
    """Sum of squares after k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's algorithm; x is sorted."""
    centres, near = [rng.choice(x)], np.full(x.shape, np.inf)
    for _ in range(k - 1):
        near = np.minimum(near, (x - centres[-1]) ** 2)
        total = np.cumsum(near)
        centres.append(x[min(np.searchsorted(total, rng.random() * total[-1], side="right"), x.size - 1)])
    c, running = np.sort(centres), np.concatenate([[0], np.cumsum(x)])
    for _ in range(ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(x, (c[1:] + c[:-1]) / 2), [x.size]])
        count = np.diff(edges)
        c = np.where(count > 0, np.diff(running[edges]) / np.maximum(count, 1), c)
    return float(((x - c[np.searchsorted((c[1:] + c[:-1]) / 2, x)]) ** 2).sum())


def restarts() -> list[dict[str, Any]]:
    """The cold C step over the best of several k-means++ runs."""
    rows = []
    for seed in SEEDS:
        x, rng = sample(seed, 100_000), np.random.default_rng(seed + 1000)
        ordered = np.sort(np.asarray(x, np.float64))
        best = min(kmeans_plus_plus(ordered, 256, rng) for _ in range(RESTARTS))
        ours = relative(lcq.KMeans(256).project(x), x) * ordered.var() * x.size
        rows.append({"what": "kmeans_plus_plus", "k": 256, "seed": seed, "cold_over_best": ours / best})
    return rows


def kernels() -> list[dict[str, Any]]:
    """How far cold C steps are above the exact optimum on the kernels of trained nets."""
    rows = []
    for net in NETS:
        with np.load(f"{os.environ['LCQ_DATA']}/{net}.npz") as found:
            leaves = {name: jnp.asarray(found[name]) for name in found.files if found[name].ndim in (2, 4)}
        for k in (2, 4, 16):
            over = {
                name: relative(lcq.KMeans(k).project(x), x) / relative(lcq.KMeans(k, exact=True).project(x), x) - 1
                for name, x in leaves.items()
            }
            worst = max(over, key=lambda name: over[name])
            row = {"what": "kernels", "net": net, "k": k, "count": len(over), "worst": worst, "excess": over[worst]}
            rows.append(row | {"median": statistics.median(over.values()), "far": sum(e > 5e-4 for e in over.values())})
    return rows


def table() -> str:
    """Times in units of one `jnp.sort` of the same array."""
    by_kind: dict[str, list[Any]] = {}
    for row in stored("cstep"):
        by_kind.setdefault(row["what"], []).append(row)
    sort, cold, warm = (by_kind[kind][0] for kind in ("sort", "cold", "warm"))
    exact = max(row["cpu_seconds"] for row in by_kind["exact"])
    excess = max(row["excess_of_cold"] for row in by_kind["exact"])
    constants = max(abs(row["exact"] / row["constant"] - 1) for row in by_kind["lloyd_max"])
    plus = max(row["cold_over_best"] for row in by_kind["kmeans_plus_plus"])
    rows = [
        ["`jnp.sort`, 1e6 weights", f"{1e3 * sort['seconds']:.0f} ms", ""],
        ["cold, K = 16, in jit", f"{cold['of_a_sort']:.3f} of a sort", ".5 (.2)"],
        ["warm, K = 16, in jit", f"{warm['of_a_sort']:.3f} of a sort", ".1 (.05)"],
        ["memory, cold / warm", f"{cold['copies_of_the_leaf']:.2f} / {warm['copies_of_the_leaf']:.2f} leaves", "4"],
        ["exact, K = 16", f"{exact:.1f} cpu s at most", "10 (2) s"],
        ["cold above the exact optimum", f"{100 * excess:.2f} %", ".1 %"],
        ["exact from the Lloyd-Max constants", f"{100 * constants:.2f} %", ".1 %"],
        ["K = 256, n = 1e5, over best of 5 k-means++", f"{plus:.3f} at most", "1"],
    ]
    for row in by_kind.get("kernels", []):
        what = f"{row['net'].split('_')[0]}, K = {row['k']}: cold above the exact optimum at worst, of {row['count']}"
        rows.append([what, f"{100 * row['excess']:.3f} %", ".2 (.05) %"])
    return grid(["K-means", "measured", "goal (hoped for)"], rows)


if __name__ == "__main__":
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    rows = [*times(rounds), *exact(), *constants(), *restarts(), *kernels()]
    for row in rows:
        print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
    record("cstep", rows, seeds=SEEDS, size=SIZE, rounds=rounds, restarts=RESTARTS)
