"""ONNX: a model of the dense function, as jax2onnx or torch.onnx wrote it, with codes in the place of its weights.

    MatMul(x, W), Gemm(x, W, c), Einsum("..k,kn->..n", x, W)  ->  MatMulNBits(x, codes, scales, zeros) (+ c)

    codes   uint8 [out, ceil(in / g), g b / 8]   b of 2, 4 or 8 bits, the first in the lowest; g a power of 2 from 16
    scales  [out, ceil(in / g)], as the weight was
    zeros   uint8 [out, ceil(ceil(in / g) b / 8)], packed likewise; without, 2^(b-1)

`accuracy_level=1`: ONNX Runtime then computes with the activations as they are, where its default for DequantizeLinear
(`onnx_dequantize`) rounds them to 8 bits. Neither the package onnx nor protobuf is needed.

Source: ContribOperators.md of onnxruntime 1.32.
"""

import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt, UInt8

from lcq.forms import Codes, bitpack
from lcq.io.atomic import replacing
from lcq.io.container import Json, flat
from lcq.io.exports.base import EXPORT_FORMATS, Encoded, ExportFormat, Tensor
from lcq.io.exports.grids import kind_of
from lcq.io.exports.leaves import NO_TARGET, Item
from lcq.io.exports.linear import bits_of, encoded
from lcq.io.exports.names import Name
from lcq.io.exports.onnx_graph import (
    GRAPH,
    INITIALIZER,
    INPUT,
    MICROSOFT,
    NODE,
    OPSETS,
    Holder,
    Node,
    holder_of,
    is_product,
    is_turned,
    name_of,
    node,
    node_of,
)
from lcq.io.exports.steps import cast, whole_zeros
from lcq.io.facts import Facts
from lcq.io.layouts.protobuf import Field, field, fields, opened

_BITS = (2, 4, 8)
_TYPES = {
    **{"float32": 1, "uint8": 2, "int8": 3, "int16": 5, "int32": 6, "int64": 7, "bool": 9, "float16": 10},
    **{"float64": 11, "bfloat16": 16},
}
_SCALES = ("float32", "float16", "bfloat16")
_SMALL = {"uint4": 21, "int4": 22, "uint2": 25, "int2": 26}
_MOST = 1 << 31


