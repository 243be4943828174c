"""HEMP on LeNet-5 and ResNet-20: points of the curves of bytes and error, with the entropy's term and without.

    LCQ_DATA=folder python -m benchmarks.experiments.hemp point --out folder --order 3 --weight 3    one point
    ... --net resnet20        of the other net
    ... --trial --epochs 5    judged on held-back images only: no test set, no record, no artifact
    LCQ_DATA=folder python -m benchmarks.experiments.hemp sweep --out folder    every point that is not there yet

LeNet-5 (20-50-500, 430,500 weights and 580 biases) on MNIST from a float net, and the given ResNet-20 on CIFAR-10:
trained on all training images but the last 5,000, and judged on these (the given ResNet-20 had seen them); the test set
is read once per point. lambda_H = 0 is the same training without the term. The inner optimizer is Adam: with SGD
lambda_H has an edge, below it nothing happens and above it every weight goes to one level, as the loss gradients of a
net that fits its data resist a move of all weights but of none alone; Adam's steps, in units of a weight's own
gradients, hold those that matter and let the others go. The slopes of H_n are large where levels are close: so
ResNet-20's convolutions start with weights of one size, which batch norm allows; as they were given, the layer of the
smallest weights lost them all before the others changed. lambda_H falls as a cosine to 0 in the first part of a run,
lambda_E grows to its end; the levels are estimated at the start, and stay. (The committed points are from before: at
the end they were estimated once more.) Sizes are whole files, as `lcq.save` writes them: blocks of codes by rANS,
header and all; LeNet-5's biases in float32, ResNet-20's batch norm folded to a scale and a bias, in bfloat16 as its
other bias. After every epoch all there is goes to OUT/NAME.ckpt.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

import lcq
from benchmarks.experiments import hemp_nets, resnet20
from benchmarks.experiments.hemp_nets import BATCH, NETS, Images, judge, train
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.checkpoint import digest, keep, maker, resume
from benchmarks.harness.record import record, stored


def empirical(codes: np.ndarray, order: int) -> tuple[float, int]:
    """H_n of the codes of one leaf, in bits, and how many blocks."""
    blocks = codes.reshape(-1)[: codes.size // order * order].reshape(-1, order).astype(np.int64)
    joint = np.bincount(blocks @ (1 + int(codes.max())) ** np.arange(order))
    p = joint[joint > 0] / len(blocks)
    return float(-(p * np.log2(p)).sum() / order), len(blocks)


class Point(NamedTuple):
    """A point of the curves: order, lambda_H, levels, and the price of a bit in the codebooks, in mean squares of w."""

    order: int
    weight: float
    levels: int
    price: float = 0.0
    seed: int = 0

    def name(self, net: str) -> str:
        return f"hemp_{net}_n{self.order}_h{self.weight:g}_k{self.levels}_p{self.price:g}_s{self.seed}"

    def rules(self, params: Any) -> list[lcq.Rule]:
        """A codebook of its own for each kernel; an odd number of levels has a zero."""
        zero = (0.0,) if self.levels % 2 else ()
        kernels = {path: w for path, w in flatten_dict(params, sep="/").items() if path.endswith("kernel")}
        mean = {path: float(jnp.mean(w**2)) for path, w in kernels.items()}
        return [lcq.Rule(path, lcq.KMeans(self.levels, zero, rate=self.price * mean[path])) for path in kernels]


WITHOUT = [Point(0, 0.0, 2), Point(0, 0.0, 3), Point(0, 0.0, 3, 0.4), Point(0, 0.0, 5), Point(0, 0.0, 5, 0.2)]
"""Without the term the codebooks make the curve."""

WITH = [(1, 0.5), (1, 1.0), (1, 1.5), (1, 2.0), (2, 1.0), (2, 1.5), (3, 1.0), (3, 1.5)]
POINTS = {
    "lenet5": [*WITHOUT, *(Point(order, weight, 5, 0.2) for order, weight in WITH)],
    "resnet20": [
        WITHOUT[1],
        WITHOUT[4],
        *(Point(order, weight, 5, 0.2) for order, weight in ((1, 5.5), (1, 5.75), (2, 5.0), (3, 5.0))),
    ],
}


def train_point(args: argparse.Namespace, point: Point, images: Images) -> None:
    """Trains one point and records it; one that is recorded already is left as it is."""
    name, net = point.name(args.net), NETS[args.net]
    if stored(name) and not args.trial:
        return print(name, "is there already")
    epochs = args.epochs or net.epochs
    steps = epochs * (len(images.train[0]) // BATCH)
    settings = {"epochs": epochs, "rate": args.rate, "error_weight": args.error}
    settings |= {"power": args.power, "stop": args.stop}
    variables = net.start()
    tx = lcq.hemp(
        optax.adam(optax.cosine_decay_schedule(args.rate, steps)),
        point.rules(variables["params"]),
        order=max(point.order, 1),
        entropy_weight=optax.cosine_decay_schedule(point.weight, int(args.stop * steps)),
        error_weight=optax.polynomial_schedule(0.0, args.error, args.power, steps),
    )
    recipe = (name, settings, args.trial)
    now = (variables["params"], variables["batch_stats"], tx.init(variables["params"]))
    path = args.out / f"{name}{f'_trial_{digest(repr(recipe))}' if args.trial else ''}.ckpt"
    now, log = resume(
        path,
        maker(recipe, __file__, hemp_nets.__file__, resnet20.__file__, Path(lcq.__file__).parent / "training"),
        now,
    )

    def each(now: Any) -> None:
        variables = net.finished(lcq.extract(now[2], now[0]), now[1], images)
        loss, error = judge(net, variables, images.held_back)
        log["curve"].append({"entropy": float(now[2].entropy), "loss": loss, "error": error})
        print(name, log["curve"][-1], flush=True)
        keep(path, now, log)

    params, statistics, state = train(net, tx, now, images, log, epochs, point.seed, each)
    forms = lcq.extract(state, params)
    if args.trial:
        size = -(-lcq.table(forms).total.coded // 8)
        return print(name, settings, f"{size:,} bytes, {log['seconds']:.0f} s", flush=True)
    file = ARTIFACTS / f"{name}.lcq"
    row = {"net": args.net, **point._asdict(), "artifact": file.name}
    row |= {"bytes": lcq.save(file, net.finished(forms, statistics, images)), "entropy": float(state.entropy)}
    leaves = jax.tree.leaves(forms, is_leaf=lambda leaf: isinstance(leaf, lcq.forms.Form))
    codes = [np.asarray(leaf.codes) for leaf in leaves if isinstance(leaf, lcq.forms.Form)]
    for n in (1, 2, 3):
        parts = [empirical(c, n) for c in codes]
        row[f"bits_of_blocks_of_{n}"] = sum(h * many for h, many in parts) / sum(many for _, many in parts)
    loaded = lcq.load(file)
    row["ratio"] = lcq.ratio(loaded)
    for what, some in images._asdict().items():
        row[f"{what}_loss"], row[f"{what}_error"] = judge(net, loaded, some)
    row |= {"seconds": round(log["seconds"], 1), "resumed_after": log["resumed_after"], "curve": log["curve"]}
    print({key: value for key, value in row.items() if key != "curve"}, flush=True)
    record(name, [row], seeds=[point.seed], settings=settings, batch=BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("point", "sweep"))
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda_H")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--price", type=float, default=0.0, help="of a bit in the codebooks, in mean squares of w")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--net", choices=list(NETS), default="lenet5")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--epochs", type=int, help="in place of the net's")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam at first; it falls as a cosine to 0")
    parser.add_argument("--stop", type=float, default=0.8, help="part of a run after which lambda_H is 0")
    parser.add_argument("--error", type=float, default=0.02, help="lambda_E at the end")
    parser.add_argument("--power", type=float, default=8.0, help="of the growth of lambda_E from 0")
    parser.add_argument("--trial", action="store_true", help="judge on held-back images only")
    args = parser.parse_args()
    ARTIFACTS.mkdir(exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    images = NETS[args.net].images()
    one = Point(args.order, args.weight, args.levels, args.price, args.seed)
    for point in POINTS[args.net] if args.what == "sweep" else [one]:
        train_point(args, point, images)


if __name__ == "__main__":
    main()
