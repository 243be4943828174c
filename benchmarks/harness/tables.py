"""The tables of the README and the docs, from the committed results; each experiment makes its own.

python -m benchmarks.harness.tables        writes them between their markers, `<!-- table: NAME -->` and `<!-- end -->`
"""

import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.checks import llama_7b_paper, scale_aot_table
from benchmarks.experiments import (
    brute_force,
    coded_trellis,
    exports_table,
    gpfq_images,
    gpfq_rows,
    gpfq_transformers_table,
    headline,
    hemp_summary,
    lenet300_report,
    llama_1b,
    output_plans,
    resnet20_table,
    smallest,
    smollm2_table,
    smooth_binary_table,
    transforms,
    trellis,
    tune,
)
from benchmarks.harness.artifacts import FOLDER
from benchmarks.micro import (
    big_save,
    coder,
    cstep,
    csteps,
    export,
    generate,
    gpfq_speed,
    import_time,
    kernels,
    lc_overhead,
    quantize_call,
    rows,
    stacks,
)

ROOT = FOLDER.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[], str]] = {
    "headline": headline.table,
    "lenet300": lenet300_report.table,
    "lenet300_toolkit": lenet300_report.toolkit,
    "lenet300_kept": lenet300_report.kept,
    "resnet20": resnet20_table.table,
    "tune": tune.table,
    "trellis": trellis.table,
    "trellis_speed": trellis.speed_table,
    "coded_trellis": coded_trellis.table,
    "scale_aot": scale_aot_table.table,
    "cstep": cstep.table,
    "csteps": csteps.table,
    "stacks": stacks.table,
    "lc_overhead": lc_overhead.table,
    "brute_force": brute_force.table,
    "gpfq_images": gpfq_images.table,
    "gpfq_rows": gpfq_rows.table,
    "output_plans": output_plans.table,
    "gpfq_transformers": gpfq_transformers_table.table,
    "gpfq_speed": gpfq_speed.table,
    "quantize_call": quantize_call.table,
    "import_time": import_time.table,
    "kernels": kernels.table,
    "rows": rows.table,
    "rows_avx2": lambda: rows.table("rows_avx2"),
    "generate": generate.table,
    "big_save": big_save.table,
    "coder": coder.table,
    "export": export.table,
    "exports": exports_table.table,
    "smollm2": smollm2_table.table,
    "smooth_binary": smooth_binary_table.table,
    "hemp": hemp_summary.table,
    "smallest": smallest.table,
    "transforms": transforms.table,
    "llama_1b": llama_1b.table,
    "llama_7b_paper": llama_7b_paper.table,
}


def documents() -> list[Path]:
    """README.md and every page of docs/; where a table stands is theirs to say."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """The text with every marked table made anew."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    for path in documents():
        before = path.read_text()
        if (after := filled(before)) != before:
            path.write_text(after)


if __name__ == "__main__":
    main()
