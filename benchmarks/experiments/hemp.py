"""HEMP: is the entropy's gradient exact, what does it cost, and what is it worth on LeNet-5 and ResNet-20.

    python -m benchmarks.experiments.hemp exact              results/hemp_exact.json
    taskset -c 0 python -m benchmarks.experiments.hemp speed [rounds]       results/hemp_speed.json
    LCQ_DATA=folder python -m benchmarks.experiments.hemp reference         artifacts/lenet5_reference.npz
    LCQ_DATA=folder python -m benchmarks.experiments.hemp point --out folder --order 3 --weight 3    one point
    ... --net resnet20        of the other net
    ... --trial --epochs 5    judged on held-back images only: no test set, no record, no artifact
    LCQ_DATA=folder python -m benchmarks.experiments.hemp sweep --out folder      every point that is not there yet
    python -m benchmarks.experiments.hemp summary            results/hemp_lenet5.json: sizes at equal accuracy

Exact: value and slopes in float64 beside autodiff of the dense definition, a K^n tensor for each block, and for n = 2
beside the closed form; and in float32 on 1e6 weights beside float64. Speed: 1e6 weights, medians in one process.

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
other bias. The summary interpolates log bytes between points of a curve, which goes on level past its last, on
held-back and on test images. After every epoch all there is goes to OUT/NAME.ckpt.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import lcq
from benchmarks.experiments import gpfq_train, resnet20
from benchmarks.harness.checkpoint import digest, keep, maker, resume
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import ARTIFACTS, RESULTS, record, stored
from lcq.examples import data
from lcq.examples.train import evaluate

SIZE, ROUNDS, ORDERS, CENTRES = 1_000_000, 9, (1, 2, 3, 4), (6, 10)
HELD_BACK, BATCH = 5000, 128
REFERENCE = ARTIFACTS / "lenet5_reference.npz"


# Exactness and speed


def dense(w: Any, centres: Any, order: int) -> Any:
    """H_n by its definition: memberships as hats over the centres, a tensor of K^n for each block."""
    wide = jnp.concatenate([centres[:1] - 1, centres, centres[-1:] + 1])
    x = w[: w.size // order * order, None]
    rising, falling = (x - wide[:-2]) / jnp.diff(wide)[:-1], (wide[2:] - x) / jnp.diff(wide)[1:]
    hats = jnp.maximum(0, jnp.where(x < centres, rising, falling)).reshape(-1, order, centres.size)
    blocks = functools.reduce(lambda a, b: (a[:, :, None] * b[:, None]).reshape(len(a), -1), jnp.moveaxis(hats, 1, 0))
    p = blocks.mean(0)
    return -jnp.sum(jnp.where(p > 0, p * jnp.log2(jnp.where(p > 0, p, 1)), 0)) / order


def closed_form(w: np.ndarray, c: np.ndarray) -> np.ndarray:
    """dH_2/dw of every weight of whole pairs."""
    b = np.searchsorted(c, w, side="right")
    tau = (w - c[b - 1]) / (c[b] - c[b - 1])
    member = np.zeros((w.size, c.size))
    member[np.arange(w.size), b], member[np.arange(w.size), b - 1] = tau, 1 - tau
    p = member[0::2].T @ member[1::2] / (w.size // 2)
    slopes = np.empty_like(w)
    logs = np.log2(np.where(p > 0, p, 1))
    for place, table in enumerate((logs, logs.T)):
        mine, others = b[place::2], member[1 - place :: 2]
        slopes[place::2] = (others * (table[mine - 1] - table[mine])).sum(1)
    return slopes / (w.size * (c[b] - c[b - 1]))


def sample(size: int, centres: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian weights, and equally spaced centres around all of them."""
    w = np.random.default_rng(seed).standard_normal(size)
    return w, np.linspace(w.min() - 0.1, w.max() + 0.1, centres)


def slopes_of(order: int) -> Any:
    return jax.jit(jax.value_and_grad(lambda w, c: lcq.training.block_entropy(w, c, order)))


