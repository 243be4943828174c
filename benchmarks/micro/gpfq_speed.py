"""How fast GPFQ's codes are found from inputs, beside plain matrix products and the literal recursion.

    python -m benchmarks.micro.gpfq_speed [--rounds 15] [--brevitas PYTHON]        results/gpfq_speed.json

Whole: N = n = 1024, m = 4096, from X and Y to codes, statistics included, 4 m N^2 + 2 N^2 n operations; over the rate
of float32 products of [N, m] by [m, N] and of [N, N] by [N, n], and in time beside `follow`. Recursion alone: N = 4096,
n = 1024, from statistics to codes, 2 N^2 n operations, over the rate of [N, N] by [N, n]. All are jitted, at the
highest precision, interleaved in one process; medians over rounds. Compilation: of the recursion, with another number
of neurons for each N, so that nothing is cached. Brevitas: its GPFQ on the same layer with the same frozen scales, by
gpfq_brevitas.py under a Python that has it (pip install torch brevitas), right after the rest.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.sequential import follow
from lcq.ptq.statistics import Statistics, finish, gather

ROUNDS, ROWS, SMALL, LARGE, NEURONS = 15, 4096, 1024, 4096, 1024
SCHEME = lcq.Uniform(4, per="channel")


def timed(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def inputs(rows: int, size: int, neurons: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weights, and inputs after a ReLU without and with noise."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.maximum(jax.random.normal(keys[0], (rows, size)), 0)
    y = jnp.maximum(x + 0.1 * jax.random.normal(keys[1], x.shape), 0)
    return jax.random.normal(keys[2], (size, neurons)), x, y


@jax.jit
def product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)


@jax.jit
def whole(w: jax.Array, x: jax.Array, y: jax.Array, form: Any) -> jax.Array:
    return GPFQ().codes(w, finish(gather(y, x)), form).codes


@jax.jit
def recursion(w: jax.Array, gram: jax.Array, drift: jax.Array, form: Any) -> jax.Array:
    nothing = jnp.zeros(len(gram))
    return GPFQ().codes(w, Statistics(gram, drift, None, nothing, nothing, 1), form).codes


@jax.jit
def literal(w: jax.Array, x: jax.Array, y: jax.Array, form: Any) -> jax.Array:
    return follow(w, x, y, form)[0].codes


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        timed(run)
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(timed(run))
    return seconds


def row(what: str, size: int, operations: float, seconds: list[float], beside: dict[str, list[float]]) -> Any:
    """Median seconds and rate, and the median of what a round's time is to that of every other thing."""
    ratios = {
        name: statistics.median(a / b for a, b in zip(other, seconds, strict=True)) for name, other in beside.items()
    }
    middle = statistics.median(seconds)
    return {"what": what, "inputs": size, "seconds": middle, "gflops": operations / middle / 1e9, **ratios}


def from_inputs(rounds: int) -> list[Any]:
    w, x, y = inputs(ROWS, SMALL, NEURONS)
    form, turned, square = SCHEME.project(w), x.T + 0.0, x[:SMALL] + 0.0
    runs = {
        "wide_product": lambda: product(turned, y),
        "square_product": lambda: product(square, w),
        "gpfq": lambda: whole(w, x, y, form),
        "follow": lambda: literal(w, x, y, form),
    }
    seconds = medians(runs, rounds)
    same = float((whole(w, x, y, form) == literal(w, x, y, form)).mean())
    counts = {
        "wide_product": 2 * ROWS * SMALL**2,
        "square_product": 2 * SMALL**2 * NEURONS,
        "gpfq": 4 * ROWS * SMALL**2 + 2 * SMALL**2 * NEURONS,
        "follow": 6 * ROWS * SMALL * NEURONS,
    }
    rows = [row(name, SMALL, counts[name], seconds[name], {}) for name in runs]
    for found in rows:
        found["of_rate_of_wide"] = found["gflops"] / rows[0]["gflops"]
        found["of_rate_of_square"] = found["gflops"] / rows[1]["gflops"]
    rows[2]["follow_over_this"] = row("", SMALL, 1, seconds["gpfq"], {"r": seconds["follow"]})["r"]
    rows[2]["codes_as_follow"] = same
    return rows


