"""Trained image nets quantized without labels or retraining: MNIST 784-500-300-10, the CIFAR-10 CNN, ResNet-20.

    LCQ_DATA=folder python -m benchmarks.experiments.gpfq_images NET [RECIPE ..]    results/gpfq_NET.json, artifacts/
    ... NET RECIPE .. --trial    on held-back training images; writes nothing

NET is mnist, cifar or resnet20. A recipe is METHOD-LEVELS, such as gpfq-16 or nearest-3, or paper-LEVELS: GPFQ with the
levels of the papers, equispaced in [-a, a] with a = C median |W| for each layer, C chosen on held-back images.
Every kernel is quantized, with a scale for each output unit; biases and batch-norm means follow, and stay float32.
Calibration images are training images without labels; the last 5,000 training images are held back.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import lcq
from benchmarks.experiments.gpfq_train import HELD_BACK, NETS, RECIPES
from benchmarks.experiments.gpfq_train import load as load_images
from benchmarks.harness.artifacts import ARTIFACTS, find
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.examples import data, models

GRIDS = {3: (-1, 0, 1), 4: (-3, -1, 1, 3), 8: tuple(range(-7, 8, 2)), 16: tuple(range(-15, 16, 2))}
"""Our levels, times a scale per output unit."""

METHODS = ("nearest", "gptq", "gpfq", "qronos", "descent")

NAMES = {"nearest": "rtn", "paper": "gpfq"}
"""What lcq calls a method, where a recipe has another word."""

RADII = (1, 2, 3, 4, 5, 6)
"""The papers' C, tried on held-back images with a quarter of the calibration images."""


class Net(NamedTuple):
    """A net and how it is calibrated.

    Attributes:
        apply: (variables, uint8 images) -> logits.
        variables: trained.
        images: for calibration.
        batch: of them.
        recipes: in the order of the table.
    """

    apply: Callable[[Any, Any], Any]
    variables: Any
    images: int
    batch: int
    recipes: tuple[str, ...]


def net(name: str) -> Net:
    """The net by its name in the command line."""
    apply = apply_of(name)
    if name == "resnet20":
        variables = models.resnet_from_torch(data.pretrained("resnet20_cifar10"))
        recipes = [f"{method}-{levels}" for levels in (16, 8, 4, 3) for method in METHODS]
        return Net(apply, variables, 1024, 128, tuple(recipes))
    trainer = f"python -m benchmarks.experiments.gpfq_train {name} --out FOLDER"
    variables = lcq.load(find(f"gpfq_{name}_float.lcq", trainer))
    levels = (3,) if name == "mnist" else (16, 8, 4, 3)
    recipes = [f"{method}-{k}" for k in levels for method in ("paper", *METHODS)]
    return Net(apply, variables, *((25_000, 1000) if name == "mnist" else (1024, 128)), tuple(recipes))


def apply_of(name: str) -> Callable[[Any, Any], Any]:
    """(variables, uint8 images) -> logits of the net by its name."""
    if name == "resnet20":
        module, mean, std = models.ResNet(20), data.CIFAR10_MEAN, data.CIFAR10_STD
    else:
        module, mean, std = NETS[name], RECIPES[name].mean, RECIPES[name].std
    return lambda variables, x: module.apply(variables, data.normalize(x, mean, std))


def accuracy(apply: Callable[[Any, Any], Any], variables: Any, x: np.ndarray, y: np.ndarray) -> float:
    """Percent right."""
    right = jax.jit(lambda variables, x, y: (apply(variables, x).argmax(-1) == y).sum())
    return 100 * sum(int(right(variables, x[i : i + 500], y[i : i + 500])) for i in range(0, len(x), 500)) / len(x)


def rules(variables: Any, levels: int, radius: float | None) -> list[lcq.Rule]:
    """Our grid with a free scale per output unit, or the papers' for each layer."""
    if radius is None:
        return [lcq.Rule(".*/kernel", lcq.Levels(GRIDS[levels], scale=True, per="channel"))]
    chosen = []
    for layer, leaves in variables["params"].items():
        if "kernel" in leaves:
            a = radius * float(np.median(np.abs(leaves["kernel"])))
            chosen.append(lcq.Rule(f"params/{layer}/kernel", lcq.Levels(tuple(np.linspace(-a, a, levels)))))
    return chosen


