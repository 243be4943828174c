#!/usr/bin/env bash
# NaN cast to float4_e2m1fn is -0.0, in numpy and in jax.
#
# Versions: ml_dtypes 0.6.0, jax 0.10.2, numpy 2.4.6.
# Seen: the type has neither NaN nor infinity; infinity becomes 6, the largest number, and NaN becomes -0.0, in numpy's
# astype and in XLA's convert alike. A net that has diverged is finite after the cast. float8_e4m3fn keeps NaN.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 jax==0.10.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

given = np.array([np.nan, np.inf, -np.inf, 1.0], "f4")
one = given.astype(ml_dtypes.float4_e2m1fn).astype("f4")
two = np.asarray(jax.jit(lambda a: a.astype(jnp.float4_e2m1fn).astype(jnp.float32))(given))
print("ml_dtypes", m.version("ml_dtypes"), "jax", m.version("jax"), given, "->", one, two)
assert np.array_equal(one, two) and one.tolist() == [0, 6, -6, 1] and np.signbit(one[0])
assert np.isnan(given.astype(ml_dtypes.float8_e4m3fn).astype("f4")[0])
PYTHON
