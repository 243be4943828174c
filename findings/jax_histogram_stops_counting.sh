#!/usr/bin/env bash
# jnp.histogram cannot count beyond 2^24.
#
# Versions: jax 0.10.2, numpy 2.4.6.
# Seen: of 20,000,000 zeros the bin that holds them all counts 16,777,216: counts are sums of float32 ones, and 2^24 +
# 1 is 2^24 there. numpy counts 20,000,000. No error, no warning: frequencies, and entropies made of them, are wrong
# for tensors of which more than 16.7 million numbers fall into one bin. jnp.bincount counts in integers and is right.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import jax.numpy as jnp
import numpy as np

zeros = jnp.zeros(20_000_000)
one = jnp.histogram(zeros, bins=2)[0].max()
two = np.histogram(np.asarray(zeros), bins=2)[0].max()
three = jnp.bincount(zeros.astype(jnp.int32), length=2).max()
print("jax", m.version("jax"), "histogram", float(one), "numpy", int(two), "bincount", int(three))
assert one == 2**24 and two == three == 20_000_000
PYTHON
