"""LC of LeNet300 on MNIST, beside direct compression, iterated direct compression and straight-through.

    LCQ_DATA=folder python -m benchmarks.experiments.lenet300    every recipe, 3 seeds: results/lenet300_*, artifacts/
    ... lc_k2 lc_ternary      some recipes
    ... idc_k4 --seeds 0      one seed: the points of the rate-distortion picture
    ... --state folder        goes on where a run that was killed had begun its last L step
    ... --plot                results/lenet300.png and lenet300_rates.png again
    ... --tune                schedules judged on 5,000 held-back training images

Data: real MNIST, no augmentation, no teacher; weights: the trained tanh net of the LC toolkit (test error 2.13 %).
Biases stay float32; kernels are compressed each for itself unless the rule is joint. The test set is read once per
recipe and seed, after training; curves are of the training set.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lcq
from benchmarks.experiments.lenet300_report import plot, plot_rates
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.record import record, stored
from lcq.examples import data, models

BATCH = 256
HELD_BACK = 5000
KERNELS = "(.*/)?kernel"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A method, a scheme and a schedule: L step n trains epochs[n > 0] epochs at rate * decay^n with mu * factor^n.

    The loss is cross-entropy plus l2/2 ||w||^2; with a teacher, half of the cross-entropy is with the given float net's
    probabilities at temperature `teacher`, times its square.
    """

    rules: tuple[lcq.Rule, ...]
    method: str = "lc"
    mu: float = 9e-5
    factor: float = 1.35
    l_steps: int = 24
    epochs: tuple[int, int] = (6, 3)
    rate: float = 0.09
    decay: float = 0.98
    optimizer: str = "nesterov"
    coupling: str = "gradient"
    l2: float = 0.0
    teacher: float = 0.0

    @property
    def all_epochs(self) -> int:
        return self.epochs[0] + self.epochs[1] * (self.l_steps - 1)


def each(scheme: lcq.schemes.Scheme, pattern: str = KERNELS) -> tuple[lcq.Rule, ...]:
    """Every kernel for itself."""
    return (lcq.Rule(pattern, scheme),)


def jointly(scheme: lcq.schemes.Scheme) -> tuple[lcq.Rule, ...]:
    """One codebook and one budget for all kernels."""
    return (lcq.Rule(KERNELS, scheme, joint=True),)


