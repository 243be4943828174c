"""HEMP: is the entropy's gradient exact, what does it cost, and what is it worth on LeNet-5.

    python benchmarks/hemp.py exact              results/hemp_exact.json
    taskset -c 0 python benchmarks/hemp.py speed [rounds]       results/hemp_speed.json
    LCQ_DATA=folder python benchmarks/hemp.py reference         artifacts/lenet5_reference.npz
    LCQ_DATA=folder python benchmarks/hemp.py point --order 3 --weight 3       one point of the curves
    ... --trial --epochs 5    judged on held-back images only: no test set, no record, no artifact
    LCQ_DATA=folder python benchmarks/hemp.py sweep             every point that is not there yet
    python benchmarks/hemp.py summary            results/hemp_lenet5.json: sizes at equal accuracy

Exact: value and slopes in float64 beside autodiff of the dense definition, a K^n tensor for each block, and for n = 2
beside the closed form; and in float32 on 1e6 weights beside float64. Speed: 1e6 weights, medians in one process.

LeNet-5 (20-50-500, 430,500 weights and 580 biases) on MNIST: trained on the first 55,000 images from a float reference,
judged on the last 5,000; the test set is read once per point. A point is order, lambda_H, levels of the codebooks and
seed; lambda_H = 0 is the same training without the term. Sizes are whole files, as `lcq.save` writes them: blocks of
codes by rANS, biases in float32, header and all. The summary interpolates log bytes between the points of a curve at
the errors that both reach on the held-back images.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from record import ARTIFACTS, RESULTS, record, stored

import lcq
from lcq.examples import data

SIZE, ROUNDS, ORDERS, CENTRES = 1_000_000, 9, (1, 2, 3, 4), (6, 10)
HELD_BACK, BATCH = 5000, 128
KERNELS = "(.*/)?kernel"
REFERENCE = ARTIFACTS / "lenet5_reference.npz"
WEIGHTS, LEVELS = (0.3, 1.0, 3.0, 10.0), (2, 3, 4, 6, 8, 16)
POINTS = [
    *((0, 0.0, levels, seed) for levels in LEVELS for seed in (0,)),
    *((order, weight, 4, seed) for order in (1, 2, 3) for weight in WEIGHTS for seed in (0,)),
]
"""Order, lambda_H, levels, seed; without the term the number of levels makes the curve."""


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
    return jax.jit(jax.value_and_grad(lambda w, c: lcq.block_entropy(w, c, order)))


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
        value = jax.jit(lambda w, c, order=order: lcq.block_entropy(w, c, order))
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


# LeNet-5


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


def load() -> dict[str, tuple[Any, Any]]:
    """Images and labels to train on, to judge by, and to test on."""
    split = data.mnist()
    mean = split.x_train[:-HELD_BACK].mean() / 255
    x, x_test = (jnp.asarray(data.normalize(a, mean)) for a in (split.x_train, split.x_test))
    y, y_test = jnp.asarray(split.y_train), jnp.asarray(split.y_test)
    return {
        "train": (x[:-HELD_BACK], y[:-HELD_BACK]),
        "held_back": (x[-HELD_BACK:], y[-HELD_BACK:]),
        "test": (x_test, y_test),
    }


def loss(params: Any, x: Any, y: Any) -> Any:
    logits = LeNet5().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def _wrong(params: Any, x: Any, y: Any) -> tuple[Any, Any]:
    logits = LeNet5().apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).sum(), (logits.argmax(-1) != y).sum()


def judge(params: Any, images: tuple[Any, Any]) -> tuple[float, float]:
    """Mean loss, and error in percent."""
    x, y = images
    sums = np.sum([_wrong(params, x[i : i + 1000], y[i : i + 1000]) for i in range(0, len(x), 1000)], axis=0)
    return float(sums[0] / len(x)), float(100 * sums[1] / len(x))


def train(tx: Any, params: Any, images: tuple[Any, Any], epochs: int, seed: int, each: Any) -> tuple[Any, Any]:
    """Parameters and optimizer state; `each(epoch, params, state)` after every epoch."""
    x, y = images
    per_epoch = len(x) // BATCH

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:  # XLA's convolutions are slow in a scan
        updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    for epoch in range(epochs):
        order = np.random.default_rng((seed, epoch)).permutation(len(x))[: per_epoch * BATCH]
        for index in order.reshape(per_epoch, BATCH):
            params, state = step(params, state, x[index], y[index])
        each(epoch + 1, params, state)
    return params, state


def falling(rate: float, epochs: int, images: tuple[Any, Any]) -> tuple[Any, int]:
    """A rate that falls to 0 along half a cosine, and updates per epoch."""
    per_epoch = len(images[0]) // BATCH
    return optax.cosine_decay_schedule(rate, epochs * per_epoch), per_epoch


def reference(sets: Any, epochs: int) -> None:
    rate, _ = falling(0.05, epochs, sets["train"])
    params = LeNet5().init(jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(rate, 0.9, nesterov=True))
    held = sets["held_back"]
    params, _ = train(tx, params, sets["train"], epochs, 0, lambda i, p, _: print(i, judge(p, held), flush=True))
    flat = {"/".join(keys): np.asarray(a) for keys, a in _flat(params)}
    np.savez(REFERENCE, **flat)
    found = {name: judge(params, images) for name, images in sets.items()}
    row = {f"{name}_{what}": v for name, pair in found.items() for what, v in zip(("loss", "error"), pair, strict=True)}
    row |= {"bytes": lcq.save(ARTIFACTS / "lenet5_reference.lcq", params), "epochs": epochs}
    print(row)
    record("hemp_lenet5_reference", [row], seeds=[0])


def _flat(params: Any) -> list[tuple[tuple[str, str], Any]]:
    return [((layer, name), a) for layer, parts in params.items() for name, a in parts.items()]


def pretrained() -> Any:
    if not REFERENCE.exists():
        raise FileNotFoundError(f"{REFERENCE} is not there: run `python benchmarks/hemp.py reference` first")
    return jax.tree.map(jnp.asarray, data.pretrained(REFERENCE.stem, REFERENCE.parent))


def empirical(codes: np.ndarray, order: int) -> tuple[float, int]:
    """H_n of the codes of one leaf, in bits, and how many blocks."""
    blocks = codes.reshape(-1)[: codes.size // order * order].reshape(-1, order).astype(np.int64)
    joint = np.bincount(blocks @ (1 + int(codes.max())) ** np.arange(order))
    p = joint[joint > 0] / len(blocks)
    return float(-(p * np.log2(p)).sum() / order), len(blocks)


def name_of(order: int, weight: float, levels: int, seed: int) -> str:
    return f"hemp_lenet5_n{order}_h{weight:g}_k{levels}_s{seed}"


def point(args: argparse.Namespace, order: int, weight: float, levels: int, seed: int, sets: Any) -> None:
    """Trains one point and records it; one that is recorded already is left as it is."""
    name = name_of(order, weight, levels, seed)
    if stored(name) and not args.trial:
        return print(name, "is there already")
    start, curve = time.time(), []
    rate, per_epoch = falling(args.rate, args.epochs, sets["train"])
    rules = [lcq.Rule(KERNELS, lcq.KMeans(levels, fixed=(0.0,) if levels % 2 else ()))]
    tx = lcq.hemp(
        optax.sgd(rate, 0.9, nesterov=True),
        rules,
        order=max(order, 1),
        entropy_weight=optax.cosine_decay_schedule(weight, args.epochs * per_epoch),
        error_weight=optax.polynomial_schedule(0.0, args.error, args.power, args.epochs * per_epoch),
        every=per_epoch,
    )

    def each(epoch: int, params: Any, state: Any) -> None:
        forms = lcq.compress_warm(state, params)
        found = judge(lcq.decompress(forms), sets["held_back"])
        curve.append({"epoch": epoch, "entropy": float(state.entropy), "loss": found[0], "error": found[1]})
        print(name, curve[-1], flush=True)

    params, state = train(tx, pretrained(), sets["train"], args.epochs, seed, each)
    forms = lcq.compress_warm(state, params)
    if args.trial:
        size = -(-lcq.table(forms).total.coded // 8)
        return print(name, f"{size:,} bytes, {time.time() - start:.0f} s", flush=True)
    path = ARTIFACTS / f"{name}.lcq"
    row = {"order": order, "weight": weight, "levels": levels, "seed": seed, "bytes": lcq.save(path, forms)}
    row |= {"artifact": path.name, "ratio": lcq.ratio(forms), "entropy": float(state.entropy)}
    codes = {layer: np.asarray(parts["kernel"].codes) for layer, parts in forms.items()}
    for n in (1, 2, 3):
        parts = [empirical(c, n) for c in codes.values()]
        row[f"bits_of_blocks_of_{n}"] = sum(h * many for h, many in parts) / sum(many for _, many in parts)
    params = lcq.decompress(lcq.load(path))
    for images in ("train", "held_back", "test"):
        row[f"{images}_loss"], row[f"{images}_error"] = judge(params, sets[images])
    row |= {"seconds": round(time.time() - start, 1), "curve": curve}
    print({key: value for key, value in row.items() if key != "curve"}, flush=True)
    settings = {"epochs": args.epochs, "rate": args.rate, "error_weight": args.error, "power": args.power}
    record(name, [row], seeds=[seed], settings=settings, batch=BATCH)


def bytes_at(curve: list[tuple[float, float]], error: float) -> float | None:
    """Bytes of a curve of (error, bytes) at an error, log bytes interpolated along points that no other beats."""
    best = [p for p in sorted(curve) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in curve)]
    if not best or not best[0][0] <= error:
        return None
    errors, sizes = zip(*best, strict=True)
    return float(np.exp(np.interp(error, errors, np.log(sizes))))


def summary() -> list[dict[str, Any]]:
    """The points, and what every order takes at the errors of the curve without the term."""
    points = [row for path in sorted(RESULTS.glob("hemp_lenet5_n*.json")) for row in stored(path.stem)]
    curves = {
        order: [(row["held_back_error"], row["bytes"]) for row in points if row["order"] == order]
        for order in sorted({row["order"] for row in points})
    }
    rows = [{key: value for key, value in row.items() if key != "curve"} for row in points]
    for error in sorted({round(error, 2) for curve in curves.values() for error, _ in curve}):
        sizes = {f"order_{order}" if order else "without": bytes_at(curve, error) for order, curve in curves.items()}
        rows.append({"held_back_error": error, "bytes_at_equal_error": sizes})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("exact", "speed", "reference", "point", "sweep", "summary"))
    parser.add_argument("rounds", type=int, nargs="?", default=ROUNDS)
    parser.add_argument("--order", type=int, default=3)
    parser.add_argument("--weight", type=float, default=1.0, help="lambda_H")
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--error", type=float, default=0.1, help="lambda_E at the end")
    parser.add_argument("--power", type=float, default=4.0, help="of the growth of lambda_E from 0")
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
        rows = summary()
        for row in rows[-20:]:
            print(row)
        record("hemp_lenet5", rows)
        return
    sets = load()
    if args.what == "reference":
        return reference(sets, args.epochs)
    chosen = POINTS if args.what == "sweep" else [(args.order, args.weight, args.levels, args.seed)]
    for order, weight, levels, seed in chosen:
        point(args, order, weight, levels, seed, sets)


if __name__ == "__main__":
    sys.exit(main())
