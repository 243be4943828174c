"""The nets on which HEMP is tried: LeNet-5 on MNIST from a float net, the given ResNet-20 on CIFAR-10.

All training images but the last 5,000 are trained on, and these judge (the given ResNet-20 had seen them).
"""

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from benchmarks.experiments import gpfq_train, resnet20
from benchmarks.harness.artifacts import ARTIFACTS
from lcq.examples import data
from lcq.examples.train import evaluate

HELD_BACK, BATCH = 5000, 128
REFERENCE = ARTIFACTS / "lenet5_reference.npz"


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
                f"{REFERENCE} is not there: run `python -m benchmarks.experiments.hemp_reference` first"
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
