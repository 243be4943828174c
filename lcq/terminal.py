"""What a command says: tables on stdout, a bar of progress on stderr."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lcq.report import text


def show(renderable: Any) -> None:
    """In colour and as wide as the terminal; as plain text, never cut, where there is none."""
    console = Console()
    if console.is_terminal:
        console.print(renderable)
    else:
        print(text(renderable))


@contextlib.contextmanager
def progress(total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar on stderr while the block runs, if that is a terminal.

    Call what it gives with a label ("" keeps the last), the steps made, and the total if it was not known before.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def advance(label: str, steps: int, total: int | None = None) -> None:
            bar.update(task, advance=steps, description=label or None, total=total)

        yield advance


def refuse(force: bool, *paths: Path) -> None:
    """Raises unless nothing would be replaced, or that is what was asked for."""
    if not force and (there := [str(path) for path in paths if path.exists() or path.is_symlink()]):
        raise ValueError(f"{', '.join(there)}: already there; choose another name, or replace it with --force")
