#!/usr/bin/env bash
# optax.contrib.sam makes integers of booleans in the state of what it wraps.
#
# Versions: optax 0.2.8, jax 0.10.2.
# Seen: states of the two steps are mixed by arithmetic, so a boolean mask in the inner state is int32 after one update. The
# step is compiled twice, and code that inverts the mask with ~ computes -1 - mask. A mask in uint8 keeps its type.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Kept(NamedTuple):
    mask: Any


def after(dtype):
    def init(params):
        return Kept(jax.tree.map(lambda w: (jnp.abs(w) > 0.5).astype(dtype), params))

    def update(updates, state, params=None):
        return jax.tree.map(lambda u, k: u * k, updates, state.mask), state

    inner = optax.chain(optax.GradientTransformation(init, update), optax.sgd(0.1))
    tx = optax.contrib.sam(inner, optax.chain(optax.contrib.normalize(), optax.sgd(0.05)))
    params, step = {"w": jnp.array([1.0, 0.1])}, jax.jit(tx.update)
    state = tx.init(params)
    for _ in range(4):
        _, state = step(params, state, params)
    masks = [s.mask["w"].dtype.name for s in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, Kept)) if isinstance(s, Kept)]
    return sorted(set(masks)), step._cache_size()


found = {name: after(name) for name in ("bool", "uint8")}
print("optax", m.version("optax"), found)
assert found == {"bool": (["int32"], 2), "uint8": (["uint8"], 1)}
PYTHON
