#!/usr/bin/env bash
# jnp.take and dynamic_slice with a negative int8 index read elsewhere in a longer array.
#
# Versions: jax 0.10.2, numpy 2.4.6.
# Seen: element -1 of 0 .. 299, with the index in int8, is 43 by jnp.take and by lax.dynamic_slice, of 0 .. 199 it is NaN by
# jnp.take; numpy and jnp.take_along_axis give the last one, and so does int32. The length is added in int8, where 300
# is 44. Square brackets raise OverflowError.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax
import jax.numpy as jnp
import numpy as np


def last(size, kind="int8"):
    table, index = jnp.arange(float(size)), jnp.array([-1]).astype(kind)
    cut = jax.lax.dynamic_slice(table, (index[0],), (1,))
    return [float(a[0]) for a in (jnp.take(table, index), cut, jnp.take_along_axis(table, index, 0))]


found = last(300), last(200)
numpys = float(np.take(np.arange(300.0), np.array([-1], "i1"))[0])
print("jax", m.version("jax"), "take, dynamic_slice, take_along_axis of 300 and 200:", *found, "numpy:", numpys)
assert found[0] == [43, 43, 299] and np.isnan(found[1][0]) and found[1][2] == 199
assert numpys == 299 and last(300, "int32") == [299, 299, 299]
try:
    jnp.arange(300.0)[jnp.array([-1], "int8")]
    raise SystemExit("brackets do not raise")
except OverflowError as error:
    print("brackets:", error)
PYTHON
