"""What scale_aot.py compiled."""

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored

_NOTHING = 1 << 20
"""Bytes below which what is gathered, or lies whole on every chip, is no leaf and no table."""


def table() -> str:
    """GB on one chip, a row for each scheme."""
    rows, bare = [], 0
    for row in stored("scale_aot"):
        bare = bare or row["argument_bytes"]
        kinds = ("step_temporary_bytes", "c_step_temporary_bytes", "init_temporary_bytes")
        temporary = [f"{row[kind] / 1e9:.2f}" if kind in row else "" for kind in kinds]
        moved = [row.get(f"{kind}_gathered_bytes", 0) for kind in ("step", "c_step", "init")]
        ratio = row["argument_bytes"] / bare
        cells = [f"{row['argument_bytes'] / 1e9:.3f}", f"{ratio:.2f}", *temporary]
        rows.append([row["name"], *cells, _said(max(moved)), _said(row["whole_bytes_of_state"])])
    goal = ["goal (hoped for)", "", "1.45 (1.25)", "1.0 (.35)", "1.0 (.35)", "", "none", "none"]
    head = ["LLaMA-7B's shapes, 64 v5e", "arguments", "over bare", "step", "C step", "`init`", "gathered", "replicated"]
    return grid(head, [*rows, goal])


def _said(size: int) -> str:
    return "none" if size < _NOTHING else f"{size / 1e9:.3f}"
