"""What goes out comes back: the same codes and weights, and from there the same bytes again."""

import numpy as np
import pytest
import safetensors.numpy

import lcq
from lcq.io import Name, export, open_gguf
from tests.io.exports.test_gguf import GRIDS as BLOCKS
from tests.io.exports.test_linear_formats import GRIDS

NAMES = [Name(".*", "up.weight", "io")]
FIELDS = {
    "general.architecture": "llama",
    "tokenizer.ggml.tokens": ["a", "b"],
    "tokenizer.ggml.scores": np.float32([0, 1]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_gguf(name, tmp_path):
    form, dense = BLOCKS[name]
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    export({"w": form}, first, format="gguf", names=NAMES, config=FIELDS)
    back = lcq.io.read(first, forms=True)
    np.testing.assert_allclose(
        np.asarray(back["up.weight"].dense()), dense.T, rtol=5e-4, atol=1e-3 * np.abs(dense).max()
    )
    lcq.save(tmp_path / "net.lcq", back)
    report = export(tmp_path / "net.lcq", second, format="gguf", config=open_gguf(first).fields)
    assert first.read_bytes() == second.read_bytes() and report.rows[0].error < 1e-7


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "gptq_v2"])
def test_linear_formats(name, format, tmp_path):
    form, dense = GRIDS[name]
    export({"w": form}, tmp_path / "first", format=format, names=NAMES)
    back = lcq.io.read(tmp_path / "first", forms=True)
    np.testing.assert_allclose(np.asarray(back["up.weight"].dense(), np.float64), dense.T, rtol=8e-3, atol=1e-6)
    report = export(back, tmp_path / "second", format=format)
    first, second = (safetensors.numpy.load_file(tmp_path / each / "model.safetensors") for each in ("first", "second"))
    assert first.keys() == second.keys() and not report.changed
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
