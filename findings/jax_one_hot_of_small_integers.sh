#!/usr/bin/env bash
# jax.nn.one_hot sets more than one number where the classes do not fit into the type of the labels.
#
# Versions: jax 0.10.2.
# Seen: the row of label 1 in uint8, of 300 classes, has ones at 1 and at 257, so its sum is 2; in uint4, of 20
# classes, at 1 and 17; in int32 it has one. The classes are numbered in the type of the labels, where 257 is 1. No error:
# a loss or a table that is looked up with such rows is wrong for the few classes that have a double.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp


def ones(kind, classes):
    row = jax.jit(lambda label: jax.nn.one_hot(label, classes))(jnp.array([1]).astype(kind))[0]
    return jnp.flatnonzero(row).tolist()


found = {"uint8, 300": ones("uint8", 300), "uint4, 20": ones("uint4", 20), "int32, 300": ones("int32", 300)}
print("jax", m.version("jax"), "where the row of label 1 is one:", found)
assert found == {"uint8, 300": [1, 257], "uint4, 20": [1, 17], "int32, 300": [1]}
PYTHON
