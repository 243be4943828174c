"""C steps of four layers: as one stack, and as four leaves.

    taskset -c 1 python -m benchmarks.micro.stacks        results/stacks.json

`lcq.compress`, cold, compiled before; layers are 512 x 2048, random. Medians of rounds in which all cases take turns.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

LAYERS, SHAPE, ROUNDS = 4, (512, 2048), 7
SCHEMES = {
    "Uniform(4, per=32)": lcq.Uniform(4, per=32),
    'Uniform(4, per="channel")': lcq.Uniform(4, per="channel"),
    "Ternary()": lcq.Ternary(),
    "KMeans(16)": lcq.KMeans(16),
    "Prune(fraction=.1)": lcq.Prune(fraction=0.1),
}


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def table() -> str:
    return grid(
        ["seconds", "one stack", "four leaves", "ratio"],
        [
            [f"`{row['scheme']}`", f"{row['stack']:.3f}", f"{row['leaves']:.3f}", f"{row['stack'] / row['leaves']:.2f}"]
            for row in stored("stacks")
        ],
    )


def main() -> None:
    stack = jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, *SHAPE)), jnp.float32)
    leaves = {f"w{i}": jnp.array(layer) for i, layer in enumerate(stack)}
    runs: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, scheme in SCHEMES.items():
        alone, together = [lcq.Rule("w.*", scheme)], [lcq.Rule("w", scheme, stacked=1)]
        runs[name, "stack"] = lambda rules=together: lcq.compress({"w": stack}, rules)
        runs[name, "leaves"] = lambda rules=alone: lcq.compress(leaves, rules)
    rounds = [{case: seconds(run) for case, run in runs.items()} for _ in range(1 + ROUNDS)][1:]
    medians = {case: statistics.median(each[case] for each in rounds) for case in runs}
    rows = [{"scheme": name, **{how: round(medians[name, how], 4) for how in ("stack", "leaves")}} for name in SCHEMES]
    for row in rows:
        print(row, flush=True)
    record("stacks", rows, seeds=[0], rounds=ROUNDS)


if __name__ == "__main__":
    main()
