"""lcq: compress any JAX function's parameters, and run the result.

What a first hour needs is here; the rest is in namespaces, whose `__all__` is what is public:

    lcq.forms      what is stored
    lcq.schemes    how an array becomes a form
    lcq.tree       where: paths of leaves, rules on them, whole trees
    lcq.tracing    functions as equations
    lcq.training   who chooses the weights while a net trains
    lcq.io         files and checkpoints
    lcq.kernels    products with forms
    lcq.ptq        who chooses the weights without training
    lcq.reporting  tables and pages
    lcq.runtime    functions on forms
    lcq.plans      rules chosen, written down, previewed
    lcq.layers     binary layers of linen and nnx
    lcq.examples   data, nets, training loops
"""

import importlib
from typing import Any

from lcq import interrupt as interrupt  # first, as importing the rest takes a while
from lcq.io import ArtifactError, compress_to, load, save
from lcq.plans import Plan, dry_run, pareto, read_plan
from lcq.ptq import GPFQ, GPTQ, Descent, Qronos, quantize
from lcq.reporting import table
from lcq.runtime import packed
from lcq.schemes import (
    Additive,
    Binary,
    Cast,
    CodedTrellis,
    KMeans,
    L0Penalty,
    L1Ball,
    L1Penalty,
    Levels,
    LowRank,
    NofM,
    PowersOfTwo,
    Prune,
    PruneGroups,
    Ternary,
    Trellis,
    Uniform,
)
from lcq.training import (
    distill,
    extract,
    finetune,
    geometric,
    hemp,
    lc,
    metrics,
    penalty_schedule,
    recalibrate_batch_norm,
    smooth_binary,
)
from lcq.tree import Rule, compress, decompress, ratio, sizes

__version__ = "0.1.0"

__all__ = [
    "GPFQ",
    "GPTQ",
    "Additive",
    "ArtifactError",
    "Binary",
    "Cast",
    "CodedTrellis",
    "Descent",
    "KMeans",
    "L0Penalty",
    "L1Ball",
    "L1Penalty",
    "Levels",
    "LowRank",
    "NofM",
    "Plan",
    "PowersOfTwo",
    "Prune",
    "PruneGroups",
    "Qronos",
    "Rule",
    "Ternary",
    "Trellis",
    "Uniform",
    "__version__",
    "cli",
    "compress",
    "compress_to",
    "decompress",
    "distill",
    "dry_run",
    "examples",
    "extract",
    "finetune",
    "forms",
    "geometric",
    "hemp",
    "io",
    "kernels",
    "layers",
    "lc",
    "load",
    "metrics",
    "packed",
    "pareto",
    "penalty_schedule",
    "plans",
    "ptq",
    "quantize",
    "ratio",
    "read_plan",
    "recalibrate_batch_norm",
    "reporting",
    "runtime",
    "save",
    "schemes",
    "sizes",
    "smooth_binary",
    "table",
    "tracing",
    "training",
    "tree",
]


def __getattr__(name: str) -> Any:
    """Namespaces that nothing has imported yet: layers need flax, examples need data."""
    if name in __all__:
        return importlib.import_module(f"lcq.{name}")
    raise AttributeError(f"module 'lcq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
