"""What distilling adds after quantize, without a label: ResNet-20 at 3 and 4 levels, stories260K at 3 bits in groups.

    LCQ_DATA=folder python -m benchmarks.experiments.distilled [NET ..]    results/distilled.json
    ... NET --trial --epochs 20 --rate 1e-3    on held-back training data; writes nothing

NET is resnet20-3, resnet20-4 or stories-3. Quantized by "descent" on the inputs of gpfq_images.py and
gpfq_transformers.py, then `lcq.distill` on the same inputs by Adam, its rate a cosine to 0: scales, norms and biases
move, codes stay. Images are flipped and moved by up to 4 pixels anew each epoch. Held back: the last 5,000 training
images (which the given net has seen), 32 windows of text. Nothing else chose epochs and rates.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import lcq
from benchmarks.experiments import gpfq_images, gpfq_train, gpfq_transformers
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.examples import data


class Case(NamedTuple):
    """A quantized net, its inputs, and who judges.

    Attributes:
        fn: (params, batch) -> logits.
        params: of the float net.
        forms: quantized.
        batches: epochs -> batches.
        held_back: params -> figures on held-back training data.
        test: params -> figures on the test set.
    """

    fn: Callable[..., Any]
    params: Any
    forms: Any
    batches: Callable[[int], Iterator[Any]]
    held_back: Callable[[Any], dict[str, float]]
    test: Callable[[Any], dict[str, float]]


def resnet20(levels: int) -> Case:
    net = gpfq_images.net("resnet20")
    x, y = data.cifar10("train")
    back = x[-gpfq_train.HELD_BACK :], y[-gpfq_train.HELD_BACK :]
    chosen = x[np.random.default_rng(0).permutation(len(x) - gpfq_train.HELD_BACK)[: net.images]]
    forms, _ = gpfq_images.quantized(net, f"descent-{levels}", np.split(chosen, len(chosen) // net.batch))
    logits = jax.jit(net.apply)

    def batches(epochs: int) -> Iterator[Any]:
        how = gpfq_train.Recipe(epochs, 0.0, batch=net.batch, augment=True)
        for epoch in range(epochs):
            yield from (images for images, _ in gpfq_train.batches(chosen, np.zeros(len(chosen)), how, epoch))

    def judge(params: Any, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
        pairs = [(logits(net.variables, part), logits(params, part)) for part in np.split(x, len(x) // 500)]
        logs = [[jax.nn.log_softmax(a) for a in pair] for pair in pairs]
        kl = np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in logs])
        return {"accuracy": gpfq_images.accuracy(net.apply, params, x, y), "kl": float(kl)}

    return Case(
        net.apply, net.variables, forms, batches, lambda p: judge(p, *back), lambda p: judge(p, *data.cifar10("test"))
    )


def stories(bits: int) -> Case:
    net = gpfq_transformers.load_stories()
    forms = lcq.quantize(net.fn, net.params, net.batches(), net.rules(bits, "groups"), "descent").forms

    def batches(epochs: int) -> Iterator[Any]:
        for epoch in range(epochs):
            order = np.random.default_rng(epoch).permutation(net.size)
            yield from np.split(net.calibration[order], net.size // 16)

    return Case(net.fn, net.params, forms, batches, net.held_back, net.evaluate)


class Run(NamedTuple):
    """A net of the command line and its recipe."""

    load: Callable[[], Case]
    title: str
    epochs: int
    rate: float
    goal: str


RUNS = {
    "stories-3": Run(lambda: stories(3), "stories260K, 3 bits in groups", 10, 5e-4, "half of the loss that is left"),
    "resnet20-4": Run(lambda: resnet20(4), "ResNet-20, 4 levels", 20, 1e-3, "90.8 (91.2)"),
    "resnet20-3": Run(lambda: resnet20(3), "ResNet-20, 3 levels", 20, 1e-3, "89.9 (90.6)"),
}


def distilled(case: Case, epochs: int, rate: float) -> Any:
    """Forms after `epochs` over the inputs."""
    steps = sum(1 for _ in case.batches(1)) * epochs
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return lcq.distill(case.fn, case.params, case.forms, tx, case.batches(epochs), steps=steps)


def table() -> str:
    """Before and after, and the float net."""
    rows = []
    for row in stored("distilled"):
        run, metric = RUNS[row["net"]], "nll" if "nll" in row["float"] else "accuracy"
        figures = [f"{row[when][metric]:.3f}" for when in ("float", "before", "after")]
        rows.append([run.title, metric, *figures, *(f"{row[w]['kl']:.4f}" for w in ("before", "after")), run.goal])
    return grid(["", "figure", "float", "quantized", "distilled", "KL before", "after", "goal (hoped for)"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", choices=[[], *RUNS])
    parser.add_argument("--trial", action="store_true")
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--rate", type=float)
    args = parser.parse_args()
    known = {row["net"]: row for row in stored("distilled")}
    for name in args.nets or RUNS:
        run, case = RUNS[name], RUNS[name].load()
        epochs, rate = args.epochs or run.epochs, args.rate or run.rate
        start = time.perf_counter()
        forms = distilled(case, epochs, rate)
        row = {"net": name, "epochs": epochs, "rate": rate, "seconds": round(time.perf_counter() - start, 1)}
        judge = case.held_back if args.trial else case.test
        trees = {"float": case.params, "before": lcq.decompress(case.forms), "after": lcq.decompress(forms)}
        row |= {when: judge(tree) for when, tree in trees.items()}
        print(row, flush=True)
        if not args.trial:
            known[name] = row
            record("distilled", [known[n] for n in RUNS if n in known], seeds=[0])


if __name__ == "__main__":
    main()
