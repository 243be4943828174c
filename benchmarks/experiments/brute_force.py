"""How often LC reaches the global optimum of problems small enough for brute force, from 20 starts each.

    python -m benchmarks.experiments.brute_force        results/brute_force.json

min L(w) subject to w having at most 2 distinct values, learned: all assignments of d <= 10 weights to two values are
tried, each solved exactly, in float64 numpy/scipy, beside direct compression of the unconstrained optimum and LC from
20 starts. Least squares and logistic regression: LC is not about nets. "At the optimum" is within 1e-3 of its loss.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

STARTS, PROBLEMS = 20, 5
SHAPES = ((60, 4), (60, 7), (60, 10))


def least_squares(a: Any, b: Any) -> Callable[[Any], Any]:
    return lambda w: ((a @ w - b) ** 2).mean()


def logistic(a: Any, b: Any) -> Callable[[Any], Any]:
    """Labels b in {-1, 1}, with a little L2 so that an optimum exists."""
    xp = np if isinstance(a, np.ndarray) else jnp
    return lambda w: xp.logaddexp(0, -b * (a @ w)).mean() + 1e-3 * (w**2).sum()


def brute_force(loss: Callable[[Any], Any], d: int) -> float:
    """The least loss over all assignments to two values; the first weight takes the first value."""
    best = np.inf
    for rest in itertools.product((0, 1), repeat=d - 1):
        z = np.eye(2)[[0, *rest]]
        best = min(best, scipy.optimize.minimize(lambda c, z=z: loss(z @ c), np.zeros(2), tol=1e-12).fun)
    return float(best)


def lc(loss: Callable[[Any], Any], start: Any, smooth: float) -> Any:
    """Delta(Theta) after LC from one start; gradient descent at 1/smooth, clipped by lc as mu grows."""
    schedule = lcq.geometric(1e-3 * smooth, 1.1, steps=120)
    rules = [lcq.Rule("w", lcq.KMeans(2))]
    tx = lcq.lc(lambda eta: optax.sgd(eta), rules, mu=schedule, every=None, learning_rate=1 / smooth)
    params = {"w": start}

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(lambda p: loss(p["w"]))(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    def l_step(carry: Any, _: Any) -> Any:
        carry, _ = jax.lax.scan(step, carry, length=200)
        return (carry[0], lcq.training.c_step(carry[1], carry[0])), None

    (params, _), _ = jax.lax.scan(l_step, (params, tx.init(params)), length=120)
    return lcq.KMeans(2).project(params["w"]).dense()


def table() -> str:
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in stored("brute_force"):
        groups.setdefault((row["problem"], row["weights"]), []).append(row)
    rows = []
    for (problem, weights), members in groups.items():
        hits = sum(row["starts_at_the_optimum"] for row in members)
        starts = sum(row["starts"] for row in members)
        worst = max(row["lc_median"] / row["optimum"] - 1 for row in members)
        direct = max(row["direct_compression"] / row["optimum"] - 1 for row in members)
        found = sum(row["starts_at_the_optimum"] > 0 for row in members)
        rows.append(
            [
                f"{problem}, {weights} weights",
                f"{hits} of {starts}",
                f"{found} of {len(members)}",
                f"{100 * worst:.1f} %",
                f"{100 * direct:.0f} %",
            ]
        )
    head = ["K = 2", "starts at the optimum", "problems solved", "LC's median above it, at worst", "direct compression"]
    return grid(head, rows)


def main() -> None:
    rows = []
    for kind, (m, d), seed in itertools.product(("least squares", "logistic"), SHAPES, range(PROBLEMS)):
        rng = np.random.default_rng(seed)
        a = rng.normal(size=(m, d)) @ (np.eye(d) + 0.3 * rng.normal(size=(d, d)))
        truth = rng.normal(size=d)
        make = least_squares if kind == "least squares" else logistic
        b = a @ truth + 0.3 * rng.normal(size=m) if kind == "least squares" else np.sign(a @ truth + rng.normal(size=m))
        loss, smooth = make(a, b), (2 if kind == "least squares" else 0.25) * np.linalg.norm(a, 2) ** 2 / m
        free = scipy.optimize.minimize(loss, np.zeros(d), tol=1e-12)
        best = brute_force(loss, d)
        on_device = make(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
        starts = jnp.asarray(free.x + rng.normal(size=(STARTS, d)) * np.abs(free.x).mean(), jnp.float32)
        ends = np.asarray(jax.jit(jax.vmap(lambda w, f=on_device, s=smooth: lc(f, w, s)))(starts), np.float64)
        losses = np.array([loss(w) for w in ends])
        direct = float(loss(np.asarray(lcq.KMeans(2, exact=True).project(jnp.asarray(free.x, jnp.float32)).dense())))
        within = losses <= best + 1e-3 * abs(best)
        rows.append(
            {
                "problem": kind,
                "weights": d,
                "seed": seed,
                "float": float(free.fun),
                "optimum": best,
                "direct_compression": direct,
                "lc_median": float(np.median(losses)),
                "lc_best": float(losses.min()),
                "starts": STARTS,
                "starts_at_the_optimum": int(within.sum()),
                "starts_no_worse_than_direct": int((losses <= direct * (1 + 1e-6)).sum()),
            }
        )
        print(rows[-1], flush=True)
    record("brute_force", rows, seeds=list(range(PROBLEMS)))


if __name__ == "__main__":
    main()
