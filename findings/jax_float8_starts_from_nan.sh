#!/usr/bin/env bash
# Maxima and softmax of float8 types without infinity are NaN, because jax starts them from one.
#
# Versions: jax 0.10.2.
# Seen: segment_max of float8_e4m3fn is NaN for segments full of numbers, and nn.softmax of ten zeros is ten NaN: both
# start from minus infinity, which is NaN in that type. jnp.max is right there, and of float8_e8m0fnu, the type of MX scales,
# it is NaN too, where numpy gives the largest. float8_e5m2 has an infinity and gives numbers. No error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
import numpy as np


def found(kind):
    given = jnp.array([1, 4, 2]).astype(kind)
    three = jax.ops.segment_max(given, jnp.zeros(3, int), 1)[0], jax.nn.softmax(given)[1], jnp.max(given)
    return [round(float(one), 2) for one in three]


kinds = {kind: found(kind) for kind in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")}
print("jax", m.version("jax"), "segment_max, softmax at the largest, max of 1, 4, 2:", kinds)
four, five, scale = (np.isnan(k) for k in kinds.values())
assert four.tolist() == [True, True, False] and not five.any() and scale[2]
assert float(np.asarray(jnp.array([1, 4, 2]).astype(jnp.float8_e8m0fnu)).max()) == 4
PYTHON
