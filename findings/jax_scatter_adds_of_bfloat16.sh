#!/usr/bin/env bash
# Sums over indices stop at 256 in bfloat16, those of gradients of embeddings among them.
#
# Versions: jax 0.10.2, flax 0.12.8.
# Seen: jax.ops.segment_sum of 1,000 bfloat16 ones is 256, and so are jnp.bincount with such weights and the product of
# a sparse BCOO or BCSR row of ones with ones, where jnp.sum and a dense product are 1,000. A token that occurs 1,000
# times in a batch has in flax's Embed(dtype=bfloat16), with parameters in float32, a gradient of 256 instead of 1,000.
# In float16 all are 1,000, as 256 + 1 is no number of bfloat16.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import sparse


def sums(kind):
    ones, zeros = jnp.ones(1000, kind), jnp.zeros(1000, jnp.int32)
    matrix = jnp.ones((1, 1000), kind)

    def loss(table):
        return nn.Embed(4, 2, dtype=kind).apply({"params": {"embedding": table}}, zeros).astype(jnp.float32).sum()

    found = {
        "segment_sum": jax.ops.segment_sum(ones, zeros, 2)[0],
        "bincount": jnp.bincount(zeros, weights=ones, length=2)[0],
        "BCOO": (sparse.BCOO.fromdense(matrix) @ ones)[0],
        "BCSR": (sparse.BCSR.fromdense(matrix) @ ones)[0],
        "gradient": jax.grad(loss)(jnp.ones((4, 2)))[0, 0],
        "sum": ones.sum(),
        "dense": (matrix @ ones)[0],
    }
    return {name: float(a) for name, a in found.items()}


small, half = sums("bfloat16"), sums("float16")
print("jax", m.version("jax"), "flax", m.version("flax"), "in bfloat16:", small, "in float16:", half)
assert small.pop("sum") == small.pop("dense") == 1000 and set(small.values()) == {256}
assert set(half.values()) == {1000}
PYTHON