def exact() -> list[dict[str, Any]]:
    """Largest differences over the largest slope, and of the value."""
    rows = []
    for order, size in itertools.product(ORDERS, (4, 6)):
        w, c = sample(240, size)
        with jax.enable_x64(True):
            value, slopes = slopes_of(order)(jnp.asarray(w), jnp.asarray(c))
            expected = jax.value_and_grad(dense)(jnp.asarray(w), jnp.asarray(c), order)
        others = {"autodiff": np.asarray(expected[1])} | ({"closed_form": closed_form(w, c)} if order == 2 else {})
        for name, other in others.items():
            away = float(np.abs(np.asarray(slopes) - other).max() / np.abs(other).max())
            row = {"what": name, "order": order, "centres": size, "weights": w.size, "slope": away}
            rows.append({**row, "value": abs(float(value) - float(expected[0]))})
    for order, size in itertools.product(ORDERS, CENTRES):
        w, c = (np.asarray(a, np.float32) for a in sample(SIZE, size))
        value, slopes = slopes_of(order)(jnp.asarray(w), jnp.asarray(c))
        with jax.enable_x64(True):
            wide = slopes_of(order)(jnp.asarray(w, jnp.float64), jnp.asarray(c, jnp.float64))
        away = float(np.abs(np.asarray(slopes) - np.asarray(wide[1])).max() / np.abs(np.asarray(wide[1])).max())
        row = {"what": "float32", "order": order, "centres": size, "weights": SIZE, "slope": away}
        rows.append({**row, "value": abs(float(value) - float(wide[0]))})
    return rows


def speed(rounds: int) -> list[dict[str, Any]]:
    """Median and least seconds of the value, and of value and gradient."""
    rows = []
    for size, order in itertools.product(CENTRES, ORDERS):
        w, c = (jnp.asarray(a, jnp.float32) for a in sample(SIZE, size))
        value = jax.jit(lambda w, c, order=order: lcq.training.block_entropy(w, c, order))
        for what, run in (("value", value), ("value_and_gradient", slopes_of(order))):
            jax.block_until_ready(run(w, c))
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                jax.block_until_ready(run(w, c))
                seconds.append(time.perf_counter() - start)
            row = {"what": what, "order": order, "centres": size, "weights": SIZE}
            rows.append({**row, "seconds": statistics.median(seconds), "least_seconds": min(seconds)})
    return rows


# The nets