def quantized(net: Net, recipe: str, batches: list[Any], radius: float | None = None) -> tuple[Any, dict[str, Any]]:
    """Forms, and what it took."""
    method, levels = recipe.split("-")
    start = time.perf_counter()
    done = lcq.quantize(
        net.apply,
        net.variables,
        batches,
        rules(net.variables, int(levels), radius),
        NAMES.get(method, method),
        bias_correction=radius is None,
    )
    facts = {
        "seconds": round(time.perf_counter() - start, 1),
        "last_error": done.records[-1].error,
        "recursion": sorted({r.recursion for r in done.records}),
        "centred": sum(r.bias_correction for r in done.records),
        "products": len(done.records),
        "C": radius,
    }
    return done.forms, facts


TITLES = {"mnist": "MNIST 784-500-300-10", "cifar": "CIFAR-10 CNN", "resnet20": "ResNet-20, CIFAR-10"}
TARGETS = {
    ("mnist", 3): (-0.43, -0.3),
    ("cifar", 16): (-0.17, -0.1),
    ("cifar", 8): (-1.06, -0.7),
    ("cifar", 4): (-4.4, -3.0),
    ("cifar", 3): (-7.0, -5.0),
    ("resnet20", 16): (91.61, 91.8),
    ("resnet20", 8): (91.21, 91.5),
    ("resnet20", 4): (89.30, 90.3),
    ("resnet20", 3): (88.95, 89.8),
}
"""The goal and what was hoped for, test accuracy in percent; negative numbers are from the float net."""


def table() -> str:
    """Test accuracies; a row for each net and number of levels."""
    columns = ("nearest", "paper", *METHODS[1:])
    rows = []
    for (net, levels), targets in TARGETS.items():
        by_method = {row["recipe"].split("-")[0]: row for row in stored(f"gpfq_{net}") if row["levels"] == levels}
        before = next(iter(by_method.values()))["float_accuracy"]
        cells = [f"{by_method[m]['accuracy']:.2f}" if m in by_method else "" for m in columns]
        goal, hope = (t if t > 0 else before + t for t in targets)
        rows.append([f"{TITLES[net]}, {levels} levels", f"{before:.2f}", *cells, f"{goal:.2f} ({hope:.2f})"])
    head = ["test accuracy %", "float", "RTN", "GPFQ, paper's levels", "GPTQ", "GPFQ", "Qronos", "`descent`"]
    return grid([*head, "goal (hoped for)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=("mnist", "cifar", "resnet20"))
    parser.add_argument("recipes", nargs="*")
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int)
    arguments = parser.parse_args()
    name, one = arguments.net, net(arguments.net)
    images, labels = load_images("mnist" if name == "mnist" else "cifar", "train")
    back = images[-HELD_BACK:], labels[-HELD_BACK:]
    count = arguments.images or one.images
    chosen = np.random.default_rng(arguments.seed).permutation(len(images) - HELD_BACK)[:count]
    batches = [images[chosen[i : i + one.batch]] for i in range(0, count, one.batch)]
    judged = back if arguments.trial else load_images("mnist" if name == "mnist" else "cifar", "test")
    before = accuracy(one.apply, one.variables, *judged)
    known = {row["recipe"]: row for row in stored(f"gpfq_{name}")}
    for recipe in arguments.recipes or one.recipes:
        radius = None
        if recipe.startswith("paper"):
            few = batches[: len(batches) // 4]
            score = {c: accuracy(one.apply, lcq.decompress(quantized(one, recipe, few, c)[0]), *back) for c in RADII}
            radius = max(score, key=lambda c: score[c])
        forms, facts = quantized(one, recipe, batches, radius)
        levels = int(recipe.split("-")[1])
        row = {
            "recipe": recipe,
            "levels": levels,
            "images": count,
            "seed": arguments.seed,
            **facts,
            "float_accuracy": before,
        }
        if arguments.trial:
            print({**row, "held_back": accuracy(one.apply, lcq.decompress(forms), *judged)}, flush=True)
            continue
        artifact = f"gpfq_{name}_{recipe}.lcq"
        row |= {"artifact": artifact, "bytes": lcq.save(ARTIFACTS / artifact, forms), "ratio": lcq.ratio(forms)}
        row["accuracy"] = accuracy(one.apply, lcq.decompress(lcq.load(ARTIFACTS / artifact)), *judged)
        print(row, flush=True)
        known[recipe] = row
        record(f"gpfq_{name}", [known[r] for r in one.recipes if r in known], seeds=[arguments.seed])


if __name__ == "__main__":
    main()
