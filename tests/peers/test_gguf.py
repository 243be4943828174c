"""The package gguf reads and decodes what lcq exports: the same codes, the same weights."""

import numpy as np
import pytest

from lcq.io import Name, export
from tests.io.exports.made import codes, grid
from tests.io.exports.test_gguf import GRIDS, IO, LLAMA

gguf = pytest.importorskip("gguf", reason="pip install '.[peers]', or run .ci/peers")


def decoded(path):
    """The weights of its one tensor, its type, and the reader's fields."""
    reader = gguf.GGUFReader(path)
    (tensor,) = reader.tensors
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type), tensor.tensor_type.name, reader.fields


@pytest.mark.parametrize("name", GRIDS)
def test_blocks(name, tmp_path):
    form, dense = GRIDS[name]
    (row,) = export({"up": {"kernel": form}}, tmp_path / "net.gguf", format="gguf", config=LLAMA).rows
    found, kind, fields = decoded(tmp_path / "net.gguf")
    assert kind == name.split()[0] and fields["general.architecture"].contents() == "llama"
    moved = np.linalg.norm(found - dense.T) / np.linalg.norm(dense)
    np.testing.assert_allclose(moved, row.error, rtol=0.02, atol=1e-7)


def test_three_levels_in_base_3(tmp_path):
    form, dense = codes(IO, (2, 6), grid(-1, 1))
    names = [Name("w", "w", "io", type="TQ1_0")]
    export({"w": form}, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA)
    found, kind, _ = decoded(tmp_path / "net.gguf")
    np.testing.assert_array_equal(found, dense.T.astype(np.float32))
    assert kind == "TQ1_0"


@pytest.mark.parametrize(
    ("name", "blocks", "levels", "zeros"),
    [
        ("Q4_K", (16, 6), grid(0, 15), True),
        ("Q5_K", (8, 6), grid(0, 31), True),
        ("Q6_K", (32, 6), grid(-32, 31), False),
    ],
)
def test_k_quants(name, blocks, levels, zeros, tmp_path):
    form, dense = codes(IO, blocks, levels, zeros=zeros)
    names = [Name("w", "w", "io", type=name)]
    (row,) = export({"w": form}, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA).rows
    found, kind, _ = decoded(tmp_path / "net.gguf")
    moved = np.linalg.norm(found - dense.T) / np.linalg.norm(dense)
    np.testing.assert_allclose(moved, row.error, rtol=0.02)
    assert kind == name and moved < 0.05


def test_experts(tmp_path):
    form, dense = codes((3, 64, 8), (3, 2, 8), grid(-8, 7))
    names = [Name("w", "w", "io", experts=1)]
    export({"w": form}, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA)
    found, kind, _ = decoded(tmp_path / "net.gguf")
    np.testing.assert_allclose(found, dense.swapaxes(1, 2), rtol=2e-3, atol=1e-5)
    assert kind == "Q4_0"