K2, K4, TERNARY = each(lcq.KMeans(2)), each(lcq.KMeans(4)), each(lcq.Ternary())
PLANS = {
    "k2": K2,
    "k4": K4,
    "k16": each(lcq.KMeans(16)),
    "ternary": TERNARY,
    **{f"l0_{percent}": jointly(lcq.Prune(fraction=percent / 100)) for percent in (10, 5, 3, 2, 1)},
    "l0_5_k16": jointly(lcq.Prune(fraction=0.05, values=lcq.KMeans(16))),
    "l0_2_k16": jointly(lcq.Prune(fraction=0.02, values=lcq.KMeans(16))),
    **{f"rank_{rank}": each(lcq.LowRank(rank), "dense[01]/kernel") for rank in (5, 10, 20)},
    "k2_l0_1": jointly(lcq.Additive(lcq.KMeans(2), lcq.Prune(fraction=0.01))),
    "rank_2_l0_3": jointly(lcq.Additive(lcq.LowRank(2), lcq.Prune(fraction=0.03))),
}
"""One point each of the rate-distortion picture, by LC, iterated direct and direct compression."""
MIXED = (
    lcq.Rule("dense0/kernel", lcq.Prune(count=5000)),
    lcq.Rule("dense1/kernel", lcq.LowRank(10)),
    lcq.Rule("dense2/kernel", lcq.KMeans(2)),
)
SLOW = {"factor": 1.15, "l_steps": 50, "epochs": (5, 5)}
SLOWEST = {"factor": 1.1, "l_steps": 75, "epochs": (5, 5)}
RECIPES = {
    "reference": Recipe(K2, "none"),
    **{f"dc_{name}": Recipe(rules, "dc") for name, rules in PLANS.items()},
    "dc_k2": Recipe(each(lcq.KMeans(2, exact=True)), "dc"),
    "dc_k4": Recipe(each(lcq.KMeans(4, exact=True)), "dc"),
    "dc_ternary": Recipe(each(lcq.Levels((-1, 0, 1), scale=True, exact=True)), "dc"),
    **{f"lc_{name}": Recipe(rules) for name, rules in PLANS.items()},
    **{f"idc_{name}": Recipe(rules, "idc") for name, rules in PLANS.items()},
    "ste_k2": Recipe(K2, "ste"),
    "ste_l0_5": Recipe(PLANS["l0_5"], "ste"),
    "lc_k2_adam": Recipe(K2, optimizer="adam", rate=1e-3),
    "lc_k2_proximal": Recipe(K2, coupling="proximal"),
    "lc_k2_slow": Recipe(K2, rate=0.2, **SLOW),
    "lc_k2_slowest": Recipe(K2, rate=0.2, **SLOWEST),
    "lc_k4_slow": Recipe(K4, **SLOW),
    "lc_k4_slow_0.2": Recipe(K4, rate=0.2, **SLOW),
    "lc_k2_teacher": Recipe(K2, rate=0.2, teacher=3.0, **SLOW),
    "lc_k4_teacher": Recipe(K4, rate=0.2, teacher=3.0, **SLOW),
    "lc_k4_teacher_0.09": Recipe(K4, teacher=3.0, **SLOW),
    "lc_k2_teacher_slowest": Recipe(K2, rate=0.2, teacher=3.0, **SLOWEST),
    "lc_k2_first_last_slow": Recipe(each(lcq.KMeans(2), "dense[02]/kernel"), rate=0.2, **SLOW),
    "lc_l0_5_slow": Recipe(PLANS["l0_5"], **SLOW),
    "lc_k2_l0_1_slow": Recipe(PLANS["k2_l0_1"], rate=0.2, **SLOW),
    "lc_mixed_slow": Recipe(MIXED, **SLOW),
    "lc_mixed_slow_0.2": Recipe(MIXED, rate=0.2, **SLOW),
    "lc_mixed_teacher": Recipe(MIXED, teacher=3.0, **SLOW),
    "lc_rank_slow": Recipe(each(lcq.LowRank(penalty=1e-6, unit=1.0)), **SLOW),
    "lc_rank_slow_3e-6": Recipe(each(lcq.LowRank(penalty=3e-6, unit=1.0)), **SLOW),
    "lc_rank_slow_3e-7": Recipe(each(lcq.LowRank(penalty=3e-7, unit=1.0)), **SLOW),
    "lc_rank_teacher": Recipe(each(lcq.LowRank(penalty=1e-6, unit=1.0)), teacher=3.0, **SLOW),
}
RECIPES |= {
    f"{method}_trellis{bits}": Recipe(each(lcq.Trellis(bits, memory=10)), method)
    for method in ("dc", "lc")
    for bits in (1, 2)
}
CANDIDATES = {
    f"{name}_{factor}x{l_steps}x{epochs}_{rate}": Recipe(
        rules, factor=factor, l_steps=l_steps, epochs=(epochs, epochs), rate=rate
    )
    for name, rules in (("k2", K2), ("k4", K4))
    for factor, l_steps, epochs in ((1.15, 50, 5), (1.1, 80, 3), (1.1, 75, 5))
    for rate in (0.09, 0.2, 0.4)
}
"""Schedules to choose from: about three times the epochs of the toolkit's, and larger learning rates."""
CANDIDATES |= {
    f"k2_1.15x50x5_0.2_{name}": Recipe(K2, rate=0.2, **SLOW, **more)
    for name, more in {"l2_1e-5": {"l2": 1e-5}, "l2_1e-4": {"l2": 1e-4}, "teacher": {"teacher": 3.0}}.items()
}


def load() -> tuple[Any, Any, Any, Any, Any]:
    """Pretrained parameters, training and test set as the net takes them."""
    split = data.mnist()
    mean = split.x_train.mean(0) / 255
    x, x_test = (data.normalize(a, mean).reshape(len(a), -1) for a in (split.x_train, split.x_test))
    params = jax.tree.map(jnp.asarray, data.pretrained("lenet300_tanh_mnist"))
    return params, jnp.asarray(x), jnp.asarray(split.y_train), jnp.asarray(x_test), jnp.asarray(split.y_test)


