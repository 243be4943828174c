"""`CheckpointFormat`: one way in which other tools write parameters; and the registry of all."""

import abc
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import PyTree

from lcq.forms.registry import Registry
from lcq.io.tree_paths import Leaf, nest


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tree: nested dicts of numpy arrays.
        metadata: strings by name, of a safetensors header.
    """

    tree: PyTree
    metadata: dict[str, str]


class CheckpointFormat(abc.ABC):
    """One way in which other tools write parameters.

    A subclass is one file, registered by `CHECKPOINT_FORMATS.register(name)`; `read`, `write` and the command line then
    know it.

    Attributes:
        suffix: how names of its files end, such as ".npz"; "" for folders.
        holds_metadata: whether strings by name can be written with the arrays.
        holds_empty: whether None and empty containers can be written.

    Example:
        >>> import lcq, tempfile
        >>> @CHECKPOINT_FORMATS.register("npy")
        ... class Npy(CheckpointFormat):
        ...     suffix = ".npy"
        ...     def read(self, path):
        ...         return Checkpoint(nested(path, {"w": np.load(path)}), {})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/net.npy", np.ones(2))
        ...     lcq.io.read(f"{folder}/net.npy")
        {'w': array([1., 1.])}
        >>> CHECKPOINT_FORMATS.unregister("npy")
    """

    suffix: ClassVar[str]
    holds_metadata: ClassVar[bool] = False
    holds_empty: ClassVar[bool] = False

    def recognises(self, path: Path) -> bool:
        """Whether what is at `path`, which exists, is of this format."""
        return bool(self.suffix) and path.suffix == self.suffix

    @abc.abstractmethod
    def read(self, path: Path) -> Checkpoint:
        """What a checkpoint holds.

        Raises:
            ValueError: it is damaged, or holds what numpy cannot; names it.
        """

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        """Writes arrays of the host, by path, whole or not at all.

        Raises:
            ValueError: an array that the format cannot hold; names it. Or, as here, a format that is only read.
        """
        del leaves, metadata
        raise ValueError(f"{path}: expected a format that can be written, got one that is only read; choose another")


CHECKPOINT_FORMATS: Registry[type[CheckpointFormat]] = Registry("checkpoint formats")
"""How other tools write parameters; the newest that recognises a checkpoint reads it."""


def nested(path: Path, arrays: dict[str, np.ndarray]) -> PyTree:
    """Nested dicts of arrays by name, "a/b" being b in a.

    Raises:
        ValueError: a name that is both an array and the dict of others.
    """
    leaves = [Leaf(tuple(name.split("/")), "d" * (name.count("/") + 1), array) for name, array in arrays.items()]
    try:
        return nest(leaves)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
