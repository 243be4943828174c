"""What each target holds, by trying: python docs/targets.py

A matrix of 256 x 64 weights is compressed in every way and exported in every format. A cell says as what it went out,
with a star if scales were rounded, or that the format refuses it.
"""

import re
import tempfile
from pathlib import Path

import numpy as np

import lcq
from lcq.io import EXPORT_FORMATS, Name
from lcq.io.layouts.protobuf import field

WAYS = {
    "2 bits in groups of 32": lcq.Uniform(2, per=32),
    "3 bits in groups of 32": lcq.Uniform(3, per=32),
    "4 bits in groups of 32": lcq.Uniform(4, per=32),
    "4 bits in groups of 16": lcq.Uniform(4, per=16),
    "4 bits by channel": lcq.Uniform(4, per="channel"),
    "2 bits with zeros, groups of 32": lcq.Uniform(2, per=32, zero_point=True),
    "4 bits with zeros, groups of 32": lcq.Uniform(4, per=32, zero_point=True),
    "4 bits with scales of 6 bits, groups of 32": lcq.Uniform(4, per=32, zero_point=True, scale_bits=6),
    "5 bits in groups of 32": lcq.Uniform(5, per=32),
    "5 bits with zeros, groups of 32": lcq.Uniform(5, per=32, zero_point=True),
    "6 bits in groups of 16": lcq.Uniform(6, per=16),
    "8 bits in groups of 32": lcq.Uniform(8, per=32),
    "8 bits with zeros, groups of 32": lcq.Uniform(8, per=32, zero_point=True),
    "binary in groups of 32": lcq.Binary(per=32),
    "ternary in groups of 256": lcq.Ternary(per=256),
    "powers of two, `c=2`": lcq.PowersOfTwo(2, scale=True, per=32),
    "`KMeans(16)`": lcq.KMeans(16),
    "masks, factors, sums": lcq.Prune(fraction=0.5),
    "bfloat16": lcq.Cast("bfloat16"),
    "float32": None,
}


def product(path: Path) -> Path:
    """An ONNX model of x w, w being an argument."""
    node = b"".join([field(1, "x"), field(1, "w.weight"), field(2, "y"), field(4, "MatMul")])
    graph = field(1, node) + field(11, field(1, "x")) + field(11, field(1, "w.weight")) + field(12, field(1, "y"))
    path.write_bytes(field(1, 10) + field(8, field(1, "") + field(2, 21)) + field(7, graph))
    return path


def cell(form: object, format: str, folder: Path) -> str:
    """As what a leaf goes out."""
    out, names = folder / f"net{EXPORT_FORMATS[format].suffix}", [Name("w", "w.weight", layout="io")]
    model = {"model": product(folder / "dense.onnx")}
    configs = {"gguf": {"general.architecture": "llama"}, "onnx": model, "onnx_dequantize": model}
    try:
        (row,) = lcq.io.export({"w": form}, out, format=format, names=names, config=configs.get(format)).rows
    except ValueError:
        return "refused"
    return re.split(" in groups| by channel|, blocks", row.what)[0] + (" *" if row.error else "")


def table() -> str:
    """The table in Markdown."""
    w = np.random.default_rng(0).normal(size=(256, 64)).astype(np.float32)
    lines = [["", *EXPORT_FORMATS], ["---"] * (1 + len(EXPORT_FORMATS))]
    with tempfile.TemporaryDirectory() as folder:
        for way, scheme in WAYS.items():
            form = w if scheme is None else lcq.compress({"w": w}, [lcq.Rule("w", scheme)])["w"]
            lines.append([way, *(cell(form, format, Path(folder)) for format in EXPORT_FORMATS)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(table(), end="")
