#!/usr/bin/env bash
# The reference of ONNX says that the mean of many float16 numbers is infinite.
#
# Versions: onnx 1.23.2, onnxruntime 1.32.0.
# Seen: ReduceMean of 2,000 float16 numbers of 100 is infinite in onnx's ReferenceEvaluator, and so is ReduceL2, whose
# result is 4,472; onnxruntime gives 100 and 4,472. The sum, 200,000, is formed in float16.
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



x = {"x": np.full(2000, 100, np.float16)}
mean, norm = ran("ReduceMean", x, [1]), ran("ReduceL2", x, [1])
print("onnx", m.version("onnx"), "onnxruntime", m.version("onnxruntime"), "reference and onnxruntime:", mean, norm)
assert mean == [[np.inf], [100]] and norm == [[np.inf], [4472]]
PYTHON
