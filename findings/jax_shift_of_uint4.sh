#!/usr/bin/env bash
# A uint4 or uint2 array is shifted to the right with its highest bit copied, as if it had a sign.
#
# Versions: jax 0.10.2, ml_dtypes 0.6.0, numpy 2.4.6.
# Seen: uint4 15 >> 2 is 15 in jax, eager and under jit, and 3 in numpy; uint2 2 >> 1 is 3. Numbers below half of the
# range are right, as are lax.shift_right_logical, uint8, and // 4. Codes that are cut out of four bits by shifts are
# wrong for half of the range, without an error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

codes = np.arange(16).astype(ml_dtypes.uint4)
numpys = (codes >> np.array(2, ml_dtypes.uint4)).astype(int)
shifted = [np.asarray(run(jnp.asarray(codes))).astype(int) for run in (lambda a: a >> 2, jax.jit(lambda a: a >> 2))]
logical = np.asarray(jax.lax.shift_right_logical(jnp.asarray(codes), jnp.uint4(2))).astype(int)
two = int(jnp.array([2], jnp.uint2)[0] >> 1), int(jnp.array([255], jnp.uint8)[0] >> 2)
print("jax", m.version("jax"), "0 .. 15 >> 2:", shifted[0].tolist(), "numpy:", numpys.tolist(), "uint2 2 >> 1:", two[0])
assert all(s.tolist() == [0] * 4 + [1] * 4 + [14] * 4 + [15] * 4 for s in shifted) and two == (3, 63)
assert numpys.tolist() == logical.tolist() == [n >> 2 for n in range(16)]
PYTHON
