"""Bytes at equal error: entropy-coded trellises against entropy-coded codebooks, in whole files.

    python -m benchmarks.experiments.coded_trellis         results/coded_trellis.json

Each row is a scheme at a rate on all weights of a source: 131,072 numbers of N(0, 1) and of a Laplace density in one
leaf; the five kernels of ResNet-20 (in LCQ_DATA) with 64 x 64 x 3 x 3 weights, 69 % of its kernels', a leaf each. Its
bytes are those of the file that `save` writes, names, tables and digests counted; its error is the squared one over the
mean square, in float64. Codebooks are `KMeans(k, rate=)` with the k of least error + rate bits. Rates are in units of
the mean square, equal for all leaves, which divides the bits between them. Rows that are there already are kept.
"""

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.experiments import trellis
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import record, stored

RATES = {  # of trellises, about 1, 2 and 3 bits a weight, and between which codebooks are tried
    "gaussian": (0.4, 0.1, 0.0275),
    "laplace": (0.27, 0.082, 0.022),
    "resnet20": (0.27, 0.082, 0.022),
}
FACTORS = (0.72, 1.03)
"""Rates of codebooks, over those of trellises."""
LEVELS = {0: (8, 16), 1: (16, 32), 2: (32, 64)}
"""k that are tried, at each of the three; on ResNet-20, whose leaves are shorter, the fewer."""
MEMORIES = (3, 8)
NAMES = trellis.SOURCES | {"resnet20": "ResNet-20, kernels of the last stage"}


def leaves(source: str) -> list[np.ndarray]:
    """The weights of a source."""
    return [x for x in trellis.leaves(source) if source != "resnet20" or x.shape == (64, 64, 3, 3)]


def row(source: str, scheme: Any) -> dict[str, Any]:
    """A whole file, and how far its weights are from the given ones."""
    params = {f"w{i}": jnp.asarray(x) for i, x in enumerate(leaves(source))}
    forms = lcq.compress(params, [lcq.Rule(".*", scheme)])
    with tempfile.TemporaryDirectory() as folder:
        size = lcq.save(f"{folder}/net.lcq", forms)
        back = lcq.decompress(lcq.load(f"{folder}/net.lcq"))
    missed = sum(float(((np.asarray(x, np.float64) - back[name]) ** 2).sum()) for name, x in params.items())
    square = sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in params.values())
    return {"bytes": size, "error": missed / square, "weights": sum(x.size for x in params.values())}


def run() -> None:
    rows = stored("coded_trellis")
    done = {(r["source"], r["scheme"]) for r in rows}
    for source, rates in RATES.items():
        unit = float(np.mean(np.concatenate([x.reshape(-1) for x in leaves(source)]).astype(np.float64) ** 2))
        schemes: list[tuple[int, Any]] = []
        for place, rate in enumerate(rates):
            for memory in MEMORIES[-1:] if source == "resnet20" else MEMORIES:
                schemes.append((place, lcq.CodedTrellis(float(f"{rate * unit:.4g}"), memory=memory)))
            for factor in FACTORS:
                for k in LEVELS[place][: 1 if source == "resnet20" else 2]:
                    schemes.append((place, lcq.KMeans(k, rate=float(f"{factor * rate * unit:.4g}"))))
        for place, scheme in schemes:
            if (source, repr(scheme)) in done:
                continue
            facts = {"source": source, "scheme": repr(scheme), "bits": place + 1, "rate": scheme.rate}
            kind = {"memory": scheme.memory} if isinstance(scheme, lcq.CodedTrellis) else {"k": scheme.k}
            rows.append(facts | kind | row(source, scheme) | {"unit": unit})
            print({k: v for k, v in rows[-1].items() if k != "scheme"}, flush=True)
            record("coded_trellis", rows, seeds=[0])
            jax.clear_caches()


def fewer(r: dict[str, Any], rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Bytes of codebooks at the error of a trellis, and how many fewer this has; between rates that enclose it."""

    def cost(r: dict[str, Any]) -> float:
        return r["error"] * r["unit"] + r["rate"] * 8 * r["bytes"] / r["weights"]

    best: dict[float, dict[str, Any]] = {}
    for other in rows:
        best[other["rate"]] = min(best.get(other["rate"], other), other, key=cost)
    errors, sizes = zip(
        *sorted((float(np.log2(other["error"])), other["bytes"]) for other in best.values()), strict=True
    )
    at = float(np.log2(r["error"]))
    if not errors[0] <= at <= errors[-1]:
        raise ValueError(f"expected codebooks at errors on both sides of {r['error']}, got 2^{list(errors)}; add rates")
    equal = float(np.interp(at, errors, sizes))
    return equal, 1 - r["bytes"] / equal


def table() -> str:
    """Bytes of trellises, and of codebooks at the same error, for each source and about 1, 2 and 3 bits."""
    rows, out = stored("coded_trellis"), []
    for source in RATES:
        for bits in (1, 2, 3):
            here = [r for r in rows if r["source"] == source and r["bits"] == bits]
            at = {r["memory"]: r for r in here if "memory" in r}
            found = {memory: fewer(r, [other for other in here if "k" in other]) for memory, r in at.items()}
            if last := at.get(MEMORIES[-1]):
                each = [f"{last['error']:.4f}", f"{8 * last['bytes'] / last['weights']:.2f}"]
                each += [f"{found[MEMORIES[-1]][0]:,.0f}", f"{last['bytes']:,}"]
                each += [f"{100 * found[memory][1]:.1f} %" if memory in found else "" for memory in MEMORIES]
                out.append([NAMES[source], *each])
    names = [f"fewer, {1 << memory} states" for memory in MEMORIES]
    return grid(["whole files", "error", "bits a weight", "bytes of codebooks", "of 256 states", *names], out)


if __name__ == "__main__":
    assert not sys.argv[1:]
    run()
