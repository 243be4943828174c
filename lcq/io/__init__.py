"""Files: the .lcq format, and checkpoints of other tools."""

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
from lcq.io.file import ArtifactError, load, save

__all__ = [
    "CHECKPOINT_FORMATS",
    "CODECS",
    "ArtifactError",
    "Checkpoint",
    "CheckpointFormat",
    "Codec",
    "GgufField",
    "GgufFile",
    "GgufTensor",
    "Stream",
    "from_qwix",
    "load",
    "nested",
    "open_gguf",
    "read",
    "read_checkpoint",
    "save",
    "write",
]


def __dir__() -> list[str]:
    return sorted(__all__)
