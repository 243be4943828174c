"""What a C step of each scheme takes on one core: a normal leaf in float32, in million weights a second.

    taskset -c 1 python -m benchmarks.micro.csteps        results/csteps.json

Cold, and warm: from the form of slightly different weights (2 % noise), inside jit, the best of ROUNDS calls. Passes:
that time in times of a jitted sum of the leaf. Distortion: ||w - Delta||^2 / ||w||^2. Beside it, in the same process,
qwix's `quantize` of the leaf to int4: scales from the largest magnitude, no search. Leaves have 4096 rows; slow schemes
get fewer columns.
"""

import functools
import importlib
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

ROWS, COLUMNS, FEW, ROUNDS, SEED = 4096, 11008, 344, 3, 0
FAST = {
    "Uniform(4, channel)": lcq.Uniform(4, per="channel"),
    "Uniform(4, per=32)": lcq.Uniform(4, per=32),
}
SLOW = {
    "KMeans(16)": lcq.KMeans(16),
    "KMeans(16, channel)": lcq.KMeans(16, per="channel"),
    "KMeans(16, per=32)": lcq.KMeans(16, per=32),
    "Ternary(per=32)": lcq.Ternary(per=32),
    "Uniform(4, per=32, zero_point, scale_bits=6)": lcq.Uniform(4, per=32, zero_point=True, scale_bits=6),
}


def best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest call after one."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def reading(w: jax.Array) -> float:
    """Seconds of a sum."""
    total = jax.jit(jnp.sum)
    return best(lambda: total(w))


def distortion(w: jax.Array, dense: jax.Array) -> float:
    return float(jnp.sum((w - dense) ** 2) / jnp.sum(w**2))


def leaf(columns: int) -> tuple[jax.Array, jax.Array]:
    """Weights, and the same with 2 % of noise."""
    rng = np.random.default_rng(SEED)
    w = rng.standard_normal((ROWS, columns), np.float32)
    return jnp.asarray(w), jnp.asarray(w + 0.02 * rng.standard_normal((ROWS, columns), np.float32))


def measured(schemes: dict[str, Any], columns: int) -> list[dict[str, Any]]:
    before, w = leaf(columns)
    read, rows = reading(w), []
    for name, scheme in schemes.items():
        cold, warm = jax.jit(scheme.project), jax.jit(lambda w, form, scheme=scheme: scheme.project(w, form))
        form = cold(before)
        row = {"scheme": name, "columns": columns, "distortion": distortion(w, cold(w).dense())}
        row["warm_distortion"] = distortion(w, warm(w, form).dense())
        calls = {"cold": functools.partial(cold, w), "warm": functools.partial(warm, w, form)}
        for kind, run in calls.items():
            seconds = best(run)
            row |= {f"{kind}_per_second": w.size / seconds, f"{kind}_passes": seconds / read}
        print(row, flush=True)
        rows.append(row)
    return rows


def peers(columns: int) -> list[dict[str, Any]]:
    """qwix, the largest magnitude of every column, and of every 32 rows of it."""
    qwix, (_, w) = importlib.import_module("qwix"), leaf(columns)
    read, rows = reading(w), []
    for name, tiled in (("qwix int4, channel", None), ("qwix int4, tiles of 32", {0: 32})):
        run = jax.jit(lambda w, tiled=tiled: qwix.quantize(w, jnp.int4, channelwise_axes=[1], tiled_axes=tiled))
        seconds = best(lambda run=run: run(w))
        dense = qwix.dequantize(run(w))
        row = {"scheme": name, "columns": columns, "distortion": distortion(w, dense)}
        rows.append(row | {"cold_per_second": w.size / seconds, "cold_passes": seconds / read})
        print(rows[-1], flush=True)
    return rows


def table() -> str:
    """The table of docs/results.md."""
    head = ["C step, one core", "million weights a second, cold / warm", "passes over the leaf", "distortion"]
    rows = []
    for row in stored("csteps"):
        kinds = [kind for kind in ("cold", "warm") if f"{kind}_per_second" in row]
        rates = " / ".join(f"{row[f'{kind}_per_second'] / 1e6:.3g}" for kind in kinds)
        passes = " / ".join(f"{row[f'{kind}_passes']:.0f}" for kind in kinds)
        rows.append([row["scheme"], rates, passes, f"{row['distortion']:.5f}"])
    return grid(head, rows)


if __name__ == "__main__":
    found = [*measured(FAST, COLUMNS), *peers(COLUMNS), *measured(SLOW, FEW)]
    record("csteps", found, seeds=[SEED], rows_of_leaf=ROWS, rounds=ROUNDS, cpus=len(os.sched_getaffinity(0)))
