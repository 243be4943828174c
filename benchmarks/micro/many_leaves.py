"""What a tree of many small leaves takes: CPU seconds to compress, save, load, decompress and tabulate it.

    taskset -c 0 python -m benchmarks.micro.many_leaves [leaves]        results/many_leaves.json

Leaves are those of low-rank adapters: [8, 32] normal numbers, 256 codes each, under several schemes. The first call of
each compiles its programs, one for all leaves; that is part of the time. heavy tails are drawn from a Student's t of 2
degrees of freedom, so that codes of equal steps are worth entropy coding; those of normal numbers hardly are.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import lcq
from benchmarks.harness.record import record

LEAVES, SHAPE, SEED = 10_000, (8, 32), 0
SCHEMES = {
    "KMeans(4)": ("normal", lcq.KMeans(4)),
    "KMeans(2)": ("normal", lcq.KMeans(2)),
    "Uniform(4, per=8)": ("normal", lcq.Uniform(4, per=8)),
    "Uniform(3) of heavy tails": ("heavy", lcq.Uniform(3)),
    "Prune(count=40)": ("normal", lcq.Prune(count=40)),
}


def trees(leaves: int) -> dict[str, dict[str, np.ndarray]]:
    """Names and numbers of the leaves."""
    rng = np.random.default_rng(SEED)
    drawn = {"normal": rng.normal(size=(leaves, *SHAPE)), "heavy": rng.standard_t(2, size=(leaves, *SHAPE))}
    return {
        kind: {f"layers.{i}.lora_A": np.asarray(x, np.float32) for i, x in enumerate(numbers)}
        for kind, numbers in drawn.items()
    }


def timed(row: dict[str, Any], name: str, work: Callable[[], Any]) -> Any:
    """Runs one piece of work and keeps its CPU seconds."""
    start = time.process_time()
    result = work()
    row[name] = round(time.process_time() - start, 2)
    return result


def measured(name: str, tree: dict[str, np.ndarray], scheme: Any) -> dict[str, Any]:
    """The row of a scheme."""
    row: dict[str, Any] = {"scheme": name, "leaves": len(tree), "codes": int(np.prod(SHAPE))}
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/net.lcq"
        forms = timed(row, "compress", lambda: lcq.compress(tree, [lcq.Rule(".*", scheme)]))
        row["bytes"] = timed(row, "save", lambda: lcq.save(path, forms))
        back = timed(row, "load", lambda: lcq.load(path))
        timed(row, "decompress", lambda: lcq.decompress(back))
        timed(row, "table", lambda: lcq.table(back))
        timed(row, "table_with_reference", lambda: lcq.table(back, tree))
    return row


def main() -> None:
    leaves = int(sys.argv[1]) if sys.argv[1:] else LEAVES
    rows = []
    for name, (kind, scheme) in SCHEMES.items():
        rows.append(measured(name, trees(leaves)[kind], scheme))
        print(rows[-1], flush=True)
    record("many_leaves", rows, seeds=[SEED])


if __name__ == "__main__":
    main()
