#!/usr/bin/env bash
# zfp's tolerance holds neither for integers nor beside a large number.
#
# Versions: zfpy 1.0.1.post0, numpy 2.4.6.
# Seen: compress_numpy(tolerance=1e-6) of the int32 -4 .. 3 gives numbers that are off by 1, where without a tolerance
# they are exact. Of the float32 weights .01, .02 and .03 beside 1e8 nothing is left with a tolerance of 1e-3, beside 1
# they are within it. No error is raised.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check zfpy==1.0.1.post0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
import zfpy


def off(x, **how):
    return float(np.abs(zfpy.decompress_numpy(zfpy.compress_numpy(x, **how)).astype("f8") - x).max())


whole = np.arange(-4, 4, dtype=np.int32)
integers = off(whole, tolerance=1e-6), off(whole)
beside = {top: off(np.array([top, 0.01, 0.02, 0.03], np.float32), tolerance=1e-3) for top in (1.0, 1e8)}
print("zfpy", m.version("zfpy"), "largest error of integers, tolerance 1e-6 and none:", integers)
print("of weights beside 1 and 1e8, tolerance 1e-3:", beside)
assert integers == (1, 0) and beside[1.0] <= 1e-3 < 0.02 < beside[1e8]
PYTHON
