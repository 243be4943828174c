#!/usr/bin/env bash
# Moving averages of bfloat16 numbers stop moving: optax.ema keeps what is long over, and Adam one large gradient for
# ever.
#
# Versions: optax 0.2.8, jax 0.10.2.
# Seen: optax.ema(.999) of 1,000 bfloat16 ones and 4,000 zeros is .50, in float32 .01. The second moment of optax.adam
# for bfloat16 parameters is 100 after 10 gradients of 100 and 1,990 of .01, in float32 13.6, and does not fall in
# another 2,000 steps: .999 of a bfloat16 number is rounded back to it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 optax==0.2.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
import optax


def ran(transform, values, kind, read):
    state = transform.init(jnp.ones(1, kind))
    values = jnp.asarray(values, kind)[:, None]

    def turn(state, g):
        u, state = transform.update(g, state)
        return state, read(u, state)

    return jax.lax.scan(turn, state, values)[1].astype(jnp.float32)[:, 0]


kinds = ("float32", "bfloat16")
mean = [float(ran(optax.ema(0.999), [1.0] * 1000 + [0.0] * 4000, k, lambda u, s: u)[-1]) for k in kinds]
moments = [ran(optax.adam(1e-3), [100.0] * 10 + [0.01] * 3990, k, lambda u, s: s[0].nu) for k in kinds]
moment = [[round(float(x[i]), 2) for i in (9, 1999, 3999)] for x in moments]
print("optax", m.version("optax"), "jax", m.version("jax"), "ema in float32 and bfloat16:", mean)
print("second moment after 10, 2,000 and 4,000 steps:", moment)
assert mean[0] < 0.02 and mean[1] > 0.4
assert moment[0][2] < moment[0][1] / 5 < moment[0][0] / 25 and moment[1][0] == moment[1][1] == moment[1][2]
PYTHON
