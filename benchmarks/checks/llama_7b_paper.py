"""What `quantize` of a llama of 6.7e9 weights would take, on paper: from one of 1.1e9 weights, by flops and bytes.

    python -m benchmarks.checks.llama_7b_paper        results/llama_7b_paper.json

For each layer, N inputs and M outputs of a product, T = 16 x 512 tokens, GPTQ as `llama_1b` runs it:

    statistics  2 matrices of 2 N^2 T flops for each array that products share (one for q, k, v; o; gate, up; down)
    rounding    N^3 for factor and inverse of each of these, N^2 M for each product
    activations 2 nets of 2 N M T

The rate of one core is the measured run's: its flops over its core seconds. A v5e chip has 197 Tflop/s in bfloat16 and
819 GB/s; products in float32 take six passes, and half of that rate is assumed. A step of rounding handles one input
and is too small for a chip: 10 microseconds are assumed for each. Memory: sums of the widest product, 16 N^2 bytes and
that again while they are added; activations of two nets, 8 bytes a number; four float32 copies of the largest kernel.
"""

from typing import Any

from benchmarks.experiments.llama_1b import SHAPES, kernels
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

LARGE = SHAPES | {"layers": 32, "width": 4096, "hidden": 11008, "heads": 32, "kv": 32}
SHARED = (("wq", "wk", "wv"), ("wo",), ("w1", "w3"), ("w2",))
BF16, PASSES, EFFICIENCY, STEP, BANDWIDTH = 197e12, 6, 0.5, 10e-6, 819e9


def counted(size: dict[str, int]) -> dict[str, float]:
    """Flops, weights, and steps of rounding of all layers; bytes of memory on a chip."""
    tokens, shapes = size["rows"] * size["tokens"], kernels(size)
    by_name = {name.removeprefix("layers/"): shape for name, shape in shapes.items()}
    inputs = [by_name[names[0]][0] for names in SHARED]
    statistics = sum(2 * 2 * n**2 * tokens for n in inputs)
    rounding = sum(n**3 for n in inputs) + sum(n**2 * m for n, m in shapes.values())
    weights = sum(n * m for n, m in shapes.values())
    forward = 2 * 2 * weights * tokens
    widest = max(inputs)
    memory = 32 * widest**2 + 8 * tokens * widest + 16 * max(n * m for n, m in shapes.values())
    return {
        "weights": size["layers"] * weights,
        "flops": size["layers"] * (statistics + rounding + forward),
        "steps": size["layers"] * sum(n for n, _ in shapes.values()),
        "activation_bytes": size["layers"] * 2 * 4 * tokens * 2 * sum(n + m for n, m in shapes.values()),
        "memory_bytes": memory,
    }


def rows() -> list[dict[str, Any]]:
    run = max((r for r in stored("llama_1b") if not r["products_there_before"]), key=lambda r: r["layers"])
    done = counted(SHAPES | {"layers": run["layers"]})
    rate = done["flops"] / run["cpu_seconds"]
    found = []
    for name, size in (("1.1B", SHAPES), ("7B", LARGE)):
        one = counted(size)
        chip = one["flops"] / (BF16 / PASSES * EFFICIENCY) + one["steps"] * STEP + one["activation_bytes"] / BANDWIDTH
        read = 2 * one["weights"]
        found.append(
            {"net": name, **one, "core_seconds": one["flops"] / rate, "chip_seconds": chip, "read_bytes": read}
        )
    return [{"prediction": True, "flops_a_core_second": rate, **row} for row in found]


def table() -> str:
    """A row for each net."""
    head = ["llama, on paper", "10^9 weights rounded", "10^12 flops", "core hours", "one v5e, minutes"]
    head += ["read from disk, GB", "memory beside codes, GB"]
    return grid(
        head,
        [
            [
                row["net"],
                f"{row['weights'] / 1e9:.2f}",
                f"{row['flops'] / 1e12:.0f}",
                f"{row['core_seconds'] / 3600:.1f}",
                f"{row['chip_seconds'] / 60:.1f}",
                f"{row['read_bytes'] / 1e9:.1f}",
                f"{row['memory_bytes'] / 1e9:.1f}",
            ]
            for row in stored("llama_7b_paper")
        ],
    )


if __name__ == "__main__":
    record("llama_7b_paper", rows(), prediction="flops and bytes on paper, the rate of a core as measured")
