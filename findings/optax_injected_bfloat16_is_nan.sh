#!/usr/bin/env bash
# optax.inject_hyperparams rounds Adam's numbers to the type of the parameters: in bfloat16 the first step is NaN.
#
# Versions: optax 0.2.8, jax 0.10.2.
# Seen: inject_hyperparams(adam) and (adamw) of bfloat16 parameters keep b2 = .999 in bfloat16, where it is 1, so that
# the correction of the second moment divides 0 by 0; plain adam makes a step of the learning rate, and so does
# inject_hyperparams with hyperparam_dtype=float32. With one float32 parameter beside them nothing is rounded.
# Whoever adds a schedule of the learning rate this way, to compress or to finetune a bfloat16 net, loses every weight
# in one step.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check optax==0.2.8 jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax.numpy as jnp
import numpy as np
import optax


def step(optimizer, params):
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    return float(updates["w"][0])


net = {"w": jnp.ones(4, jnp.bfloat16)}
kinds = {"adam": optax.adam, "adamw": optax.adamw}
injected = {name: step(optax.inject_hyperparams(kind)(0.001), net) for name, kind in kinds.items()}
plain = {name: step(kind(0.001), net) for name, kind in kinds.items()}
wide = step(optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(0.001), net)
beside = step(optax.inject_hyperparams(optax.adam)(0.001), net | {"norm": jnp.ones(4)})
print("optax", m.version("optax"), "first step, injected:", injected, "plain:", plain)
print("with hyperparam_dtype=float32:", wide, "beside a float32 leaf:", beside)
assert all(np.isnan(v) for v in injected.values())
assert all(abs(v + 0.001) < 0.00001 for v in [*plain.values(), wide, beside])
PYTHON
