#!/usr/bin/env bash
# A tensor named __metadata__ is saved, and the file can no longer be opened.
#
# Versions: safetensors 0.8.0.
# Seen: safetensors.numpy.save takes any name; under __metadata__, the key of the format's own text fields, it writes
# a tensor's entry, and load of the bytes raises that the header is no valid JSON. The other tensors of the file are
# lost with it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

data = save({"__metadata__": np.ones(3, "f4"), "w": np.ones(2, "f4")})
try:
    print(load(data))
    raise SystemExit("it is read again")
except SafetensorError as error:
    print("safetensors", m.version("safetensors"), len(data), "bytes, then:", error)
PYTHON
