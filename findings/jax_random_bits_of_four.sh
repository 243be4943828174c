#!/usr/bin/env bash
# jax.random.bits of uint4 gives bytes.
#
# Versions: jax 0.10.2.
# Seen: bits(key, (4096,), jnp.uint4) is a uint8 array of numbers up to 255, and uint2 likewise, without an error; uint8 and
# uint16 are what was asked for, and randint of uint4 is a uint4 array of 0 .. 15.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp

key = jax.random.key(0)
drawn = {kind: jax.random.bits(key, (4096,), getattr(jnp, kind)) for kind in ("uint2", "uint4", "uint8", "uint16")}
found = {kind: (str(a.dtype), int(a.astype(jnp.int32).max())) for kind, a in drawn.items()}
print("jax", m.version("jax"), found)
assert found["uint4"] == found["uint2"] == ("uint8", 255) and found["uint8"][0] == "uint8" and found["uint16"][0] == "uint16"
assert jax.random.randint(key, (4,), 0, 16, jnp.uint4).dtype == jnp.uint4
PYTHON
