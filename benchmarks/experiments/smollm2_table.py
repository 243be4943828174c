"""The table of results/smollm2.json."""

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored


def table() -> str:
    """A row for each way to round."""
    head = ["", "bits a weight", "nats a token", "squared error"]
    lines = [
        [r["what"], f"{r['bits']:.3g}", f"{r['nats']:.3f}", f"{r['error']:.4f}" if "error" in r else ""]
        for r in sorted(stored("smollm2"), key=lambda r: (-r["bits"], r["nats"]))
    ]
    return grid(head, lines)
