"""Files: the .lcq format, and checkpoints of other tools."""

from lcq.io.checkpoints import read, write
from lcq.io.codecs import CODECS, Codec, Stream
from lcq.io.file import ArtifactError, load, save

__all__ = ["CODECS", "ArtifactError", "Codec", "Stream", "load", "read", "save", "write"]
