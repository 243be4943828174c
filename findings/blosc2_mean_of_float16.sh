#!/usr/bin/env bash
# blosc2 says that the mean of many float16 numbers is NaN or infinite.
#
# Versions: blosc2 4.14.1, numpy 2.4.6.
# Seen: NDArray.mean of 1,000 float16 numbers of 100 is infinite, of 100,000 it is NaN, and so is that of 100,000 ones;
# numpy's mean of the same arrays is 100 and 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check blosc2==4.14.1 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import blosc2
import numpy as np

arrays = [np.full(many, value, np.float16) for many, value in ((1000, 100), (100_000, 100), (100_000, 1))]
found = [float(blosc2.asarray(a).mean()) for a in arrays]
right = [float(a.mean()) for a in arrays]
print("blosc2", m.version("blosc2"), "numpy", m.version("numpy"), "mean:", found, "numpy's:", right)
assert not np.isfinite(found).any() and right == [100, 100, 1]
PYTHON
