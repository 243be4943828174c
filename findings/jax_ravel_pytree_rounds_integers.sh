#!/usr/bin/env bash
# ravel_pytree and back changes integers that are in a tree with floats: packed codes, counters and random keys.
#
# Versions: jax 0.10.2.
# Seen: jax.flatten_util.ravel_pytree makes uint32 words beside float32 weights float32, and the function that it
# returns gives them back as uint32, rounded to 24 bits: 0x12345678 is 0x12345680 then, and a random key is another one.
# Beside bfloat16 weights a counter of 1,001 is 1,000. No warning says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import warnings

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

warnings.simplefilter("error")


def again(tree):
    flat, unravel = ravel_pytree(tree)
    return unravel(flat)


words = again({"codes": jnp.array([0x12345678], jnp.uint32), "w": jnp.ones(2)})["codes"]
count = again({"count": jnp.array(1001), "w": jnp.ones(2, jnp.bfloat16)})["count"]
alone = again({"codes": jnp.array([0x12345678], jnp.uint32)})["codes"]
key = jax.random.key(123456789)
other = jax.random.wrap_key_data(again({"key": jax.random.key_data(key), "w": jnp.ones(2)})["key"])
drawn = [float(jax.random.uniform(k)) for k in (key, other)]
print("jax", m.version("jax"), "0x12345678 ->", hex(int(words[0])), words.dtype, "1001 ->", int(count), "drawn", drawn)
assert words.dtype == jnp.uint32 and int(words[0]) == 0x12345680 and int(count) == 1000
assert int(alone[0]) == 0x12345678 and drawn[0] != drawn[1]
PYTHON
