#!/usr/bin/env bash
# tensorstore's mean of small floats is 0, and its minimum and maximum of float8_e4m3fn are NaN.
#
# Versions: tensorstore 0.1.86, numpy 2.4.6, ml_dtypes 0.6.0.
# Seen: tensorstore.downsample of ones by 2 with "mean" is 0 in float8_e4m3fn, float8_e5m2 and float4_e2m1fn, with "min"
# and "max" it is NaN in float8_e4m3fn, which has no infinity. "median" is 1 everywhere, and bfloat16 and int4 are
# right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check tensorstore==0.1.86 numpy==2.4.6 ml_dtypes==0.6.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
import tensorstore as ts


def found(kind):
    kind = getattr(ts, kind)
    ones = ts.array(np.ones(8, np.float32).astype(kind.numpy_dtype))
    ways = ("mean", "min", "max", "median")
    return [float(np.asarray(ts.downsample(ones, [2], how).read().result()).astype("f4")[0]) for how in ways]


kinds = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "bfloat16", "int4")
seen = {kind: found(kind) for kind in kinds}
print("tensorstore", m.version("tensorstore"), "mean, min, max, median of ones:", seen)
assert seen["float8_e4m3fn"][0] == 0 and np.isnan(seen["float8_e4m3fn"][1:3]).all() and seen["float8_e4m3fn"][3] == 1
assert seen["float8_e5m2"] == seen["float4_e2m1fn"] == [0, 1, 1, 1] and seen["bfloat16"] == seen["int4"] == [1] * 4
PYTHON
