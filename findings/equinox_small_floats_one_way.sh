#!/usr/bin/env bash
# equinox writes int4 and float8 leaves that it cannot read again.
#
# Versions: equinox 0.13.8, jax 0.10.2.
# Seen: tree_serialise_leaves takes a tree with an int4, float8_e4m3fn or float4_e2m1fn array, and the same tree as `like`
# makes tree_deserialise_leaves raise RuntimeError ("has changed type"): it is found out when the net is needed.
# bfloat16 works.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check equinox==0.13.8 jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m
import io

import equinox as eqx
import jax.numpy as jnp


def returns(dtype):
    tree, file = {"w": jnp.arange(4).astype(dtype)}, io.BytesIO()
    eqx.tree_serialise_leaves(file, tree)
    file.seek(0)
    try:
        return bool((eqx.tree_deserialise_leaves(file, tree)["w"] == tree["w"]).all())
    except RuntimeError as error:
        return str(error).split(".")[0][:60]


found = {name: returns(name) for name in ("bfloat16", "int4", "float8_e4m3fn", "float4_e2m1fn")}
print("equinox", m.version("equinox"), found)
assert found.pop("bfloat16") is True and all("changed type" in str(f) for f in found.values())
PYTHON
