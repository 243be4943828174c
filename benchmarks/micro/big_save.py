"""What a large net takes: seconds and memory to compress it into a set of files, and to load them back.

    python -m benchmarks.micro.big_save [weights]        results/big_save.json

1e9 normal weights in bfloat16, in 22 leaves; `lcq.compress_to` with Uniform(4, per=32) into files of at most 256 MiB.
One leaf is compressed before, so that programs are compiled; that is "first". Peak memory is the largest resident size
since, less that when the input was made, in bytes of the largest leaf. `lcq.load` reads what the operating system still
has in memory; every digest is checked. That is with the codec rans, as usual; then what was loaded is saved again with
the codec raw, packed codes as they are, and loaded.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

WEIGHTS, LEAVES, ROWS, SHARD, SEED = 1_000_000_000, 22, 4096, 1 << 28, 0
RULES = [lcq.Rule(".*", lcq.Uniform(4, per=32))]


def params_of(weights: int) -> dict[str, jax.Array]:
    """Leaves of about as many weights in all."""
    draw = jax.jit(lambda key, n: 0.02 * jax.random.normal(key, (ROWS, n), jnp.bfloat16), static_argnums=1)
    columns = max(1, round(weights / LEAVES / ROWS))
    keys = jax.random.split(jax.random.key(SEED), LEAVES)
    return {f"layers.{i:02}.w": jax.block_until_ready(draw(key, columns)) for i, key in enumerate(keys)}


def resident(peak: bool = False) -> int:
    """Bytes of memory that this process has, or had at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM" if peak else "VmRSS"))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def timed(row: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Runs one piece of work; keeps its seconds, those of the CPU, and its peak memory."""
    before = resident()
    forget_peak()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    row |= {f"{name}_seconds": round(time.perf_counter() - start, 2)}
    row |= {f"{name}_cpu_seconds": round(time.process_time() - cpu, 2)}
    row |= {f"{name}_peak_bytes": resident(peak=True) - before}
    return result


def distortion(w: jax.Array, form: Any) -> float:
    """||w - Delta||^2 / ||w||^2."""
    wide = w.astype(jnp.float32)
    return float(jnp.sum((wide - form.dense().astype(jnp.float32)) ** 2) / jnp.sum(wide**2))


def measured(params: dict[str, jax.Array]) -> list[dict[str, Any]]:
    """The rows of both codecs."""
    sizes = {"weights": sum(w.size for w in params.values()), "leaves": len(params)}
    sizes |= {"largest_leaf_bytes": max(w.nbytes for w in params.values())}
    rows: list[dict[str, Any]] = [{"codec": codec, **sizes} for codec in ("rans", "raw")]
    name, first = next(iter(params.items()))
    with tempfile.TemporaryDirectory() as folder:
        coded, raw = f"{folder}/coded.lcq", f"{folder}/raw.lcq"
        timed(rows[0], "first", lambda: lcq.compress_to(coded, {name: first}, RULES))
        save = functools.partial(lcq.compress_to, coded, params, RULES, max_shard_bytes=SHARD)
        rows[0]["bytes"] = timed(rows[0], "compress_and_save", save)
        back = timed(rows[0], "load", lambda: lcq.load(coded))
        rows[0]["distortion"] = distortion(first, back[name])
        print(rows[0], flush=True)
        save = functools.partial(lcq.save, raw, back, codecs=["raw"], max_shard_bytes=SHARD)
        rows[1]["bytes"] = timed(rows[1], "save", save)
        del back, save
        back = timed(rows[1], "load", lambda: lcq.load(raw))
        rows[1]["distortion"] = distortion(first, back[name])
        print(rows[1], flush=True)
    return rows


def table() -> str:
    """The table of docs/results.md."""
    head = ["codec", "bits a weight", "compress and save, s", "its peak, leaves", "save alone, s", "load, million/s"]
    rows = []
    for row in stored("big_save"):
        peak = row.get("compress_and_save_peak_bytes")
        rows.append(
            [
                row["codec"],
                f"{8 * row['bytes'] / row['weights']:.2f}",
                f"{row['compress_and_save_seconds']:.0f}" if peak is not None else "",
                f"{peak / row['largest_leaf_bytes']:.2f}" if peak is not None else "",
                f"{row['save_seconds']:.1f}" if "save_seconds" in row else "",
                f"{row['weights'] / row['load_seconds'] / 1e6:.0f}",
            ]
        )
    return grid(head, rows)


def main() -> None:
    weights = int(float(sys.argv[1])) if sys.argv[1:] else WEIGHTS
    rows = measured(params_of(weights))
    if weights == WEIGHTS:
        record("big_save", rows, seeds=[SEED], cpus=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    main()
