"""Binary weights by `lcq.smooth_binary`: controls on a small net, ResNet-20 from the given weights, the cost of a step.

    LCQ_DATA=folder python -m benchmarks.experiments.smooth_binary controls --out folder  results/smooth_binary_small_*
    LCQ_DATA=folder python -m benchmarks.experiments.smooth_binary resnet20 smooth --out folder
                                                    results/smooth_binary_resnet20_smooth.json, artifacts/
    LCQ_DATA=folder python -m benchmarks.experiments.smooth_binary time    results/smooth_binary_time.json
    ... --trial --epochs 3 --rate 0.2    judged on held-back images: no test set, no record, no artifact

Data: real CIFAR-10, augmented as in `resnet20`. Every convolution but the first is binary, a group for each filter; the
first, the last layer and batch norm train on in float32. The small net starts from random weights, ResNet-20 from the
given ones (test accuracy 91.73 %).
A run trains on all 50,000 training images, a trial without the last 5,000, which judge it. The test set is read once a
run, after the last epoch: of W at t = 1 ("soft_accuracy") and of what is deployed ("accuracy"), each with batch norm
recalibrated on 5,000 augmented training images; curves are of training images.

After every epoch all there is goes to OUT/NAME.ckpt; the same command goes on from it, but not with another recipe or
from other code. artifacts/smooth_binary_resnet20_NAME.lcq holds {"params", "batch_stats"}.
"""

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import lcq
from benchmarks.experiments import gpfq_train, resnet20
from benchmarks.experiments.resnet20 import BATCH, HELD_BACK, JUDGED, normalized, recalibrated
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.checkpoint import digest, keep, maker, resume
from benchmarks.harness.record import record
from lcq.examples import data, models
from lcq.examples.train import evaluate

ROUNDS, STEPS = 15, 4
"""Of the timings: interleaved rounds, and steps of each."""


class SmallResNet(nn.Module):
    """ResNet-14 of half the width: 43,192 weights, a sixth of ResNet-20's, and a sixth of its work."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        x = nn.Conv(8, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn1")(x))
        for stage, width in enumerate((8, 16, 32), start=1):
            for i in range(2):
                stride = 2 if stage > 1 and i == 0 else 1
                x = models.ResNetBlock(width, stride, name=f"stage{stage}_block{i}")(x, train)
        return nn.Dense(10, name="dense")(x.mean((1, 2)))


NETS: dict[str, nn.Module] = {"small": SmallResNet(), "resnet20": resnet20.NET}
RULES = (lcq.Rule("stage.*/kernel", lcq.Binary(per="channel")),)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov's momentum 0.9 and L2; the learning rate falls from `rate` as a cosine to 0.

    Attributes:
        binarization: of all convolutions but the first; None trains the float net.
        learned: whether alphas are parameters of their own.
        l2: the loss gains l2/2 ||w||^2 over the kernels, binary or not.
    """

    binarization: lcq.training.Binarization | None
    learned: bool = False
    net: str = "resnet20"
    epochs: int = 20
    rate: float = 0.1
    l2: float = 1e-4
    seed: int = 0

    @property
    def binary(self) -> Any:
        """The transformation of its parameters."""
        return lcq.smooth_binary(RULES, self.binarization)


METHODS: dict[str, Recipe] = {
    "float": Recipe(None),
    "sign": Recipe(lcq.training.StraightSign("constant")),
    "bwn": Recipe(lcq.training.StraightSign()),
    "group_sign": Recipe(lcq.training.StraightSign("constant", centres=True)),
    "tanh": Recipe(lcq.training.AnnealedTanh("constant")),
    "smooth_wide": Recipe(lcq.training.GroupPower("constant", last=1.0)),
    "smooth": Recipe(lcq.training.GroupPower("constant")),
    "smooth_l2": Recipe(lcq.training.GroupPower("constant"), l2=5e-4),
    "smooth_mean": Recipe(lcq.training.GroupPower()),
    "smooth_learned": Recipe(lcq.training.GroupPower("constant"), learned=True),
}
SHAPE = ("least", "settled", "width", "last")
"""Of `lcq.training.GroupPower`, which a trial may change."""

SMALL = {"net": "small", "epochs": 7, "l2": 5e-4}


@functools.cache
def apply_of(name: str) -> Callable[[Any, Any], Any]:
    """(variables, uint8 images) -> logits, by running statistics."""
    return lambda variables, x: NETS[name].apply(variables, normalized(x))


def start(recipe: Recipe) -> tuple[Any, Any]:
    """What is trained, {"params", "alphas"}, and batch-norm statistics."""
    if recipe.net == "resnet20":
        variables = resnet20.given()
    else:
        variables = jax.jit(NETS[recipe.net].init)(jax.random.key(recipe.seed), jnp.zeros((1, 32, 32, 3)))
    alphas = recipe.binary.alphas(variables["params"]) if recipe.learned else {}
    return {"params": variables["params"], "alphas": alphas}, variables["batch_stats"]


