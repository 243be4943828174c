"""Files of nets: results name every one by its bytes and sha256; the tree holds the best of each headline row."""

import hashlib
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent
ARTIFACTS = FOLDER / "artifacts"


def named(rows: Any) -> Iterator[dict[str, Any]]:
    """The rows, and runs of rows, that name a file."""
    return (run for row in rows for run in (row, *row.get("runs", ())) if "artifact" in run)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(name: str, maker: str) -> Path:
    """The file of that name, an input; `maker` is the command that makes it again."""
    path = ARTIFACTS / name
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, got no such file; make it again with `{maker}`")
    return path


def refresh(rows: Any) -> None:
    """Writes bytes and sha256 of the files that are here into their rows, and medians of bytes with them."""
    for run in named(rows):
        path = ARTIFACTS / run["artifact"]
        if path.exists():
            run |= {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for row in rows:
        if any(named(row.get("runs", ()))):
            row["median"]["bytes"] = statistics.median(run["bytes"] for run in row["runs"])
