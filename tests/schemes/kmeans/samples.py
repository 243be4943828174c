"""Samples without noise, arrays of one shape so that they share compilations, and errors in float64."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import scipy.special

import lcq

N = 24  # most tests share this shape and four levels, and with them two compilations
FOUR = lcq.KMeans(4)
PARTLY = lcq.KMeans(4, fixed=(0, 1.25))
LLOYD_MAX = {3: 0.1902, 16: 0.00950}
arrays = hnp.arrays(np.float32, N, elements=st.floats(-8, 8, width=32, allow_subnormal=False))


def gaussian(n):
    """The n equally likely quantiles of a standard normal: a sample without noise."""
    return scipy.special.ndtri((np.arange(n) + 0.5) / n)


def distortion(form, x):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


def least(x, levels):
    """The error of the best codes for these levels."""
    levels = np.asarray(levels, np.float64).reshape(-1)
    return ((np.asarray(x, np.float64).reshape(-1, 1) - levels) ** 2).min(1).sum()


def weigh(seed, n=N):
    """Weights over many magnitudes, a fifth of them zero."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(n) < 0.2, 0, rng.lognormal(sigma=2, size=n)).astype(np.float32)


def weighted(form, x, h):
    return (h * (np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()