def from_statistics(rounds: int) -> list[Any]:
    w, x, y = inputs(2 * LARGE, LARGE, NEURONS)
    form, gram, drift = SCHEME.project(w), product(y.T, y), product(y.T, x - y)
    runs = {"large_product": lambda: product(gram, w), "recursion": lambda: recursion(w, gram, drift, form)}
    seconds = medians(runs, rounds)
    operations = 2 * LARGE**2 * NEURONS
    rows = [row(name, LARGE, operations, seconds[name], {}) for name in runs]
    rows[1]["of_rate_of_large"] = rows[1]["gflops"] / rows[0]["gflops"]
    return rows


def compilations() -> list[Any]:
    rows = []
    for i, size in enumerate((256, 1024, 4096)):
        w, square = jnp.zeros((size, NEURONS - 8 * (i + 1))), jnp.eye(size)
        form = SCHEME.project(w)
        start = time.perf_counter()
        recursion.lower(w, square, square, form).compile()
        rows.append({"what": "compilation", "inputs": size, "seconds": time.perf_counter() - start})
    return rows


def brevitas(python: str, seconds: float) -> Any:
    """What Brevitas takes for the layer, over `seconds`, and how many of its codes are ours."""
    w, x, y = inputs(ROWS, SMALL, NEURONS)
    form = SCHEME.project(w)
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "in.npz"), Path(folder, "out.npz")
        np.savez(given, w=w, x=x, y=y, scale=form.scale.reshape(-1))
        script = Path(__file__).with_name("gpfq_brevitas.py")
        subprocess.run([python, "-W", "ignore", script, "--input", given, "--out", found], check=True)
        with np.load(found) as file:
            taken, codes, versions = float(file["seconds"]), file["codes"], str(file["versions"])
    same = float((whole(w, x, y, form).astype(jnp.int32) - 8 == codes).mean())
    return {
        "what": "brevitas",
        "inputs": SMALL,
        "seconds": taken,
        "over_gpfq": taken / seconds,
        "codes_as_ours": same,
        "versions": versions,
    }


def table() -> str:
    by_what = {(row["what"], row["inputs"]): row for row in stored("gpfq_speed")}
    gpfq, recursion = by_what["gpfq", 1024], by_what["recursion", 4096]
    compiled = [row["seconds"] for row in by_what.values() if row["what"] == "compilation"]
    walks = [row["walk_in_forward_passes"] for row in stored("gpfq_walk")]
    new = [row["compilations"] for row in stored("gpfq_walk")[1:]]
    rows = [
        [
            "N = n = 1024, m = 4096, over [N, m] [m, N] products",
            f"{gpfq['of_rate_of_wide']:.2f} of their rate",
            ".7 (.9)",
        ],
        ["the same over [N, N] [N, n] products", f"{gpfq['of_rate_of_square']:.2f} of their rate", ".7 (.9)"],
        ["the same, in seconds", f"{gpfq['seconds']:.2f}", ""],
        ["over the literal recursion as a scan", f"{gpfq['follow_over_this']:.1f} times", "4 (5)"],
    ]
    if peer := by_what.get(("brevitas", 1024)):
        same = f"{100 * peer['codes_as_ours']:.2f} % equal codes"
        rows.append([f"over Brevitas' GPFQ ({same})", f"{peer['over_gpfq']:.1f} times", "30"])
    rows += [
        ["N = 4096, n = 1024, recursion", f"{recursion['of_rate_of_large']:.2f} of the matmul rate", ".4 (.6)"],
        ["compilation, N = 256, 1024, 4096", ", ".join(f"{s:.1f}" for s in compiled) + " s", "3 s"],
        ["walk over ResNet-20, in forward passes", ", ".join(f"{w:.1f}" for w in walks), "3"],
        ["its compilations for further numbers of batches", ", ".join(map(str, new)), "0"],
    ]
    return grid(["GPFQ", "measured", "goal (hoped for)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--brevitas", metavar="PYTHON")
    arguments = parser.parse_args()
    rows = [*compilations(), *from_inputs(arguments.rounds), *from_statistics(arguments.rounds)]
    if arguments.brevitas:
        ours = next(found["seconds"] for found in rows if found["what"] == "gpfq")
        rows.append(brevitas(arguments.brevitas, ours))
    for found in rows:
        print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()})
    record("gpfq_speed", rows, rounds=arguments.rounds, samples=ROWS, neurons=NEURONS)


if __name__ == "__main__":
    main()
