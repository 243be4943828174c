"""What `lcq.lc` costs in time and memory: LeNet300, batch 256, C steps amortised over an epoch.

    python -m benchmarks.micro.lc_overhead        results/lc_overhead.json

Time: epochs of 234 steps, bare and wrapped, interleaved in one process, medians of the ratio over rounds; as separate
jitted calls, and as one jitted `lax.scan` over the epoch. Memory: bytes of the wrapper's state over bytes of the
selected weights, and the temporary bytes of a compiled C step over bytes of its largest leaf.
"""

import functools
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.examples import models

STEPS, BATCH, ROUNDS = 234, 256, 15
SCHEMES = {"KMeans(2)": lcq.KMeans(2), "KMeans(16)": lcq.KMeans(16), "Ternary()": lcq.Ternary()}


def loss_of(params: Any, x: Any, y: Any) -> Any:
    logits = models.lenet300().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loops(tx: Any) -> dict[str, Any]:
    """An epoch, (params, state, x, y) -> (params, state), as separate calls and as one scan."""

    def step(carry: Any, x: Any, y: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss_of)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    call = jax.jit(step, donate_argnums=0)

    def calls(carry: Any, x: Any, y: Any) -> Any:
        for _ in range(STEPS):
            carry = call(carry, x, y)
        return carry

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(carry: Any, x: Any, y: Any) -> Any:
        return jax.lax.scan(lambda carry, _: (step(carry, x, y), None), carry, length=STEPS)[0]

    return {"calls": calls, "scan": scan}


def seconds(epoch: Any, carry: Any, x: Any, y: Any) -> tuple[float, Any]:
    """Per step, over an epoch."""
    jax.block_until_ready(carry)
    start = time.perf_counter()
    carry = jax.block_until_ready(epoch(carry, x, y))
    return (time.perf_counter() - start) / STEPS, carry


def ratios(txs: dict[str, Any], params: Any, x: Any, y: Any) -> dict[str, Any]:
    """Of both kinds of loop: milliseconds a step, and medians of the ratio to the first optimizer."""
    result = {}
    for kind in ("calls", "scan"):
        epochs, carries = {name: loops(tx)[kind] for name, tx in txs.items()}, {}
        for name, tx in txs.items():
            copy = jax.tree.map(jnp.copy, params)
            _, carries[name] = seconds(epochs[name], (copy, tx.init(copy)), x, y)
        times: dict[str, list[float]] = {name: [] for name in txs}
        for _ in range(ROUNDS):
            for name in txs:
                spent, carries[name] = seconds(epochs[name], carries[name], x, y)
                times[name].append(spent)
        first = times[next(iter(txs))]
        result[kind] = {
            name: {
                "milliseconds": 1e3 * statistics.median(spent),
                "ratio": statistics.median(a / b for a, b in zip(spent, first, strict=True)),
            }
            for name, spent in times.items()
        }
    return result


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def table() -> str:
    rows = [
        [
            f"`{row['scheme']}`",
            *(f"{row['steps'][kind]['wrapped']['ratio']:.3f}" for kind in ("calls", "scan")),
            *(f"{row['steps'][kind]['bare again']['ratio']:.3f}" for kind in ("calls", "scan")),
            f"{row['state_over_weights']:.2f}",
            f"{row['c_step_temporary_over_largest_leaf']:.2f}",
        ]
        for row in stored("lc_overhead")
    ]
    head = ["LeNet300, batch 256", "step over bare: calls", "scan", "noise: calls", "scan"]
    return grid([*head, "state / weights", "C step's memory / leaf"], rows)


def main() -> None:
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.random((BATCH, 784)), jnp.float32), jnp.asarray(rng.integers(0, 10, BATCH))
    params = models.lenet300().init(jax.random.key(0), x)["params"]
    rows = []
    for name, scheme in SCHEMES.items():
        rules = [lcq.Rule("(.*/)?kernel", scheme)]
        inner = optax.sgd(0.05, 0.9, nesterov=True)
        wrapped = lcq.lc(inner, rules, mu=lcq.geometric(1e-4, 1.1, steps=50), every=STEPS)
        steps = ratios({"bare": inner, "wrapped": wrapped, "bare again": inner}, params, x, y)
        state = wrapped.init(params)
        weights = [w for path, w in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path)]
        temporary = jax.jit(lcq.training.c_step).lower(state, params).compile().memory_analysis().temp_size_in_bytes
        row = {
            "scheme": name,
            "steps": steps,
            "state_over_weights": (nbytes(state) - nbytes(state.inner)) / nbytes(weights),
            "c_step_temporary_over_largest_leaf": temporary / max(w.nbytes for w in weights),
        }
        rows.append(row)
        print(row, flush=True)
    record("lc_overhead", rows, seeds=[0])


if __name__ == "__main__":
    main()
