"""The command as a function of its words, and a small tree of weights for it."""

import jax
import numpy as np

import lcq
from lcq.cli.main import main

RULE = "(.*/)?kernel=KMeans(4)"


def run(*words):
    return main([str(word) for word in words])


def weights():
    rng = np.random.default_rng(0)
    kernels = {f"dense{i}": {"kernel": rng.normal(size=(12, 8)).astype(np.float32)} for i in range(2)}
    return kernels | {"bias": np.arange(5, dtype=np.float32), "count": np.arange(3)}


def same(a, b):
    x, y = (lcq.decompress(tree) for tree in (a, b))
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)
