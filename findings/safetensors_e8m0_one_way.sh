#!/usr/bin/env bash
# safetensors.flax writes a float8_e8m0fnu array that it cannot read.
#
# Versions: safetensors 0.8.0, jax 0.10.2, flax 0.12.8.
# Seen: save succeeds with the dtype F8_E8M0 in the header, load of these bytes raises KeyError: 'F8_E8M0'.
# e8m0 is the type of the scales of MX formats.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 jax==0.10.2 flax==0.12.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax.numpy as jnp
from safetensors.flax import load, save

written = save({"scale": jnp.array([0.5, 1.0, 2.0]).astype(jnp.float8_e8m0fnu)})
assert b"F8_E8M0" in written
try:
    load(written)
except KeyError as error:
    print("safetensors", m.version("safetensors"), "saved", len(written), "bytes; load raises KeyError", error)
else:
    raise SystemExit("it is read now")
PYTHON
