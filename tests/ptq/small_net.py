"""A net of two layers of eight, two batches for it, and `quantize` without what is slow to compile."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from lcq.ptq.rounding import ROUNDING_METHODS
from lcq.ptq.statistics import Statistics

SIZE = 8
UNIFORM = lcq.Uniform(3, per="channel")
RULES = [lcq.Rule("w.", UNIFORM)]


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def net(p, x):
    """Two layers of eight, the first with a bias."""
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]


def problem():
    """Parameters, and two batches of correlated inputs off zero."""
    params = {"w1": draw(SIZE, SIZE, seed=1), "b1": draw(SIZE), "w2": draw(SIZE, SIZE, seed=2)}
    mix = draw(SIZE, SIZE, seed=3) + 1
    return params, [(draw(30, SIZE, seed=i) + 0.5) @ mix / 4 for i in (4, 5)]


def bare(method="gpfq", search=False, shrink=0.0, **settings):
    """Without the search, whose compilation is long, and without the choice of how far statistics are believed."""
    return ROUNDING_METHODS[method](search=search, shrink=shrink, **settings)


BARE = bare()


def quantize(fn=net, params=None, batches=None, rules=RULES, method=BARE, **settings):
    whole = problem()
    params, batches = params or whole[0], whole[1] if batches is None else batches
    return lcq.quantize(fn, params, batches, rules, method, **settings)


@functools.cache
def standard():
    return quantize()


def dense(done):
    return jax.tree.map(np.asarray, lcq.decompress(done.forms))


def statistics(x, y, centred):
    x, y = x.astype(np.float64), y.astype(np.float64)
    means = x.mean(0), y.mean(0)
    if centred:
        x, y = x - means[0], y - means[1]
    drift = y.T @ (x - y)
    return jax.tree.map(jnp.float32, Statistics(y.T @ y, drift if drift.any() else None, None, *means, len(x)))
