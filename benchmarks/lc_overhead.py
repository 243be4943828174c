"""What `lcq.lc` costs in time and memory: LeNet300, batch 256, C steps amortised over an epoch.

    python benchmarks/lc_overhead.py        results/lc_overhead.json

Time: epochs of 234 separate jitted steps, bare and wrapped, interleaved in one process; medians of the ratio over
rounds. Memory: bytes of the wrapper's state over bytes of the selected weights, and the temporary bytes of a compiled C
step over bytes of its largest leaf.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from record import record

import lcq
from lcq.examples import models

STEPS, BATCH, ROUNDS = 234, 256, 15
SCHEMES = {"KMeans(2)": lcq.KMeans(2), "KMeans(16)": lcq.KMeans(16), "Ternary()": lcq.Ternary()}


def loss_of(params: Any, x: Any, y: Any) -> Any:
    logits = models.lenet300().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def stepper(tx: Any) -> Any:
    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        updates, state = tx.update(jax.grad(loss_of)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def seconds(step: Any, carry: Any, x: Any, y: Any) -> tuple[float, Any]:
    """Per step, over an epoch."""
    jax.block_until_ready(carry)
    start = time.perf_counter()
    for _ in range(STEPS):
        carry = step(*carry, x, y)
    jax.block_until_ready(carry)
    return (time.perf_counter() - start) / STEPS, carry


def nbytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.random((BATCH, 784)), jnp.float32), jnp.asarray(rng.integers(0, 10, BATCH))
    params = models.lenet300().init(jax.random.key(0), x)["params"]
    rows = []
    for name, scheme in SCHEMES.items():
        rules = [lcq.Rule("(.*/)?kernel", scheme)]
        inner = optax.sgd(0.05, 0.9, nesterov=True)
        wrapped = lcq.lc(inner, rules, mu=lcq.geometric(1e-4, 1.1, steps=50), every=STEPS)
        steps, carries = {}, {}
        for kind, tx in (("bare", inner), ("wrapped", wrapped), ("bare again", inner)):
            copy = jax.tree.map(jnp.copy, params)
            steps[kind], carries[kind] = stepper(tx), (copy, tx.init(copy))
            _, carries[kind] = seconds(steps[kind], carries[kind], x, y)
        times: dict[str, list[float]] = {kind: [] for kind in steps}
        for _ in range(ROUNDS):
            for kind in steps:
                spent, carries[kind] = seconds(steps[kind], carries[kind], x, y)
                times[kind].append(spent)
        state = wrapped.init(params)
        weights = [w for path, w in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(path)]
        temporary = jax.jit(lcq.c_step).lower(state, params).compile().memory_analysis().temp_size_in_bytes
        row = {
            "scheme": name,
            "milliseconds": {kind: 1e3 * statistics.median(spent) for kind, spent in times.items()},
            "wrapped_over_bare": statistics.median(w / b for w, b in zip(times["wrapped"], times["bare"], strict=True)),
            "bare_over_bare": statistics.median(w / b for w, b in zip(times["bare again"], times["bare"], strict=True)),
            "state_over_weights": (nbytes(state) - nbytes(state.inner)) / nbytes(weights),
            "c_step_temporary_over_largest_leaf": temporary / max(w.nbytes for w in weights),
        }
        rows.append(row)
        print(row, flush=True)
    record("lc_overhead", rows, seeds=[0])


if __name__ == "__main__":
    main()
