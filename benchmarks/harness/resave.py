"""Saves committed files again, in the layout that `lcq.save` writes today; results tell the new sizes.

    python -m benchmarks.harness.resave lenet300 resnet20        all whose names begin so

What the files hold stays bit for bit, so all other figures do.
"""

import json
import statistics
import subprocess
import sys
from typing import Any

import jax

import lcq
from benchmarks.harness.record import ARTIFACTS, FOLDER, RESULTS


def again(row: dict[str, Any]) -> None:
    """The file of a row, and its size."""
    path = ARTIFACTS / row["artifact"]
    before = lcq.load(path)
    size = lcq.save(path.with_suffix(".tmp"), before)
    after = lcq.load(path.with_suffix(".tmp"))
    pair = map(jax.device_get, (before, after))
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), *pair)
    if not all(jax.tree.leaves(same)):
        raise ValueError(f"{path.name}: saved again it holds something else")
    path.with_suffix(".tmp").replace(path)
    row["bytes"] = size


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=True).stdout
    for path in sorted(path for name in sys.argv[1:] for path in RESULTS.glob(f"{name}*.json")):
        result = json.loads(path.read_text())
        rows = [run for row in result["rows"] for run in (row, *row.get("runs", ())) if "artifact" in run]
        for row in rows:
            again(row)
        for row in result["rows"]:
            if "median" in row:
                row["median"]["bytes"] = statistics.median(run["bytes"] for run in row["runs"])
        if rows:
            result["made"]["saved_again"] = commit.strip()
            path.write_text(json.dumps(result, indent=1) + "\n")
            print(path.name, *(f"{row['bytes']:,}" for row in rows))


if __name__ == "__main__":
    main()
