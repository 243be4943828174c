"""`Report`: what an export wrote, and what it changed."""

from collections.abc import Iterator
from typing import NamedTuple


class Row(NamedTuple):
    """One tensor of another program's file.

    Attributes:
        leaf: the path of the leaf that it is of.
        name: in the file.
        what: as what it went out, such as "int4 in groups of 32".
        bytes: that it takes, its scales included.
        error: how far its weights moved, ||w' - w|| / ||w||; 0 where nothing changed.
        why: what moved them.
    """

    leaf: str
    name: str
    what: str
    bytes: int
    error: float = 0.0
    why: str = ""


class Report(NamedTuple):
    """What an export wrote; prints as a table.

    Attributes:
        path: of the file or folder.
        rows: a row for each tensor, in their order.
        notes: what else whoever reads the file should know.
    """

    path: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(row.bytes for row in self.rows)

    @property
    def changed(self) -> tuple[Row, ...]:
        """The rows of what is not exactly as it was."""
        return tuple(row for row in self.rows if row.error)

    def cells(self) -> Iterator[tuple[str, ...]]:
        """The text of each row."""
        for row in self.rows:
            error = f"{row.error:.1e}" if row.error else "exact"
            yield row.leaf, row.name, row.what, f"{row.bytes:,}", error, row.why

    def __str__(self) -> str:
        lines = [("leaf", "tensor", "as", "bytes", "error", "because of"), *self.cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        return "\n".join([*text, *self.notes])