def loss_of(recipe: Recipe, given: Any) -> Any:
    """The training loss (params, x, y) -> scalar; `given` are the float parameters."""
    apply = models.lenet300().apply

    def loss(params: Any, x: Any, y: Any) -> Any:
        logits = apply({"params": params}, x)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        if t := recipe.teacher:
            soft = jax.nn.softmax(apply({"params": given}, x) / t)
            value = 0.5 * value + 0.5 * t**2 * optax.softmax_cross_entropy(logits / t, soft).mean()
        return value + recipe.l2 / 2 * sum(jnp.sum(layer["kernel"] ** 2) for layer in params.values())

    return loss


@jax.jit
def judge(params: Any, x: Any, y: Any) -> tuple[Any, Any]:
    """Mean loss, and error in percent."""
    logits = models.lenet300().apply({"params": params}, x)
    wrong = (logits.argmax(-1) != y).mean()
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), 100 * wrong


def optimizer_of(recipe: Recipe, per_epoch: int) -> optax.GradientTransformation:
    first, rest = (n * per_epoch for n in recipe.epochs)

    def rate(step: Any) -> Any:
        l_step = jnp.maximum(0, (step - first) // rest + 1)
        return recipe.rate * recipe.decay**l_step

    rules = recipe.rules
    inner = {"nesterov": lambda eta: optax.sgd(eta, 0.9, nesterov=True), "adam": optax.adam}[recipe.optimizer]
    match recipe.method:
        case "idc":
            return lcq.training.iterated_direct(inner(rate), rules, every=rest)
        case "ste":
            return lcq.training.straight_through_training(inner(rate), rules)
    mu = lcq.geometric(recipe.mu, recipe.factor, steps=recipe.l_steps)
    return lcq.lc(inner, rules, mu=mu, every=(first, rest), learning_rate=rate, coupling=recipe.coupling)


def train(
    recipe: Recipe, params: Any, x: Any, y: Any, seed: int, saved: Path | None = None
) -> tuple[Any, list[dict[str, float]], Any]:
    """Forms, the training curve (one point an L step), and the last metrics; `saved` is what a run is kept in."""
    rules = recipe.rules
    if recipe.method in ("dc", "none"):
        return (lcq.compress(params, rules) if recipe.method == "dc" else params), [], {}
    per_epoch = len(x) // BATCH
    tx, loss = optimizer_of(recipe, per_epoch), loss_of(recipe, params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params: Any, state: Any, key: Any) -> tuple[Any, Any]:
        order = jax.random.permutation(key, len(x))[: per_epoch * BATCH].reshape(per_epoch, BATCH)

        def step(carry: Any, index: Any) -> tuple[Any, None]:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, x[index], y[index]), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), order)[0]

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    if recipe.method == "ste":
        params = lcq.decompress(lcq.compress(params, rules))
    compress = jax.jit(lambda p: lcq.compress(p, rules))

    def formed() -> Any:
        return lcq.extract(state, params) if recipe.method == "lc" else compress(params)

    begin, curve = 0, []
    if saved is not None and saved.exists():
        (params, state), begin, curve = resumed(saved, (params, state))
    for n in range(begin, recipe.all_epochs):
        params, state = epoch(params, state, jax.random.fold_in(jax.random.key(seed), n))
        l_step, within = divmod(n + 1 - recipe.epochs[0], recipe.epochs[1])
        if l_step >= 0 and within == 0:
            forms = formed()
            numbers = judge(lcq.decompress(forms), x, y)
            curve.append({"epoch": n + 1, **dict(zip(("train_loss", "train_error"), map(float, numbers), strict=True))})
            curve[-1]["gap"] = gap(params, forms)
            if saved is not None:
                keep(saved, (params, state), n + 1, curve)
    return formed(), curve, lcq.metrics(state) if recipe.method == "lc" else {}


def keep(saved: Path, state: Any, done: int, curve: list[dict[str, float]]) -> None:
    """Writes a run after so many epochs; the file appears whole or not at all."""
    arrays = {str(i): np.asarray(a).view(np.uint8) for i, a in enumerate(map(jnp.atleast_1d, jax.tree.leaves(state)))}
    with saved.with_suffix(".part").open("wb") as file:
        np.savez(file, **arrays, said=json.dumps([done, curve]))
    saved.with_suffix(".part").replace(saved)


