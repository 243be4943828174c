"""Files: the .lcq format, and checkpoints of other tools."""

from lcq.io.checkpoints import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested, read, write
from lcq.io.codecs import CODECS, Codec, Stream
from lcq.io.file import ArtifactError, load, save

__all__ = [
    "CHECKPOINT_FORMATS",
    "CODECS",
    "ArtifactError",
    "Checkpoint",
    "CheckpointFormat",
    "Codec",
    "Stream",
    "load",
    "nested",
    "read",
    "save",
    "write",
]


def __dir__() -> list[str]:
    return sorted(__all__)
