#!/usr/bin/env bash
# qwix quantizes to int1 and to unsigned types without complaint, and the weights are lost.
#
# Versions: qwix 0.1.8, jax 0.10.2.
# Seen, of normal weights with a scale for each output: int1 makes all of them 0, as its largest positive code is 0; uint4
# and uint8 make all negative ones 0 (half of the square); int2, int4 and int8 are as expected. No error, no warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check qwix==0.1.8 jax==0.10.2 flax==0.12.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
from qwix._src.core import qarray

w = jax.random.normal(jax.random.key(0), (64, 32))


def lost(name):
    how = qarray.HowToQuantize(qtype=getattr(jnp, name), channelwise_axes=(1,))
    back = qarray.dequantize(qarray.quantize(w, how))
    return round(float(((back - w) ** 2).sum() / (w**2).sum()), 3), round(float((back == 0).mean()), 2)


found = {name: lost(name) for name in ("int1", "uint4", "uint8", "int2", "int4", "int8")}
print("qwix", m.version("qwix"), "(share of the square lost, share of zeros)", found)
assert found["int1"] == (1.0, 1.0) and all(found[name][0] > 0.4 for name in ("uint4", "uint8"))
assert found["int4"][0] < 0.02 and found["int8"][0] < 0.001
PYTHON
