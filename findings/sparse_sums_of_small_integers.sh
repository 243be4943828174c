#!/usr/bin/env bash
# Sums of sparse int8 arrays raise as soon as a row is longer than 127.
#
# Versions: sparse 0.19.3, numpy 2.4.6.
# Seen: sparse.COO of int8 codes in rows of 128, or of uint8 codes in rows of 256, cannot be added up or averaged:
# OverflowError, "Python integer 128 out of bounds for int8". In rows of 127 the sum is an int64, as numpy's is.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check sparse==0.19.3 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
import sparse


def added(many, kind, how):
    try:
        return int(getattr(sparse.COO(np.ones((2, many), kind)), how)(axis=1).todense()[0])
    except OverflowError as error:
        return f"OverflowError: {error}"


sizes = ((127, "int8"), (128, "int8"), (255, "uint8"), (256, "uint8"))
ways = [(n, kind, how) for n, kind in sizes for how in ("sum", "mean")]
found = {way: added(*way) for way in ways}
print("sparse", m.version("sparse"), "numpy", m.version("numpy"), found)
for (n, kind, how), value in found.items():
    assert isinstance(value, str) if n in (128, 256) else value == (n if how == "sum" else 1), (n, kind, how)
PYTHON
