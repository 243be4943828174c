"""What tuning adds: centres, scales, factors, kept weights and biases trained with codes, masks and ranks fixed.

    LCQ_DATA=folder python -m benchmarks.experiments.tune                    results/tune_*.json, artifacts/tune_*.lcq
    ... lenet300_lc_k2        some of them

Data and augmentation as in lenet300.py and resnet20.py. Each row starts from a committed file, or from direct
compression of the given ResNet-20, and reads the test set before and after. LeNet300: 5 epochs of Adam, its rate
falling from 1e-3 as a cosine to 0. ResNet-20: one epoch of it, batch norm by the statistics of each batch; its rows say
too what recalibrating batch norm adds alone.
"""

import argparse
import functools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import optax

import lcq
from benchmarks.experiments import gpfq_train, lenet300, resnet20
from benchmarks.harness.artifacts import ARTIFACTS, find
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import RESULTS, record, stored
from lcq.examples import data
from lcq.examples.train import evaluate

LENET = ("dc_k4", "dc_l0_5", "dc_rank_10", "lc_k2", "lc_ternary", "lc_l0_5")
EPOCHS, RATE = 5, 1e-3


def optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(RATE, steps))


def lenet(name: str) -> dict[str, Any]:
    """A file of lenet300.py, before and after."""
    _, x, y, x_test, y_test = lenet300.load()
    maker = f"python -m benchmarks.experiments.lenet300 {name} --seeds 0"
    forms, steps = lcq.load(find(f"lenet300_{name}_0.lcq", maker)), len(x) // lenet300.BATCH
    loss = lenet300.loss_of(lenet300.RECIPES[name], None)

    def shuffled() -> Iterator[Any]:
        for epoch in range(EPOCHS):
            order = np.random.default_rng(epoch).permutation(len(x))[: steps * lenet300.BATCH]
            yield from ((x[i], y[i]) for i in order.reshape(steps, -1))

    tuned = lcq.finetune(lambda p, batch: loss(p, *batch), forms, optimizer(EPOCHS * steps), shuffled())

    row = saved(f"lenet300_{name}", tuned)
    for when, tree in {"_before": forms, "": tuned}.items():
        dense = lcq.decompress(tree)
        row[f"train_loss{when}"] = float(lenet300.judge(dense, x, y)[0])
        row[f"test_error{when}"] = float(lenet300.judge(dense, x_test, y_test)[1])
    return row


def resnet(k: int) -> dict[str, Any]:
    """Direct compression of the given net to K levels a layer: as it is, recalibrated, tuned and recalibrated."""
    x, y = data.cifar10("train")
    given = resnet20.given()
    forms, statistics = lcq.compress(given["params"], [lcq.Rule(resnet20.KERNELS, lcq.KMeans(k))]), given["batch_stats"]
    how, steps = gpfq_train.Recipe(1, RATE, batch=resnet20.BATCH, augment=True), len(x) // resnet20.BATCH
    loss, batches = resnet20.loss_of(), gpfq_train.batches(x, y, how, 0)
    tuned = lcq.finetune(lambda p, batch: loss(p, statistics, *batch)[0], forms, optimizer(steps), batches, steps=steps)
    test = data.cifar10("test")

    def accuracy(variables: Any) -> float:
        return 100 * evaluate(resnet20.apply, variables, *test).accuracy

    after = resnet20.recalibrated(tuned, statistics, x, 0)
    return saved(f"resnet20_dc_k{k}", after) | {
        "accuracy_as_it_is": accuracy({"params": forms, "batch_stats": statistics}),
        "accuracy_recalibrated": accuracy(resnet20.recalibrated(forms, statistics, x, 0)),
        "accuracy": accuracy(after),
    }


def saved(name: str, tree: Any) -> dict[str, Any]:
    path = ARTIFACTS / f"tune_{name}.lcq"
    size = lcq.save(path, tree)
    return {"name": name, "artifact": path.name, "bytes": size, "ratio": lcq.ratio(tree)}


RUNS = {f"lenet300_{name}": functools.partial(lenet, name) for name in LENET}
RUNS |= {f"resnet20_dc_k{k}": functools.partial(resnet, k) for k in (4, 16)}


def table() -> str:
    """What recalibrating batch norm and tuning add."""
    rows = []
    for path in sorted(RESULTS.glob("tune_lenet300_*.json")):
        (row,) = stored(path.stem)
        name = row["name"].removeprefix("lenet300_")
        numbers = [f"{row['train_loss_before']:.4f}", f"{row['train_loss']:.4f}"]
        rows.append(
            [f"LeNet300, `{name}`", *numbers, f"{row['test_error_before']:.2f}", "", f"{row['test_error']:.2f}"]
        )
    for path in sorted(RESULTS.glob("tune_resnet20_*.json")):
        (row,) = stored(path.stem)
        errors = [f"{100 - row[k]:.2f}" for k in ("accuracy_as_it_is", "accuracy_recalibrated", "accuracy")]
        rows.append([f"ResNet-20, `{row['name'].removeprefix('resnet20_')}`", "", "", *errors])
    head = ["", "train loss before", "tuned", "test error % before", "batch norm recalibrated", "tuned"]
    return grid(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    for name in args.names or RUNS:
        start = time.time()
        row = RUNS[name]() | {"seconds": round(time.time() - start, 1)}
        print(row, flush=True)
        record(f"tune_{name}", [row], seeds=[0])


if __name__ == "__main__":
    main()
