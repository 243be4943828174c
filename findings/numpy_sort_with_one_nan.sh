#!/usr/bin/env bash
# np.sort leaves a bfloat16 or float8 array unsorted if one number is NaN.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6.
# Seen: sort of 3, NaN, 1, 2, NaN, 0 gives them back in the same order, argsort is 0 .. 5 and unique finds six; in float16
# NaN go to the end and unique finds five. Thresholds and quantiles that are read off a sorted array are wrong, where
# NaN at the end would be seen. No error. Remedy: astype(float32), or jnp.sort, which is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import ml_dtypes
import numpy as np


def found(kind):
    given = np.array([3, np.nan, 1, 2, np.nan, 0]).astype(kind)
    return str(np.sort(given).astype("f4")), np.argsort(given, kind="stable").tolist(), len(np.unique(given))


kinds = {np.dtype(k).name: found(k) for k in (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.float16)}
print("ml_dtypes", m.version("ml_dtypes"), kinds)
right = kinds.pop("float16")
assert right == ("[ 0.  1.  2.  3. nan nan]", [5, 2, 3, 0, 1, 4], 5)
assert all(k == ("[ 3. nan  1.  2. nan  0.]", [0, 1, 2, 3, 4, 5], 6) for k in kinds.values())
PYTHON
