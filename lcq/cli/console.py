"""What a command says: tables on stdout, progress on stderr."""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lcq.reporting.summary import text

_SECONDS = 60.0
"""Between two lines of progress where there is no terminal."""


def show(renderable: Any) -> None:
    """In colour and as wide as the terminal; where there is none as plain text, tables of leaves as they print."""
    console = Console()
    if console.is_terminal:
        console.print(renderable)
    else:
        print(text(renderable))


@contextlib.contextmanager
def progress(total: int | None = None, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[..., None]]:
    """How far the block is, on stderr: a bar, or where that is no terminal, a line every minute.

    Call what it gives with a label ("" keeps the last), the steps made, and the total if it was not known before.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(total, clock).advance
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)

        def advance(label: str, steps: int, total: int | None = None) -> None:
            bar.update(task, advance=steps, description=label or None, total=total)

        yield advance


class _Lines:
    """Progress in lines for a log; nothing of what takes less than a minute."""

    def __init__(self, total: int | None, clock: Callable[[], float]) -> None:
        self._total, self._clock = total, clock
        self._label, self._steps = "", 0
        self._start = self._last = clock()

    def advance(self, label: str, steps: int, total: int | None = None) -> None:
        self._label, self._steps = label or self._label, self._steps + steps
        self._total = total or self._total
        now = self._clock()
        if now - self._last >= _SECONDS:
            self._last = now
            done = f"{self._steps:,}" if self._total is None else f"{self._steps:,} of {self._total:,}"
            print(f"{self._label}: {done}, {now - self._start:.0f} s", file=sys.stderr, flush=True)


def refuse(force: bool, *paths: Path) -> None:
    """Raises unless nothing would be replaced, or that is what was asked for."""
    if not force and (there := [str(path) for path in paths if path.exists() or path.is_symlink()]):
        raise ValueError(f"{', '.join(there)}: already there; choose another name, or replace it with --force")


def check_output(out: Path, *inputs: Path, folder: bool = False) -> None:
    """Raises unless a file can be written at `out`; made before the work, which may take long.

    Args:
        out: of the file.
        inputs: what is read, and must not be replaced.
        folder: whether `out` may be a folder that is there.

    Raises:
        ValueError: there is no folder for it, that cannot be written to, a folder has its name, or it is an input.
    """
    for given in inputs:
        if out.exists() and given.exists() and os.path.samefile(out, given):
            raise ValueError(f"{out}: expected another file than the input; choose another name")
    if out.is_dir() and not folder:
        raise ValueError(f"{out}: expected the name of a file, got a folder; name a file in it")
    parent = Path(os.path.realpath(out)).parent
    if not parent.is_dir():
        raise ValueError(f"{out.parent}: no such folder; make it, or choose another name")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ValueError(f"{out.parent}: cannot write there: {error.strerror}; choose another folder") from error
