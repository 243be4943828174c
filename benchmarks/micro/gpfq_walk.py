"""What the walk itself costs: ResNet-20 with other weights, no statistics and no rounding, over forward passes.

python -m benchmarks.micro.gpfq_walk [batches ..]          writes results/gpfq_walk.json

Random weights and images, batches of 128; a forward pass is one jitted call for each batch. The walk makes two nets'
activations, so two passes are its floor. Compilations are those of the first walk, beyond what earlier rows compiled.
"""

import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness.record import record
from lcq.examples import models
from lcq.ptq.two_stream import walk
from lcq.tracing.param_flow import trace

ROUNDS = 5
COMPILED: list[str] = []
"""An entry for each compilation so far."""


def listen(event: str, seconds: float, **_: Any) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


def main() -> None:
    jax.monitoring.register_event_duration_secs_listener(listen)
    net = models.ResNet(20)
    params = net.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    fn: Any = net.apply
    paths = ["/".join(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    leaves = dict(zip(paths, jax.tree.leaves(params), strict=True))
    kernels = [path for path in paths if path.endswith("kernel")]
    forward = jax.jit(fn)
    rows = []
    for count in [int(word) for word in sys.argv[1:]] or [1, 4, 8]:
        batches = list(jax.random.normal(jax.random.key(1), (count, 128, 32, 32, 3)))
        start, before = time.perf_counter(), len(COMPILED)
        program = trace(fn, params, batches[0], kernels)
        traced = time.perf_counter() - start

        def once(batches: Any = batches, program: Any = program) -> None:
            other = dict(leaves)
            for visit in walk(program, leaves, other, batches):
                path = visit.product.path
                other[path] = leaves[path] * 1.01
                visit.finish()

        def passes(batches: Any = batches) -> None:
            for batch in batches:
                forward(params, batch).block_until_ready()

        start = time.perf_counter()
        once()
        first, compiled = time.perf_counter() - start, len(COMPILED) - before
        passes()
        seconds: dict[str, list[float]] = {"walk": [], "forward": []}
        for _ in range(ROUNDS):
            for name, run in (("walk", once), ("forward", passes)):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
        ratio = statistics.median(a / b for a, b in zip(seconds["walk"], seconds["forward"], strict=True))
        rows.append(
            {
                "batches": count,
                "walk_seconds": statistics.median(seconds["walk"]),
                "forward_seconds": statistics.median(seconds["forward"]),
                "walk_in_forward_passes": ratio,
                "trace_seconds": traced,
                "first_walk_seconds": first,
                "compilations": compiled,
                "products": len(program.products),
            }
        )
        print(rows[-1], flush=True)
    record("gpfq_walk", rows, seeds=[0, 1])


if __name__ == "__main__":
    main()
