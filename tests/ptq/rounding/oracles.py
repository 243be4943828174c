"""Literal recursions and least squares re-solved, in float64 numpy without lcq, and a problem to try them on."""

import functools

import jax.numpy as jnp
import numpy as np

import lcq
from lcq.ptq.rounding import base
from lcq.ptq.statistics import finish, gather

M, N, n = 220, 140, 6  # two blocks of 128, the second one padded


def problem(m=M, size=N, neurons=n, offset=0.0, seed=0):
    """Correlated inputs after a ReLU, the same with noise, and weights."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(m, size)) @ rng.normal(size=(size, size)) / size**0.5 + 0.3, 0) + offset
    y = np.maximum(x + 0.15 * rng.normal(size=x.shape), 0)
    return tuple(a.astype(np.float32) for a in (rng.normal(size=(size, neurons)), x, y))


@functools.cache
def standard():
    """(w, X, Y), and plain statistics."""
    w, x, y = problem()
    return (w, x, y), finish(gather(jnp.asarray(y), jnp.asarray(x), difference=True))


def tables(form, w):
    """The levels of every weight, [N, n, K], from the arrays of a form."""
    part = (len(w), w.shape[1], 1)

    def spread(a):
        a = np.asarray(a, np.float64)
        return np.broadcast_to(np.repeat(a, len(w) // len(a), 0), (*part[:2], a.shape[-1]))

    levels = np.asarray(form.values, np.float64) if form.levels is None else spread(form.levels)
    zero = 0 if form.zero is None else spread(np.asarray(form.zero)[..., None])
    scale = 1 if form.scale is None else spread(np.asarray(form.scale)[..., None])
    return np.broadcast_to((levels - zero) * scale, (*part[:2], levels.shape[-1]))


def nearest(z, table):
    """Index, level and distance to the next midpoint, for each neuron."""
    difference = np.abs(z[:, None] - table)
    two = np.sort(difference, 1)[:, :2]
    k = difference.argmin(1)
    return k, np.take_along_axis(table, k[:, None], 1)[:, 0], two[:, 1] - two[:, 0]


def literal(w, x, y, table, order=None, shrink=lambda z: z):
    """u_t = u_{t-1} + w_t X_t - q_t Y_t. Codes, margins, u_N."""
    w, x, y = (a.astype(np.float64) for a in (w, x, y))
    u, codes, margins = np.zeros((len(x), w.shape[1])), np.zeros(w.shape, int), np.zeros(w.shape)
    for t in range(len(w)) if order is None else order:
        u = u + np.outer(x[:, t], w[t])
        norm = y[:, t] @ y[:, t]
        z = y[:, t] @ u / norm if norm > 0 else w[t]
        codes[t], q, margins[t] = nearest(shrink(z), table[t])
        u = u - np.outer(y[:, t], q)
    return codes, margins, u


def error_form(w, gram, drift, table):
    """z_t = w_t + (sum_{s<=t} D_ts w_s + sum_{s<t} H_ts e_s) / H_tt. Codes and margins."""
    w, errors, codes, margins = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape, int), np.zeros(w.shape)
    for t in range(len(w)):
        z = w[t] + (drift[t, : t + 1] @ w[: t + 1] + gram[t, :t] @ errors[:t]) / gram[t, t]
        codes[t], q, margins[t] = nearest(z, table[t])
        errors[t] = w[t] - q
    return codes, margins


def resolved(w, y, damping, table, start=0):
    """GPTQ by definition: after each level the rest v minimises ||Y (w - v)||^2 + damping ||w - v||^2."""
    rows = np.concatenate([y, damping**0.5 * np.eye(len(w))])
    v, codes = w.copy(), np.zeros(w.shape, int)
    for t in range(start, len(w)):
        codes[t], v[t], _ = nearest(v[t], table[t])
        fixed = rows[:, start : t + 1] @ (w - v)[start : t + 1]
        v[t + 1 :] = w[t + 1 :] + np.linalg.lstsq(rows[:, t + 1 :], fixed, rcond=None)[0]
    return codes


def qronos(w, x, y, damping, table):
    """The first weight, the others by least squares, and then GPTQ on these."""
    first = np.linalg.lstsq(y[:, :1], x @ w - y[:, 1:] @ w[1:], rcond=None)[0][0]
    code, q, _ = nearest(first, table[0])
    rows = np.concatenate([y[:, 1:], damping**0.5 * np.eye(len(w) - 1)])
    wanted = np.concatenate([x @ w - np.outer(y[:, 0], q), damping**0.5 * w[1:]])
    rest = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    codes = resolved(np.concatenate([w[:1], rest]), y, damping, table, start=1)
    codes[0] = code
    return codes


def assert_codes(got, expected, margins=None):
    """All codes alike; with margins, neurons may differ from a weight on whose z is within 1e-6 of a midpoint."""
    wrong = np.asarray(got.codes) != expected
    for neuron in np.flatnonzero(wrong.any(0)):
        t = np.flatnonzero(wrong[:, neuron])[0]
        assert margins is not None and margins[t, neuron] < 1e-6, (t, neuron, wrong.sum())


def correct(w, statistics, form):
    return base.correction(w, statistics.mean_x, statistics.mean_y, form)


def path_error(w, x, y, form):
    w, x, y, q = (np.asarray(a, np.float64) for a in (w, x, y, form.dense()))
    return ((x @ w - y @ q) ** 2).sum(0)


# The methods against the oracles

SCHEMES = {
    "grid": lcq.Uniform(4, per="channel"),
    "grid of one group for all": lcq.Uniform(3),
    "zero points in groups": lcq.Uniform(3, per=35, zero_point=True),
    "ternary": lcq.Ternary(per="channel"),
    "frozen": lcq.Levels((-1.5, -0.5, 0.25, 1.5)),
    "learned": lcq.KMeans(5, per="channel"),
    "learned in groups": lcq.KMeans(11, per=70),
    "long grid": lcq.Uniform(7, per=(70, 0)),
    "many powers": lcq.PowersOfTwo(4, scale=True),
}