def soft(recipe: Recipe, trained: Any, t: Any) -> Any:
    """The parameters the net is called with."""
    if recipe.binarization is None:
        return trained["params"]
    return recipe.binary(trained["params"], t, trained["alphas"] if recipe.learned else None)


def deployed(recipe: Recipe, trained: Any) -> Any:
    """Forms in place of the binary kernels; the parameters themselves of a float net."""
    if recipe.binarization is None:
        return trained["params"]
    return lcq.extract(recipe.binary, trained["params"], alphas=trained["alphas"] if recipe.learned else None)


def optimizer_of(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Of a run of so many updates."""

    def kernels(trained: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: getattr(path[-1], "key", "") == "kernel", trained)

    rate = optax.cosine_decay_schedule(recipe.rate, steps)
    return optax.chain(optax.add_decayed_weights(recipe.l2, kernels), optax.sgd(rate, 0.9, nesterov=True))


def step_of(recipe: Recipe, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """One update of (trained, statistics, state) on a batch at progress t; its arguments are donated."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(now: Any, x: Any, y: Any, t: Any) -> tuple[Any, Any]:
        trained, statistics, state = now

        def loss(trained: Any) -> tuple[Any, Any]:
            variables = {"params": soft(recipe, trained, t), "batch_stats": statistics}
            logits, moved = NETS[recipe.net].apply(variables, normalized(x), train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), moved["batch_stats"]

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, state = tx.update(grads, state, trained)
        return (optax.apply_updates(trained, updates), moved, state), value

    return step


def train(recipe: Recipe, x: np.ndarray, y: np.ndarray, path: Path) -> dict[str, Any]:
    """Trains, or goes on from `path`; returns the soft and the deployed variables and the log."""
    per_epoch = len(x) // BATCH
    tx = optimizer_of(recipe, recipe.epochs * per_epoch)
    step, (trained, means) = step_of(recipe, tx), start(recipe)
    now = (trained, means, tx.init(trained))
    own = Path(lcq.__file__).parent
    used = [own / "examples" / "models.py", own / "forms" / "blocks.py", own / "training" / "smooth_binary.py"]
    now, log = resume(path, maker(recipe, __file__, gpfq_train.__file__, resnet20.__file__, *used), now)
    how = gpfq_train.Recipe(recipe.epochs, recipe.rate, batch=BATCH, augment=True, seed=recipe.seed)
    for epoch in range(len(log["curve"]), recipe.epochs):
        begin, losses = time.time(), []
        for i, (xs, ys) in enumerate(gpfq_train.batches(x, y, how, epoch)):
            now, value = step(now, xs, ys, jnp.float32((epoch + i / per_epoch) / recipe.epochs))
            losses.append(value)
        t = (epoch + 1) / recipe.epochs
        now_soft = recalibrated(soft(recipe, now[0], t), now[1], x, recipe.seed, NETS[recipe.net])
        score = evaluate(apply_of(recipe.net), now_soft, x[:JUDGED], y[:JUDGED])
        point = {
            "epoch": epoch + 1,
            "batch_loss": float(jnp.stack(losses).mean()),
            "train_loss": score.loss,
            "train_accuracy": round(100 * score.accuracy, 3),
            **gap_of(recipe, now[0], t),
        }
        log["curve"].append(point)
        log["seconds"] += time.time() - begin
        print(point, f"{time.time() - begin:.1f} s", flush=True)
        keep(path, now, log)
    ends = {"soft": soft(recipe, now[0], 1.0), "deployed": deployed(recipe, now[0])}
    net = NETS[recipe.net]
    return {**{name: recalibrated(params, now[1], x, recipe.seed, net) for name, params in ends.items()}, **log}


def gap_of(recipe: Recipe, trained: Any, t: float) -> dict[str, float]:
    """The binarisation gap, of all filters and of the worst."""
    if recipe.binarization is None:
        return {}
    gaps = np.concatenate([np.ravel(gap) for gap in recipe.binary.deviation(trained["params"], t).values()])
    return {"gap": float(gaps.mean()), "worst_gap": float(gaps.max())}


def run(name: str, recipe: Recipe, args: Any) -> dict[str, Any]:
    """Trains a recipe; scores of what it ends with: on the test set, or of a trial on held-back images."""
    x, y = data.cifar10("train")
    x_judge, y_judge = (x[-HELD_BACK:], y[-HELD_BACK:]) if args.trial else data.cifar10("test")
    x, y = (x[:-HELD_BACK], y[:-HELD_BACK]) if args.trial else (x, y)
    trial = f"_trial_{digest(repr(recipe))}" if args.trial else ""
    trained = train(recipe, x, y, args.out / f"{recipe.net}_{name}_{recipe.seed}{trial}.ckpt")
    scores = {end: evaluate(apply_of(recipe.net), trained[end], x_judge, y_judge) for end in ("soft", "deployed")}
    row = {
        "recipe": name,
        "seed": recipe.seed,
        "accuracy": round(100 * scores["deployed"].accuracy, 3),
        "test_loss": scores["deployed"].loss,
        "soft_accuracy": round(100 * scores["soft"].accuracy, 3),
        "soft_test_loss": scores["soft"].loss,
        "gap": trained["curve"][-1].get("gap"),
        "worst_gap": trained["curve"][-1].get("worst_gap"),
        "epochs": recipe.epochs,
        "seconds": round(trained["seconds"], 1),
        "resumed_after": trained["resumed_after"],
        "settings": {**dataclasses.asdict(recipe), "binarization": repr(recipe.binarization), "batch": BATCH},
        "curve": trained["curve"],
    }
    print("held back:" if args.trial else "test:", {k: v for k, v in row.items() if k != "curve"}, flush=True)
    return {"row": row, "deployed": trained["deployed"]}


def controls(args: Any) -> None:
    """Every method on the small net, with several seeds."""
    for name in args.names or METHODS:
        recipes = [changed(dataclasses.replace(METHODS[name], **SMALL, seed=seed), args) for seed in args.seeds]
        rows = [run(name, recipe, args)["row"] for recipe in recipes]
        found = np.array([[row["soft_accuracy"], row["accuracy"]] for row in rows])
        print(f"{name}: soft {found[:, 0].mean():.2f}, deployed {found[:, 1].mean():.2f} +- {found[:, 1].std():.2f}")
        if not args.trial:
            record(f"smooth_binary_small_{name}", rows, seeds=args.seeds)


def resnet(args: Any) -> None:
    """ResNet-20 by one method."""
    for name in args.names:
        recipe = changed(METHODS[name], args)
        ended = run(name, recipe, args)
        if args.trial:
            continue
        ARTIFACTS.mkdir(exist_ok=True)
        path = ARTIFACTS / f"smooth_binary_resnet20_{name}.lcq"
        size = lcq.save(path, ended["deployed"])
        sizes = {"artifact": path.name, "bytes": size, "ratio": lcq.ratio(lcq.load(path))}
        record(f"smooth_binary_resnet20_{name}", [{**ended["row"], **sizes}], seeds=[recipe.seed])


def cost(args: Any) -> None:
    """A training step of ResNet-20 by each method, in interleaved rounds: time, and ratio to the float net's."""
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 256, (BATCH, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, BATCH)
    names = ["float", *(name for name in args.names or METHODS if name != "float")]
    steps, nows, t = {}, {}, jnp.float32(0.5)
    for name in names:
        recipe = METHODS[name]
        tx = optimizer_of(recipe, 1000)
        trained, means = start(recipe)
        steps[name], nows[name] = step_of(recipe, tx), (trained, means, tx.init(trained))
        nows[name] = jax.block_until_ready(steps[name](nows[name], x, y, t)[0])
    spent: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            begin = time.perf_counter()
            for _ in range(STEPS):
                nows[name], _ = steps[name](nows[name], x, y, t)
            jax.block_until_ready(nows[name])
            spent[name].append((time.perf_counter() - begin) / STEPS)
    rows = [
        {
            "recipe": name,
            "milliseconds": 1e3 * statistics.median(spent[name]),
            "ratio": statistics.median(a / b for a, b in zip(spent[name], spent["float"], strict=True)),
        }
        for name in names
    ]
    print(*rows, sep="\n", flush=True)
    if not args.trial:
        record("smooth_binary_time", rows, rounds=args.rounds, steps=STEPS, batch=BATCH)


def changed(recipe: Recipe, args: Any) -> Recipe:
    """The recipe with what the command says."""
    given = {k: v for k in ("epochs", "rate", "l2") if (v := getattr(args, k)) is not None}
    shape = {k: v for k in SHAPE if (v := getattr(args, k)) is not None}
    given |= {"binarization": dataclasses.replace(recipe.binarization, **shape)} if shape else {}
    return dataclasses.replace(recipe, **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = {"controls": controls, "resnet20": resnet, "time": cost}
    parser.add_argument("question", choices=list(questions))
    parser.add_argument("names", nargs="*", help=f"methods, of {', '.join(METHODS)}")
    parser.add_argument("--out", type=Path, help="folder of checkpoints")
    parser.add_argument("--trial", action="store_true", help="judge on held-back images only; record nothing")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="of the controls")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of the timings")
    for field, kind in {"epochs": int, "rate": float, "l2": float, **dict.fromkeys(SHAPE, float)}.items():
        parser.add_argument(f"--{field}", type=kind, help="in place of the recipe's")
    args = parser.parse_args()
    if unknown := set(args.names) - set(METHODS):
        parser.error(f"expected methods of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    if args.question != "time":
        if args.out is None or (args.question == "resnet20" and not args.names):
            parser.error("expected --out FOLDER, and of resnet20 the names of methods")
        args.out.mkdir(parents=True, exist_ok=True)
    questions[args.question](args)


if __name__ == "__main__":
    main()
