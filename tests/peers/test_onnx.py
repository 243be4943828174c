"""ONNX Runtime runs the models that lcq exports, and the package onnx checks them."""

import numpy as np
import pytest

from lcq.io import Name, export
from tests.io.exports.made import PRODUCTS, codes

onnx = pytest.importorskip("onnx", reason="pip install '.[peers]', or run .ci/peers")
runtime = pytest.importorskip("onnxruntime", reason="pip install '.[peers]', or run .ci/peers")

RNG = np.random.default_rng(0)
BIAS = RNG.normal(size=32).astype(np.float32)
SHAPES = {"a": (64, 48), "b": (48, 32), "c": (32, 20)}


def dense(path, opset):
    """y = einsum(relu((x A) B + b), C); A is an argument, B lies [out, in]."""
    make, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        make.make_node("MatMul", ["x", "a"], ["h"]),
        make.make_node("Gemm", ["h", "b", "bias"], ["g"], transB=1),
        make.make_node("Relu", ["g"], ["r"]),
        make.make_node("Einsum", ["r", "c"], ["y"], equation="bk,kn->bn"),
    ]
    inputs = [make.make_tensor_value_info(*each) for each in (("x", number, ["n", 64]), ("a", number, [64, 48]))]
    outputs = [make.make_tensor_value_info("y", number, ["n", 20])]
    held = {"b": np.ones((32, 48)), "bias": BIAS, "c": np.ones((32, 20))}
    initializers = [make.make_tensor(name, number, array.shape, array.ravel()) for name, array in held.items()]
    graph = make.make_graph(nodes, "net", inputs, outputs, initializers)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=12), path)
    return {"model": path}


@pytest.mark.parametrize(("format", "opset"), [("onnx", 21), ("onnx_dequantize", 21), ("onnx_dequantize", 25)])
@pytest.mark.parametrize(("values", "group", "zeros"), PRODUCTS)
def test_products_are_exact(values, group, zeros, format, opset, tmp_path):
    made = {key: codes((k, n), (k // (group or k), n), values, zeros=zeros) for key, (k, n) in SHAPES.items()}
    forms, (a, b, c) = {key: form for key, (form, _) in made.items()}, [w for _, w in made.values()]
    config = dense(tmp_path / "dense.onnx", opset)
    export(forms, tmp_path / "net.onnx", format=format, names=[Name("(.)", r"\1", "io")], config=config)
    onnx.checker.check_model(onnx.load(tmp_path / "net.onnx"))
    options = runtime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # MatMulNBits has it in its nodes
    session = runtime.InferenceSession(tmp_path / "net.onnx", options)
    assert [each.name for each in session.get_inputs()] == ["x"]
    x = RNG.normal(size=(5, 64)).astype(np.float32)
    (y,) = session.run(None, {"x": x})
    expected = np.maximum(x @ a @ b + BIAS, 0) @ c
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
