#!/usr/bin/env bash
# orbax writes the leaf "a.b" and the leaf "b" of "a" in one place: one of them comes back as the other.
#
# Versions: orbax-checkpoint 0.12.8, tensorstore 0.1.86, jax 0.10.2.
# Seen: a tree with a nested net and flat names beside it, {"ema": {"w": ...}, "ema.w": ...}, is saved without an error
# and restored with the same array twice, with and without a target tree. Names with "/" are kept apart.
# A checkpoint of a net beside flat names in PyTorch's style has lost a weight, and nothing says so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check \
  orbax-checkpoint==0.12.8 tensorstore==0.1.86 jax==0.10.2
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m
import logging
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.CRITICAL)


def back(tree, target=False):
    folder = tempfile.mkdtemp() + "/net"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder, *([jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)] if target else []))


def tree(sign):
    return {"ema": {"w": jnp.zeros(2)}, f"ema{sign}w": jnp.ones(2)}


def same(found):
    first, second = jax.tree.leaves(found)
    return bool(np.array_equal(first, second))


dots = {"restored": same(back(tree("."))), "with a target": same(back(tree("."), True))}
slashes = same(back(tree("/")))
print("orbax-checkpoint", m.version("orbax-checkpoint"))
print("zeros and ones come back the same, with a dot:", dots, "with a slash:", slashes)
assert all(dots.values()) and not slashes
PYTHON