class LeNet5(nn.Module):
    """Caffe's LeNet-5: 20 and 50 convolutions of 5x5 with max pooling, 500 and 10 units."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = x.reshape(-1, 28, 28, 1)
        for i, width in enumerate((20, 50)):
            x = nn.Conv(width, (5, 5), padding="VALID", name=f"conv{i}")(x)
            n, h, w, c = x.shape
            x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        x = nn.relu(nn.Dense(500, name="dense0")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="dense1")(x)


class Images(NamedTuple):
    """Images and labels to train on, to judge by, and to test on."""

    train: tuple[Any, Any]
    held_back: tuple[Any, Any]
    test: tuple[Any, Any]


class OnMnist:
    """LeNet-5, from weights trained here."""

    epochs = 15

    def images(self) -> Images:
        split = data.mnist()
        mean = split.x_train[:-HELD_BACK].mean() / 255
        x, x_test = (data.normalize(a, mean) for a in (split.x_train, split.x_test))
        return cut(x, split.y_train, (x_test, split.y_test))

    def start(self) -> dict[str, Any]:
        if not REFERENCE.exists():
            raise FileNotFoundError(
                f"{REFERENCE} is not there: run `python -m benchmarks.experiments.hemp reference` first"
            )
        params = jax.tree.map(jnp.asarray, data.pretrained(REFERENCE.stem, REFERENCE.parent))
        return {"params": params, "batch_stats": {}}

    def apply(self, variables: Any, x: Any) -> Any:
        return LeNet5().apply(variables, x)

    def loss(self, params: Any, statistics: Any, x: Any, y: Any) -> tuple[Any, Any]:
        logits = LeNet5().apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), {"batch_stats": statistics}

    def batches(self, images: tuple[Any, Any], seed: int, epoch: int) -> Iterator[tuple[Any, Any]]:
        return data.batches(*images, BATCH, seed=seed, epoch=epoch)

    def finished(self, forms: Any, statistics: Any, images: Images) -> dict[str, Any]:
        return {"params": forms}


class OnCifar:
    """ResNet-20 from the given weights, augmented and recalibrated as in resnet20.py."""

    epochs = 10

    def images(self) -> Images:
        return cut(*data.cifar10("train"), data.cifar10("test"))

    def start(self) -> dict[str, Any]:
        return alike(resnet20.given())

    def apply(self, variables: Any, x: Any) -> Any:
        return resnet20.apply(variables, x)

    def loss(self, params: Any, statistics: Any, x: Any, y: Any) -> tuple[Any, Any]:
        return resnet20.loss_of()(params, statistics, x, y)

    def batches(self, images: tuple[Any, Any], seed: int, epoch: int) -> Iterator[tuple[Any, Any]]:
        how = gpfq_train.Recipe(self.epochs, 0.0, batch=BATCH, augment=True, seed=seed)
        return gpfq_train.batches(*images, how, epoch)

    def finished(self, forms: Any, statistics: Any, images: Images) -> dict[str, Any]:
        return resnet20.folded(resnet20.recalibrated(forms, statistics, images.train[0], 0))


Net = OnMnist | OnCifar
NETS: dict[str, Net] = {"lenet5": OnMnist(), "resnet20": OnCifar()}


def alike(variables: Any) -> dict[str, Any]:
    """Every convolution with weights of root mean square .1; its batch norm takes that back."""
    params, statistics = flatten_dict(variables["params"]), flatten_dict(variables["batch_stats"])
    for *block, name, kind in list(params):
        if name.startswith("conv") and kind == "kernel":
            factor = 0.1 / jnp.sqrt(jnp.mean(params[*block, name, kind] ** 2))
            norm = (*block, name.replace("conv", "bn"))
            params[*block, name, kind] *= factor
            statistics[*norm, "mean"] *= factor
            statistics[*norm, "var"] *= factor**2
    return {"params": unflatten_dict(params), "batch_stats": unflatten_dict(statistics)}


def cut(x: Any, y: Any, test: tuple[Any, Any]) -> Images:
    return Images((x[:-HELD_BACK], y[:-HELD_BACK]), (x[-HELD_BACK:], y[-HELD_BACK:]), test)


def judge(net: Net, variables: Any, images: tuple[Any, Any]) -> tuple[float, float]:
    """Mean loss, and error in percent."""
    score = evaluate(net.apply, variables, *images)
    return score.loss, 100 * (1 - score.accuracy)


def train(net: Net, tx: Any, now: Any, images: Images, log: dict[str, Any], epochs: int, seed: int, each: Any) -> Any:
    """Parameters, batch-norm statistics and optimizer state; `each(now)` after every epoch."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(now: Any, x: Any, y: Any) -> Any:  # in a scan XLA's convolutions are slow on a CPU
        params, statistics, state = now
        grads, moved = jax.grad(net.loss, has_aux=True)(params, statistics, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), moved["batch_stats"], state

    now = jax.tree.map(jnp.copy, now)
    for epoch in range(len(log["curve"]), epochs):
        start = time.time()
        for x, y in net.batches(images.train, seed, epoch):
            now = step(now, x, y)
        jax.block_until_ready(now)
        log["seconds"] += time.time() - start
        each(now)
    return now


