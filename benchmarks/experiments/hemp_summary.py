"""What HEMP's term is worth: bytes with and without it at equal errors, from the points that `hemp` recorded.

    python -m benchmarks.experiments.hemp_summary NET        results/hemp_NET.json

Log bytes are interpolated between points of a curve, which goes on level past its last; once on held-back images, once
on test images.
"""

import argparse
from typing import Any

import numpy as np

from benchmarks.harness.markdown import grid
from benchmarks.harness.record import RESULTS, record, stored

TITLES = {"lenet5": "LeNet-5, MNIST", "resnet20": "ResNet-20, CIFAR-10"}


def unbeaten(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points of (error, bytes) that no other beats, by their errors."""
    return [p for p in sorted(curve) if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in curve)]


def bytes_at(curve: list[tuple[float, float]], error: float) -> float | None:
    """Bytes of a curve of (error, bytes) at an error, log bytes interpolated along points that no other beats."""
    best = unbeaten(curve)
    if not best or best[0][0] > error:
        return None
    errors, sizes = zip(*best, strict=True)
    return float(np.exp(np.interp(error, errors, np.log(sizes))))


def summary(net: str) -> list[dict[str, Any]]:
    """What every order takes at equal errors, by held-back images and by test images.

    The points of all orders together are a curve too, "any". Errors are those of the points without the term, and of
    the ends of the curve with it where the other curve has points on either side.
    """
    points = [row for path in sorted(RESULTS.glob(f"hemp_{net}_n*.json")) for row in stored(path.stem)]
    rows = []
    for judge in ("held_back_error", "test_error"):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in points:
            for name in (str(row["order"]), *(["any"] if row["order"] else [])):
                curves.setdefault(name, []).append((round(row[judge], 2), row["bytes"]))
        without, ends = unbeaten(curves["0"]), unbeaten(curves["any"])
        shared = {error for error, _ in (ends[0], ends[-1]) if without[0][0] < error < without[-1][0]}
        for error in sorted(shared | {error for error, _ in curves["0"]}):
            sizes = {name: bytes_at(curve, error) for name, curve in sorted(curves.items())}
            rows.append({"judged_by": judge, "error": error, "bytes": sizes})
    return rows


def table() -> str:
    """Bytes with and without the term at equal errors."""
    rows = []
    for net, title in TITLES.items():
        for row in stored(f"hemp_{net}"):
            without, sizes = row["bytes"]["0"], [row["bytes"].get(str(order)) for order in (1, 2, 3)]
            best = row["bytes"]["any"]
            saved = f"{100 * (1 - best / without):.0f} %" if best else ""
            cells = [f"{size:,.0f}" if size else "" for size in (without, *sizes)]
            judge = "held back" if row["judged_by"] == "held_back_error" else "test"
            rows.append([f"{title}, {row['error']:.2f} % {judge}", *cells, saved, "15 (25) %"])
    head = ["bytes at equal error", "without the term", "n = 1", "n = 2", "n = 3", "smaller by", "goal (hoped for)"]
    return grid(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", choices=list(TITLES))
    net = parser.parse_args().net
    rows = summary(net)
    print(*rows, sep="\n")
    record(f"hemp_{net}", rows)


if __name__ == "__main__":
    main()
