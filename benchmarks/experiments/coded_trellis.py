"""Bytes at equal error: entropy-coded trellises against entropy-coded codebooks, in whole files.

    python -m benchmarks.experiments.coded_trellis         results/coded_trellis.json

Each row is a scheme at a rate on all weights of a source: 131,072 numbers of N(0, 1) and of a Laplace density in one
leaf, the kernels of ResNet-20 (in LCQ_DATA) a leaf each. Its bytes are those of the file that `save` writes, names,
tables and digests counted; its error is the squared one over the mean square, in float64. Codebooks are `KMeans(k,
rate=)` with the k of least error + rate bits. Rates are in units of the mean square, equal for all kernels, which
divides the bits between them. Rows that are there already are kept.
"""

import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from benchmarks.experiments.trellis import SOURCES, leaves
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
"""k that are tried, at each of the three."""
MEMORIES = (3, 8)


def row(source: str, scheme: Any, joint: bool) -> dict[str, Any]:
    """A whole file, and how far its weights are from the given ones."""
    params = {f"w{i}": jnp.asarray(x) for i, x in enumerate(leaves(source))}
    forms = lcq.compress(params, [lcq.Rule(".*", scheme, joint=joint)])
    with tempfile.TemporaryDirectory() as folder:
        size = lcq.save(f"{folder}/net.lcq", forms)
        back = lcq.decompress(lcq.load(f"{folder}/net.lcq"))
    missed = sum(float(((np.asarray(x, np.float64) - back[name]) ** 2).sum()) for name, x in params.items())
    square = sum(float((np.asarray(x, np.float64) ** 2).sum()) for x in params.values())
    return {"bytes": size, "error": missed / square, "weights": sum(x.size for x in params.values())}


def run() -> None:
    rows = stored("coded_trellis")
    done = {(r["source"], r["scheme"], r["joint"]) for r in rows}
    for source, rates in RATES.items():
        unit = float(np.mean(np.concatenate([x.reshape(-1) for x in leaves(source)]).astype(np.float64) ** 2))
        schemes: list[tuple[int, Any]] = []
        for place, rate in enumerate(rates):
            for memory in MEMORIES:
                schemes.append((place, lcq.CodedTrellis(float(f"{rate * unit:.4g}"), memory=memory)))
            for factor in FACTORS:
                for k in LEVELS[place]:
                    schemes.append((place, lcq.KMeans(k, rate=float(f"{factor * rate * unit:.4g}"))))
        for place, scheme in schemes:
            joint = source == "resnet20" and isinstance(scheme, lcq.CodedTrellis)
            if (source, repr(scheme), joint) in done:
                continue
            facts = {"source": source, "scheme": repr(scheme), "joint": joint, "bits": place + 1, "rate": scheme.rate}
            kind = {"memory": scheme.memory} if isinstance(scheme, lcq.CodedTrellis) else {"k": scheme.k}
            rows.append(facts | kind | row(source, scheme, joint) | {"unit": unit})
            print({k: v for k, v in rows[-1].items() if k != "scheme"}, flush=True)
            record("coded_trellis", rows, seeds=[0])
            jax.clear_caches()


def codebooks(rows: Sequence[dict[str, Any]], bits: int) -> list[tuple[float, float]]:
    """(log2 of the error, bytes) of codebooks, of each rate the better k."""
    best: dict[float, dict[str, Any]] = {}
    for r in rows:
        if "k" in r and r["bits"] == bits:

            def cost(r: dict[str, Any]) -> float:
                return r["error"] * r["unit"] + r["rate"] * 8 * r["bytes"] / r["weights"]

            best[r["rate"]] = min(best.get(r["rate"], r), r, key=cost)
    return sorted((float(np.log2(r["error"])), float(r["bytes"])) for r in best.values())


def table() -> str:
    """Bytes of trellises, and of codebooks at the same error, for each source and about 1, 2 and 3 bits."""
    rows, out = stored("coded_trellis"), []
    for source in RATES:
        here = [r for r in rows if r["source"] == source]
        for bits in (1, 2, 3):
            points = codebooks(here, bits)
            at = [(r["memory"], r) for r in here if "memory" in r and r["bits"] == bits]
            if len(points) < 2 or len(at) < len(MEMORIES):
                continue
            fewer, last = [], dict(at)[MEMORIES[-1]]
            for _, r in sorted(at, key=lambda pair: pair[0]):
                equal = float(np.interp(np.log2(r["error"]), *zip(*points, strict=True)))
                fewer.append(f"{100 * (1 - r['bytes'] / equal):.1f} %")
            equal = float(np.interp(np.log2(last["error"]), *zip(*points, strict=True)))
            each = [f"{last['error']:.4f}", f"{8 * last['bytes'] / last['weights']:.2f}"]
            out.append([SOURCES[source], *each, f"{equal:,.0f}", f"{last['bytes']:,}", *fewer])
    names = [f"fewer, {1 << memory} states" for memory in MEMORIES]
    heads = ["whole files", "error", "bits a weight", "bytes of codebooks", "of 256 states", *names]
    return grid(heads, out)


if __name__ == "__main__":
    assert not sys.argv[1:]
    run()
