"""The smallest files at an accuracy, everything counted: LeNet300 on MNIST.

    LCQ_DATA=folder python -m benchmarks.experiments.smallest lenet300_3       results/smallest_NAME.json, artifacts/
    ... lenet300_3 --trial          judged on 5,000 held-back training images; no record, no artifact

LC with one budget of kept weights over all kernels and biases in bfloat16, in 250 epochs; from there LC with one
codebook of the kept weights' values too, in 60; then centres and biases tuned with masks and codes fixed, and the coded
file. Data, weights and batches are those of lenet300.py. The test set is read once a recipe. A recipe with moved images
sees each training image in five places, in one pass over all of these for an L step.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import lcq
from benchmarks.experiments import lenet300
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.examples import data


@dataclasses.dataclass(frozen=True)
class Small:
    """What is kept, the size of its codebook, and how LC trains.

    Attributes:
        kept: part of the weights.
        k: values that kept weights have.
        rate: learning rate at first.
        teacher: temperature of the given net's probabilities, 0 for none.
        tuned: epochs of Adam at the end, its rate falling from 1e-3 as a cosine to 0.
        moved: whether it also trains on the training images moved by a pixel up, down, left and right.
    """

    kept: float
    k: int
    rate: float = 0.09
    teacher: float = 0.0
    tuned: int = 5
    moved: bool = False
    seed: int = 0

    def stage(self, values: lcq.schemes.Scheme | None, **schedule: Any) -> lenet300.Recipe:
        rules = (
            lcq.Rule(lenet300.KERNELS, lcq.Prune(fraction=self.kept, values=values), joint=True),
            lcq.Rule(".*/bias", lcq.Cast("bfloat16")),
        )
        epochs = (1, 1) if self.moved else schedule["epochs"]
        return lenet300.Recipe(rules, rate=self.rate, teacher=self.teacher, **(schedule | {"epochs": epochs}))


RECIPES = {
    "lenet300_3": Small(0.03, 16),
    "lenet300_3_teacher": Small(0.03, 16, teacher=3.0),
    "lenet300_2.2_teacher": Small(0.022, 8, teacher=3.0),
    "lenet300_2.5_moved": Small(0.025, 8, teacher=3.0, tuned=1, moved=True),
}
CODEBOOK: dict[str, Any] = {"mu": 3e-3, "factor": 1.3, "l_steps": 20, "epochs": (3, 3), "decay": 0.9}
"""The schedule of the second stage: the mask hardly moves at this mu, and the values settle."""


def moved(x: Any) -> Any:
    """Normalized images and, below them, what they are when moved by a pixel up, down, left and right on black."""
    mean = data.mnist().x_train.mean(0).reshape(28, 28) / 255
    black = jnp.pad(x.reshape(-1, 28, 28) + mean, ((0, 0), (1, 1), (1, 1)))
    corners = ((1, 1), (2, 1), (0, 1), (1, 2), (1, 0))
    return jnp.concatenate([(black[:, i : i + 28, j : j + 28] - mean).reshape(len(x), -1) for i, j in corners])


def train(recipe: Small, params: Any, x: Any, y: Any) -> Any:
    """The compressed net."""
    if recipe.moved:
        x, y = moved(x), jnp.tile(y, 5)
    pruned, _, _ = lenet300.train(recipe.stage(None, **lenet300.SLOW), params, x, y, recipe.seed)
    second = recipe.stage(lcq.KMeans(recipe.k), **CODEBOOK)
    forms, _, _ = lenet300.train(second, lcq.decompress(pruned), x, y, recipe.seed + 1)
    loss, steps = lenet300.loss_of(second, params), len(x) // lenet300.BATCH

    def batches() -> Iterator[Any]:
        for epoch in range(recipe.tuned):
            order = np.random.default_rng((recipe.seed, epoch)).permutation(len(x))[: steps * lenet300.BATCH]
            yield from ((x[i], y[i]) for i in order.reshape(steps, -1))

    tx = optax.adam(optax.cosine_decay_schedule(1e-3, recipe.tuned * steps))
    return lcq.finetune(lambda p, batch: loss(p, *batch), forms, tx, batches()) if recipe.tuned else forms


TITLES = {
    "lenet300_3": ("LeNet300, MNIST, 3 % kept, 16 values", "error 2.2 in 14 (9) kB"),
    "lenet300_3_teacher": ("the same, teacher", "error 2.2 in 14 (9) kB"),
    "lenet300_2.2_teacher": ("LeNet300, MNIST, 2.2 % kept, 8 values, teacher", "error 2.2 in 14 (9) kB"),
    "lenet300_2.5_moved": ("LeNet300, MNIST, 2.5 % kept, 8 values, teacher, moved", "error 2.2 in 14 (9) kB"),
}
RATES = {
    "lc_k8_rate": "K = 8, rate .0013, teacher",
    "lc_k8_rate_l2": "K = 8, rate .0013, five times the L2",
    "lc_k8_low_rate_l2": "K = 8, rate .0006, five times the L2",
    "lc_k8_evened_rate_l2": "K = 8, rate .0017, less where weights matter more, five times the L2",
}


def table() -> str:
    """The smallest files of whole nets."""
    rows = []
    for name, (title, target) in TITLES.items():
        for row in stored(f"smallest_{name}"):
            rows.append([title, f"{row['test_error']:.2f}", f"{row['bytes']:,}", target])
    for name, title in RATES.items():
        for row in stored(f"resnet20_{name}"):
            target = "error 8.8 in 60 (45) kB; 9.5 in 45 (36) kB"
            rows.append([f"ResNet-20, CIFAR-10, {title}", f"{100 - row['accuracy']:.2f}", f"{row['bytes']:,}", target])
    return grid(["everything counted", "test error %", "bytes", "goal (hoped for)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--trial", action="store_true", help="judge on held-back images only")
    kinds: dict[str, Any] = {"kept": float, "k": int, "rate": float, "teacher": float, "tuned": int}
    for field, kind in kinds.items():
        parser.add_argument(f"--{field}", type=kind, help="in place of the recipe's")
    args = parser.parse_args()
    recipe = dataclasses.replace(RECIPES[args.recipe], **{k: v for k in kinds if (v := getattr(args, k)) is not None})
    params, x, y, x_test, y_test = lenet300.load()
    path = ARTIFACTS / f"smallest_{args.recipe}.lcq"
    if args.trial:
        order = np.random.default_rng(0).permutation(len(x))
        back, rest = order[: lenet300.HELD_BACK], order[lenet300.HELD_BACK :]
        forms = train(recipe, params, x[rest], y[rest])
        loss, error = map(float, lenet300.judge(lcq.decompress(forms), x[back], y[back]))
        print({"trial": recipe, "held_back_error": error, "held_back_loss": loss}, flush=True)
        return
    start = time.time()
    forms = train(recipe, params, x, y)
    size = lcq.save(path, forms)
    dense = lcq.decompress(lcq.load(path))
    row: dict[str, Any] = {"recipe": args.recipe, "artifact": path.name, "bytes": size, "ratio": lcq.ratio(forms)}
    row["train_loss"], row["train_error"] = map(float, lenet300.judge(dense, x, y))
    row["test_loss"], row["test_error"] = map(float, lenet300.judge(dense, x_test, y_test))
    row |= {"settings": dataclasses.asdict(recipe), "seconds": round(time.time() - start, 1)}
    print(row, flush=True)
    record(f"smallest_{args.recipe}", [row], seeds=[recipe.seed])


if __name__ == "__main__":
    main()
