"""Reloads every committed .lcq file and compares it with the results: bytes always, accuracy where the data is there.

LCQ_DATA=folder python benchmarks/verify.py        exit status 1 if anything differs
"""

import os
import sys
from pathlib import Path
from typing import Any

import lenet300
from record import ARTIFACTS, stored

import lcq

TOLERANCE = 0.0101
"""Percent: one test image of 10,000, for sums in another order on another machine."""


def rows() -> list[dict[str, Any]]:
    """Every run with a file, of every benchmark with files."""
    return [run for name in lenet300.RECIPES for recipe in stored(f"lenet300_{name}") for run in recipe["runs"]]


def faults(run: dict[str, Any], test: Any) -> list[str]:
    """What differs between a run's row and its file."""
    path = ARTIFACTS / run["artifact"]
    if not path.exists():
        return [f"{path.name}: missing"]
    forms = lcq.load(path)
    found = []
    if path.stat().st_size != run["bytes"]:
        found.append(f"{path.name}: {path.stat().st_size} bytes, the table says {run['bytes']}")
    if abs(lcq.ratio(forms) - run["ratio"]) > 1e-9:
        found.append(f"{path.name}: ratio {lcq.ratio(forms)}, the table says {run['ratio']}")
    if test is not None:
        error = float(lenet300.judge(lcq.decompress(forms), *test)[1])
        if abs(error - run["test_error"]) > TOLERANCE:
            found.append(f"{path.name}: test error {error:.2f} %, the table says {run['test_error']:.2f}")
    return found


def main() -> int:
    runs = rows()
    strays = {path.name for path in Path(ARTIFACTS).glob("*.lcq")} - {run["artifact"] for run in runs}
    test = lenet300.load()[3:] if os.environ.get("LCQ_DATA") else None
    found = [fault for run in runs for fault in faults(run, test)]
    found += [f"{name}: in no table" for name in sorted(strays)]
    print("\n".join(found) or f"{len(runs)} files agree with the results" + ("" if test else " (bytes; no LCQ_DATA)"))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
