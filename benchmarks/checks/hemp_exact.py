"""Is the gradient of HEMP's entropy exact?

    python -m benchmarks.checks.hemp_exact        results/hemp_exact.json

Value and slopes in float64 beside autodiff of the dense definition, a K^n tensor for each block, and for n = 2 beside
the closed form; and in float32 on 1e6 weights beside float64.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.record import record

SIZE, ORDERS, CENTRES = 1_000_000, (1, 2, 3, 4), (6, 10)


def dense(w: Any, centres: Any, order: int) -> Any:
    """H_n by its definition: memberships as hats over the centres, a tensor of K^n for each block."""
    wide = jnp.concatenate([centres[:1] - 1, centres, centres[-1:] + 1])
    x = w[: w.size // order * order, None]
    rising, falling = (x - wide[:-2]) / jnp.diff(wide)[:-1], (wide[2:] - x) / jnp.diff(wide)[1:]
    hats = jnp.maximum(0, jnp.where(x < centres, rising, falling)).reshape(-1, order, centres.size)
    blocks = functools.reduce(lambda a, b: (a[:, :, None] * b[:, None]).reshape(len(a), -1), jnp.moveaxis(hats, 1, 0))
    p = blocks.mean(0)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0)) / order


def closed_form(w: np.ndarray, c: np.ndarray) -> np.ndarray:
    """dH_2/dw of every weight of whole pairs."""
    b = np.searchsorted(c, w, side="right")
    tau = (w - c[b - 1]) / (c[b] - c[b - 1])
    member = np.zeros((w.size, c.size))
    member[np.arange(w.size), b], member[np.arange(w.size), b - 1] = tau, 1 - tau
    p = member[0::2].T @ member[1::2] / (w.size // 2)
    slopes = np.empty_like(w)
    logs = np.log2(np.where(p > 0, p, 1))
    for place, table in enumerate((logs, logs.T)):
        mine, others = b[place::2], member[1 - place :: 2]
        slopes[place::2] = (others * (table[mine - 1] - table[mine])).sum(1)
    return slopes / (w.size * (c[b] - c[b - 1]))


def sample(size: int, centres: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian weights, and equally spaced centres around all of them."""
    w = np.random.default_rng(seed).standard_normal(size)
    return w, np.linspace(w.min() - 0.1, w.max() + 0.1, centres)


def slopes_of(order: int) -> Any:
    return jax.jit(jax.value_and_grad(lambda w, c: lcq.training.block_entropy(w, c, order)))


def exact() -> list[dict[str, Any]]:
    """Largest differences over the largest slope, and of the value."""
    rows = []
    for order, size in itertools.product(ORDERS, (4, 6)):
        w, c = sample(240, size)
        with jax.enable_x64(True):
            value, slopes = slopes_of(order)(jnp.asarray(w), jnp.asarray(c))
            expected = jax.value_and_grad(dense)(jnp.asarray(w), jnp.asarray(c), order)
        others = {"autodiff": np.asarray(expected[1])} | ({"closed_form": closed_form(w, c)} if order == 2 else {})
        for name, other in others.items():
            away = float(np.abs(np.asarray(slopes) - other).max() / np.abs(other).max())
            row = {"what": name, "order": order, "centres": size, "weights": w.size, "slope": away}
            rows.append({**row, "value": abs(float(value) - float(expected[0]))})
    for order, size in itertools.product(ORDERS, CENTRES):
        w, c = (np.asarray(a, np.float32) for a in sample(SIZE, size))
        value, slopes = slopes_of(order)(jnp.asarray(w), jnp.asarray(c))
        with jax.enable_x64(True):
            wide = slopes_of(order)(jnp.asarray(w, jnp.float64), jnp.asarray(c, jnp.float64))
        away = float(np.abs(np.asarray(slopes) - np.asarray(wide[1])).max() / np.abs(np.asarray(wide[1])).max())
        row = {"what": "float32", "order": order, "centres": size, "weights": SIZE, "slope": away}
        rows.append({**row, "value": abs(float(value) - float(wide[0]))})
    return rows


def main() -> None:
    rows = exact()
    for row in rows:
        print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
    record("hemp_exact", rows, seeds=[0])


if __name__ == "__main__":
    main()
