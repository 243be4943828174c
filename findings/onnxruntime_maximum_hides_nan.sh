#!/usr/bin/env bash
# onnxruntime's maximum over an axis and its arg max pass over NaN: a net that diverged gives finite logits and a class.
#
# Versions: onnx 1.23.2, onnxruntime 1.32.0.
# Seen: ReduceMax, GlobalMaxPool and ArgMax of 1, NaN and 2s give 2, 2 and the place of a 2, where onnx's reference
# gives NaN, NaN and the place of the NaN. Max of two tensors keeps NaN in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.2 onnxruntime==1.32.0 numpy==2.4.6
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
import onnx
import onnxruntime
from onnx import helper
from onnx.reference import ReferenceEvaluator


def model(op, inputs, shape, kind=None):
    kinds = {name: helper.np_dtype_to_tensor_dtype(a.dtype) for name, a in inputs.items()}
    there = [helper.make_tensor_value_info(name, kinds[name], a.shape) for name, a in inputs.items()]
    back = [helper.make_tensor_value_info("y", kind or kinds["x"], shape)]
    graph = helper.make_graph([helper.make_node(op, list(inputs), ["y"])], "g", there, back)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def ran(op, inputs, shape, kind=None):
    net = model(op, inputs, shape, kind)
    onnx.checker.check_model(net)
    session = onnxruntime.InferenceSession(net.SerializeToString(), providers=["CPUExecutionProvider"])
    return [np.ravel(run(None, inputs)[0]).tolist() for run in (ReferenceEvaluator(net).run, session.run)]



x = np.full((1, 1, 20), 2, np.float32)
x[..., :2] = 1, np.nan
row = {"x": x}
found = {op: ran(op, row, [1, 1, 1]) for op in ("ReduceMax", "GlobalMaxPool")}
flat = {"x": x[0, 0]}
where = ran("ArgMax", flat, [1], onnx.TensorProto.INT64)
pair = ran("Max", {"x": x[0, 0], "z": np.zeros(20, np.float32)}, [20])
print("onnx", m.version("onnx"), "onnxruntime", m.version("onnxruntime"), "reference and onnxruntime:", found)
print("arg max:", where, "Max at the NaN:", [run[1] for run in pair])
assert all(np.isnan(want[0]) and got == [2] for want, got in found.values())
assert where[0] == [1] and where[1] != [1] and all(np.isnan(run[1]) for run in pair)
PYTHON
