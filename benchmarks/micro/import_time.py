"""Seconds to import lcq, beside JAX.

    python -m benchmarks.micro.import_time        results/import_time.json

Each line of Python runs in a process of its own, all of them in turn, nine times: medians of wall and cpu seconds.
"""

import os
import subprocess
import sys
import time
from statistics import median

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

TIMES = 9
LINES = {
    "import jax": "import jax",
    "import lcq": "import lcq",
    "lcq --version": "from lcq.cli.main import main; main(['--version'])",
    "import lcq; lcq.lc": "import lcq; lcq.lc",
    "import lcq, all of it": "import lcq; [getattr(lcq, name) for name in lcq.__all__]",
}


def seconds(line: str) -> tuple[float, float]:
    """Wall and cpu seconds of a fresh Python that runs a line."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, "-c", line], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


def table() -> str:
    """A row for each line; what it takes over JAX alone."""
    rows = stored("import_time")
    least = next(row["seconds"] for row in rows if row["what"] == "import jax")
    return grid(
        ["", "seconds", "over JAX", "cpu seconds"],
        [
            [f"`{row['what']}`", f"{row['seconds']:.2f}", f"{row['seconds'] - least:.2f}", f"{row['cpu_seconds']:.2f}"]
            for row in rows
        ],
    )


def main() -> None:
    runs = [{what: seconds(line) for what, line in LINES.items()} for _ in range(TIMES)]
    rows = []
    for what in LINES:
        wall, cpu = (median(run[what][i] for run in runs) for i in range(2))
        rows.append({"what": what, "seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)})
        print(rows[-1], flush=True)
    record("import_time", rows)


if __name__ == "__main__":
    main()
