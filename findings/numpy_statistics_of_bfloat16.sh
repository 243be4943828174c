#!/usr/bin/env bash
# numpy's mean and std of a bfloat16 array are those of its first few hundred numbers.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6.
# Seen, of 100,000 normal weights: std is .21, not 1, and the mean of their magnitudes .011, not .80; the mean of 1,000 ones
# is .256. Sums are kept in bfloat16, where 256 + 1 is 256, and the mean divides by all; in float16 the mean is right. int4
# wraps: seven, three times, has the mean 1. The sum is ml_dtypes' issue 63, closed. Remedy: dtype=np.float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import ml_dtypes
import numpy as np

w = np.random.default_rng(0).normal(size=100_000).astype(ml_dtypes.bfloat16)
ones, four = np.ones(1000), np.array([7, 7, 7], ml_dtypes.int4)
std, size, one = float(w.std()), float(np.abs(w).mean()), float(ones.astype(w.dtype).mean())
right = float(w.std(dtype="f4")), float(np.abs(w).mean(dtype="f4")), float(ones.astype("f2").mean())
print("ml_dtypes", m.version("ml_dtypes"), "std, mean magnitude, mean of ones:", (std, size, one), "right:", right)
print("mean of three int4 7:", four.mean())
assert std < 0.3 and size < 0.02 and abs(one - 0.256) < 0.001 and int(four.mean()) == 1
assert abs(right[0] - 1) < 0.01 and abs(right[1] - 0.8) < 0.01 and right[2] == 1
PYTHON
