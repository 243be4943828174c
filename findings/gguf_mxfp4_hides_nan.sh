#!/usr/bin/env bash
# gguf's MXFP4 makes zeros of every block that has a NaN or an infinity.
#
# Versions: gguf 0.19.0, numpy 2.4.6.
# Seen: of a block of 32 ones with one NaN or one infinity among them, all 32 come back as 0; the other types of blocks, Q4_0 and
# Q8_0, give NaN in the whole block, and BF16 at its place. A net that has diverged is finite, and a few of its blocks
# are gone. No error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
from gguf import GGMLQuantizationType as types
from gguf.quants import dequantize, quantize


def back(kind, value):
    block = np.ones((1, 32), "f4")
    block[0, 3] = value
    return dequantize(quantize(block, kind), kind)[0]


with np.errstate(all="ignore"):
    found = {(kind.name, v): back(kind, v) for kind in (types.MXFP4, types.Q4_0, types.Q8_0) for v in (np.nan, np.inf, 1.0)}
print("gguf", m.version("gguf"), {key: (int(np.isfinite(a).sum()), float(a[0])) for key, a in found.items()})
assert all((found["MXFP4", v] == 0).all() for v in (np.nan, np.inf)) and (found["MXFP4", 1.0] == 1).all()
assert all(np.isnan(found[kind, v][0]) for kind in ("Q4_0", "Q8_0") for v in (np.nan, np.inf))
PYTHON
