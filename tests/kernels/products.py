"""Forms of one shape, the product of all tests, and how near to the dense product it has to be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from lcq.kernels.api import matmul

CODED = [
    lcq.Binary(scale=True),
    lcq.KMeans(1),
    lcq.KMeans(2),
    lcq.KMeans(2, per="channel"),
    lcq.KMeans(4),
    lcq.KMeans(4, per=(10, 1)),
    lcq.KMeans(20, per="channel"),
    lcq.KMeans(300),
    lcq.Ternary(),
    lcq.PowersOfTwo(2),
    lcq.Uniform(3, per=(35, 1), zero_point=True),
    lcq.Uniform(8, per=(70, 5)),
]


def near(y, x, dense, ulps=16, least=1e-30):
    """Errors are at most so many units of rounding of sum |x| max |Delta|, or of sum |x| least."""
    x, dense = np.asarray(x, np.float64), np.asarray(dense, np.float64)
    scale = np.abs(x).sum(-1, keepdims=True) * max(np.abs(dense).max(), least)
    assert (np.abs(np.asarray(y, np.float64) - x @ dense) <= ulps * 2.0**-24 * scale).all()


product = jax.jit(matmul, static_argnames="kernel")


@functools.cache
def form_of(scheme, shape=(70, 130)):
    w = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    project = jax.vmap(scheme.project) if len(shape) == 3 else scheme.project
    return jax.jit(project)(w)
