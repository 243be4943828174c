"""ResNet-20 on CIFAR-10, compressed while it trains: LC and straight-through training from the given weights.

    LCQ_DATA=folder python -m benchmarks.experiments.resnet20 lc_k2 --out folder    results/resnet20_lc_k2*, artifacts/
    ... --trial --epochs 3 --mu 1e-3 10    judged on held-back images: no test set, no record, no artifact

Data: real CIFAR-10; weights: the given ResNet-20, test accuracy 91.73 %. Every kernel is compressed, that of the first
convolution and of the last layer too, but for `lc_k2_filters`, which stands beside smooth_binary.py's rows; the
parameters of batch norm and the last bias train on in float32. Augmentation: horizontal flips and random crops of
images padded by 4 black pixels. A teacher, where there is one, is the given net.
A row trains on all 50,000 training images. A trial trains without the last 5,000, and these judge recipes (the given
weights had seen them). The test set is read once a row, after the last epoch; curves are of training images.
Delta(Theta) is always evaluated with batch norm recalibrated on 5,000 training images, augmented as in training: the
frame of black moves the statistics, and those of bare images cost 2 to 3 points of accuracy (seen on training images).

After every epoch all there is goes to OUT/RECIPE.ckpt; the same command goes on from it, but not with another recipe or
from other code. artifacts/resnet20_RECIPE.lcq holds {"params", "batch_stats"}.
One process hardly gains from a second core: run two rows side by side. Under Linux a step takes a quarter less with
GLIBC_TUNABLES=glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:
glibc.malloc.trim_threshold=8589934592:glibc.malloc.top_pad=1073741824
"""

import argparse
import dataclasses
import functools
import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

import lcq
from benchmarks.experiments import gpfq_train
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.checkpoint import digest, keep, maker, resume
from benchmarks.harness.record import record
from lcq.examples import data, models
from lcq.examples.train import evaluate

HELD_BACK = gpfq_train.HELD_BACK
BATCH = 128
KERNELS = "(.*/)?kernel"
JUDGED = 2000
"""Training images for the curve."""

RECALIBRATION = (10, 500)
"""Batches of training images for batch norm, and images of each."""

_NO_EPOCH = 1 << 20
"""The number of the epoch whose order and augmentation those have: none of training."""

NET = models.ResNet(20)
EPSILON = 1e-5
"""Of its batch norm."""


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Epochs at the end that train what forms hold and what is not compressed, masks and codes fixed.

    Attributes:
        epochs: so many.
        rate, l2, teacher: as of a `Recipe`; momentum starts anew.
    """

    epochs: int
    rate: float = 0.02
    l2: float = 0.0
    teacher: float = 0.0


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules and a schedule. SGD with Nesterov's momentum 0.9; the learning rate falls from `rate` as a cosine to 0.

    Attributes:
        rules: what is compressed, and how; or bits, the budget for each number of the given parameters of which
            `lcq.pareto` makes a plan, a codebook of 2, 4, 8 or 16 values for each kernel.
        method: "lc", or "ste", straight-through training.
        mu: penalty weight at first and at last, geometric in between.
        wait: share of all C steps, the first, with mu as at first.
        hold: share of all C steps, the last, with mu as at last.
        every: updates of an L step.
        coupling: of `lcq.lc`.
        epochs: of all, with those of tuning.
        tuned: what comes last, within these epochs.
        l2: weight decay, added to the gradients.
        teacher: temperature of the given net's probabilities, which are half of the loss then; 0 for none.
        folded: whether batch norm is stored as a scale and a bias of each output, in bfloat16, as the last bias is.
        evened: whether the price of a bit is divided by a kernel's `sensitivity`, where that is above 1.
    """

    rules: tuple[lcq.Rule, ...] | float
    method: str = "lc"
    epochs: int = 20
    rate: float = 0.1
    mu: tuple[float, float] = (2e-3, 3.0)
    wait: float = 0.0
    hold: float = 0.05
    every: int = 100
    coupling: str = "gradient"
    tuned: Tuning = Tuning(0)
    l2: float = 0.0
    teacher: float = 0.0
    folded: bool = False
    evened: bool = False
    seed: int = 0


