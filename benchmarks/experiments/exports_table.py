"""The table of results/exports.json."""

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored


def table() -> str:
    """Perplexities of each net, grid and format."""
    head = ["net, grid, format", "float32", "its own codes", "lcq's", "of the gap closed"]
    lines = [
        [
            f"{row['net']}, {row['grid']}, {row['format']}",
            *(f"{row[key]:.3f}" for key in ("float", "own", "lcq")),
            f"{100 * row['gap_closed']:.0f} %",
        ]
        for row in stored("exports")
    ]
    return grid(head, lines)
