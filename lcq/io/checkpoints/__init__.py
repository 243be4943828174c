"""Checkpoints of other tools, in and out: one format a file."""

from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested
from lcq.io.checkpoints.checkpoint import read, read_checkpoint, write

__all__ = ["CHECKPOINT_FORMATS", "Checkpoint", "CheckpointFormat", "nested", "read", "read_checkpoint", "write"]
