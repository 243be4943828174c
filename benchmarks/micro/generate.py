"""Tokens a second of a net of the shape of SmolLM2-135M, with a cache of keys and values: in float32, and on codes.

    python -m benchmarks.micro.generate                 results/generate.json, two minutes
    ... --cores 1 2 --widths 256 512                    what is measured; each pair in a process of its own

The kernels of the 30 layers have 4 bits in groups of 32, the embedding, which is the head too, 8 bits and a scale for
each token; the weights are random, the same for all. Contestants take turns at steps of one token, at the same places
of their caches; figures are medians. A step reads more weights than a cache holds. Nothing else may run meanwhile.
Vector width: that of XLA's `--xla_cpu_prefer_vector_width`.
"""

import functools
import statistics
import sys
import time
from typing import Any

from benchmarks.harness.each_width import measure
from benchmarks.harness.markdown import grid
from benchmarks.harness.record import stored

STEPS, ROOM = 24, 64
LAYERS, VOCABULARY, WIDTH, HIDDEN, HEADS, GROUPS = 30, 49152, 576, 1536, 9, 3
GROUP = 32


def forms_of() -> dict[str, Any]:
    """Random codes, in the place of all weights but the norms'."""
    import jax.numpy as jnp
    import numpy as np

    import lcq

    rng, keys = np.random.default_rng(0), WIDTH // HEADS * GROUPS

    def codes(bits: int, shape: tuple[int, ...], blocks: tuple[int, ...]) -> Any:
        values = tuple(float(level) for level in range(-(2 ** (bits - 1)), 2 ** (bits - 1)))
        scale = jnp.asarray(rng.uniform(0.5, 1, blocks) * 0.1 / len(values), jnp.float16)
        return lcq.forms.Codes(jnp.asarray(rng.integers(0, len(values), shape, np.uint8)), values=values, scale=scale)

    sizes = {"wq": (WIDTH, WIDTH), "wk": (WIDTH, keys), "wv": (WIDTH, keys), "wo": (WIDTH, WIDTH)}
    sizes |= {"w1": (WIDTH, HIDDEN), "w3": (WIDTH, HIDDEN), "w2": (HIDDEN, WIDTH)}
    layers = {name: codes(4, (LAYERS, k, n), (LAYERS, k // GROUP, n)) for name, (k, n) in sizes.items()}
    norms = {name: jnp.ones((LAYERS, WIDTH)) for name in ("attention_norm", "ffn_norm")}
    table = codes(8, (VOCABULARY, WIDTH), (VOCABULARY, 1))
    return {"tok_embeddings": table, "norm": jnp.ones(WIDTH), "layers": layers | norms}


def rows() -> list[dict[str, Any]]:
    import jax
    import jax.numpy as jnp
    import numpy as np

    import lcq
    from lcq.examples import llama
    from lcq.examples.llama_names import Config

    forms, config = forms_of(), Config(heads=HEADS)
    dense = jax.tree.map(jnp.asarray, lcq.decompress(forms))
    made = {
        "float32": dense,
        "4 bits in groups of 32": forms | {"tok_embeddings": dense["tok_embeddings"]},
        "the same, embedding in 8 bits": forms,
    }
    run = lcq.packed(functools.partial(llama.step, config=config))
    step, token = jax.jit(run, donate_argnums=2), jnp.full((1, 1), 100)
    caches = {name: llama.empty_cache(dense, 1, ROOM, config) for name in made}
    ready = {name: run.prepack(made[name], token, caches[name]) for name in made}
    spent: dict[str, list[float]] = {name: [] for name in made}
    scores: dict[str, Any] = {}
    for _ in range(STEPS):
        for name in made:
            start = time.perf_counter()
            scores[name], caches[name] = step(ready[name], token, caches[name])
            jax.block_until_ready(scores[name])
            spent[name].append(1e3 * (time.perf_counter() - start))
    median = {name: statistics.median(some[1:]) for name, some in spent.items()}
    wanted, found = np.asarray(scores["float32"]), []
    for name, ms in median.items():
        report = run.report(ready[name], token, caches[name])
        found.append(
            {
                "what": name,
                "milliseconds": round(ms, 2),
                "tokens_a_second": round(1e3 / ms, 1),
                "times": round(median["float32"] / ms, 2),
                "bytes": sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(ready[name])),
                "apart": float(np.abs(scores[name] - wanted).max() / np.abs(wanted).max()),
                "kernels": {use.path: use.kernel or use.how for use in report},
            }
        )
        print(found[-1], file=sys.stderr, flush=True)
    return found


def table() -> str:
    """Tokens a second, and times those of float32."""
    lines: dict[str, dict[Any, str]] = {}
    runs = list(dict.fromkeys((row["cores"], row["vector_bits"]) for row in stored("generate")))
    for row in stored("generate"):
        cell = f"{row['tokens_a_second']:.1f}, {row['times']:.2f} times"
        lines.setdefault(row["what"], {})[row["cores"], row["vector_bits"]] = cell
    head = ["tokens a second", *(f"{c} core{'s' * (c > 1)}, {v} bits" for c, v in runs)]
    return grid(head, [[name, *(found.get(run, "") for run in runs)] for name, found in lines.items()])


if __name__ == "__main__":
    measure("generate", __doc__, rows)
