"""How fast an `.lcq` file goes out to other programs, and what memory that takes.

    taskset -c 0 python -m benchmarks.micro.export [leaves]        results/export.json

A file of so many leaves of 4,096 x 4,096 random codes in groups of 32, not coded, goes out in each format, read from it
a leaf at a time: once timed (wall and cpu seconds, the file's syncing included), once with every allocation of Python
and numpy counted, whose peak stands beside the largest leaf made dense in float32. 60 leaves are 1e9 weights.
"""

import os
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np

import lcq
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

SIDE, GROUP, LEAVES, SEED = 4096, 32, 60, 0
CASES = (("compressed-tensors", 4), ("compressed-tensors", 3), ("gptq", 4), ("gguf", 4))


def form(bits: int) -> lcq.forms.Codes:
    """Random codes with random scales, as a file holds them."""
    rng, half = np.random.default_rng(SEED), 1 << (bits - 1)
    words = rng.integers(0, 1 << 32, SIDE * SIDE * bits // 32, dtype=np.uint32)
    scale = rng.normal(size=(SIDE // GROUP, SIDE)).astype(np.float16)
    return lcq.forms.Codes(words, scale=scale, values=tuple(map(float, range(-half, half))), packed=(SIDE, SIDE))


def measure(format: str, bits: int, leaves: int, folder: Path) -> dict[str, Any]:
    source, out = folder / f"{bits}.lcq", folder / ("net.gguf" if format == "gguf" else format)
    if not source.exists():
        leaf = form(bits)
        lcq.save(source, {f"layer{i:02}": {"kernel": leaf} for i in range(leaves)}, coded=False)
    config = {"general.architecture": "llama"} if format == "gguf" else {}
    wall, cpu = time.perf_counter(), time.process_time()
    report = lcq.io.export(source, out, format=format, config=config)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    tracemalloc.start()
    lcq.io.export(source, out, format=format, config=config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    weights = leaves * SIDE * SIDE
    return {
        "format": format,
        "bits": bits,
        "weights": weights,
        "bytes": report.bytes,
        "wall": wall,
        "cpu": cpu,
        "mb_of_float32_a_cpu_second": 4e-6 * weights / cpu,
        "peak_bytes": peak,
        "peak_over_largest_leaf": peak / (4 * SIDE * SIDE),
    }


def table() -> str:
    """Speed and peak of each format."""
    rows = [
        [
            f"{row['format']}, {row['bits']} bits",
            f"{row['weights']:.2g}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['cpu']:.1f}",
            f"{row['mb_of_float32_a_cpu_second']:.0f}",
            f"{row['peak_over_largest_leaf']:.2f}",
        ]
        for row in stored("export")
    ]
    return grid(["", "weights", "MB written", "cpu s", "MB of float32 a cpu s", "peak over the largest leaf"], rows)


if __name__ == "__main__":
    leaves = int(sys.argv[1]) if len(sys.argv) > 1 else LEAVES
    with tempfile.TemporaryDirectory() as name:
        rows = [measure(format, bits, leaves, Path(name)) for format, bits in CASES]
    for row in rows:
        print(row)
    record("export", rows, seeds=[SEED], leaves=leaves, cores_used=len(os.sched_getaffinity(0)))
