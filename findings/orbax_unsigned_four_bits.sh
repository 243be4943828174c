#!/usr/bin/env bash
# orbax saves int2 and int4 arrays, and refuses uint4.
#
# Versions: orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2.
# Seen: int2 and int4 come back as they were; uint4, the natural type of codes 0 .. 15, raises ValueError: Unsupported data
# type: "uint4", from inside a thread of the save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m
import logging
import tempfile

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)


def returns(dtype):
    codes, folder = jnp.array([0, 1, 1]).astype(dtype), tempfile.mkdtemp()
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder + "/net", {"codes": codes})
            back = checkpointer.restore(folder + "/net")["codes"]
    except ValueError as error:
        return "Unsupported data type" in str(error) and "unsupported"
    return back.dtype == codes.dtype and bool(np.array_equal(back, codes))


found = {name: returns(name) for name in ("int2", "int4", "uint4")}
print("orbax-checkpoint", m.version("orbax-checkpoint"), "tensorstore", m.version("tensorstore"), found)
assert found == {"int2": True, "int4": True, "uint4": "unsupported"}
PYTHON
