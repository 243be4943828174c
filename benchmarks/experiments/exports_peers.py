"""What each library makes of a matrix by its own quantizer, and of the files that lcq exports.

`PEERS` has for each format (own, decoded): `own(w, bits, zeros, group)` quantizes and decodes a matrix [in, out] by
the library alone, `group` inputs to a scale; `decoded(forms, bits)` exports forms by lcq and gives the weights that the
library reads, by path.
    pip install gguf compressed-tensors qwix onnx onnx_ir onnxruntime
"""

import contextlib
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

import lcq

GROUP, BLOCK = 32, 256
Weights = dict[str, np.ndarray]
NAMES = [lcq.io.Name(r"(.*)", r"\1.weight", "io")]


class Peer(NamedTuple):
    """A format and its library.

    Attributes:
        own: of a matrix, bits, whether there are zeros, and inputs to a scale.
        decoded: of forms by path, and bits.
    """

    own: Callable[[np.ndarray, int, bool, int], np.ndarray]
    decoded: Callable[[dict[str, lcq.forms.Codes], int], Weights]


def gguf_own(w: np.ndarray, bits: int, zeros: bool, group: int, ternary: str = "TQ2_0") -> np.ndarray:
    """Q4_0: the largest weight decides. Q4_1: the smallest and largest do. TQ2_0 and TQ1_0: the largest, in blocks of
    256 inputs, filled up by zeros, which change nothing there."""
    import gguf

    name = {2: ternary, 4: "Q4_1" if zeros else "Q4_0", 5: "Q5_0"}[bits]
    kind = gguf.GGMLQuantizationType[name]
    rows = np.pad(w.T, ((0, 0), (0, -len(w) % (BLOCK if bits == 2 else GROUP))))
    return gguf.quants.dequantize(gguf.quants.quantize(np.ascontiguousarray(rows), kind), kind).T[: len(w)]


def gguf_decoded(forms: dict[str, lcq.forms.Codes], bits: int, type: str | None = None) -> Weights:
    import gguf

    names = [lcq.io.Name(r"(.*)", r"\1.weight", "io", type=type)]
    wide = {path: _filled(form) if bits == 2 else form for path, form in forms.items()}
    with _folder() as folder:
        lcq.io.export(wide, folder / "net.gguf", format="gguf", names=names, config={"general.architecture": "llama"})
        read = gguf.GGUFReader(folder / "net.gguf")
        dense = {t.name.removesuffix(".weight"): gguf.quants.dequantize(t.data, t.tensor_type).T for t in read.tensors}
        return {path: w[: forms[path].shape[0]].copy() for path, w in dense.items()}


def _filled(form: lcq.forms.Codes) -> lcq.forms.Codes:
    """A form with a scale for each output, its inputs filled up by zeros to a whole block; others as they are."""
    form = form.unpack()
    if form.scale.shape[0] > 1 or not (more := -form.shape[0] % BLOCK):
        return form
    zero = form.values.index(0.0)
    codes = np.pad(np.asarray(form.codes), ((0, more), (0, 0)), constant_values=zero)
    return dataclasses.replace(form, codes=codes)


