"""Text in columns that fits a width: names are broken at "/", "_" and spaces only."""

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import rich.table
from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

_FLOORS = {"leaf": 20}
_FLOOR = 12
"""Columns of text are folded down to this width before one is left out."""


class Column(NamedTuple):
    """A column of a table of text.

    Attributes:
        header: Its name.
        cells: One for each line.
        number: Whether it is of numbers: to the right, and never folded.
    """

    header: str
    cells: tuple[str, ...]
    number: bool = False


def terminal_width() -> int:
    """Columns of the terminal, or what the environment says by COLUMNS; 100 where there is none."""
    return shutil.get_terminal_size((100, 24)).columns


def fold(words: str, width: int) -> str:
    """Words in lines of at most `width`, broken after "/", "_" or a space; a longer word keeps a line of its own.

    Example:
        >>> fold("layer0..5/attention_norm/scale", 20).split(chr(10))
        ['layer0..5/attention_', 'norm/scale']
    """
    lines = [""]
    for piece in _pieces(words):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def fit(columns: Sequence[Column], width: int, spare: Sequence[str] = ()) -> tuple[list[Column], list[str], int]:
    """Columns folded to a width, without those of `spare`, in that order, for which there is no room.

    Args:
        columns: As wide as they like.
        width: Of all of them with the spaces between.
        spare: Headers of what may be left out, the first to go first.

    Returns:
        The columns that are left, folded; the headers of the others; the space.
    """
    for space in (3, 2):
        if sum(map(_width, columns)) + space * (len(columns) - 1) <= width:
            return list(columns), [], space
    for many in range(len(spare) + 2):  # in the last round nothing more is left out, and nothing holds a floor
        left = [column for column in columns if column.header not in spare[:many]]
        room = width - 2 * (len(left) - 1)
        widths = _shrunk(left, room, floor=many <= len(spare))
        if sum(widths) <= room:
            break
    out = [column.header for column in columns if column.header in spare[:many]]
    return [_folded(column, wide) for column, wide in zip(left, widths, strict=True)], out, 2


def grid(columns: Sequence[Column], space: int, footer: int) -> rich.table.Table:
    """A rich table, the last `footer` lines set apart in bold."""
    made = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, space - 2, 0, 1))
    for column in columns:
        side: Literal["left", "right"] = "right" if column.number else "left"
        made.add_column(column.header, justify=side, no_wrap=column.number, overflow="fold")
    lines = list(zip(*(column.cells for column in columns), strict=True))
    for number, (first, *others) in enumerate(lines, 1):
        bold = "bold" if number > len(lines) - footer else ""
        made.add_row(Text(first, "bold"), *map(Text, others), style=bold, end_section=number == len(lines) - footer)
    return made


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns that rich prints as wide as its console.

    Attributes:
        columns: All of the same length.
    """

    columns: Sequence[Column]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        fitting, _, space = fit(self.columns, options.max_width - 2)  # 2: the edges
        yield grid(fitting, space, 0)


def _pieces(words: str) -> list[str]:
    return re.findall(r"[^/_ ]*[/_ ]+|[^/_ ]+", words)


def _width(column: Column) -> int:
    return max(cell_len(line) for cell in (column.header, *column.cells) for line in cell.split("\n"))


def _shrunk(columns: Sequence[Column], room: int, *, floor: bool) -> list[int]:
    """Widths that sum to `room` if they can: columns of text give, the farthest above its floor first."""
    widths = [_width(_folded(column, 0) if column.number else column) for column in columns]
    floors = []
    for column, wide in zip(columns, widths, strict=True):
        least = _width(_folded(column, 0))
        floors.append(
            wide if column.number else max(least, min(wide, _FLOORS.get(column.header, _FLOOR)) if floor else 0)
        )
    while sum(widths) > room and widths != floors:
        widest = max((i for i, wide in enumerate(widths) if wide > floors[i]), key=lambda i: widths[i] - floors[i])
        widths[widest] -= 1
    return widths


def _folded(column: Column, width: int) -> Column:
    """The column with text folded; of numbers only the header."""
    cells = column.cells if column.number else tuple(fold(cell, width) for cell in column.cells)
    return column._replace(header=fold(column.header, width), cells=cells)
