"""Files: the .lcq format, checkpoints of other tools, and files that other programs run."""

from lcq.io.checkpoints import (
    CHECKPOINT_FORMATS,
    Checkpoint,
    CheckpointFormat,
    GgufField,
    GgufFile,
    GgufTensor,
    from_qwix,
    nested,
    open_gguf,
    read,
    read_checkpoint,
    write,
)
from lcq.io.codecs import CODECS, Codec, Stream
from lcq.io.compressing import compress_to
from lcq.io.exports import (
    EXPORT_FORMATS,
    Encoded,
    ExportFormat,
    Item,
    Name,
    Report,
    Tensor,
    export,
    llama_names,
    to_qwix,
)
from lcq.io.file import ArtifactError, load
from lcq.io.mapped import MappedArray
from lcq.io.saving import save

__all__ = [
    "CHECKPOINT_FORMATS",
    "CODECS",
    "EXPORT_FORMATS",
    "ArtifactError",
    "Checkpoint",
    "CheckpointFormat",
    "Codec",
    "Encoded",
    "ExportFormat",
    "GgufField",
    "GgufFile",
    "GgufTensor",
    "Item",
    "MappedArray",
    "Name",
    "Report",
    "Stream",
    "Tensor",
    "compress_to",
    "export",
    "from_qwix",
    "llama_names",
    "load",
    "nested",
    "open_gguf",
    "read",
    "read_checkpoint",
    "save",
    "to_qwix",
    "write",
]


def __dir__() -> list[str]:
    return sorted(__all__)
