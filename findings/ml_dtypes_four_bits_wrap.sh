#!/usr/bin/env bash
# 9 cast to int4 is -7 in numpy and 7 in jax.
#
# Versions: ml_dtypes 0.6.0, jax 0.10.2, numpy 2.4.6.
# Seen: ml_dtypes' int4 under numpy takes the number modulo 16, as numpy does for its own integers; jax, eager and
# under jit, takes the nearest end of the range. 300 is -4 and 7, infinity 0 and 7. int8 differs likewise, 300 being
# 44 and 127. Codes that were clipped in one are wrong in the other, without an error.
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

given = np.array([-9, 9, 300, np.inf], "f4")
one = given.astype(ml_dtypes.int4).astype("i4")
two = np.asarray(jax.jit(lambda a: a.astype(jnp.int4).astype(jnp.int32))(given))
eager = np.asarray(jnp.asarray(given).astype(jnp.int4).astype(jnp.int32))
print("ml_dtypes", m.version("ml_dtypes"), "jax", m.version("jax"), given, "->", one, two)
assert one.tolist() == [7, -7, -4, 0] and two.tolist() == eager.tolist() == [-8, 7, 7, 7]
PYTHON
