"""Checkpoints in .gguf files of llama.cpp: made dense, or with their codes as forms.

Forms have a scale, and of types with minima a zero, for each group. Of Q4_K and Q5_K these stay multiples of 6 bits,
`lcq.forms.steps`, where all blocks of a row share their units, as in files that `lcq.io.export` wrote; those of
llama.cpp have units of their own, and scales and zeros become float32.
"""

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lcq.forms import Codes
from lcq.forms.dtypes import native
from lcq.forms.steps import Steps, from_steps
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat
from lcq.io.checkpoints.gguf_file import GgufTensor, as_text, open_gguf
from lcq.io.facts import Facts
from lcq.io.layouts import BLOCK_TYPES, TENSOR_DTYPES, TENSOR_TYPES, Blocks, BlockType
from lcq.io.layouts.gguf_superblocks import SUPERBLOCK_TYPES, SuperBlockType
from lcq.io.mapped import MappedArray

PLAIN = {number: TENSOR_DTYPES[name] for name, number in TENSOR_TYPES.items()}
"""Types of numbers by what stands for them in a file."""

BLOCKS: dict[int, BlockType | SuperBlockType] = {
    **{block.number: block for block in BLOCK_TYPES.values()},
    **{block.number: block for block in SUPERBLOCK_TYPES.values()},
}
"""Types of blocks likewise."""

_STEPPED_GROUPS = 8
"""Of a block of Q4_K or Q5_K."""


@CHECKPOINT_FORMATS.register("gguf")
class Gguf(CheckpointFormat):
    """A file of llama.cpp: tensors under its names, weights (out, in), fields that are no arrays as metadata."""

    suffix = ".gguf"
    only_read = True

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        return (
            Facts(
                "`.gguf` of llama.cpp, versions 2 and 3",
                "F32, F16, BF16, F64 and integers as they are, blocks made dense in float32",
                ", ".join(block.name for block in BLOCKS.values()),
                "other types, such as IQ2 and NVFP4; big-endian files",
            ),
        )

    def read(self, path: Path) -> Checkpoint:
        return _read(path, _dense)

    def read_forms(self, path: Path) -> Checkpoint:
        return _read(path, _form)

    def read_lazily(self, path: Path) -> Checkpoint:
        return _read(path, functools.partial(_lazy, path))


