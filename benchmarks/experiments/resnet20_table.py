"""What resnet20.py measured."""

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored

RESNET = {
    "k2": ("1 bit, K = 2", "88.0 (90.7)"),
    "k4": ("2 bits, K = 4", "91.2 (91.6)"),
    "ternary": ("scaled ternary", ""),
    "mixed": ("mixed, 1.3 bits", "above the line, 88.0"),
    "prune10": ("10 % kept of all", "90.8 (91.4)"),
}
ATTEMPTS = {
    "lc_{}": "**LC**",
    "lc_{}_steep": "**LC**, steeper",
    "lc_{}_tuned": "**LC**, mask fixed for the last 6 epochs",
    "lc_{}_taught": "**LC**, as above, teacher and weight decay",
    "ste_{}": "straight-through",
}


def table() -> str:
    """LC and straight-through training at the same epochs."""
    rows = []
    for name, (title, target) in RESNET.items():
        for recipe, method in ATTEMPTS.items():
            for row in stored(f"resnet20_{recipe.format(name)}"):
                size = [str(row["epochs"]), f"{row['bytes']:,}", f"{row['ratio']:.1f}"]
                gap = f"{row['gap']:.0e}" if row["gap"] is not None else ""
                scores = [f"{row['train_accuracy']:.2f}", f"{row['accuracy']:.2f}", gap]
                rows.append([f"{title}: {method}", *scores, *size, target if "LC" in method else ""])
    return grid(
        ["ResNet-20, CIFAR-10", "train %", "test %", "gap", "epochs", "bytes", "ratio", "goal (hoped for)"], rows
    )
