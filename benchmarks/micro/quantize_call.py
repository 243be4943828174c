"""What a call of `quantize` costs: one layer with nothing left to compile, and the first call on whole nets.

    python -m benchmarks.micro.quantize_call [layer resnet20 minilm ten] [--as before]       results/quantize_call.json

Layer: N = n = 1024, m = 4096 rows after a ReLU, 4 bits a neuron, medians over rounds after a call that compiles. Nets:
random weights of ResNet-20's shapes, and of six blocks of MiniLM's, on random inputs, in a process that has compiled
nothing else and reads no cache of programs. "ten" is ResNet-20 ten times in one process, and what the last call takes.
Rows of `--as before` are kept beside those of today.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored
from lcq.examples import models

METHODS = ("rtn", "gpfq", "gptq", "descent")
SIZE, ROWS, ROUNDS = 1024, 4096, 3
WIDTH, HIDDEN, BLOCKS, HEADS = 384, 1536, 6, 12
COMPILED: list[str] = []
"""An entry for each compilation so far."""


def listen(event: str, seconds: float, **_: Any) -> None:
    if event.endswith("backend_compile_duration"):
        COMPILED.append(event)


def layer() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(SIZE, SIZE)), jnp.float32)
    x = np.maximum(rng.normal(size=(ROWS, SIZE)), 0).astype(np.float32)
    rules, rows = [lcq.Rule("w", lcq.Uniform(4, per="channel"))], []
    for method in METHODS:
        seconds, cpu = [], []
        for _ in range(1 + ROUNDS):
            start = time.perf_counter(), time.process_time()
            done = lcq.quantize(lambda p, x: x @ p["w"], {"w": w}, [x], rules, method)
            seconds.append(time.perf_counter() - start[0])
            cpu.append(time.process_time() - start[1])
        took = {"seconds": statistics.median(seconds[1:]), "cpu_seconds": statistics.median(cpu[1:])}
        rows.append({"case": f"layer, {method}", **took, "error": done.records[0].error})
    return rows


def resnet20() -> tuple[Callable[[Any, Any], Any], Any, list[Any], list[lcq.Rule]]:
    net, rng = models.ResNet(20), np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    params = jax.tree.map(lambda a: weights(rng, a.shape), shapes)
    batches = [rng.normal(size=(64, 32, 32, 3)).astype(np.float32) for _ in range(2)]
    return net.apply, params, batches, [lcq.Rule(".*/kernel", lcq.Uniform(4, per="channel"))]


def minilm() -> tuple[Callable[[Any, Any], Any], Any, list[Any], list[lcq.Rule]]:
    rng, params = np.random.default_rng(0), {}
    for i in range(BLOCKS):
        shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH)}
        shapes |= {"up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        params[f"{i}"] = {name: {"w": weights(rng, s), "b": weights(rng, s[1:])} for name, s in shapes.items()}

    def normed(x: Any) -> Any:
        return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def fn(params: Any, x: Any) -> Any:
        for block in params.values():

            def linear(name: str, a: Any, block: Any = block) -> Any:
                return a @ block[name]["w"] + block[name]["b"]

            q, k, v = (linear(name, x).reshape(*x.shape[:2], HEADS, -1) for name in "qkv")
            scores = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k) / 6)
            x = normed(x + linear("o", jnp.einsum("bhts,bshd->bthd", scores, v).reshape(x.shape)))
            x = normed(x + linear("down", jax.nn.gelu(linear("up", x))))
        return x

    batches = [rng.normal(size=(16, 64, WIDTH)).astype(np.float32) for _ in range(2)]
    return fn, params, batches, [lcq.Rule(".*/w", lcq.Uniform(4, per="channel"))]


def weights(rng: np.random.Generator, shape: tuple[int, ...]) -> jax.Array:
    size = shape[-2] ** -0.5 if len(shape) > 1 else 0.1
    return jnp.asarray(rng.normal(size=shape) * size + (len(shape) == 1), jnp.float32)


def first(name: str) -> list[dict[str, Any]]:
    """The first call of a process."""
    fn, params, batches, rules = {"resnet20": resnet20, "minilm": minilm}[name]()
    jax.block_until_ready(params)
    COMPILED.clear()
    start = time.perf_counter(), time.process_time()
    done = lcq.quantize(fn, params, batches, rules)
    took = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    facts = {"compilations": len(COMPILED), "products": len(done.records), "error": done.records[-1].error}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return [{"case": f"{name}, descent, first call", **took, **facts, "largest_resident_gb": peak}]


def ten() -> list[dict[str, Any]]:
    """Ten calls in one process: what the last takes, and the most memory of all."""
    fn, params, batches, rules = resnet20()
    for _ in range(10):
        COMPILED.clear()
        start = time.perf_counter(), time.process_time()
        lcq.quantize(fn, params, batches, rules)
        took = {"seconds": time.perf_counter() - start[0], "cpu_seconds": time.process_time() - start[1]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return [
        {"case": "resnet20, descent, tenth call", **took, "compilations": len(COMPILED), "largest_resident_gb": peak}
    ]


def table() -> str:
    rows = []
    found = stored("quantize_call")
    for case in dict.fromkeys(row["case"] for row in found):
        by = {row["which"]: row for row in found if row["case"] == case}
        cells = [by.get(which, {}).get(key) for key in HEAD for which in WHICH]
        rows.append([case, *("" if cell is None else f"{cell:.3g}" for cell in cells)])
    return grid(["`quantize`", *(f"{name}, {which}" for name in HEAD.values() for which in WHICH)], rows)


HEAD = {
    "seconds": "seconds",
    "cpu_seconds": "of a core",
    "compilations": "compilations",
    "largest_resident_gb": "GB at most",
}
WHICH = ("before", "now")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=["layer", "resnet20", "minilm", "ten"])
    parser.add_argument("--as", dest="which", choices=WHICH, default="now")
    parser.add_argument("--alone", action="store_true", help="in this process")
    given = parser.parse_args()
    if not given.alone:
        plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        for case in given.cases:
            command = [sys.executable, "-m", "benchmarks.micro.quantize_call", case, "--as", given.which, "--alone"]
            subprocess.run(command, env=os.environ if case == "layer" else plain, check=True)
        return
    jax.monitoring.register_event_duration_secs_listener(listen)
    (case,) = given.cases
    found = {"layer": layer, "ten": ten}.get(case, lambda: first(case))()
    rows = [{"which": given.which, **row} for row in found]
    for row in rows:
        print(row, flush=True)
    keys = [(row["which"], row["case"]) for row in rows]
    kept = [row for row in stored("quantize_call") if (row["which"], row["case"]) not in keys]
    record("quantize_call", [*kept, *rows], rounds=ROUNDS, seeds=[0])


if __name__ == "__main__":
    main()
