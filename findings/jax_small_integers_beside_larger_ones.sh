#!/usr/bin/env bash
# An int8 or uint8 array is compared with, and clipped to, Python integers modulo 256.
#
# Versions: jax 0.10.2, numpy 2.4.6.
# Seen: int8 5 < 200 is False, uint8 5 > -1 is False, uint8 5 == 261 is True; jnp.clip of an int8 array to -200 .. 300
# makes every number 44, and a uint8 array clipped to at most 256 is all 0. numpy answers True, True, False, leaves the
# array as it is, or raises OverflowError. jnp.array([261], uint8) raises there too. Checks that codes are in range fail or
# pass for nothing.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax.numpy as jnp
import numpy as np


def answers(xp):
    small, codes = xp.array([-5, 5], xp.int8), xp.array([5, 9], xp.uint8)
    return [a.tolist() for a in (small < 200, codes > -1, codes == 261, xp.clip(small, -200, 300))]


jaxs, numpys, top = answers(jnp), answers(np), jnp.minimum(jnp.array([5, 9], jnp.uint8), 256).tolist()
print("jax", m.version("jax"), "<, >, ==, clip:", *jaxs, "minimum with 256:", top, "numpy", m.version("numpy"), *numpys)
assert jaxs == [[False, False], [False, False], [True, False], [44, 44]] and top == [0, 0]
assert numpys == [[True, True], [True, True], [False, False], [-5, 5]]
PYTHON
