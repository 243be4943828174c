"""What smooth_binary.py measured."""

import statistics

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored

BINARIES = {
    "float": "float32",
    "sign": "straight-through, sign(w)",
    "bwn": "straight-through, BWN's scales",
    "group_sign": "straight-through, centred groups",
    "tanh": "tanh, annealed",
    "smooth_wide": "**smooth**, as wide to the end",
    "smooth": "**smooth**",
    "smooth_l2": "**smooth**, five times the L2",
    "smooth_mean": "**smooth**, BWN's scales",
    "smooth_learned": "**smooth**, learned scales",
}


def table() -> str:
    """Every method: the small net's seeds, ResNet-20, a step's time."""
    times = {row["recipe"]: row for row in stored("smooth_binary_time")}
    rows = []
    for name, title in BINARIES.items():
        found, large = (stored(f"smooth_binary_{net}_{name}") for net in ("small", "resnet20"))
        if not found + large:
            continue
        cells = []
        for kind in ("soft_accuracy", "accuracy"):
            values = [row[kind] for row in found]
            cells.append(f"{statistics.mean(values):.2f} +- {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        cells += [f"{row[kind]:.2f}" for row in large for kind in ("soft_accuracy", "accuracy")] or ["", ""]
        cells += [f"{row['bytes']:,}" for row in large] or [""]
        rows.append([title, *cells, f"{times[name]['ratio']:.2f}" if name in times else ""])
    for row in stored("resnet20_lc_k2_filters"):
        rows.append(["**LC**, K = 2", "", "", "", f"{row['accuracy']:.2f}", f"{row['bytes']:,}", ""])
    head = ["test accuracy %", "small net, t = 1", "deployed", "ResNet-20, t = 1", "deployed", "bytes", "step / float"]
    return grid(head, rows)
