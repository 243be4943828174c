#!/usr/bin/env bash
# safetensors.numpy.save writes the memory of a view instead of its elements.
#
# Versions: safetensors 0.8.0 beside 0.7.0, numpy 2.4.6.
# Seen: the transpose of [[0, 1, 2], [3, 4, 5]] comes back as [[0, 1], [2, 3], [4, 5]], and every second one of 0 .. 5 as
# 0, 1, 2, without an error. 0.7.0 gave [[0, 3], [1, 4], [2, 5]] and 0, 2, 4. A checkpoint of `w.T` is another net.
# Remedy: np.ascontiguousarray before saving.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
from safetensors.numpy import load, save

w = np.arange(6, dtype=np.float32).reshape(2, 3)
turned, second = load(save({"w": w.T}))["w"], load(save({"w": np.arange(6)[::2]}))["w"]
right = load(save({"w": np.ascontiguousarray(w.T)}))["w"]
print("safetensors", m.version("safetensors"), "transposed", turned.tolist(), "every second", second.tolist())
assert turned.tolist() == [[0, 1], [2, 3], [4, 5]] and second.tolist() == [0, 1, 2]
assert right.tolist() == w.T.tolist()
PYTHON
