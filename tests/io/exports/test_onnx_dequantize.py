"""DequantizeLinear: a dense model of any products, its weights decoded here bit by bit."""

import numpy as np
import pytest

from lcq.io import Name, export
from lcq.io.layouts.protobuf import field, fields
from tests.io.exports.made import PRODUCTS
from tests.io.exports.test_onnx import NAMES, apart, dense, one, op, three


def decoded(path):
    """Weights by name, and inputs of the graph; a decoder stands before what uses it."""
    graph = list(fields(one(list(fields(path.read_bytes())), 7)))
    held = {}
    for entry in (list(fields(f.value)) for f in graph if f.number == 5):
        shape, kind = [f.value for f in entry if f.number == 1], one(entry, 2)
        raw = np.frombuffer(one(entry, 9), {1: np.float32, 3: np.int8}.get(kind, np.uint8))
        if kind in (21, 22, 25, 26):
            half = 8 if kind < 25 else 2
            raw = apart(raw, 4 if kind < 25 else 2, int(np.prod(shape)))
            raw = (raw ^ half) - half if kind in (22, 26) else raw
        held[bytes(one(entry, 8)).decode()] = raw.reshape(shape).astype(np.float64)
    weights, used = {}, []
    for entry in (list(fields(f.value)) for f in graph if f.number == 1):
        names = [bytes(f.value).decode() for f in entry if f.number == 1]
        if bytes(one(entry, 4)) != b"DequantizeLinear":
            used += names
            continue
        said = {bytes(one(a, 1)).decode(): one(a, 3) for a in (list(fields(f.value)) for f in entry if f.number == 5)}
        codes, scale, zero = held[names[0]], held[names[1]], held[names[2]] if len(names) > 2 else np.zeros(1)
        axis = said["axis"]
        if "block_size" in said:
            scale, zero = (np.repeat(a, said["block_size"], axis) if a.ndim == 2 else a for a in (scale, zero))
        else:
            scale, zero = (a.reshape([-1 if i == axis else 1 for i in range(2)]) for a in (scale, zero))
        (out,) = (bytes(f.value).decode() for f in entry if f.number == 2)
        assert out not in used
        weights[out] = (codes - zero) * scale
    return weights, [bytes(one(list(fields(f.value)), 1)).decode() for f in graph if f.number == 11]


@pytest.mark.parametrize("opset", [21, 25])
@pytest.mark.parametrize(("values", "group", "zeros"), PRODUCTS)
def test_weights_are_those_of_the_forms(values, group, zeros, opset, tmp_path):
    """Of 2 bits there are numbers from opset 25 on."""
    forms, (a, b, c) = three(values, group, zeros=zeros)
    config, out = dense(tmp_path / "dense.onnx", opset=opset), tmp_path / "net.onnx"
    report = export(forms, out, format="onnx_dequantize", names=NAMES[:1], config=config)
    weights, inputs = decoded(out)
    assert inputs == ["x"] and not report.changed and "rounds activations to 8 bits" in report.notes[0]
    assert sum(row.bytes for row in report.rows) < out.stat().st_size < report.bytes + 2048
    small = "int2" if opset == 25 and len(values) <= 4 else "int"
    assert all(row.what.startswith("u" * zeros + small) for row in report.rows)
    for name, expected in {"a/w": a, "b/w": b.T, "c/w": c}.items():  # Gemm has b as [out, in]
        np.testing.assert_allclose(weights[name], expected, rtol=1e-6)


def test_what_is_refused(tmp_path):
    forms, old = {"a": three(tuple(map(float, range(-8, 8))), 16)[0]["a"]}, tmp_path / "old.onnx"
    plain, both = dense(tmp_path / "dense.onnx"), op("Gemm", ["x", "a/w"], "t", transB=1)
    (message,) = (f.value for f in fields(plain["model"].read_bytes()) if f.number == 7)
    old.write_bytes(field(1, 10) + field(8, field(1, "") + field(2, 20)) + field(7, bytes(message)))
    for config, complaint in [
        ({"model": old}, r"old.onnx: expected a model of opset 21 or later, got 20; write it so, or choose"),
        (dense(tmp_path / "both.onnx", both), r"a: expected 'a/w' to be used one way, got Gemm with transB"),
        ({}, r"expected config=\{'model': path\} of the dense function"),
    ]:
        with pytest.raises(ValueError, match=complaint):
            export(forms, tmp_path / "net.onnx", format="onnx_dequantize", names=NAMES[:1], config=config)
        assert not (tmp_path / "net.onnx").exists()


def test_floats_take_the_place_of_floats(tmp_path):
    tree = {"bias": np.zeros(32, np.float32)}
    names = [Name("bias", "b")]
    config, out = dense(tmp_path / "dense.onnx"), tmp_path / "net.onnx"
    report = export(tree, out, format="onnx_dequantize", names=names, config=config)
    assert not report.notes and decoded(out)[0] == {}
