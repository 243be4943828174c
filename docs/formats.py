"""Every format that lcq reads or writes, from the registries, and what is refused, by trying: python docs/formats.py

The table has a row for each kind of file of every format in `CHECKPOINT_FORMATS` and `EXPORT_FORMATS`, as their `facts`
say. Refusals are what `lcq.io.export` says of a matrix of 100 or 256 inputs and 64 outputs.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from targets import product

import lcq
from lcq.io import CHECKPOINT_FORMATS, EXPORT_FORMATS, Name

FUNCTIONS = (
    (
        "in",
        "`from_qwix`",
        "a tree of qwix in memory",
        "as they are",
        "int2, int4, int8, unsigned",
        "codes of float types, nf4",
    ),
    (
        "out",
        "`to_qwix`",
        "a tree for qwix",
        "as they are",
        "int4, int8, scales along any axis, zeros",
        "more than 8 bits",
    ),
)
CASES = {
    "`KMeans(16)`": (256, lcq.KMeans(16)),
    "`Prune(fraction=0.5)`": (256, lcq.Prune(fraction=0.5)),
    "`LowRank(4)`": (256, lcq.LowRank(4)),
    "`Uniform(12)`": (256, lcq.Uniform(12)),
    "`Uniform(4, per=10)`": (100, lcq.Uniform(4, per=10)),
    "`Uniform(8, per=32, zero_point=True)`": (256, lcq.Uniform(8, per=32, zero_point=True)),
    "scales of 1e-30": (256, lcq.Uniform(4, per=32)),
}


def formats() -> Iterator[tuple[str, ...]]:
    """The rows of the table."""
    for name in CHECKPOINT_FORMATS:
        yield from (("in", f"`{name}`", *facts) for facts in CHECKPOINT_FORMATS[name].facts())
    for name in EXPORT_FORMATS:
        yield "out", f"`{name}`", *EXPORT_FORMATS[name].facts()
    yield from FUNCTIONS


def refusal(inputs: int, scheme: lcq.schemes.Scheme, tiny: bool, format: str, folder: Path) -> str | None:
    """What a format says of a matrix that is compressed so; None if it takes it."""
    w = np.random.default_rng(0).normal(size=(inputs, 64)).astype(np.float32) * (1e-30 if tiny else 1)
    form = lcq.compress({"w": w}, [lcq.Rule("w", scheme)])["w"]
    model = {"model": product(folder / "dense.onnx")}
    configs = {"gguf": {"general.architecture": "llama"}, "onnx": model, "onnx_dequantize": model}
    out, names = folder / f"net{EXPORT_FORMATS[format].suffix}", [Name("w", "w.weight", layout="io")]
    try:
        lcq.io.export({"w": form}, out, format=format, names=names, config=configs.get(format))
    except ValueError as error:
        return re.sub(r"\s+", " ", str(error))
    return None


def refusals() -> Iterator[tuple[str, ...]]:
    """The rows of what is refused: of what, by whom, and how it is said."""
    with tempfile.TemporaryDirectory() as folder:
        for what, (inputs, scheme) in CASES.items():
            said: dict[str, list[str]] = {}
            for format in EXPORT_FORMATS:
                words = refusal(inputs, scheme, "1e-30" in what, format, Path(folder))
                if words is not None:
                    said.setdefault(words, []).append(f"`{format}`")
            for words, by in said.items():
                yield what, "all" if len(by) == len(list(EXPORT_FORMATS)) else ", ".join(by), words


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    """Rows in Markdown."""
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def page() -> Iterator[str]:
    """Both tables."""
    yield table(("", "name", "file", "numbers", "codes", "refused"), formats())
    yield table(("compressed by", "refused by", "in these words"), refusals())


if __name__ == "__main__":
    print(*page(), sep="\n", end="")
