"""The README's tables, from the committed results.

python benchmarks/tables.py        writes them between their markers in README.md
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from record import FOLDER, stored

README = FOLDER.parent / "README.md"
BLOCK = r"(<!-- table: {} -->\n).*?(<!-- end -->)"


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


LENET = {
    "reference": ("float32 (given)", ""),
    "dc_k2": ("1 bit: direct compression", ""),
    "idc_k2": ("1 bit: iterated direct compression", ""),
    "ste_k2": ("1 bit: straight-through", ""),
    "lc_k2": ("1 bit: **LC**", "loss .029 / .024"),
    "lc_k2_adam": ("1 bit: **LC**, Adam", ""),
    "lc_k2_proximal": ("1 bit: **LC**, proximal", ""),
    "lc_k2_slow": ("1 bit: **LC**, slow", "error 2.3 / 2.13"),
    "lc_k2_slowest": ("1 bit: **LC**, slower", "error 2.3 / 2.13"),
    "lc_k2_teacher": ("1 bit: **LC**, slow, teacher", "error 2.3 / 2.13"),
    "lc_k2_teacher_slowest": ("1 bit: **LC**, slower, teacher", "error 2.3 / 2.13"),
    "dc_ternary": ("scaled ternary: direct compression", ""),
    "lc_ternary": ("scaled ternary: **LC**", "loss .0058 / .0045"),
    "dc_k4": ("2 bits: direct compression", ""),
    "lc_k4_slow": ("2 bits: **LC**, slow", "error 2.13 / 2.0"),
    "lc_k4_slow_0.2": ("2 bits: **LC**, slow, rate .2", "error 2.13 / 2.0"),
    "lc_k4_teacher": ("2 bits: **LC**, slow, rate .2, teacher", "error 2.13 / 2.0"),
    "lc_k4_teacher_0.09": ("2 bits: **LC**, slow, teacher", "error 2.13 / 2.0"),
}


def lenet300() -> str:
    """Medians over the seeds."""
    by_name = {row["recipe"]: row for name in LENET for row in stored(f"lenet300_{name}")}
    rows = []
    for name, (title, target) in LENET.items():
        if name not in by_name:
            continue
        run, median = by_name[name]["runs"][0], by_name[name]["median"]
        gap = f"{median['gap']:.1e}" if name.startswith("lc") else ""
        rows.append(
            [
                title,
                str(run["epochs"]),
                f"{median['train_loss']:.4f}",
                f"{median['test_error']:.2f}",
                gap,
                f"{median['bytes']:,}",
                f"{median['ratio']:.2f}",
                target,
            ]
        )
    return grid(
        ["LeNet300, MNIST", "epochs", "train loss", "test error %", "gap", "bytes", "ratio", "accept / aim"], rows
    )


def cstep() -> str:
    """Times in units of one `jnp.sort` of the same array."""
    by_kind: dict[str, list[Any]] = {}
    for row in stored("cstep"):
        by_kind.setdefault(row["what"], []).append(row)
    sort, cold, warm = (by_kind[kind][0] for kind in ("sort", "cold", "warm"))
    exact = max(row["cpu_seconds"] for row in by_kind["exact"])
    excess = max(row["excess_of_cold"] for row in by_kind["exact"])
    constants = max(abs(row["exact"] / row["constant"] - 1) for row in by_kind["lloyd_max"])
    plus = max(row["cold_over_best"] for row in by_kind["kmeans_plus_plus"])
    rows = [
        ["`jnp.sort`, 1e6 weights", f"{1e3 * sort['seconds']:.0f} ms", ""],
        ["cold, K = 16, in jit", f"{cold['of_a_sort']:.3f} of a sort", ".5 / .2"],
        ["warm, K = 16, in jit", f"{warm['of_a_sort']:.3f} of a sort", ".1 / .05"],
        ["memory, cold / warm", f"{cold['copies_of_the_leaf']:.2f} / {warm['copies_of_the_leaf']:.2f} leaves", "4"],
        ["exact, K = 16", f"{exact:.1f} cpu s at most", "10 / 2 s"],
        ["cold above the exact optimum", f"{100 * excess:.2f} %", ".1 %"],
        ["exact from the Lloyd-Max constants", f"{100 * constants:.2f} %", ".1 %"],
        ["K = 256, n = 1e5, over best of 5 k-means++", f"{plus:.3f} at most", "1"],
    ]
    return grid(["K-means", "measured", "accept / aim"], rows)


def lc_overhead() -> str:
    rows = [
        [
            f"`{row['scheme']}`",
            *(f"{row['steps'][kind]['wrapped']['ratio']:.3f}" for kind in ("calls", "scan")),
            *(f"{row['steps'][kind]['bare again']['ratio']:.3f}" for kind in ("calls", "scan")),
            f"{row['state_over_weights']:.2f}",
            f"{row['c_step_temporary_over_largest_leaf']:.2f}",
        ]
        for row in stored("lc_overhead")
    ]
    head = ["LeNet300, batch 256", "step over bare: calls", "scan", "noise: calls", "scan"]
    return grid([*head, "state / weights", "C step's memory / leaf"], rows)


def brute_force() -> str:
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in stored("brute_force"):
        groups.setdefault((row["problem"], row["weights"]), []).append(row)
    rows = []
    for (problem, weights), members in groups.items():
        hits = sum(row["starts_at_the_optimum"] for row in members)
        starts = sum(row["starts"] for row in members)
        worst = max(row["lc_median"] / row["optimum"] - 1 for row in members)
        direct = max(row["direct_compression"] / row["optimum"] - 1 for row in members)
        found = sum(row["starts_at_the_optimum"] > 0 for row in members)
        rows.append(
            [
                f"{problem}, {weights} weights",
                f"{hits} of {starts}",
                f"{found} of {len(members)}",
                f"{100 * worst:.1f} %",
                f"{100 * direct:.0f} %",
            ]
        )
    head = ["K = 2", "starts at the optimum", "problems solved", "LC's median above it, at worst", "direct compression"]
    return grid(head, rows)


TABLES: dict[str, Callable[[], str]] = {table.__name__: table for table in (lenet300, cstep, lc_overhead, brute_force)}


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    for name, table in TABLES.items():
        text = re.sub(BLOCK.format(name), lambda m, t=table: m[1] + t() + m[2], text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    Path(README).write_text(filled(README.read_text()))
