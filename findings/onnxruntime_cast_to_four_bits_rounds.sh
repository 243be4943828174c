#!/usr/bin/env bash
# ONNX Runtime rounds in a Cast to int4, where its Cast to int8 and ONNX's reference truncate.
#
# Versions: onnx 1.23.0, onnxruntime 1.32.0.
# Seen: Cast of .5 and 3.7 to int4 and back gives 1 and 4 in ONNX Runtime, 0 and 3 in onnx's reference evaluator; to
# int8 both give 0 and 3. Codes that an exporter shifts by .5 before the Cast, to round, are one too high there.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check onnx==1.23.0 onnxruntime==1.32.0
"$work/venv/bin/python" -W ignore - <<'PYTHON'
import importlib.metadata as m

import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper
from onnx.reference import ReferenceEvaluator

given = {"x": np.array([-3.7, -0.5, 0.5, 3.7], "f4")}


def cast(kind):
    nodes = [helper.make_node("Cast", ["x"], ["q"], to=kind), helper.make_node("Cast", ["q"], ["y"], to=1)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return [run.run(None, given)[0].tolist() for run in (session, ReferenceEvaluator(model))]


four, eight = cast(TensorProto.INT4), cast(TensorProto.INT8)
versions = [f"{name} {m.version(name)}" for name in ("onnx", "onnxruntime")]
print(*versions, given["x"], "as int4:", *four, "as int8:", *eight)
assert four[0] != four[1] and four[0][2:] == [1, 4] and four[1][2:] == [0, 3] and eight[0] == eight[1] == [-3, 0, 0, 3]
PYTHON
