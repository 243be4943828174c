"""Checkpoints of other tools, in and out."""

from lcq.io.checkpoints.checkpoint import read, write

__all__ = ["read", "write"]
