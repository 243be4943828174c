"""What gpfq_transformers.py measured."""

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored

TEXT = (
    ("stories", "stories260K, nats", "nll", {4: "+.01", 3: "+.06", 2: ""}),
    ("minilm", "MiniLM, STS-B Spearman", "spearman", {4: "-.003", 3: "-.015", 2: ""}),
    ("minilm", "MiniLM, 1 - cosine to float", "turn", {4: "", 3: ".04", 2: ".15"}),
)
METHODS = ("qwix", "qwix_gptq", "nearest", "gptq", "gpfq", "qronos", "descent")


def table() -> str:
    """Evaluation figures; a row for each net, number of bits, and what shares a scale."""
    rows = []
    for net, title, metric, targets in TEXT:
        by_key = {(row["bits"], row["per"], row["method"]): row for row in stored(f"gpfq_{net}")}
        digits = 3 if metric == "nll" else 4
        before = next(row[metric] for row in by_key.values() if row["method"] == "float")
        for bits, target in targets.items():
            for per in ("channel", "groups", "trellis", "rotated channel", "rotated trellis"):
                if all(key[:2] != (bits, per) for key in by_key):
                    continue
                found = [by_key.get((bits, per, m)) for m in METHODS]
                cells = ["" if row is None else f"{row[metric]:.{digits}f}" for row in found]
                rows.append([f"{title}, {bits} bits, {per}", f"{before:.{digits}f}", *cells, target])
    head = ["", "float", "qwix", "qwix GPTQ", "RTN", "GPTQ", "GPFQ", "Qronos", "`descent`", "goal"]
    return grid(head, rows)
