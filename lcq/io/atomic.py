"""Files that appear whole or not at all: written beside their place, synced, and renamed."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place of `path` when the block ends, and vanishes if the block fails."""
    check_folder(path)
    target = os.path.realpath(path)
    temporary = temporary_beside(target)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(os.path.dirname(target))


def temporary_beside(target: str) -> str:
    """The name of a file beside another, that is nobody's."""
    return f"{target}.{secrets.token_hex(6)}.tmp"


def sync_folder(folder: str) -> None:
    """Makes renamings last too, where a folder can be opened."""
    if hasattr(os, "O_DIRECTORY"):
        opened = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def check_path(path: object, call: str) -> None:
    """Refuses what is no name of a file, such as a tree in its place."""
    if not isinstance(path, str | bytes | os.PathLike):
        raise ValueError(f"expected the name of a file first, got {type(path).__name__}; the order is {call}")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raises unless the folder of a file is there."""
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise FileNotFoundError(errno.ENOENT, "no such folder; make it, or choose another name", folder)