class MappedBlocks:
    """A tensor of blocks in a file, made dense in float32 when it is asked for, a slice at a time, as `MappedArray`.

    Attributes:
        data: bytes of blocks, [.., blocks of a row, bytes of a block].
        block: their type.
        shape: of the tensor.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, data: MappedArray, block: BlockType | SuperBlockType, shape: tuple[int, ...]) -> None:
        self.data, self.block, self.shape = data, block, shape

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        given = index if isinstance(index, tuple) else (index,)
        simple = all(isinstance(each, int | np.integer | slice) for each in given)
        rows = given[: self.ndim - 1] if simple else ()
        data = self.data[rows]
        dense = self.block.values(self.block.unpack(data)).reshape(*data.shape[:-2], self.shape[-1])
        left = tuple(slice(None) for each in rows if isinstance(each, slice))
        return dense[(*left, *given[len(rows) :])]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("expected to copy what is read from a file, got copy=False; leave it out")
        return self[()].astype(dtype or self.dtype, copy=False)

    def __repr__(self) -> str:
        return f"MappedBlocks({self.data.path.name!r}, {self.block.name}{list(self.shape)})"


def _read(path: Path, leaf_of: Callable[[GgufTensor], Any]) -> Checkpoint:
    file = open_gguf(path)
    tree = {}
    for name, tensor in file.tensors.items():
        try:
            tree[name] = leaf_of(tensor)
        except ValueError as error:
            raise ValueError(f"{path}: {name[:200]}: {error}") from error
    texts = {name: as_text(field) for name, field in file.fields.items()}
    return Checkpoint(tree, {name: text for name, text in texts.items() if text is not None}, "oi")


def _dense(tensor: GgufTensor) -> np.ndarray:
    if tensor.type in PLAIN:
        return _numbers(tensor)
    block, data = _blocks(tensor)
    return block.values(block.unpack(data)).reshape(tensor.shape)


def _form(tensor: GgufTensor) -> Codes | np.ndarray:
    if tensor.type in PLAIN:
        return _numbers(tensor)
    block, data = _blocks(tensor)
    blocks = block.unpack(data)
    if isinstance(block, SuperBlockType) and blocks.minimum is not None and block.groups == _STEPPED_GROUPS:
        found = _form_in_steps(block, data, blocks.codes.reshape(tensor.shape))
        if found is not None:
            return found
    return form_of(blocks, block.levels, tensor.shape)


def _form_in_steps(block: SuperBlockType, data: np.ndarray, codes: np.ndarray) -> Codes | None:
    """The stored form of blocks of Q4_K or Q5_K with their scales in steps; None where no such form has the same."""
    scale, least, units = block.steps(data)
    if not (units == units[..., :1]).all():
        return None
    wide = units[..., :1].astype(np.float32)
    scale, least = (a.reshape(*a.shape[:-2], -1) for a in (scale, least))
    for whole, unit in zip((scale, least), wide, strict=True):
        filled, empty = (unit > 0) & (whole.max(-1, keepdims=True) == 63), (unit == 0) & ~whole.any(-1, keepdims=True)
        if not (filled | empty).all():
            return None  # other units would be found in the numbers
    if ((scale == 0) & (least > 0)).any():
        return None
    scale, zero = map(np.asarray, from_steps(Steps(scale, least, wide)))
    return Codes(codes, scale=scale, zero=zero, values=block.levels, scale_bits=6, along=(-1,)).pack()


def _lazy(path: Path, tensor: GgufTensor) -> MappedArray | MappedBlocks:
    if tensor.type in PLAIN:
        found = _numbers(tensor)
        return MappedArray(path, tensor.shape, found.dtype, tensor.begin)
    block, data = _blocks(tensor)
    return MappedBlocks(MappedArray(path, data.shape, np.uint8, tensor.begin), block, tensor.shape)


def _numbers(tensor: GgufTensor) -> np.ndarray:
    dtype = PLAIN[tensor.type]
    data = _bytes(tensor, math.prod(tensor.shape) * dtype.itemsize)
    return native(data.view(_little(dtype)).reshape(tensor.shape))


def _blocks(tensor: GgufTensor) -> tuple[BlockType | SuperBlockType, np.ndarray]:
    """The type of a tensor's blocks, and their bytes, [.., blocks of a row, bytes of a block]."""
    shape, kind = tensor.shape, tensor.type
    if kind not in BLOCKS:
        known = ", ".join(block.name for block in BLOCKS.values())
        raise ValueError(
            f"expected a type of numbers, or one of {known}, got the type {kind}; write it again in one of these, "
            "with llama-quantize --allow-requantize"
        )
    block = BLOCKS[kind]
    if not shape or shape[-1] % block.length:
        raise ValueError(f"expected rows of blocks of {block.length} for {block.name}, got the shape {list(shape)}")
    rows = (*shape[:-1], shape[-1] // block.length)
    return block, _bytes(tensor, math.prod(rows) * block.size).reshape(*rows, block.size)


def _little(dtype: np.dtype) -> np.dtype:
    """As the file has it; numpy's own dtypes know an order of bytes, bfloat16 does not."""
    return dtype.newbyteorder("<") if dtype.type.__module__ == "numpy" else dtype


def _bytes(tensor: GgufTensor, size: int) -> np.ndarray:
    if size > tensor.data.size:
        raise ValueError(f"expected {size} bytes before the next tensor or the end, got {tensor.data.size}")
    return np.ascontiguousarray(tensor.data[:size])


def form_of(blocks: Blocks, levels: tuple[float, ...], shape: tuple[int, ...]) -> Codes:
    """The form of a tensor's blocks, stored: Delta = scale (level - zero), zero = -minimum / scale in float32.

    Where a scale is 0 and the minimum is not, a block is a constant: it gets the minimum as its scale, and codes of 0.

    Args:
        blocks: along the last axis of the tensor.
        levels: of its type.
        shape: of the tensor.

    Example:
        >>> one = np.ones((1, 1), np.float16)
        >>> blocks = Blocks(np.full((1, 1, 32), 3, np.uint8), one, one / 2)
        >>> float(form_of(blocks, tuple(map(float, range(16))), (1, 32)).dense()[0, 0])
        3.5
    """
    codes, scale, zero = blocks.codes.reshape(shape), blocks.scale.reshape(*shape[:-1], -1), None
    if blocks.minimum is not None:
        minimum = blocks.minimum.astype(np.float32).reshape(scale.shape)
        flat = (scale == 0) & (minimum != 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(scale == 0, np.float32(0), -minimum / scale.astype(np.float32))
        if flat.any():
            scale, zero = np.where(flat, minimum.astype(scale.dtype), scale), np.where(flat, np.float32(-1), zero)
            spread = np.repeat(flat, shape[-1] // scale.shape[-1], axis=-1)
            codes = np.where(spread, np.uint8(0), codes)
    return Codes(codes, scale=scale, zero=zero, values=levels).pack()