K2, K4, TERNARY = ((lcq.Rule(KERNELS, scheme),) for scheme in (lcq.KMeans(2), lcq.KMeans(4), lcq.Ternary()))
PRUNED = (lcq.Rule(KERNELS, lcq.Prune(fraction=0.1), joint=True),)
FIRST = {"hold": 0.1, "every": 50}
"""Of the first attempts: with codebooks w swings about Delta(Theta), as multipliers that are updated every 50 steps are
faster than a w whose learning rate times mu falls; their gaps stay above 4e-3."""

TAUGHT = {"l2": 1e-4, "teacher": 2.0}
SMALL = {"epochs": 14, "folded": True, **TAUGHT}
SMALLER = {"epochs": 16, "folded": True, "l2": 5e-4}
# Without multipliers w stays -gradient/mu away from Delta(Theta), where the loss is lower: after 10 epochs at mu = .006
# and 5 on to .23, Delta(Theta) of K = 2 was right on 74 % of training images; with them it is on 90 %.
RECIPES = {
    "lc_k2": Recipe(K2, mu=(2e-3, 0.3), **FIRST),
    "lc_k2_steep": Recipe(K2),
    "lc_k2_taught": Recipe(K2, **TAUGHT),
    "lc_k2_filters": Recipe((lcq.Rule("stage.*/kernel", lcq.KMeans(2, per="channel")),), l2=1e-4),
    "ste_k2": Recipe(K2, "ste", rate=0.01),
    "lc_k4": Recipe(K4, rate=0.05, mu=(5e-3, 0.5), **FIRST),
    "lc_k4_steep": Recipe(K4, rate=0.05, mu=(5e-3, 5.0)),
    "lc_k4_taught": Recipe(K4, rate=0.05, mu=(5e-3, 5.0), **TAUGHT),
    "ste_k4": Recipe(K4, "ste", rate=0.01),
    "lc_prune10": Recipe(PRUNED, mu=(2e-3, 0.3), **FIRST),
    "lc_prune10_tuned": Recipe(PRUNED, rate=0.05, mu=(5e-4, 1.0), tuned=Tuning(6)),
    "lc_prune10_taught": Recipe(PRUNED, rate=0.05, mu=(5e-4, 1.0), tuned=Tuning(6, 0.05, **TAUGHT)),
    "ste_prune10": Recipe(PRUNED, "ste", rate=0.01),
    "lc_ternary": Recipe(TERNARY),
    "ste_ternary": Recipe(TERNARY, "ste", rate=0.01),
    "lc_k8_rate": Recipe((lcq.Rule(KERNELS, lcq.KMeans(8, rate=1.3e-3)),), rate=0.05, mu=(5e-3, 5.0), **SMALL),
    "lc_k8_rate_l2": Recipe((lcq.Rule(KERNELS, lcq.KMeans(8, rate=1.3e-3)),), **SMALLER),
    "lc_k8_low_rate_l2": Recipe((lcq.Rule(KERNELS, lcq.KMeans(8, rate=6e-4)),), **SMALLER),
    "lc_k8_evened_rate_l2": Recipe((lcq.Rule(KERNELS, lcq.KMeans(8, rate=1.7e-3)),), evened=True, **SMALLER),
    "lc_mixed": Recipe(1.3),
    "ste_mixed": Recipe(1.3, "ste", rate=0.01),
}


def given() -> dict[str, Any]:
    """The trained variables all rows start from."""
    return jax.tree.map(jnp.array, models.resnet_from_torch(data.pretrained("resnet20_cifar10")))


@functools.cache
def rules_of(recipe: Recipe) -> tuple[lcq.Rule, ...]:
    """The recipe's, or those of the plan within its budget, or a rule for each kernel."""
    if recipe.evened:
        (rule,) = recipe.rules
        rates = {path: rule.scheme.rate / max(h, 1) for path, h in sensitivity().items()}
        return tuple(lcq.Rule(path, dataclasses.replace(rule.scheme, rate=rate)) for path, rate in rates.items())
    if not isinstance(recipe.rules, float):
        return recipe.rules
    candidates = {KERNELS: [lcq.KMeans(k) for k in (2, 4, 8, 16)]}
    return tuple(lcq.pareto(given()["params"], candidates, bits_per_weight=recipe.rules, coded=False).plan.rules)


