"""stories260K at 3 bits in groups of 32, after each transform of its weights and without.

    LCQ_DATA=folder python -m benchmarks.experiments.transforms

Protocol, data and evaluation are those of gpfq_transformers, calibration on its first 32 windows. In all rows the head
is a leaf of its own, a copy of the embedding that stays float32 like it: the stream of a tied net cannot be turned.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import lcq
from benchmarks.experiments.gpfq_transformers import bits_per_weight, load_stories
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

BITS, PER, CALIBRATION = 3, "groups", 32
METHODS = ("rtn", "gptq")
TRANSFORMS: dict[str, Sequence[Callable[..., Any]]] = {
    "none": (),
    "equalize": (lcq.ptq.transforms.equalize,),
    "activation_aware": (lcq.ptq.transforms.activation_aware,),
    "rotate": (lcq.ptq.transforms.rotate,),
}


def main() -> None:
    net = load_stories()
    params = {**net.params, "output": net.params["tok_embeddings"].T}
    rules = [lcq.Rule("output", None), *net.rules(BITS, PER)]
    rows = [{"transform": "float", "method": "", **net.evaluate(params)}]
    for name, chosen in TRANSFORMS.items():
        given = params
        for transform in chosen:
            given = transform(net.fn, given, net.batches(CALIBRATION), rules).params
        apart = largest_change(net.fn, params, given, net.batches(CALIBRATION)[0])
        for method in METHODS:
            done = lcq.quantize(net.fn, given, net.batches(CALIBRATION), rules, method)
            row = {"transform": name, "method": method, "function_changed_by": apart}
            row |= {"bits_per_weight": round(bits_per_weight(done.forms), 3)}
            rows.append(row | net.evaluate(lcq.decompress(done.forms)))
            print(rows[-1], flush=True)
            record("transforms", rows, seeds=[0])


def largest_change(fn: Any, params: Any, other: Any, batch: Any) -> float:
    """max |fn(other) - fn(params)| / max |fn(params)|."""
    run = jax.jit(fn)
    one, two = (np.asarray(run(p, batch), np.float64) for p in (params, other))
    return float(np.abs(one - two).max() / np.abs(one).max())


def table() -> str:
    """The rows as Markdown: a line for each transform, nats of each method."""
    rows = {(row["transform"], row["method"]): row for row in stored("transforms")}
    head = ["transform", *(f"{method}: {what}" for method in METHODS for what in ("nats", "KL"))]
    cells = [
        [f"`{name}`", *(f"{rows[name, method][key]:.3f}" for method in METHODS for key in ("nll", "kl"))]
        for name in TRANSFORMS
    ]
    return grid(head, cells)


if __name__ == "__main__":
    main()
