"""Plans of three bits a weight: the same everywhere, by the distortion of weights, and by the error of outputs.

    LCQ_DATA=folder python -m benchmarks.experiments.output_plans [NET ..]    results/output_plans.json
    ... --trial    judged on held-back training data; writes nothing
    ... --methods rtn gptq

NET is resnet20 or minilm. Every plan may take as many bytes as `Uniform(3, per="channel")` on every kernel, packed at a
fixed width. Both others choose for each kernel from grids of 2 to 6 bits, on MiniLM also with scales for groups of 128
inputs. Plans by outputs see 256 training images or 64 training sentences without labels. "rtn" is
`lcq.compress`, whose codes are those that were compared; "gptq" is `lcq.quantize` on the same inputs.

Judged by how far outputs are from the float net's, on data that chose nothing: of ResNet-20
||f - f'||^2 / ||f||^2 of the logits of the test images, and accuracy; of MiniLM the mean of 1 - cosine, half the
squared error of the unit vectors, over the sentences of the dev pairs, and Spearman's correlation.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

import lcq
from benchmarks.experiments import gpfq_images, gpfq_train, gpfq_transformers
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

BITS, UNIFORM = (2, 3, 4, 5, 6), lcq.Uniform(3, per="channel")
PLANS = ("uniform", "weights", "outputs")


class Net(NamedTuple):
    """A net, and what its plans are made of.

    Attributes:
        fn: (params, batch) -> outputs.
        params: as given.
        calibration: batches without labels.
        pattern: of the paths of the kernels.
        schemes: to choose from.
        judge: the error of the outputs of other parameters, and how good these are.
    """

    fn: Callable[[Any, Any], Any]
    params: Any
    calibration: Sequence[Any]
    pattern: str
    schemes: Sequence[lcq.Uniform]
    judge: Callable[[Any], dict[str, float]]


def resnet20(trial: bool) -> Net:
    net = gpfq_images.net("resnet20")
    images, labels = gpfq_train.load("cifar", "train")
    back = gpfq_train.HELD_BACK
    chosen = np.random.default_rng(0).permutation(len(images) - back)[:256]
    judged = (images[-back:], labels[-back:]) if trial else gpfq_train.load("cifar", "test")
    run = jax.jit(net.apply)

    def logits(variables: Any) -> np.ndarray:
        parts = range(0, len(judged[0]), 500)
        return np.concatenate([np.asarray(run(variables, judged[0][i : i + 500]), np.float64) for i in parts])

    given = logits(net.variables)

    def judge(variables: Any) -> dict[str, float]:
        found = logits(variables)
        right = 100 * float((found.argmax(-1) == judged[1]).mean())
        return {"error": float(((found - given) ** 2).sum() / (given**2).sum()), "accuracy": right}

    schemes = [lcq.Uniform(bits, per="channel") for bits in BITS]
    batches = [images[chosen[:128]], images[chosen[128:]]]
    return Net(net.apply, net.variables, batches, ".*/kernel", schemes, judge)


def minilm(trial: bool) -> Net:
    net = gpfq_transformers.load_minilm()
    (pattern,) = net.weights

    def judge(params: Any) -> dict[str, float]:
        found = (net.held_back if trial else net.evaluate)(params)
        return {"error": found["turn"], "spearman": found["spearman"]}

    schemes = [lcq.Uniform(bits, per=per) for bits in BITS for per in ("channel", 128)]
    return Net(net.fn, net.params, net.batches(64), pattern, schemes, judge)


NETS = {"resnet20": resnet20, "minilm": minilm}


def plan_of(net: Net, name: str, size: int) -> Any:
    """The allocation of a plan by its name."""
    if name == "uniform":
        return lcq.pareto(net.params, {net.pattern: [UNIFORM]}, bytes=size, coded=False)
    given = {"fn": net.fn, "calibration": net.calibration} if name == "outputs" else {}
    return lcq.pareto(net.params, {net.pattern: net.schemes}, bytes=size, coded=False, **given)


def forms_of(net: Net, plan: lcq.Plan, method: str) -> Any:
    if method == "rtn":
        return lcq.compress(net.params, plan)
    return lcq.quantize(net.fn, net.params, net.calibration, plan, method).forms


def bits_per_weight(allocation: Any) -> float:
    weights = sum(int(np.prod(choice.shape)) for choice in allocation.choices)
    return sum(choice.bits for choice in allocation.choices) / weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=list(NETS))
    parser.add_argument("--methods", nargs="+", default=["rtn"])
    parser.add_argument("--trial", action="store_true")
    args = parser.parse_args()
    for name in args.nets:
        net = NETS[name](args.trial)
        size = lcq.pareto(net.params, {net.pattern: [UNIFORM]}, bytes=10**12, coded=False).bytes
        for by in PLANS:
            start = time.time()
            chosen = plan_of(net, by, size)
            seconds = round(time.time() - start, 1)
            facts = {"net": name, "plan": by, "bytes": chosen.bytes, "seconds": seconds}
            facts |= {"bits_per_weight": round(bits_per_weight(chosen), 3)}
            facts |= {"choices": {choice.path: str(choice.scheme) for choice in chosen.choices}}
            for method in args.methods:
                row = {**facts, "method": method, **net.judge(lcq.decompress(forms_of(net, chosen.plan, method)))}
                print(row, flush=True)
                if not args.trial:
                    keys = ("net", "plan", "method")
                    others = [old for old in stored("output_plans") if any(old[k] != row[k] for k in keys)]
                    record("output_plans", [*others, row], seeds=[0])


TITLES = {"resnet20": "ResNet-20, CIFAR-10", "minilm": "MiniLM"}
GOAL, HOPE = 20, 40
"""Percent less error than of the uniform plan."""


def table() -> str:
    """A row for each net and rounding method, the errors of the three plans."""
    rows = {(row["net"], row["method"], row["plan"]): row for row in stored("output_plans")}
    cells = []
    for name, method in dict.fromkeys((name, method) for name, method, _ in rows):
        uniform, *others = (rows[name, method, plan] for plan in PLANS)
        quality = "accuracy" if name == "resnet20" else "spearman"
        changes = [f"{row['error']:.4f} ({100 * (row['error'] / uniform['error'] - 1):+.0f} %)" for row in others]
        last = " / ".join(f"{row[quality]:.4g}" for row in (uniform, *others))
        cells.append([f"{TITLES[name]}, {method}", f"{uniform['error']:.4f}", *changes, last, f"-{GOAL} (-{HOPE}) %"])
    head = ["error of outputs", "3 bits everywhere", "by weights", "**by outputs**"]
    return grid([*head, "accuracy % or Spearman of the three", "goal (hoped for)"], cells)


if __name__ == "__main__":
    main()