def resumed(saved: Path, like: Any) -> tuple[Any, int, list[dict[str, float]]]:
    """What `keep` wrote of a run, as `like` is."""
    leaves, structure = jax.tree.flatten(like)
    with np.load(saved) as found:
        arrays = [found[str(i)].view(a.dtype).reshape(a.shape) for i, a in enumerate(map(jnp.asarray, leaves))]
        done, curve = json.loads(str(found["said"]))
    return jax.tree.unflatten(structure, map(jnp.asarray, arrays)), done, curve


def gap(params: Any, forms: Any) -> float:
    """||w - Delta(Theta)||^2 / ||w||^2 over the kernels."""
    pairs = [(params[k]["kernel"], lcq.decompress(forms)[k]["kernel"]) for k in params]
    return float(sum(jnp.sum((w - d) ** 2) for w, d in pairs) / sum(jnp.sum(w**2) for w, _ in pairs))


def run(name: str, recipe: Recipe, seeds: Any, sets: Any, folder: Path | None = None) -> dict[str, Any]:
    params, x, y, x_test, y_test = sets
    rows = []
    for seed in seeds:
        start = time.time()
        saved = None if folder is None else folder / f"lenet300_{name}_{seed}.npz"
        forms, curve, info = train(recipe, params, x, y, seed, saved)
        path = ARTIFACTS / f"lenet300_{name}_{seed}.lcq"
        size = lcq.save(path, forms)
        dense = lcq.decompress(lcq.load(path))
        row = {
            "seed": seed,
            "bytes": size,
            "ratio": lcq.ratio(forms),
            "artifact": path.name,
            "epochs": 0,
            "curve": curve,
        }
        row["train_loss"], row["train_error"] = map(float, judge(dense, x, y))
        row["test_loss"], row["test_error"] = map(float, judge(dense, x_test, y_test))
        row.update(seconds=round(time.time() - start, 1), kept_back=int(info.get("kept_back", 0)))
        row.update(gap=curve[-1]["gap"] if curve else None, epochs=recipe.all_epochs if curve else 0)
        rows.append(row)
        print(name, {k: v for k, v in row.items() if k != "curve"}, flush=True)
        if not curve:
            break  # nothing random
    numbers = ("train_loss", "train_error", "test_loss", "test_error", "bytes", "ratio")
    median = {k: statistics.median(row[k] for row in rows) for k in numbers}
    if rows[0]["gap"] is not None:
        median["gap"] = statistics.median(row["gap"] for row in rows)
    settings = {**dataclasses.asdict(recipe), "rules": list(map(repr, recipe.rules)), "batch": BATCH}
    return {"recipe": name, "settings": settings, "median": median, "runs": rows}


def tune(name: str, recipe: Recipe, sets: Any) -> dict[str, Any]:
    """Trains without 5,000 training images, and judges on these."""
    params, x, y, _, _ = sets
    order = np.random.default_rng(0).permutation(len(x))
    back, rest = order[:HELD_BACK], order[HELD_BACK:]
    forms, curve, _ = train(recipe, params, x[rest], y[rest], 0)
    loss, error = map(float, judge(lcq.decompress(forms), x[back], y[back]))
    print(name, error, loss, curve[-1], flush=True)
    return {"recipe": name, "held_back_error": error, "held_back_loss": loss, **curve[-1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--plot", action="store_true", help="only draw results/lenet300.png and lenet300_rates.png")
    parser.add_argument("--state", type=Path, help="a folder in which runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    if args.plot:
        plot()
        return plot_rates()
    sets = load()
    ARTIFACTS.mkdir(exist_ok=True)
    if args.tune:
        for name in args.recipes or CANDIDATES:
            others = [row for row in stored("lenet300_tuning") if row["recipe"] != name]
            record("lenet300_tuning", [*others, tune(name, CANDIDATES[name], sets)], seeds=[0])
        return
    for name in args.recipes or RECIPES:
        record(f"lenet300_{name}", [run(name, RECIPES[name], args.seeds, sets, args.state)], seeds=args.seeds)
    plot()
    plot_rates()


if __name__ == "__main__":
    main()
