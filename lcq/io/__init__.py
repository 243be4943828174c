"""Files: the .lcq format, and checkpoints of other tools."""

from lcq.io.checkpoints import read, write
from lcq.io.file import ArtifactError, load, save

__all__ = ["ArtifactError", "load", "read", "save", "write"]
