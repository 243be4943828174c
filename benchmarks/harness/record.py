"""Where figures come from: every script writes its rows here, as results/NAME.json with how they were made."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.harness.artifacts import FOLDER, refresh

RESULTS = FOLDER / "results"
_START = time.time()


def record(name: str, rows: Any, *, seeds: Any = (), **facts: Any) -> Path:
    """Writes results/NAME.json: rows, and the command, commit, seeds, versions, machine, wall and cpu seconds.

    Rows that name a file, as `artifact`, get its bytes and sha256.
    """
    refresh(rows)
    RESULTS.mkdir(exist_ok=True)
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    made = {
        "command": shlex.join(["python", "-m", _module(), *map(_argument, sys.argv[1:])]),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--", ":/lcq", ":/benchmarks/*.py")),
        "seeds": list(seeds),
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "machine": {"processor": _processor(), "cores": os.cpu_count()},
        "wall_seconds": round(time.time() - _START, 1),
        "cpu_seconds": round(time.process_time(), 1),
        **facts,
    }
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(as_text({"made": made, "rows": rows}))
    os.replace(temporary, path)
    return path


def as_text(result: dict[str, Any]) -> str:
    """JSON with a row on a line: short, and what changed is seen."""
    rows = ",\n".join(json.dumps(row) for row in result["rows"])
    return f'{{"made": {json.dumps(result["made"])},\n"rows": [\n{rows}\n]}}\n'


def stored(name: str) -> list[Any]:
    """The rows of results/NAME.json; none if it does not exist."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _module() -> str:
    """benchmarks.experiments.lenet300, of the script that runs."""
    return ".".join(Path(sys.argv[0]).resolve().relative_to(FOLDER.parent).with_suffix("").parts)


def _argument(given: str) -> str:
    """An argument as it was given, but for the folders of this machine."""
    option, equals, value = given.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
