"""The same measurement on one core and two, at each width of vectors: XLA takes both when a process starts."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.harness.record import record


def measure(name: str, about: str | None, rows: Callable[[], list[dict[str, Any]]], result: str | None = None) -> None:
    """Records `rows` of benchmarks.micro.NAME as `result`, made in a process for each of `cores` and `vector_bits`."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # a process of its own: rows to stdout
    args = parser.parse_args()
    if args.one:
        print(json.dumps(rows()))
        return
    here, made = sorted(os.sched_getaffinity(0)), []
    for cores in args.cores:
        for width in args.widths:
            child = [sys.executable, "-m", f"benchmarks.micro.{name}", "--one"]
            os.sched_setaffinity(0, here[:cores])  # the child inherits it
            flags = {"XLA_FLAGS": f"--xla_cpu_prefer_vector_width={width}"}
            out = subprocess.run(child, env={**os.environ, **flags}, stdout=subprocess.PIPE, check=True)
            made += [{"cores": cores, "vector_bits": width, **found} for found in json.loads(out.stdout)]
    os.sched_setaffinity(0, here)
    record(result or name, made)
