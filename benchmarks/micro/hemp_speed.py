"""What the entropy of HEMP and its gradient cost: 1e6 weights, medians in one process.

taskset -c 0 python -m benchmarks.micro.hemp_speed [rounds]        results/hemp_speed.json
"""

import itertools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

import lcq
from benchmarks.checks.hemp_exact import CENTRES, ORDERS, SIZE, sample, slopes_of
from benchmarks.harness.record import record

ROUNDS = 9


def speed(rounds: int) -> list[dict[str, Any]]:
    """Median and least seconds of the value, and of value and gradient."""
    rows = []
    for size, order in itertools.product(CENTRES, ORDERS):
        w, c = (jnp.asarray(a, jnp.float32) for a in sample(SIZE, size))
        value = jax.jit(lambda w, c, order=order: lcq.training.block_entropy(w, c, order))
        for what, run in (("value", value), ("value_and_gradient", slopes_of(order))):
            jax.block_until_ready(run(w, c))
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                jax.block_until_ready(run(w, c))
                seconds.append(time.perf_counter() - start)
            row = {"what": what, "order": order, "centres": size, "weights": SIZE}
            rows.append({**row, "seconds": statistics.median(seconds), "least_seconds": min(seconds)})
    return rows


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    rows = speed(rounds)
    for row in rows:
        print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
    record("hemp_speed", rows, seeds=[0], rounds=rounds)


if __name__ == "__main__":
    main()
