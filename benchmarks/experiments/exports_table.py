"""The table of results/exports.json."""

import math

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
    before, own = stored("smollm2_own")
    same = "the same file" if own["same_file"] else "another file"
    kept = [f"{math.exp(row['nats']):.3f}" for row in (before, own)]
    lines.append(["SmolLM2-135M, its own Q4_1 codes, in and out again, gguf", kept[0], kept[0], kept[1], same])
    return grid(head, lines)
