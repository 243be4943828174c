"""ONNX by its own operators alone, from opset 21 on: codes, and DequantizeLinear where a weight was.

    W = DequantizeLinear(codes, scales, zeros)     in blocks along the inputs, or a scale for each output

    codes   int4 or int8 [in, out] without zeros, uint4 or uint8 with; of Gemm's transposed weights [out, in]
            from opset 25 on also int2 and uint2
    scales  [in / g, out], or [out], as the weight was
    zeros   as codes, of the shape of scales

Every runtime of ONNX has it, and it decodes exactly. But by default ONNX Runtime makes one kernel of it and the
product, on activations that it rounds to 8 bits: the option session.qdq_matmulnbits_accuracy_level=1 prevents that.

Source: onnx 1.19, docs/Operators.md, DequantizeLinear.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Shaped

from lcq.forms import Codes
from lcq.io.container import Json
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, Tensor
from lcq.io.exports.grids import kind_of
from lcq.io.exports.leaves import NO_TARGET, Item
from lcq.io.exports.linear import bits_of, encoded
from lcq.io.exports.onnx import Onnx, declared, packed_bytes
from lcq.io.exports.onnx_graph import is_turned, node, opset_of
from lcq.io.exports.steps import whole_zeros
from lcq.io.facts import Facts

_BITS = (4, 8)
_OPSET = 21
_OPSET_OF_2_BITS = 25
_ROUNDED = (
    "note: ONNX Runtime rounds activations to 8 bits before products with these weights, unless "
    "session.qdq_matmulnbits_accuracy_level is 1"
)


@EXPORT_FORMATS.register("onnx_dequantize")
class OnnxDequantize(Onnx):
    """An .onnx file for any runtime. `config` is {"model": path} of the dense one, of opset 21 or later."""

    @classmethod
    def facts(cls) -> Facts:
        return Facts(
            "`.onnx` for any runtime, of a dense model from opset 21 on: DequantizeLinear",
            "as `onnx`",
            f"{', '.join(map(str, _BITS))} bits, and 2 from opset {_OPSET_OF_2_BITS} on, in groups or by channel",
            f"a weight that is used both ways round; 2 GiB; {NO_TARGET}",
        )

    def __init__(self, config: Mapping[str, Json]) -> None:
        super().__init__(config)
        if (opset := opset_of(self._model)) < _OPSET:
            raise ValueError(
                f"{config['model']}: expected a model of opset {_OPSET} or later, got {opset}; write it so, or choose "
                "format='onnx'"
            )
        self._bits = (2, *_BITS) if opset >= _OPSET_OF_2_BITS else _BITS
        self._decoders: list[bytes] = []

    def declare(self, item: Item) -> dict[str, Tensor]:
        if not isinstance(item.value, Codes):
            return super().declare(item)
        name = self._name(item)
        self._replaced.add(name)
        turned, scales = self._turned(name), self._check_products(item, name)
        kind, bits = kind_of(item.value, item.rule.layout), bits_of(item, self._bits)
        shape, dtype = (kind.inputs, kind.outputs), f"{'u' * kind.steps.shifted}int{bits}"
        blocks = kind.inputs // kind.group
        groups = (kind.outputs,) if blocks == 1 else (blocks, kind.outputs)
        if turned:
            shape, groups = shape[::-1], groups[::-1]
        made = {f"{name}_codes": _of_bits(dtype, shape), f"{name}_scales": declared(scales, *groups)}
        if kind.steps.shifted:
            made[f"{name}_zeros"] = _of_bits(dtype, groups)
        axis = int(turned) if blocks > 1 else int(not turned)
        length = {"block_size": kind.group} if blocks > 1 else {}
        self._decoders.append(node("DequantizeLinear", tuple(made), (name,), "", axis=axis, **length))
        return made

    def encode(self, item: Item) -> Encoded:
        if not isinstance(item.value, Codes):
            return super().encode(item)
        name, bits = self._name(item), bits_of(item, self._bits)
        kind, turned = kind_of(item.value, item.rule.layout), self._turned(name)
        scales = self._scales(name)
        grid, error = encoded(item, bits, scales)
        half = 0 if kind.steps.shifted else 1 << (bits - 1)

        def laid(numbers: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(numbers if turned else numbers.T).reshape(1, -1)

        signed = (grid.codes - np.uint8(half)) & np.uint8((1 << bits) - 1)
        made = {f"{name}_codes": packed_bytes(laid(signed), bits), f"{name}_scales": laid(grid.scale)}
        if grid.zero is not None:
            made[f"{name}_zeros"] = packed_bytes(laid(whole_zeros(grid.zero, bits)), bits)
        what = f"{'u' * kind.steps.shifted}int{bits} {kind.words}"
        return Encoded(made, what, error, f"scales to {scales}" if error else "")

    def write(
        self, path: Path, tensors: dict[str, Tensor], arrays: Iterator[tuple[str, Shaped[np.ndarray, "..."]]]
    ) -> tuple[str, ...]:
        super().write(path, tensors, arrays)
        return (_ROUNDED,) if self._decoders else ()

    def _first_nodes(self) -> list[bytes | memoryview]:
        return [*self._decoders]

    def _turned(self, name: str) -> bool:
        """Whether the model has a weight as [out, in].

        Raises:
            ValueError: it has it both ways.
        """
        ways = {is_turned(each) for each in self._products(name)}
        if len(ways) > 1:
            raise ValueError(f"expected {name!r} to be used one way, got Gemm with transB and another; make it dense")
        return ways.pop()


def _of_bits(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of 4 bits are two in a byte, of 2 bits four."""
    return Tensor(shape, dtype, -(-int(np.prod(shape)) * int(dtype.removeprefix("u").removeprefix("int")) // 8))
