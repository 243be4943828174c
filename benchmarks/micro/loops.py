"""Recurrent nets packed: a loop's kernels decoded before it, against the dense net and against codes in each round.

    python -m benchmarks.micro.loops        results/loops.json, a minute

Contestants of a row take turns; figures are medians. Nothing else may run meanwhile.
"""

import statistics
import time
from typing import Any

import jax
import numpy as np
from flax import linen as nn

import lcq
from benchmarks.harness.record import record

CELLS = (nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell)
SIZES = ((16, 64, 128), (16, 64, 512), (1, 64, 512))
"""Sequences, steps, units."""
ROUNDS = 15


def row(cell: Any, shape: tuple[int, int, int]) -> dict[str, Any]:
    net, x = nn.RNN(cell(shape[-1])), jax.random.normal(jax.random.key(1), shape)
    params = net.init(jax.random.key(0), x)
    forms = lcq.compress(params, [lcq.Rule("(.*/)?kernel", lcq.Uniform(4, per="channel"))])
    contestants = {
        "dense": (jax.jit(net.apply), lcq.decompress(forms)),
        "packed": (jax.jit(lcq.packed(net.apply)), forms),
        "on codes": (jax.jit(lcq.packed(net.apply, held=0)), lcq.packed(net.apply, held=0).prepack(forms, x)),
    }
    memory = {
        name: fn.lower(p, x).compile().memory_analysis().temp_size_in_bytes for name, (fn, p) in contestants.items()
    }
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    results = {name: np.asarray(fn(p, x)) for name, (fn, p) in contestants.items()}
    for _ in range(ROUNDS):
        for name, (fn, p) in contestants.items():
            start = time.perf_counter()
            jax.block_until_ready(fn(p, x))
            spent[name].append(1e3 * (time.perf_counter() - start))
    found = {name: statistics.median(times) for name, times in spent.items()}
    return {
        "cell": cell.__name__,
        "shape": list(shape),
        "milliseconds": {name: round(ms, 3) for name, ms in found.items()},
        "over_dense": {name: round(ms / found["dense"], 2) for name, ms in found.items() if name != "dense"},
        "temporary_bytes": memory,
        "apart": float(np.abs(results["packed"] - results["dense"]).max()),
    }


if __name__ == "__main__":
    made = []
    for cell in CELLS:
        for shape in SIZES:
            made.append(row(cell, shape))
            print(made[-1], flush=True)
    record("loops", made)
