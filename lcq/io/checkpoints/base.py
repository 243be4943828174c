"""`CheckpointFormat`: one way in which other tools write parameters; and the registry of all."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from jaxtyping import PyTree

from lcq.forms.registry import Registry
from lcq.io.facts import Facts, facts_of
from lcq.io.tree_paths import Leaf, nest


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
        tree: nested dicts of numpy arrays, or of forms in place of some.
        metadata: strings by name, of a safetensors header or the fields of a GGUF file.
        layout: of its weights, as `lcq.Rule` has it, where the format says so: "oi", (outputs, inputs); None where it
            does not.
    """

    tree: PyTree
    metadata: dict[str, str]
    layout: str | None = None


class CheckpointFormat(abc.ABC):
    """One way in which other tools write parameters.

    A subclass is one file, registered by `CHECKPOINT_FORMATS.register(name)`; `read`, `write` and the command line then
    know it.

    Attributes:
        suffix: how names of its files end, such as ".npz"; "" for folders.
        holds_metadata: whether strings by name can be written with the arrays.
        holds_empty: whether None and empty containers can be written.
        only_read: whether errors name it apart, as what cannot be written.

    Example:
        >>> import lcq, tempfile, numpy as np
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
    only_read: ClassVar[bool] = False

    @classmethod
    def facts(cls) -> Sequence[Facts]:
        """What the documentation says of it, a row for each kind of file; see `lcq.io.facts`."""
        return (facts_of(cls, cls.suffix),)

    def recognises(self, path: Path) -> bool:
        """Whether what is at `path`, which exists, is of this format."""
        return bool(self.suffix) and path.suffix == self.suffix

    @abc.abstractmethod
    def read(self, path: Path) -> Checkpoint:
        """What a checkpoint holds.

        Raises:
            ValueError: it is damaged, or holds what numpy cannot; names it.
        """

    def read_forms(self, path: Path) -> Checkpoint:
        """The same with forms, stored, for weights that are codes in the file; of a format without codes as `read`.

        Raises:
            ValueError: as `read`, and codes that no form holds.
        """
        return self.read(path)

    def read_lazily(self, path: Path) -> Checkpoint:
        """The same, each array an `lcq.io.MappedArray`.

        Raises:
            ValueError: as `read`; or, as here, a format whose arrays cannot be read a part at a time.
        """
        raise ValueError(
            f"{path}: expected .safetensors, whole or in shards, or .gguf for lazy=True, got another format; leave it "
            "out, or write it anew: lcq.io.write('net.safetensors', tree)"
        )

    def write(self, path: Path, leaves: list[Leaf], metadata: dict[str, str]) -> None:
        """Writes arrays of the host, by path, whole or not at all.

        Raises:
            ValueError: an array that the format cannot hold; names it. Or, as here, a format that is only read.
        """
        del leaves, metadata
        raise ValueError(f"{path}: expected a format that can be written, got one that is only read; choose another")


CHECKPOINT_FORMATS: Registry[type[CheckpointFormat]] = Registry("checkpoint formats")
"""How other tools write parameters; the newest that recognises a checkpoint reads it."""


def nested(path: Path, arrays: Mapping[str, Any]) -> PyTree:
    """Nested dicts of arrays, or forms, by name, "a/b" being b in a.

    Raises:
        ValueError: a name that is both an array and the dict of others.
    """
    leaves = [Leaf(tuple(name.split("/")), "d" * (name.count("/") + 1), array) for name, array in arrays.items()]
    try:
        return nest(leaves)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
