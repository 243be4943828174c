#!/usr/bin/env bash
# numpy adds up int4 and int2 codes in four and two bits: the sum of 100 ones is 4 and 0, their mean 0.
#
# Versions: ml_dtypes 0.7.0, numpy 2.4.6.
# Seen: sum, cumsum, dot and add.at of 100 ones wrap in int4, uint4 and int2, mean divides what is left, and nothing is
# raised; numpy widens int8 and uint8 to 64 bits for the same calls. matmul and bincount of the same arrays are right.
# Counts and means of codes, and of 0-1 masks in four bits, are wrong unless they are cast first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.7.0 numpy==2.4.6
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata as m

import ml_dtypes
import numpy as np


def adds(kind):
    ones = np.ones(100, kind)
    sums = np.sum(ones), np.cumsum(ones)[-1], np.dot(ones, ones), np.mean(ones)
    return [float(v) for v in (*sums, np.matmul(ones[None], ones[:, None])[0, 0], np.bincount(ones)[1])]


kinds = (ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2)
found = {np.dtype(kind).name: adds(kind) for kind in kinds}
wide = {name: float(np.sum(np.ones(100, name))) for name in ("int8", "uint8")}
print("ml_dtypes", m.version("ml_dtypes"), "numpy", m.version("numpy"))
print("sum, cumsum, dot, mean, matmul and bincount of 100 ones:", found, "sums of", wide)
assert found == {"int4": [4, 4, 4, 0, 100, 100], "uint4": [4, 4, 4, 0, 100, 100], "int2": [0, 0, 0, 0, 100, 100]}
assert wide == {"int8": 100, "uint8": 100}
PYTHON
