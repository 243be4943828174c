#!/usr/bin/env bash
# jax.lax.ragged_dot with group sizes in uint8 or int8 multiplies rows with other experts, or with none.
#
# Versions: jax 0.10.2.
# Seen, of 300 rows in groups of 100, 120 and 80, whose experts give 0, 4 and 8: with sizes in uint8, which hold each of them,
# the last group gets 0; in int8 the first gets 8 and the second 0. int32 and uint16 are right. The ends of groups are sums
# in the type of the sizes, where 300 is 44. No error.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp

x, experts = jnp.ones((300, 4)), jnp.arange(3.0)[:, None, None] * jnp.ones((3, 4, 2))


def groups(kind):
    y = jax.lax.ragged_dot(x, experts, jnp.array([100, 120, 80]).astype(kind))
    return y[jnp.array([0, 150, 290]), 0].tolist()


found = {kind: groups(kind) for kind in ("int32", "uint16", "uint8", "int8")}
print("jax", m.version("jax"), "a row of each group:", found)
assert found["int32"] == found["uint16"] == [0, 4, 8] and found["uint8"] == [0, 4, 0] and found["int8"] == [8, 0, 8]
PYTHON
