"""Whether GPFQ and its family give the codes of their definitions: in float64 all of them, in float32 nearly all.

    python -m benchmarks.checks.gpfq_exact        results/gpfq_exact.json

Definitions are loops in float64 numpy that share nothing with lcq: for GPFQ u_t = u_{t-1} + w_t X_t - q_t Y_t; GPTQ as
a least-squares problem for the weights left over, solved again after every level; Qronos likewise, its first step on X
and Y. Inputs are correlated, after a ReLU, Y with noise. A subprocess with JAX_ENABLE_X64=1 does the part in float64.
"""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.record import record
from lcq.ptq.rounding.base import residual
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.gptq import GPTQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.sequential import follow
from lcq.ptq.statistics import finish, gather

SEEDS, SHAPE, SOLVED, DAMP = (0, 1, 2), (1000, 400, 64), (250, 100, 16), 0.01
SCHEMES = {
    "16 levels": lcq.Uniform(4, per="channel"),
    "3 levels": lcq.Ternary(per="channel"),
    "zero points in groups": lcq.Uniform(4, per=50, zero_point=True),
    "learned": lcq.KMeans(8, per="channel"),
}


def problem(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w [N, n], X and Y [m, N] in float32."""
    rng, (rows, size, neurons) = np.random.default_rng(seed), shape
    x = np.maximum(rng.normal(size=(rows, size)) @ rng.normal(size=(size, size)) / size**0.5 + 0.3, 0)
    y = np.maximum(x + 0.15 * rng.normal(size=x.shape), 0)
    w, x, y = (a.astype(np.float32) for a in (rng.normal(size=(size, neurons)), x, y))
    return w, x, y


def tables(form: Any, w: np.ndarray) -> np.ndarray:
    """The levels of every weight, [N, n, K]."""

    def spread(a: Any) -> np.ndarray:
        return np.repeat(np.asarray(a, np.float64), len(w) // a.shape[0], 0)

    levels = np.asarray(form.values, np.float64) if form.levels is None else spread(form.levels)
    levels = levels if form.zero is None else levels - spread(form.zero)[..., None]
    levels = levels if form.scale is None else levels * spread(form.scale)[..., None]
    return np.broadcast_to(levels, (*w.shape, levels.shape[-1]))


def nearest(z: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = np.abs(z[:, None] - table).argmin(1)
    return k, np.take_along_axis(table, k[:, None], 1)[:, 0]


def literal(w: np.ndarray, x: np.ndarray, y: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes, and ||u_N||^2."""
    u, codes = np.zeros((len(x), w.shape[1])), np.zeros(w.shape, int)
    for t in range(len(w)):
        u += np.outer(x[:, t], w[t])
        codes[t], q = nearest(y[:, t] @ u / (y[:, t] @ y[:, t]), table[t])
        u -= np.outer(y[:, t], q)
    return codes, (u**2).sum(0)


def resolved(w: np.ndarray, y: np.ndarray, damping: float, table: np.ndarray, start: int = 0) -> np.ndarray:
    """After each level the rest v minimises ||Y (w - v)||^2 + damping ||w - v||^2."""
    rows = np.concatenate([y, damping**0.5 * np.eye(len(w))])
    v, codes = w.copy(), np.zeros(w.shape, int)
    for t in range(start, len(w)):
        codes[t], v[t] = nearest(v[t], table[t])
        fixed = rows[:, start : t + 1] @ (w - v)[start : t + 1]
        v[t + 1 :] = w[t + 1 :] + np.linalg.lstsq(rows[:, t + 1 :], fixed, rcond=None)[0]
    return codes


def qronos(w: np.ndarray, x: np.ndarray, y: np.ndarray, damping: float, table: np.ndarray) -> np.ndarray:
    """The first weight, the others by least squares, then GPTQ on these."""
    code, q = nearest(np.linalg.lstsq(y[:, :1], x @ w - y[:, 1:] @ w[1:], rcond=None)[0][0], table[0])
    rows = np.concatenate([y[:, 1:], damping**0.5 * np.eye(len(w) - 1)])
    wanted = np.concatenate([x @ w - np.outer(y[:, 0], q), damping**0.5 * w[1:]])
    rest = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    codes = resolved(np.concatenate([w[:1], rest]), y, damping, table, start=1)
    codes[0] = code
    return codes


def same(form: Any, codes: np.ndarray) -> float:
    return float((np.asarray(form.codes) == codes).mean())


def compare(wide: bool) -> list[dict[str, Any]]:
    """Shares of equal codes; float64 if `wide`, of forms whose tables are exactly those of float32."""
    rows = []
    for name, scheme in SCHEMES.items():
        for seed in SEEDS:
            given = problem(seed, SHAPE)
            w, x, y = (a.astype(np.float64) for a in given)
            ours = [jnp.asarray(a, jnp.float64 if wide else jnp.float32) for a in given]
            form = scheme.project(ours[0])
            statistics = finish(gather(ours[2], ours[1], difference=True))
            blocked, (plain, error) = GPFQ().codes(ours[0], statistics, form), follow(*ours, form)
            codes, expected = literal(w, x, y, tables(form, w))
            found = np.asarray(residual(ours[0], statistics, blocked), np.float64)
            direct = ((x @ w - y @ np.asarray(blocked.dense(), np.float64)) ** 2).sum(0)
            row = {"what": "gpfq", "bits": 64 if wide else 32, "alphabet": name, "seed": seed}
            row |= {"blocked": same(blocked, codes), "follow": same(plain, codes)}
            row |= {"residual": float(np.abs(found / direct - 1).max())}
            row |= {"residual_of_follow": float(np.abs(np.asarray(error) / expected - 1).max())}
            rows.append(row)
    return rows


def solve(wide: bool) -> list[dict[str, Any]]:
    """The same of the methods that are defined by least squares, on a smaller problem."""
    rows = []
    for name, scheme in SCHEMES.items():
        given = problem(0, SOLVED)
        w, x, y = (a.astype(np.float64) for a in given)
        ours = [jnp.asarray(a, jnp.float64 if wide else jnp.float32) for a in given]
        form, statistics = scheme.project(ours[0]), finish(gather(ours[2], ours[1]))
        damping, table = DAMP * (y**2).sum(0).mean(), tables(form, w)
        expected = {"gptq": resolved(w, y, damping, table), "qronos": qronos(w, x, y, damping, table)}
        for method, codes in (("gptq", GPTQ(DAMP)), ("qronos", Qronos(DAMP))):
            share = same(codes.codes(ours[0], statistics, form), expected[method])
            rows.append({"what": method, "bits": 64 if wide else 32, "alphabet": name, "seed": 0, "blocked": share})
    return rows


if __name__ == "__main__":
    if "--wide" in sys.argv:
        assert jax.config.jax_enable_x64
        print(json.dumps([*compare(True), *solve(True)]))
    else:
        command = [sys.executable, "-m", "benchmarks.checks.gpfq_exact", "--wide"]
        environment = {**os.environ, "JAX_ENABLE_X64": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        rows = [*json.loads(done.stdout), *compare(False), *solve(False)]
        for row in rows:
            print(row)
        record("gpfq_exact", rows, seeds=SEEDS, shape=SHAPE, solved=SOLVED, damp=DAMP)
