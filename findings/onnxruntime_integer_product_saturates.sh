#!/usr/bin/env bash
# onnxruntime's product of 8-bit integers is wrong on processors without VNNI.
#
# Versions: onnx 1.23.2, onnxruntime 1.32.0, on an x86-64 processor with AVX2 and neither avx512_vnni nor avx_vnni in
# /proc/cpuinfo.
# Seen: MatMulInteger of four uint8 255 with four int8 127 is 65,534, where 129,540 is right, as in onnx's reference:
# pairs of products are added in 16 bits and stop at 32,767. Of uniform codes in 256 rows all 64 sums are wrong, by up
# to 48,322; with weights within 64 none is.
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



def product(a, b):
    return ran("MatMulInteger", {"x": a, "w": b}, [len(a), b.shape[1]], onnx.TensorProto.INT32)


rng = np.random.default_rng(0)
largest = product(np.full((1, 4), 255, np.uint8), np.full((4, 1), 127, np.int8))
codes = rng.integers(0, 256, (8, 256)).astype(np.uint8)
uniform, narrow = (product(codes, rng.integers(-n, n, (256, 8)).astype(np.int8)) for n in (128, 64))
wrong = [int((np.array(want) != got).sum()) for want, got in (uniform, narrow)]
off = int(np.abs(np.subtract(*uniform)).max())
print("onnx", m.version("onnx"), "onnxruntime", m.version("onnxruntime"), "reference and onnxruntime:", largest)
print("wrong of 64 sums of weights within 128 and 64:", wrong, "by up to", off)
assert largest == [[129540], [65534]] and wrong[0] > 0 and wrong[1] == 0 and off > 1000
PYTHON
