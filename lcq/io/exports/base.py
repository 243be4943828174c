"""`ExportFormat`: one kind of file that another program reads; and the registry of all."""

import abc
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Shaped

from lcq.forms.registry import Registry
from lcq.io.container import Json
from lcq.io.exports.leaves import Item
from lcq.io.exports.names import TORCH, Name
from lcq.io.facts import Facts, facts_of


class Tensor(NamedTuple):
    """An array of another program's file before its bytes are there.

    Attributes:
        shape: of the array.
        kind: its dtype, as numpy or the format calls it.
        size: in bytes.
    """

    shape: tuple[int, ...]
    kind: str
    size: int


class Encoded(NamedTuple):
    """What an item became.

    Attributes:
        arrays: by name, as they were declared.
        what: as what it went out, in a few words.
        error: how far that moved its weights, ||w' - w|| / ||w||.
        why: what moved them.
    """

    arrays: dict[str, Shaped[np.ndarray, "..."]]
    what: str
    error: float = 0.0
    why: str = ""


class ExportFormat(abc.ABC):
    """One kind of file that another program reads, written by numpy alone.

    A subclass is one file, registered by `EXPORT_FORMATS.register(name)`; `export` and the command line then know it.
    An object of it writes one file: `declare` is called for every item, with shape structs for arrays; then `write`,
    which reads the arrays of one item after another.

    Attributes:
        suffix: how names of its files end; "" for folders.
        names: what leaves are called where the user does not say it.
    """

    suffix: ClassVar[str]
    names: ClassVar[Sequence[Name]] = TORCH

    def __init__(self, config: Mapping[str, Json]) -> None:
        self.config = config

    @classmethod
    def facts(cls) -> Facts:
        """What the documentation says of it; see `lcq.io.facts`."""
        return facts_of(cls, cls.suffix)

    def take_tokenizer(self, path: Path) -> None:
        """Has a tokenizer go with the weights.

        Args:
            path: of a tokenizer.json, or its folder.

        Raises:
            ValueError: one that the format cannot hold; or, as here, a format without a place for one.
        """
        raise ValueError(f"{path}: expected a format that has a place for a tokenizer, got another; leave it out")

    @abc.abstractmethod
    def declare(self, item: Item) -> dict[str, Tensor]:
        """The arrays that an item will be, by name.

        Raises:
            ValueError: what the format cannot hold; the leaf's path is put before it.
        """

    @abc.abstractmethod
    def encode(self, item: Item) -> Encoded:
        """The same arrays.

        Raises:
            ValueError: likewise, for what only the numbers tell.
        """

    @abc.abstractmethod
    def write(
        self, path: Path, tensors: dict[str, Tensor], arrays: Iterator[tuple[str, Shaped[np.ndarray, "..."]]]
    ) -> Sequence[str]:
        """Writes the file or folder, whole or not at all.

        Args:
            path: of it.
            tensors: all that were declared, in order.
            arrays: those, in the same order, one read after another.

        Returns:
            What else the reader of the file should know.
        """


EXPORT_FORMATS: Registry[type[ExportFormat]] = Registry("export formats")
"""What other programs read, by name."""
