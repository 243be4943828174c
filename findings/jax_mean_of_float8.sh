#!/usr/bin/env bash
# The mean of some hundred numbers in float8_e4m3fn is wrong, and of more than 448 NaN.
#
# Versions: jax 0.10.2.
# Seen: jnp.mean of 400 ones is .5625, of 1,000 ones NaN, and so is jnp.var: sums are handed on in float8, and the number
# of elements is made one, whose largest is 448. In float16 and bfloat16 jnp.mean computes in float32 and is right, as
# it is with dtype=jnp.float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax.numpy as jnp


def means(kind, many):
    ones = jnp.ones(many).astype(kind)
    return [float(a) for a in (jnp.mean(ones), jnp.var(ones), jnp.mean(ones, dtype=jnp.float32))]


few, lots, half = means("float8_e4m3fn", 400), means("float8_e4m3fn", 1000), means("bfloat16", 1000)
print("jax", m.version("jax"), "mean, var, mean in float32 of 400 and 1,000 ones:", few, lots, "bfloat16:", half)
assert few[0] < 0.7 and few[1] > 0.1 and lots[0] != lots[0] and lots[1] != lots[1] and few[2] == lots[2] == 1
assert half == [1, 0, 1]
PYTHON
