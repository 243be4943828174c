#!/usr/bin/env bash
# The population count of a negative int4 is the count of eight bits, wrapped.
#
# Versions: jax 0.10.2.
# Seen: population_count of int4 -1, which has four bits set, is -8: the number is widened with its sign, eight bits
# are counted, and 8 wraps in int4. int2 -1 gives -2. uint4, uint2 and int8 are right; the same under jit, on the CPU.
# No error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp


def bits(kind, number):
    return int(jax.jit(jax.lax.population_count)(jnp.array([number], kind))[0])


ones = {"int8": -1, "int4": -1, "uint4": 15, "int2": -1, "uint2": 3}
found = {kind: bits(kind, number) for kind, number in ones.items()}
print("jax", m.version("jax"), jax.default_backend(), found)
assert found == {"int8": 8, "int4": -8, "uint4": 4, "int2": -2, "uint2": 2}
PYTHON
