"""Checkpoints of other tools, in and out: one format a file, which registers itself when it is imported here."""

from lcq.io.checkpoints import gguf as gguf
from lcq.io.checkpoints import keras as keras
from lcq.io.checkpoints import npz as npz
from lcq.io.checkpoints import orbax as orbax
from lcq.io.checkpoints import safetensors as safetensors
from lcq.io.checkpoints.base import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested
from lcq.io.checkpoints.checkpoint import read, read_checkpoint, write
from lcq.io.checkpoints.gguf_file import GgufField, GgufFile, GgufTensor, open_gguf
from lcq.io.checkpoints.qarrays import from_qwix

__all__ = [
    "CHECKPOINT_FORMATS",
    "Checkpoint",
    "CheckpointFormat",
    "GgufField",
    "GgufFile",
    "GgufTensor",
    "from_qwix",
    "nested",
    "open_gguf",
    "read",
    "read_checkpoint",
    "write",
]


def __dir__() -> list[str]:
    return sorted(__all__)