@functools.cache
def sensitivity() -> dict[str, float]:
    """How the probabilities of the given net move with each kernel, by path; the geometric mean of all weights is 1.

    h = KL(p, p') / ||e||^2, e normal noise of a tenth of the kernel's size: means of 4 draws, 1,000 training images.
    """
    variables, x = given(), jnp.array(data.cifar10("train")[0][:1000])
    flat = flatten_dict(variables["params"], sep="/")

    @jax.jit
    def log_p(flat: Any) -> Any:
        return jax.nn.log_softmax(apply({**variables, "params": unflatten_dict(flat, sep="/")}, x))

    def moved(path: str, seed: int) -> float:
        noise = jax.random.normal(jax.random.key(seed), flat[path].shape)
        e = 0.1 * jnp.sqrt(jnp.mean(flat[path] ** 2)) * noise
        return float(optax.kl_divergence(log_p(flat | {path: flat[path] + e}), p).mean() / jnp.sum(e**2))

    p = jnp.exp(log_p(flat))
    found = {path: np.mean([moved(path, seed) for seed in range(4)]) for path in flat if path.endswith("kernel")}
    mean = np.average(np.log([*found.values()]), weights=[flat[path].size for path in found])
    return {path: float(h / np.exp(mean)) for path, h in found.items()}


def sgd(l2: float, rate: Any) -> optax.GradientTransformation:
    """Nesterov's momentum, with weight decay if there is any."""
    momentum = optax.sgd(rate, 0.9, nesterov=True)
    return optax.chain(optax.add_decayed_weights(l2), momentum) if l2 else momentum