def reference(epochs: int) -> None:
    """LeNet-5 from random weights."""
    net, log = NETS["lenet5"], {"curve": [], "seconds": 0.0}
    images = net.images()
    rate = optax.cosine_decay_schedule(0.05, epochs * (len(images.train[0]) // BATCH))
    params = jax.jit(LeNet5().init)(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, 0.9, nesterov=True))

    def each(now: Any) -> None:
        print(judge(net, {"params": now[0]}, images.held_back), flush=True)

    params, *_ = train(net, tx, (params, {}, tx.init(params)), images, log, epochs, 0, each)
    np.savez(REFERENCE, **{"/".join(path): np.asarray(a) for path, a in flatten_dict(params).items()})
    row: dict[str, Any] = {"float32_bytes": 4 * sum(a.size for a in jax.tree.leaves(params)), "epochs": epochs}
    for name, some in images._asdict().items():
        row[f"{name}_loss"], row[f"{name}_error"] = judge(net, {"params": params}, some)
    print(row)
    record("hemp_lenet5_reference", [row], seeds=[0])


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
    now, log = resume(path, maker(recipe, __file__, resnet20.__file__, Path(lcq.__file__).parent / "training"), now)

    def each(now: Any) -> None:
        variables = net.finished(lcq.training.compress_warm(now[2], now[0]), now[1], images)
        loss, error = judge(net, variables, images.held_back)
        log["curve"].append({"entropy": float(now[2].entropy), "loss": loss, "error": error})
        print(name, log["curve"][-1], flush=True)
        keep(path, now, log)

    params, statistics, state = train(net, tx, now, images, log, epochs, point.seed, each)
    forms = lcq.training.compress_warm(state, params)
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


def unbeaten(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of (error, bytes) that no other beats, by their errors."""
    return [p for p in sorted(curve) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in curve)]


def bytes_at(curve: list[tuple[float, float]], error: float) -> float | None:
    """Bytes of a curve of (error, bytes) at an error, log bytes interpolated along points that no other beats."""
    best = unbeaten(curve)
    if not best or best[0][0] > error:
        return None
    errors, sizes = zip(*best, strict=True)
    return float(np.exp(np.interp(error, errors, np.log(sizes))))


def summary(net: str) -> list[dict[str, Any]]:
    """What every order takes at equal errors, by held-back images and by test images.

    The points of all orders together are a curve too, "any". Errors are those of the points without the term, and of
    the ends of the curve with it where the other curve has points on either side.
    """
    points = [row for path in sorted(RESULTS.glob(f"hemp_{net}_n*.json")) for row in stored(path.stem)]
    rows = []
    for judge in ("held_back_error", "test_error"):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in points:
            for name in (str(row["order"]), *(["any"] if row["order"] else [])):
                curves.setdefault(name, []).append((round(row[judge], 2), row["bytes"]))
        without, ends = unbeaten(curves["0"]), unbeaten(curves["any"])
        shared = {error for error, _ in (ends[0], ends[-1]) if without[0][0] < error < without[-1][0]}
        for error in sorted(shared | {error for error, _ in curves["0"]}):
            sizes = {name: bytes_at(curve, error) for name, curve in sorted(curves.items())}
            rows.append({"judged_by": judge, "error": error, "bytes": sizes})
    return rows


TITLES = {"lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10"}


def table() -> str:
    """Bytes with and without the term at equal errors."""
    rows = []
    for net, title in TITLES.items():
        for row in stored(f"hemp_{net}"):
            without, sizes = row["bytes"]["0"], [row["bytes"].get(str(order)) for order in (1, 2, 3)]
            best = row["bytes"]["any"]
            saved = f"{100 * (1 - best / without):.0f} %" if best else ""
            cells = [f"{size:,.0f}" if size else "" for size in (without, *sizes)]
            judge = "held back" if row["judged_by"] == "held_back_error" else "test"
            rows.append([f"{title}, {row['error']:.2f} % {judge}", *cells, saved, "15 / 25 %"])
    head = ["bytes at equal error", "without the term", "n = 1", "n = 2", "n = 3", "smaller by", "accept / aim"]
    return grid(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "speed", "reference", "point", "sweep", "summary"))
    parser.add_argument("rounds", type=int, nargs="?", default=ROUNDS)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda_H")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--price", type=float, default=0.0, help="of a bit in the codebooks, in mean squares of w")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--net", choices=list(NETS), default="lenet5")
    parser.add_argument("--out", type=Path, help="folder of checkpoints")
    parser.add_argument("--epochs", type=int, help="in place of the net's")
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam at first; it falls as a cosine to 0")
    parser.add_argument("--stop", type=float, default=0.8, help="part of a run after which lambda_H is 0")
    parser.add_argument("--error", type=float, default=0.02, help="lambda_E at the end")
    parser.add_argument("--power", type=float, default=8.0, help="of the growth of lambda_E from 0")
    parser.add_argument("--trial", action="store_true", help="judge on held-back images only")
    args = parser.parse_args()
    ARTIFACTS.mkdir(exist_ok=True)
    if args.what in ("exact", "speed"):
        rows = exact() if args.what == "exact" else speed(args.rounds)
        for row in rows:
            print({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()})
        record(f"hemp_{args.what}", rows, seeds=[0], rounds=args.rounds if args.what == "speed" else 1)
        return
    if args.what == "summary":
        rows = summary(args.net)
        print(*rows, sep="\n")
        record(f"hemp_{args.net}", rows)
        return
    if args.what == "reference":
        return reference(args.epochs or 15)
    if args.out is None:
        parser.error("expected --out FOLDER")
    args.out.mkdir(parents=True, exist_ok=True)
    images = NETS[args.net].images()
    one = Point(args.order, args.weight, args.levels, args.price, args.seed)
    for point in POINTS[args.net] if args.what == "sweep" else [one]:
        train_point(args, point, images)


if __name__ == "__main__":
    sys.exit(main())
