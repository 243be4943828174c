#!/usr/bin/env bash
# np.save writes a float8_e5m2 array that np.load refuses.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6.
# Seen: np.savez with such an array succeeds, and np.load of it raises ValueError: not a valid dtype descriptor: '<f1'. The
# type presents itself as a float of one byte, which numpy has not. bfloat16, int4 and float8_e4m3fn come back as bytes,
# which a view makes whole. Remedy: save a.view(np.uint8).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check ml_dtypes==0.6.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m
import io

import ml_dtypes
import numpy as np


def returns(kind):
    given, file = np.arange(4).astype(kind), io.BytesIO()
    np.savez(file, w=given)
    file.seek(0)
    try:
        return bool((np.load(file)["w"].view(kind) == given).all())
    except ValueError as error:
        return str(error)


found = {k.__name__: returns(k) for k in (ml_dtypes.float8_e5m2, ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16, ml_dtypes.int4)}
print("ml_dtypes", m.version("ml_dtypes"), "numpy", m.version("numpy"), found)
assert "'<f1'" in found.pop("float8_e5m2") and all(f is True for f in found.values())
PYTHON
