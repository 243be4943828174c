"""What a command line names for `quantize`: a function in a module and batches in a file; and what it tells of them."""

import contextlib
import importlib
import operator
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import rich.table
from rich import box
from rich.text import Text

from lcq.io.checkpoints import checkpoint
from lcq.ptq.quantize import Quantized
from lcq.tree.aliases import Batch, Params
from lcq.tree.paths import flatten


@contextlib.contextmanager
def function_of(module: str, name: str) -> Iterator[Callable[[Any, Any], Any]]:
    """module:name, with the current folder first on the path; what it raises is said in one line, with the place."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ValueError(f"{module}: {error}, which it imports") from error
            raise ValueError(f"{module}: no such module, neither in {here} nor installed") from error
        except Exception as error:
            raise ValueError(f"{module}: {_words(error)}") from error
        try:
            function = operator.attrgetter(name)(found)
        except AttributeError as error:
            known = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
            raise ValueError(f"{module}: no {name!r} in it; it has {', '.join(known[:8]) or 'no function'}") from error
        if not callable(function):
            raise ValueError(f"{module}:{name}: expected a function of (params, batch), got {type(function).__name__}")

        def call(params: Params, batch: Batch) -> Any:
            try:
                return function(params, batch)
            except Exception as error:
                raise ValueError(f"{module}:{name}: {_words(error, getattr(found, '__file__', None))}") from error

        yield call
    finally:
        sys.path.remove(here)


def _words(error: Exception, file: str | None = None) -> str:
    """An error of the user's code: its kind, its first line, and where in the file it came from."""
    lines = str(error).strip().splitlines()
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}{where}"


def batches_of(path: Path, size: int, limit: int | None = None, mask: str | None = None) -> list[Any]:
    """Slices of the one array of a file, or of each of several; the last is shorter if the examples do not fill it.

    Args:
        path: of an .npz file, or another checkpoint of arrays; "/" in names makes nested dicts.
        size: examples in a batch.
        limit: take the first so many examples only.
        mask: the name of the array that says what positions of the others count; examples without one are left out.

    Raises:
        ValueError: no arrays, or of different lengths; no other array than the mask, none of its name, or one by which
            nothing counts.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/data.npz", tokens=np.arange(10).reshape(5, 2))
        ...     [batch.tolist() for batch in batches_of(Path(f"{folder}/data.npz"), 3)]
        [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9]]]
    """
    tree = checkpoint.read(path)
    arrays = flatten(tree)[0]
    many = {len(array) if array.ndim else 0 for array in arrays.values()}
    if len(many) != 1 or 0 in many:
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
        raise ValueError(
            f"{path}: expected arrays with equally many examples along their first axis, got {shapes or 'none'}"
        )
    if mask is not None and (mask not in arrays or len(arrays) == 1):
        raise ValueError(
            f"{path}: expected the inputs and the array {mask!r} that says which of their positions count, got "
            f"{', '.join(arrays)}; name it with mask="
        )
    (count,) = many
    count = min(count, limit or count)
    data = next(iter(arrays.values())) if len(arrays) == 1 else tree
    data = jax.tree.map(lambda a: a[:count], data)
    if mask is not None:
        counts = arrays[mask][:count].reshape(count, -1).any(axis=1)
        if not counts.all():
            data, count = jax.tree.map(lambda a: a[counts], data), int(counts.sum())
        if not count:
            raise ValueError(f"{path}: {mask}: expected a position that counts, got none; mark it by 1")
    return [jax.tree.map(lambda a, i=i: a[i : i + size], data) for i in range(0, count, size)]


def products_of(done: Quantized) -> rich.table.Table:
    """A line for each product that chose codes; on a narrow terminal words are wrapped, numbers never.

    The error is on the rows that chose the codes; "held out", on rows that did not, is what to expect on others.
    """
    grid = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("product", overflow="fold", style="bold")
    grid.add_column("GxMxNxn", overflow="fold")
    grid.add_column("how", overflow="fold")
    for name in ("levels", "bits", "error", "held out", "scale", "seconds"):
        grid.add_column(name, justify="right", no_wrap=True)
    for record in done.records:
        levels = record.levels
        corrected = ", bias corrected" if record.bias_correction else ""
        silent = f", no data in {len(record.silent)} of {record.shape[0]} groups" if record.silent else ""
        how = f"{record.method.partition('(')[0]}, {record.recursion}{corrected}{silent}"
        held_out = "" if record.held_out is None else f"{record.held_out:.2e}"
        words = [record.path, "x".join(map(str, record.shape)), how, str(levels), str((levels - 1).bit_length())]
        numbers = [f"{record.error:.2e}", held_out, f"{record.scale:.3g}", f"{record.seconds:.2f}"]
        grid.add_row(*map(Text, [*words, *numbers]))
    return grid