@EXPORT_FORMATS.register("onnx")
class Onnx(ExportFormat):
    """An .onnx file. `config` is {"model": path} of the dense one, whose initializers or inputs have the names."""

    suffix = ".onnx"
    names = (Name(".*", r"\g<0>", layout="io"),)

    @classmethod
    def facts(cls) -> Facts:
        return Facts(
            "`.onnx` for ONNX Runtime, of a dense model in ONNX: MatMulNBits",
            f"{', '.join(_TYPES)}; floats become those of the model",
            f"{', '.join(map(str, _BITS))} bits, in groups of multiples of 16 or by channel, with zeros or without",
            f"weights that are used in other ways than x W, or float64; 2 GiB; {NO_TARGET}",
        )

    def __init__(self, config: Mapping[str, Json]) -> None:
        super().__init__(config)
        if "model" not in config:
            raise ValueError(
                "expected config={'model': path} of the dense function in ONNX, got none; write it with "
                "jax2onnx.to_onnx, its weights being arguments or constants"
            )
        path = self._path = Path(config["model"])
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._model = list(fields(memoryview(self._data)))
            graphs = [each.value for each in self._model if each.number == GRAPH]
            if len(graphs) != 1 or isinstance(graphs[0], int):
                raise ValueError("no graph in it")
            self._graph = list(fields(graphs[0]))
            self._nodes = [node_of(f.value) for f in self._graph if f.number == NODE and not isinstance(f.value, int)]
            entries = [f for number in (INITIALIZER, INPUT) for f in self._graph if f.number == number]
            self._holders: dict[str, Holder] = {}
            for each in entries:
                self._holders.setdefault(name_of(each), holder_of(each))
        except (ValueError, StopIteration) as error:
            raise ValueError(f"{path}: expected an ONNX model, got another file: {error}") from error
        self._known = {name.replace("/", "."): name for name in self._holders}
        self._layers: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {}
        self._replaced: set[str] = set()

    def declare(self, item: Item) -> dict[str, Tensor]:
        name = self._name(item)
        self._replaced.add(name)
        if not isinstance(item.value, Codes):
            return {name: declared(self._dtype(item), *self._fitting(name, *item.value.shape))}
        scales = self._check_products(item, name)
        kind, bits = kind_of(item.value, item.rule.layout), bits_of(item, _BITS)
        group = block_length(kind.group, kind.inputs)
        blocks = -(-kind.inputs // group)
        made = {
            f"{name}_codes": declared("uint8", kind.outputs, blocks, group * bits // 8),
            f"{name}_scales": declared(scales, kind.outputs, blocks),
        }
        if kind.steps.shifted:
            made[f"{name}_zeros"] = declared("uint8", kind.outputs, -(-blocks * bits // 8))
        settings = {"K": kind.inputs, "N": kind.outputs, "bits": bits, "block_size": group, "accuracy_level": 1}
        self._layers[name] = tuple(made), settings
        return made

    def encode(self, item: Item) -> Encoded:
        name = self._name(item)
        if not isinstance(item.value, Codes):
            dtype = self._dtype(item)
            array, error = cast(np.asarray(item.value), np.dtype(dtype))
            return Encoded({name: array}, dtype, error, f"{item.value.dtype} to {dtype}" if error else "")
        kind, bits = kind_of(item.value, item.rule.layout), bits_of(item, _BITS)
        dtype = self._scales(name)
        grid, error = encoded(item, bits, dtype)
        group = block_length(kind.group, kind.inputs)
        blocks = -(-kind.inputs // group)
        padded = np.pad(grid.codes, ((0, 0), (0, blocks * group - kind.inputs)))
        made = {
            f"{name}_codes": packed_bytes(padded, bits).reshape(kind.outputs, blocks, group * bits // 8),
            f"{name}_scales": _each_block(grid.scale, kind.group, group, blocks),
        }
        if grid.zero is not None:
            made[f"{name}_zeros"] = packed_bytes(
                _each_block(whole_zeros(grid.zero, bits), kind.group, group, blocks), bits
            )
        what = f"MatMulNBits of {bits} bits, blocks of {group}"
        return Encoded(made, what, error, f"scales to {dtype}" if error else "")

    def write(
        self, path: Path, tensors: dict[str, Tensor], arrays: Iterator[tuple[str, Shaped[np.ndarray, "..."]]]
    ) -> tuple[str, ...]:
        pieces = [*self._first_nodes(), *(piece for entry in self._graph for piece in self._entry(entry))]
        heads = {name: _tensor_head(name, each) for name, each in tensors.items()}
        inner = sum(map(len, pieces)) + sum(len(heads[name]) + each.size for name, each in tensors.items())
        around: list[bytes | memoryview] = [each.raw for each in self._model if each.number != GRAPH]
        if self._layers and not any(f.number == OPSETS and MICROSOFT.encode() in bytes(f.raw) for f in self._model):
            around.append(field(OPSETS, field(1, MICROSOFT) + field(2, 1)))
        kept = [name for name, each in self._holders.items() if each.outside and name not in self._replaced]
        if kept and path.resolve().parent != self._path.resolve().parent:
            raise ValueError(
                f"{path}: expected to stand beside {self._path}, as {len(kept)} of its weights are in another file "
                f"there, {kept[0]} among them; write to {self._path.parent / path.name}, or save the model as one file"
            )
        if inner + sum(map(len, around)) >= _MOST:
            raise ValueError(f"expected a model below 2 GiB, as protobuf holds, got {inner:,} bytes; use fewer bits")
        with replacing(path) as file:
            for piece in (*around, opened(GRAPH, inner), *pieces):
                file.write(piece)
            for name, array in arrays:
                file.write(heads[name])
                file.write(flat(np.ascontiguousarray(array)).data)
        return ()

    def _products(self, name: str) -> list[Node]:
        """The products that a weight is used in.

        Raises:
            ValueError: none, or other uses.
        """
        used = [each for each in self._nodes if name in each.inputs or name in each.inner]
        for each in used:
            if not is_product(each, name):
                raise ValueError(
                    f"expected {name!r} to be used in products x W alone, got {each.op} too; leave this leaf out of "
                    "the rules, or make it dense"
                )
        if not used:
            raise ValueError(f"expected {name!r} to be used in a product, got no use; leave it out: Name(.., None)")
        return used

    def _check_products(self, item: Item, name: str) -> str:
        """The dtype of the scales of codes, which products take in the place of a weight.

        Raises:
            ValueError: other uses, or other axes or numbers in the model.
        """
        assert isinstance(item.value, Codes)
        kind = kind_of(item.value, item.rule.layout)
        for each in self._products(name):
            self._fitting(name, *((kind.outputs, kind.inputs) if is_turned(each) else (kind.inputs, kind.outputs)))
        return self._scales(name)

    def _fitting(self, name: str, *shape: int) -> tuple[int, ...]:
        """A shape, as the model has it.

        Raises:
            ValueError: it has another.
        """
        wanted = self._holders[name].shape
        if wanted is not None and tuple(w or n for w, n in zip(wanted, shape, strict=False)) != shape:
            raise ValueError(
                f"expected the shape {list(wanted)}, as {name!r} has in the model, got {list(shape)}; correct the "
                "name, or its layout="
            )
        return shape

    def _type(self, name: str, other: str) -> str:
        """The dtype in the model; another if it says none.

        Raises:
            ValueError: one that numpy does not have.
        """
        number = self._holders[name].type
        known = {0: other} | {number: dtype for dtype, number in _TYPES.items()}
        if number not in known:
            raise ValueError(
                f"expected one of {', '.join(_TYPES)} in the model, got type {number}; leave this leaf out"
            )
        return known[number]

    def _scales(self, name: str) -> str:
        dtype = self._type(name, "float32")
        if dtype not in _SCALES:
            raise ValueError(f"expected a weight of {', '.join(_SCALES)} in the model, got {dtype}; write it so")
        return dtype

    def _dtype(self, item: Item) -> str:
        """That of an array in the model: floating-point ones become what is there.

        Raises:
            ValueError: numbers of another kind, or such as the format does not have.
        """
        dtype = str(item.value.dtype)
        made = self._type(self._name(item), "float32" if dtype == "bfloat16" else dtype)
        floats = all(jnp.issubdtype(each, jnp.floating) for each in (dtype, made))
        if made not in _TYPES or (dtype != made and not floats):
            raise ValueError(f"expected {made if dtype in _TYPES else ', '.join(_TYPES)}, got {dtype}; make it another")
        return made

    def _first_nodes(self) -> list[bytes | memoryview]:
        """Nodes that go before those of the model."""
        return []

    def _entry(self, entry: Field) -> Iterator[bytes | memoryview]:
        """What takes the place of an entry of the graph."""
        if entry.number in (INITIALIZER, INPUT) and name_of(entry) in self._replaced:
            return
        if entry.number == NODE and not isinstance(entry.value, int):
            old = node_of(entry.value)
            if old.inputs[1:2] and (layer := self._layers.get(old.inputs[1])) is not None:
                bias = old.inputs[2:3] if old.op == "Gemm" and old.inputs[2:3] != ("",) else ()
                out = (f"{old.outputs[0]}_product",) if bias else old.outputs
                yield node("MatMulNBits", (old.inputs[0], *layer[0]), out, MICROSOFT, **layer[1])
                if bias:
                    yield node("Add", (*out, *bias), old.outputs)
                return
        yield entry.raw

    def _name(self, item: Item) -> str:
        if item.name not in self._known:
            raise ValueError(
                f"expected the name of an initializer or input of the model, got {item.name!r}; these are "
                f"{', '.join(list(self._known)[:6])}; say lcq.io.Name({item.path!r}, 'NAME', layout='io')"
            )
        return self._known[item.name]


def declared(dtype: str, *shape: int) -> Tensor:
    return Tensor(shape, dtype, math.prod(shape) * np.dtype(dtype).itemsize)


def block_length(group: int, inputs: int) -> int:
    """The blocks that groups are cut into: powers of 2 from 16; of a channel 128, the last one filled.

    Raises:
        ValueError: groups that cannot be.

    Example:
        >>> block_length(96, 192), block_length(100, 100)
        (32, 128)
    """
    if group == inputs:
        return 128
    length = group & -group
    if length < 16:
        raise ValueError(
            f"expected groups that are multiples of 16, or a scale for each output, got groups of {group}; compress "
            "with per=32 or per='channel'"
        )
    return length


def _each_block(numbers: Shaped[np.ndarray, "out groups"], group: int, length: int, blocks: int) -> np.ndarray:
    """One for each block of the numbers of groups; of a channel all the same."""
    many = blocks if numbers.shape[1] == 1 else group // length
    return np.repeat(numbers, many, axis=1)


def packed_bytes(codes: UInt[np.ndarray, "rows n"], bits: int) -> UInt8[np.ndarray, "rows bytes"]:
    """Codes of 2, 4 or 8 bits in bytes, the first in the lowest bits; rows are filled to whole bytes."""
    rows, n = codes.shape
    each = 8 // bits
    wide = np.pad(codes, ((0, 0), (0, -n % each)))
    words = bitpack.pack(np.pad(wide.reshape(-1), (0, -wide.size * bits % 32 // bits)), bits)
    return words.view(np.uint8)[: wide.size // each].reshape(rows, wide.shape[1] // each)


def _tensor_head(name: str, each: Tensor) -> bytes:
    """An initializer up to its bytes."""
    said = b"".join(field(1, n) for n in each.shape) + field(2, (_TYPES | _SMALL)[each.kind]) + field(8, name)
    body = said + opened(9, each.size)
    return opened(INITIALIZER, len(body) + each.size) + body
