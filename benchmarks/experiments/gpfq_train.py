"""Trains the float nets of the GPFQ papers, with batch norm: 784-500-300-10 on MNIST and a plain CNN on CIFAR-10.

    LCQ_DATA=folder python -m benchmarks.experiments.gpfq_train NET --out folder    results/gpfq_train_*, artifacts/
    ... --trial --epochs 3 --rate 0.05    a recipe judged on held-back images: no test set, no record, no artifact

NET is mnist or cifar. Data: real; all but the last 5,000 training images are trained on, and these 5,000 judge
recipes. The test set is read once, after the last epoch. After every epoch all there is goes to OUT/NAME.ckpt; the same
command goes on from it, but not with another recipe or from other code.
artifacts/gpfq_NAME_float.lcq holds {"params", "batch_stats"}.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import lcq
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.checkpoint import digest, keep, maker, resume
from benchmarks.harness.record import record
from lcq.examples import data, models
from lcq.examples.train import evaluate

HELD_BACK = 5000
PAD = 4


@dataclasses.dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov's momentum 0.9; the rate rises to `rate` in `warmup` of all steps, then a cosine to 0.

    The loss is cross-entropy plus l2/2 ||w||^2 over the kernels. A net takes (image/255 - mean) / std.
    """

    epochs: int
    rate: float
    batch: int = 128
    l2: float = 5e-4
    warmup: float = 0.2
    augment: bool = False
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    seed: int = 0


RECIPES = {
    "mnist": Recipe(epochs=10, rate=0.05),
    "cifar": Recipe(epochs=20, rate=0.1, augment=True, mean=data.CIFAR10_MEAN, std=data.CIFAR10_STD),
}
NETS: dict[str, nn.Module] = {"mnist": models.NormMLP(), "cifar": models.ConvNet()}


def load(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 images with channels, and labels."""
    if name == "cifar":
        return data.cifar10(split)
    x_train, y_train, x_test, y_test = data.mnist()
    x, y = (x_train, y_train) if split == "train" else (x_test, y_test)
    return x[..., None], y


def batches(x: np.ndarray, y: np.ndarray, recipe: Recipe, epoch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One epoch; with `augment`, half of the images are flipped, and cut out of themselves with a frame of black."""
    rng = np.random.default_rng((recipe.seed, epoch, 1))
    for xs, ys in data.batches(x, y, recipe.batch, seed=recipe.seed, epoch=epoch):
        if recipe.augment:
            n, height, width, _ = xs.shape
            framed = np.pad(xs, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)))
            top, left = rng.integers(0, 2 * PAD + 1, (2, n, 1))
            rows, columns = top + np.arange(height), left + np.arange(width)
            columns = np.where(rng.random((n, 1)) < 0.5, columns[:, ::-1], columns)
            xs = framed[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
        yield xs, ys


@functools.cache
def apply_of(name: str, recipe: Recipe) -> Callable[[Any, Any], Any]:
    """(variables, uint8 images) -> logits, by running statistics."""
    return lambda variables, x: NETS[name].apply(variables, data.normalize(x, recipe.mean, recipe.std))


def train(name: str, recipe: Recipe, x: np.ndarray, y: np.ndarray, path: Path) -> dict[str, Any]:
    """Trains, or goes on from `path`; returns variables, seconds, accuracy on held-back images after each epoch."""
    x, y, x_back, y_back = x[:-HELD_BACK], y[:-HELD_BACK], x[-HELD_BACK:], y[-HELD_BACK:]
    net, per_epoch = NETS[name], len(x) // recipe.batch
    steps = recipe.epochs * per_epoch
    rate = optax.warmup_cosine_decay_schedule(0.0, recipe.rate, int(recipe.warmup * steps), steps)
    tx = optax.sgd(rate, 0.9, nesterov=True)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any) -> tuple[Any, Any]:
            inputs, now = data.normalize(x, recipe.mean, recipe.std), {**variables, "params": params}
            logits, moved = net.apply(now, inputs, train=True, mutable=["batch_stats"])
            kernels = [layer["kernel"] for layer in params.values() if "kernel" in layer]
            value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return value + recipe.l2 / 2 * sum(jnp.sum(w**2) for w in kernels), moved

        params = variables["params"]
        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), **moved}, state, value

    variables = net.init(jax.random.key(recipe.seed), data.normalize(x[:1], recipe.mean, recipe.std))
    state = tx.init(variables["params"])
    (variables, state), log = resume(path, maker(recipe, __file__, models.__file__), (variables, state))
    for epoch in range(len(log["curve"]), recipe.epochs):
        start, losses = time.time(), []
        for xs, ys in batches(x, y, recipe, epoch):
            variables, state, value = step(variables, state, xs, ys)
            losses.append(value)
        loss = float(jnp.stack(losses).mean())
        accuracy = 100 * evaluate(apply_of(name, recipe), variables, x_back, y_back).accuracy
        log["seconds"] += time.time() - start
        log["curve"].append(round(accuracy, 3))
        facts = f"loss {loss:.4f}, held back {accuracy:.2f} %, {time.time() - start:.1f} s"
        print(f"{name} epoch {epoch + 1}/{recipe.epochs}: {facts}", flush=True)
        keep(path, (variables, state), log)
    return {"variables": variables, **log}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=list(NETS))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--trial", action="store_true", help="judge on held-back images only")
    for field in ("epochs", "rate", "l2", "batch", "seed"):
        kind = type(getattr(RECIPES["cifar"], field))
        parser.add_argument(f"--{field}", type=kind, help="in place of the recipe's")
    args = parser.parse_args()
    given = {k: v for k in ("epochs", "rate", "l2", "batch", "seed") if (v := getattr(args, k)) is not None}
    name, recipe = args.net, dataclasses.replace(RECIPES[args.net], **given)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = f"{name}_trial_{digest(repr(recipe))}" if args.trial else name
    x, y = load(name, "train")
    trained = train(name, recipe, x, y, args.out / f"{stem}.ckpt")
    if args.trial:
        return
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"gpfq_{name}_float.lcq"
    size = lcq.save(path, trained["variables"])
    variables = lcq.load(path)
    sets = {
        "train": (x[:-HELD_BACK], y[:-HELD_BACK]),
        "held_back": (x[-HELD_BACK:], y[-HELD_BACK:]),
        "test": load(name, "test"),
    }
    scores = {k: evaluate(apply_of(name, recipe), variables, *v) for k, v in sets.items()}
    row = {
        "net": name,
        "seed": recipe.seed,
        "artifact": path.name,
        "bytes": size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "images": {k: len(v[0]) for k, v in sets.items()},
        **{f"{k}_accuracy": round(100 * score.accuracy, 3) for k, score in scores.items()},
        **{f"{k}_loss": score.loss for k, score in scores.items()},
        "held_back_after_epoch": trained["curve"],
        "epochs": recipe.epochs,
        "augmentation": f"horizontal flips, random crops of images padded by {PAD} black pixels"
        if recipe.augment
        else "none",
        "optimizer": "SGD, Nesterov momentum 0.9, linear warm-up and cosine to 0",
        "settings": dataclasses.asdict(recipe),
        "seconds": round(trained["seconds"], 1),
        "resumed_after": trained["resumed_after"],
    }
    print(row, flush=True)
    record(f"gpfq_train_{name}", [row], seeds=[recipe.seed])


if __name__ == "__main__":
    main()