def optimizer_of(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many updates."""
    rate = optax.cosine_decay_schedule(recipe.rate, steps)
    inner = functools.partial(sgd, recipe.l2)
    if recipe.method == "ste":
        return lcq.training.straight_through_training(inner(rate), rules_of(recipe))
    (first, last), count = recipe.mu, steps / recipe.every
    growing = max(1, int((1 - recipe.wait - recipe.hold) * count))
    mu = lcq.geometric(first, (last / first) ** (1 / growing), steps=growing, wait=int(recipe.wait * count))
    return lcq.lc(inner, rules_of(recipe), mu=mu, every=recipe.every, learning_rate=rate, coupling=recipe.coupling)


def apply(variables: Any, x: Any) -> Any:
    """Logits of uint8 images, by running statistics or folded ones."""
    return NET.apply(whole(variables), normalized(x))


def folded(variables: Any) -> Any:
    """Variables without statistics: s conv(x) + b is gamma (conv(x) - mean) / std + beta; s and b in bfloat16."""
    params, statistics = _flat(variables["params"]), _flat(variables["batch_stats"])
    for *norm, kind in statistics:
        if kind == "mean":
            params[*norm, "scale"] /= jnp.sqrt(statistics[*norm, "var"] + EPSILON)
            params[*norm, "bias"] -= statistics[*norm, "mean"] * params[*norm, "scale"]
    short = {k: a if k[-1] == "kernel" else lcq.Cast("bfloat16").project(jnp.asarray(a)) for k, a in params.items()}
    return {"params": unflatten_dict(short)}


def whole(variables: Any) -> Any:
    """The variables as the net takes them: those that are folded with statistics that change nothing."""
    if "batch_stats" in variables:
        return variables
    shapes = jax.eval_shape(lambda: NET.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["batch_stats"]
    neutral = {path: jnp.full(a.shape, path[-1] == "var") * (1 - EPSILON) for path, a in _flat(shapes).items()}
    return {**variables, "batch_stats": unflatten_dict(neutral)}


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    return flatten_dict(tree, is_leaf=lambda _, leaf: not isinstance(leaf, dict))


@functools.partial(jax.jit, static_argnums=0)
def _gather(net: nn.Module, statistics: Any, params: Any, x: Any) -> Any:
    variables = {"params": params, "batch_stats": statistics}
    return net.apply(variables, normalized(x), train=True, mutable=["batch_stats"])[1]["batch_stats"]


def normalized(x: Any) -> Any:
    return (x.astype(jnp.float32) / 255 - jnp.array(data.CIFAR10_MEAN)) / jnp.array(data.CIFAR10_STD)


def recalibrated(forms: Any, statistics: Any, x: np.ndarray, seed: int, net: nn.Module = NET) -> dict[str, Any]:
    """The compressed net with batch-norm statistics of its own; x are training images."""
    (count, size), dense = RECALIBRATION, lcq.decompress(forms)
    how = gpfq_train.Recipe(1, 0.0, batch=size, augment=True, seed=seed)
    images = itertools.islice(gpfq_train.batches(x, np.zeros(len(x)), how, _NO_EPOCH), count)
    gathered = lcq.recalibrate_batch_norm(lambda s, batch: _gather(net, s, dense, batch[0]), statistics, images)
    return {"params": forms, "batch_stats": gathered}


def forms_of(recipe: Recipe, params: Any, state: Any) -> Any:
    """Theta; silent about a gap, which is in the curve."""
    if recipe.method == "ste":
        return jax.jit(functools.partial(lcq.compress, rules=rules_of(recipe)))(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return lcq.extract(state, params)


def train(recipe: Recipe, x: np.ndarray, y: np.ndarray, path: Path) -> dict[str, Any]:
    """Trains from the given weights, or goes on from `path`; returns the compressed variables and the log."""
    variables, loss = given(), loss_of(recipe.teacher)
    epochs = recipe.epochs - recipe.tuned.epochs
    tx = optimizer_of(recipe, epochs * (len(x) // BATCH))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any, Any]:
        params = variables["params"]
        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(params, variables["batch_stats"], x, y)
        updates, state = tx.update(grads, state, params)
        return {"params": optax.apply_updates(params, updates), **moved}, state, value

    state = tx.init(variables["params"])
    if recipe.method == "ste":
        variables["params"] = lcq.decompress(lcq.compress(variables["params"], rules_of(recipe)))
    made_by = maker(recipe, __file__, gpfq_train.__file__, Path(lcq.__file__).parent)
    (variables, state), log = resume(path, made_by, (variables, state))
    order: dict[str, Any] = {"batch": BATCH, "augment": True, "seed": recipe.seed}
    for epoch in range(len(log["curve"]), epochs):
        start, losses = time.time(), []
        for xs, ys in gpfq_train.batches(x, y, gpfq_train.Recipe(recipe.epochs, recipe.rate, **order), epoch):
            variables, state, value = step(variables, state, xs, ys)
            losses.append(value)
        forms = forms_of(recipe, variables["params"], state)
        compressed = recalibrated(forms, variables["batch_stats"], x, recipe.seed)
        score = evaluate(apply, compressed, x[:JUDGED], y[:JUDGED])
        point = {
            "epoch": epoch + 1,
            "batch_loss": float(jnp.stack(losses).mean()),
            "train_loss": score.loss,
            "train_accuracy": round(100 * score.accuracy, 3),
            **_tension(recipe, variables["params"], forms, state),
        }
        log["curve"].append(point)
        log["seconds"] += time.time() - start
        print(point, f"{time.time() - start:.1f} s", flush=True)
        keep(path, (variables, state), log)
    forms = forms_of(recipe, variables["params"], state)
    if recipe.tuned.epochs:
        start = time.time()
        forms = tune(recipe, forms, variables["batch_stats"], x, y)
        log["seconds"] += time.time() - start
    return {"variables": recalibrated(forms, variables["batch_stats"], x, recipe.seed), **log}


def loss_of(temperature: float = 0.0) -> Callable[..., Any]:
    """The loss of params, statistics, images and labels, and the statistics it moves; of a teacher, see `Recipe`."""
    teacher = given()

    def loss(params: Any, statistics: Any, x: Any, y: Any) -> tuple[Any, Any]:
        now = {"params": params, "batch_stats": statistics}
        logits, moved = NET.apply(now, normalized(x), train=True, mutable=["batch_stats"])
        value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        if t := temperature:
            soft = jax.nn.softmax(apply(teacher, x) / t)
            value = 0.5 * value + 0.5 * t**2 * optax.softmax_cross_entropy(logits / t, soft).mean()
        return value, moved

    return loss


def tune(recipe: Recipe, forms: Any, statistics: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """The last epochs of a recipe."""
    steps, how = len(x) // BATCH, recipe.tuned
    order = gpfq_train.Recipe(recipe.epochs, how.rate, batch=BATCH, augment=True, seed=recipe.seed)
    epochs = range(recipe.epochs - how.epochs, recipe.epochs)
    batches = itertools.chain.from_iterable(gpfq_train.batches(x, y, order, epoch) for epoch in epochs)

    def show(step: int, value: Any) -> None:
        if step % steps == 0:
            print({"tuned": step // steps, "batch_loss": float(value)}, flush=True)

    loss, tx = loss_of(how.teacher), sgd(how.l2, optax.cosine_decay_schedule(how.rate, how.epochs * steps))
    return lcq.finetune(lambda p, batch: loss(p, statistics, *batch)[0], forms, tx, batches, on_step=show)


def _tension(recipe: Recipe, params: Any, forms: Any, state: Any) -> dict[str, float]:
    """Gap of w and Delta(Theta), and mu."""
    if recipe.method == "ste":
        return {}
    pairs = zip(_kernels(params), _kernels(lcq.decompress(forms)), strict=True)
    squares = np.array([[float(jnp.sum((w - d) ** 2)), float(jnp.sum(w**2))] for w, d in pairs])
    apart, whole = squares.sum(0)
    return {"gap": float(apart / whole), "mu": float(lcq.metrics(state)["penalty_weight"])}


def _kernels(params: Any) -> list[Any]:
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=list(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--trial", action="store_true", help="judge on held-back images only")
    kinds: dict[str, Any] = {"epochs": int, "rate": float, "wait": float, "hold": float, "every": int, "seed": int}
    kinds["coupling"] = str
    for field, kind in kinds.items():
        parser.add_argument(f"--{field}", type=kind, help="in place of the recipe's")
    parser.add_argument("--mu", type=float, nargs=2, help="in place of the recipe's")
    args = parser.parse_args()
    settings = {k: v for k in kinds if (v := getattr(args, k)) is not None}
    settings |= {"mu": tuple(args.mu)} if args.mu else {}
    recipe = dataclasses.replace(RECIPES[args.recipe], **settings)
    args.out.mkdir(parents=True, exist_ok=True)
    x, y = data.cifar10("train")
    if args.trial:
        stem = f"{args.recipe}_trial_{digest(repr(recipe))}"
        trained = train(recipe, x[:-HELD_BACK], y[:-HELD_BACK], args.out / f"{stem}.ckpt")
        score = evaluate(apply, trained["variables"], x[-HELD_BACK:], y[-HELD_BACK:])
        print(f"{recipe}: held back {100 * score.accuracy:.2f} %, loss {score.loss:.4f}", flush=True)
        return
    trained = train(recipe, x, y, args.out / f"{args.recipe}.ckpt")
    ARTIFACTS.mkdir(exist_ok=True)
    path = ARTIFACTS / f"resnet20_{args.recipe}.lcq"
    size = lcq.save(path, folded(trained["variables"]) if recipe.folded else trained["variables"])
    loaded = lcq.load(path)
    scores = {"train": evaluate(apply, loaded, x, y), "test": evaluate(apply, loaded, *data.cifar10("test"))}
    last = trained["curve"][-1]
    row = {
        "recipe": args.recipe,
        "seed": recipe.seed,
        "artifact": path.name,
        "bytes": size,
        "ratio": lcq.ratio(loaded),
        "accuracy": round(100 * scores["test"].accuracy, 3),
        "test_loss": scores["test"].loss,
        "train_accuracy": round(100 * scores["train"].accuracy, 3),
        "train_loss": scores["train"].loss,
        "gap": last.get("gap"),
        "epochs": recipe.epochs,
        "seconds": round(trained["seconds"], 1),
        "hours": round(trained["seconds"] / 3600, 2),
        "augmentation": f"horizontal flips, random crops of images padded by {gpfq_train.PAD} black pixels",
        "optimizer": "SGD, Nesterov momentum 0.9, cosine to 0",
        "settings": {**dataclasses.asdict(recipe), "rules": repr(rules_of(recipe)), "batch": BATCH},
        "resumed_after": trained["resumed_after"],
        "curve": trained["curve"],
    }
    print({k: v for k, v in row.items() if k != "curve"}, flush=True)
    record(f"resnet20_{args.recipe}", [row], seeds=[recipe.seed])


if __name__ == "__main__":
    main()
