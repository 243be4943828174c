#!/usr/bin/env bash
# Average pools of more than 256 places are too small in bfloat16: over 32 x 32 a quarter of what they should be.
#
# Versions: flax 0.12.8, equinox 0.13.8, jax 0.10.2, on a CPU.
# Seen: flax.linen.avg_pool of a bfloat16 image of ones is 1 over 16 x 16, .89 over 17 x 17 and .25 over 32 x 32, and so
# is equinox.nn.AvgPool2d. jnp.mean of the same places is 1, and in float16 pools are right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8 equinox==0.13.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import equinox
import flax.linen as nn
import jax.numpy as jnp


def pools(kind, side):
    image = jnp.ones((side, side), kind)
    flax = nn.avg_pool(image[None, :, :, None], (side, side))
    return [float(a.reshape(())) for a in (flax, equinox.nn.AvgPool2d(side)(image[None]), image.mean())]


found = {side: pools("bfloat16", side) for side in (16, 17, 32)}
half = pools("float16", 32)
print("flax", m.version("flax"), "equinox", m.version("equinox"), "jax", m.version("jax"))
print("flax, equinox and jnp.mean of ones, by side:", found, "in float16, 32:", half)
assert found[16] == half == [1, 1, 1] and found[17][0] == found[17][1] < 0.9 and found[32] == [0.25, 0.25, 1]
PYTHON
