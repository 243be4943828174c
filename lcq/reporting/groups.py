"""Leaves that differ only in a number, such as those of repeated blocks, as one line."""

import math
import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

from lcq.reporting.row import Row

WHOLE = 24
"""Up to this many lines nothing is grouped: they fit on a screen."""
_NUMBER = "[0-9]{1,18}"
_AMOUNT = f"{_NUMBER}(?:,[0-9]{{3}})*"
_RUNS = 3


class Group(NamedTuple):
    """Leaves alike in all but the numbers of their paths; or one leaf alone.

    Attributes:
        rows: The leaves, in the order of the tree.
    """

    rows: tuple[Row, ...]

    @property
    def row(self) -> Row:
        """All of them in one row: sizes and errors are sums, the shape is that of each."""
        if len(self.rows) == 1:
            return self.rows[0]
        first = self.rows[0]
        return first._replace(
            path=pattern([row.path for row in self.rows]),
            form=_ranges([row.form for row in self.rows]),
            rule=None if first.rule is None else pattern([row.rule or "" for row in self.rows]),
            dense=sum(row.dense for row in self.rows),
            bits=sum(row.bits for row in self.rows),
            entropy=sum_or_none(row.entropy for row in self.rows),
            coded=sum_or_none(row.coded for row in self.rows),
            error=sum_or_none(row.error for row in self.rows),
            energy=sum_or_none(row.energy for row in self.rows),
        )


def grouped(rows: Sequence[Row]) -> tuple[Group, ...]:
    """Rows of one shape, dtype and kind of form whose paths differ only in numbers together, in the order of the first.

    Example:
        >>> rows = [Row(f"layer{i}/{name}", (3,), "array float32", 96, 96) for i in range(6) for name in ("a", "b")]
        >>> [(group.row.path, len(group.rows), group.row.bits) for group in grouped(rows)]
        [('layer0..5/a', 6, 576), ('layer0..5/b', 6, 576)]
    """
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        kind, _, more = row.form.partition(", ")
        words = (_skeleton(row.path), _skeleton(more, _AMOUNT), row.rule is not None and _skeleton(row.rule))
        same = (kind, row.scheme, row.shape, row.blocks, row.dtype, row.compressed)
        groups.setdefault((words, same), []).append(row)
    return tuple(Group(tuple(alike)) for alike in groups.values())


def pattern(paths: Sequence[str]) -> str:
    """Paths that differ only in numbers as one, with the numbers there are; of many runs only the first and last.

    Example:
        >>> pattern(["layer0/w", "layer1/w", "layer2/w"]), pattern(["a_01", "a_02", "a_07"]), pattern(["head"])
        ('layer0..2/w', 'a_01..02,07', 'head')
    """
    return _merged(paths, _NUMBER, _runs)


def by_pattern(paths: Iterable[str]) -> dict[str, list[str]]:
    """Paths under the pattern of those that differ only in numbers."""
    groups: dict[Hashable, list[str]] = {}
    for path in paths:
        groups.setdefault(_skeleton(path), []).append(path)
    return {pattern(alike): alike for alike in groups.values()}


def sum_or_none(numbers: Iterable[Any]) -> Any:
    """The sum, or None if one of them is None."""
    numbers = list(numbers)
    if None in numbers:
        return None
    return sum(numbers) if all(isinstance(number, int) for number in numbers) else math.fsum(numbers)


def _skeleton(words: str, number: str = _NUMBER) -> tuple[str, ...]:
    """What is between the numbers."""
    return tuple(re.split(number, words))


def _ranges(forms: Sequence[str]) -> str:
    """Descriptions that differ only in numbers as one, with the least and the largest of each."""
    return _merged(forms, _AMOUNT, lambda numbers: f"{numbers[0]}..{numbers[-1]}")


def _merged(words: Sequence[str], number: str, join: Callable[[list[str]], str]) -> str:
    """Words of one skeleton; different numbers at one place are joined, ascending."""
    parts = zip(*(re.split(f"({number})", each) for each in words), strict=True)
    merged = []
    for part in parts:
        different = (
            sorted(set(part), key=lambda digits: (int(digits.replace(",", "")), digits)) if len(set(part)) > 1 else None
        )
        merged.append(part[0] if different is None else join(different))
    return "".join(merged)


def _runs(numbers: Sequence[str]) -> str:
    runs: list[list[str]] = []
    for number in numbers:
        if runs and int(number) == int(runs[-1][-1]) + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    if len(runs) > _RUNS:
        return f"{numbers[0]}..{numbers[-1]}"
    return ",".join(run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)
