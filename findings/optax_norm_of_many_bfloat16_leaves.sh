#!/usr/bin/env bash
# optax.global_norm of many bfloat16 leaves stops growing.
#
# Versions: optax 0.2.8, jax 0.10.2.
# Seen: the global norm of 1,000 leaves of one bfloat16 1 is 16, not 31.6: the squares of leaves are added up in
# bfloat16, where 256 + 1 is 256. clip_by_global_norm(10) then leaves a gradient of norm 19.8. A net that is not
# stacked over its layers has hundreds of leaves; in one leaf, or in float32, the norm is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
import optax

many = {str(i): jnp.ones(1, jnp.bfloat16) for i in range(1000)}
one = {"all": jnp.ones(1000, jnp.bfloat16)}
clipped = optax.clip_by_global_norm(10.0).update(many, optax.EmptyState())[0]
true = float(optax.global_norm(jax.tree.map(lambda a: a.astype(jnp.float32), clipped)))
found = float(optax.global_norm(many)), float(optax.global_norm(one)), true
print("optax", m.version("optax"), "norm of 1,000 leaves, of one, and after clipping to 10:", found)
assert found[0] == 16 and abs(found[1] - 31.6) < 0.2 and 19.5 < found[2] < 20
PYTHON
