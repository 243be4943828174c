"""How other programs lay codes in bytes: a pair of pack and unpack each, in numpy alone."""

from lcq.io.layouts.gguf_blocks import BLOCK_TYPES, Blocks, BlockType
from lcq.io.layouts.gguf_header import TENSOR_DTYPES, TENSOR_TYPES, gguf_header
from lcq.io.layouts.gguf_superblocks import SUPERBLOCK_TYPES, SuperBlockType
from lcq.io.layouts.int32_rows import pack_rows, unpack_rows

__all__ = [
    "BLOCK_TYPES",
    "SUPERBLOCK_TYPES",
    "TENSOR_DTYPES",
    "TENSOR_TYPES",
    "BlockType",
    "Blocks",
    "SuperBlockType",
    "gguf_header",
    "pack_rows",
    "unpack_rows",
]


def __dir__() -> list[str]:
    return sorted(__all__)
