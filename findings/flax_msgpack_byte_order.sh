#!/usr/bin/env bash
# flax.serialization forgets the byte order of numpy arrays.
#
# Versions: flax 0.12.8, numpy 2.4.6.
# Seen: to_bytes stores the dtype by its name, "float32", and the memory as it lies; [1, 2, 3] in big-endian float32, as
# HDF5, FITS and netCDF files give it, comes back as [4.6e-41, 9.0e-44, 2.3e-41], without an error.
# Remedy: a.astype(a.dtype.newbyteorder("=")).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check flax==0.12.8 jax==0.10.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
from flax import serialization

given = np.array([1, 2, 3], ">f4")
back = serialization.from_bytes({"w": np.zeros(3, "f4")}, serialization.to_bytes({"w": given}))["w"]
print("flax", m.version("flax"), given.tolist(), "->", back.tolist(), back.dtype)
assert back.dtype == np.float32 and np.array_equal(back, given.view("<f4")) and not np.array_equal(back, given)
PYTHON