def compressed_tensors_own(w: np.ndarray, bits: int, zeros: bool, group: int) -> np.ndarray:
    """Minimum and maximum of each group, as llm-compressor's observer has them."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=bits, symmetric=not zeros, strategy="group", group_size=group)
    rows = torch.from_numpy(np.ascontiguousarray(w.T))
    apart = rows.reshape(len(rows), -1, group)
    scale, zero = calculate_qparams(apart.amin(-1), apart.amax(-1), args)
    return fake_quantize(rows, scale, zero, args).numpy().T


def compressed_tensors_decoded(forms: dict[str, lcq.forms.Codes], bits: int) -> Weights:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    names = [lcq.io.Name(r"(.*)", r"\1.weight", "io", type=f"int{bits}")]
    with _folder() as folder:
        lcq.io.export(forms, folder / "net", format="compressed-tensors", names=names)
        said = json.loads((folder / "net" / "config.json").read_text())["quantization_config"]
        tensors = safetensors.numpy.load_file(folder / "net" / "model.safetensors")
    scheme = QuantizationConfig.model_validate(said).config_groups["group_0"]
    made = {}
    for path in forms:
        parts = {key.removeprefix(f"{path}."): a for key, a in tensors.items() if key.startswith(f"{path}.")}
        parts["weight_scale"] = parts["weight_scale"].astype(np.float32)  # decoded in the dtype of scales
        state = {key: torch.from_numpy(a.copy()) for key, a in parts.items()}
        compressor = BaseCompressor.get_value_from_registry("pack-quantized")
        made[path] = compressor.decompress(state, scheme)["weight"].numpy().T
    return made


def qwix_own(w: np.ndarray, bits: int, zeros: bool, group: int) -> np.ndarray:
    """The largest weight of each tile."""
    import qwix

    method = "minmax" if zeros else "absmax"
    array = qwix.quantize(
        jnp.asarray(w), f"int{bits}", channelwise_axes=[1], tiled_axes={0: group}, calibration_method=method
    )
    return np.asarray(qwix.dequantize(array))


def qwix_decoded(forms: dict[str, lcq.forms.Codes], bits: int) -> Weights:
    import qwix

    made = {}
    for path, leaf in lcq.io.to_qwix(forms).items():
        parts = {key: jnp.asarray(a) for key, a in leaf["array"].items()}
        parts["scale"] = parts["scale"].astype(jnp.float32)
        made[path] = np.asarray(qwix.dequantize(qwix.QArray(**parts)))
    return made


def onnx_own(w: np.ndarray, bits: int, zeros: bool, group: int) -> np.ndarray:
    """The quantizer of ONNX Runtime, decoded by its MatMulNBits."""
    from onnxruntime.quantization import matmul_nbits_quantizer as quantizer

    config = quantizer.DefaultWeightOnlyQuantConfig(block_size=group, is_symmetric=not zeros, bits=bits)
    codes, scales, points = quantizer.DefaultWeightOnlyQuantizer(config).qbits_block_quant(np.ascontiguousarray(w))
    return _onnx_weights({"w": w.shape}, {"w": (codes, scales, points if zeros else None)}, bits, group)["w"]


def onnx_decoded(forms: dict[str, lcq.forms.Codes], bits: int) -> Weights:
    import onnx

    with _folder() as folder:
        for path, form in forms.items():
            held = [("w.weight", form.shape)]
            node = onnx.helper.make_node("MatMul", ["x", "w.weight"], ["y"])
            onnx.save(_onnx_model([node], [("x", (None, form.shape[0])), *held], ["y"], []), folder / "dense.onnx")
            lcq.io.export(
                {"w": form},
                folder / f"{path}.onnx",
                format="onnx",
                names=NAMES,
                config={"model": folder / "dense.onnx"},
            )
        return {path: _on_identity(folder / f"{path}.onnx", form.shape[0]) for path, form in forms.items()}


def _onnx_weights(shapes: dict[str, tuple[int, ...]], parts: dict[str, tuple], bits: int, group: int) -> Weights:
    import onnx

    made = {}
    with _folder() as folder:
        for path, (inputs, outputs) in shapes.items():
            held = {
                name: a for name, a in zip(("codes", "scales", "points"), parts[path], strict=True) if a is not None
            }
            held["scales"] = held["scales"].ravel()
            node = onnx.helper.make_node(
                "MatMulNBits",
                ["x", *held],
                ["y"],
                domain="com.microsoft",
                K=inputs,
                N=outputs,
                bits=bits,
                block_size=group,
                accuracy_level=1,
            )
            arrays = [onnx.numpy_helper.from_array(a.reshape(-1) if n == "points" else a, n) for n, a in held.items()]
            onnx.save(_onnx_model([node], [("x", (None, inputs))], ["y"], arrays), folder / "net.onnx")
            made[path] = _on_identity(folder / "net.onnx", inputs)
    return made


def _onnx_model(nodes: list, inputs: list, outputs: list[str], arrays: list) -> object:
    from onnx import TensorProto, helper

    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "net", infos, ends, arrays)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _on_identity(path: Path, inputs: int) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    return session.run(None, {"x": np.eye(inputs, dtype=np.float32)})[0]


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


PEERS = {
    "gguf": Peer(gguf_own, gguf_decoded),
    "gguf TQ1_0": Peer(functools.partial(gguf_own, ternary="TQ1_0"), functools.partial(gguf_decoded, type="TQ1_0")),
    "compressed-tensors": Peer(compressed_tensors_own, compressed_tensors_decoded),
    "qwix": Peer(qwix_own, qwix_decoded),
    "onnx": Peer(onnx_own, onnx_decoded),
}
