#!/usr/bin/env bash
# ONNX Runtime rounds the activations of a weight-only product to 8 bits by default.
#
# Versions: onnxruntime 1.32.0, onnx 1.23.2.
# Seen: DequantizeLinear of INT4 weights in blocks of 32, then MatMul: the model says float32 activations, and the fused
# kernel rounds them. With one activation of 300 among normal ones the result is wrong by 1 %, and by .19 of what the other
# 255 contribute. With session.qdq_matmulnbits_accuracy_level = 1, or ORT_ENABLE_BASIC, it is exact to float32.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

rng, inputs, units, group = np.random.default_rng(0), 256, 64, 32
codes = rng.integers(-8, 8, (inputs, units))
scale = rng.uniform(0.01, 0.02, (inputs // group, units)).astype("f4")
x = rng.normal(size=(1, inputs)).astype("f4")
x[0, 0] = 300
nodes = [
    helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=0, block_size=group),
    helper.make_node("MatMul", ["x", "w"], ["y"]),
]
weights = [
    helper.make_tensor("codes", TensorProto.INT4, [inputs, units], codes.ravel().tolist()),
    numpy_helper.from_array(scale, "scale"),
]
ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, k]) for n, k in (("x", inputs), ("y", units))]
model = helper.make_model(
    helper.make_graph(nodes, "product", ends[:1], ends[1:], weights), opset_imports=[helper.make_opsetid("", 21)]
)
model.ir_version = 10
w = codes * np.repeat(scale, group, 0).astype("f8")
others = x.astype("f8").copy()
others[0, 0] = 0


def wrong(level=None):
    options = ort.SessionOptions()
    if level:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", level)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x})
    return float(np.linalg.norm(y - x @ w) / np.linalg.norm(others @ w))


default, exact = wrong(), wrong("1")
print("onnxruntime", m.version("onnxruntime"), f"default {default:.3f}, accuracy level 1 {exact:.1e} of the others' share")
assert default > 0.05 and exact < 1e-4
PYTHON
