#!/usr/bin/env bash
# Random numbers in bfloat16 are a grid of 128 points: rare events are frequent, and normal weights have neither tails
# nor mean 0.
#
# Versions: jax 0.10.2, flax 0.12.8.
# Seen: random.bernoulli with p = .001 in bfloat16 is true in .8 % of the draws instead of .1 %. random.normal of a
# million numbers in bfloat16 has 128 different ones, of which the largest is 2.9; their mean is -.012. A layer of flax
# with param_dtype=bfloat16 starts from 128 different weights with a mean of -.017 standard deviations. Numbers drawn in
# float32 and cast have none of this.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import flax.linen as nn
import jax
import jax.numpy as jnp

key = jax.random.key(0)


def shape(x):
    x = x.astype(jnp.float32)
    mean, most = float(x.mean() / x.std()), float(jnp.abs(x).max() / x.std())
    return {"different": len(jnp.unique(x)), "mean": round(mean, 4), "largest": round(most, 2)}


def often(kind):
    return round(float(jax.random.bernoulli(key, jnp.array(0.001, kind), (1_000_000,)).mean()), 5)


rare = often("bfloat16"), often("float32")
drawn = shape(jax.random.normal(key, (1_000_000,), "bfloat16"))
cast = shape(jax.random.normal(key, (1_000_000,)).astype("bfloat16"))
layer = nn.Dense(1024, param_dtype="bfloat16").init(key, jnp.ones((1, 1024)))["params"]["kernel"]
print("jax", m.version("jax"), "flax", m.version("flax"), "how often p = .001 in bfloat16 and float32:", rare)
print("normal in bfloat16:", drawn, "float32, then cast:", cast, "weights of a layer:", shape(layer))
assert rare[0] > 5 * rare[1] and drawn["different"] == shape(layer)["different"] == 128 and cast["different"] > 1000
assert drawn["largest"] < 3 < 4 < cast["largest"] and drawn["mean"] < -0.008 < -0.005 < cast["mean"]
PYTHON
