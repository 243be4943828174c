"""lcq inspect and lcq table: what an .lcq file is made of, and what its leaves cost."""

import math
from pathlib import Path

import rich.table
from rich import box
from rich.text import Text
from safetensors import safe_open

import lcq
from lcq.artifact import checkpoint
from lcq.artifact.file import DTYPES, read_plan_text
from lcq.page import write_page
from lcq.report import table
from lcq.terminal import refuse, show


def inspect_file(path: Path) -> None:
    """Prints a file's make-up: format, header, tensors, and the plan if it holds one; every digest is checked.

    Raises:
        ArtifactError: not an lcq file, or a damaged one.
    """
    lcq.load(path)
    grid = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("tensor", overflow="fold", style="bold")
    for name in ("dtype", "shape", "bytes"):
        grid.add_column(name, justify="right", no_wrap=True)
    held = 0
    with safe_open(path, "numpy") as file:
        metadata, names = file.metadata(), list(file.keys())
        for name in names:
            tensor = file.get_slice(name)
            shape, dtype = tensor.get_shape(), tensor.get_dtype()
            size = math.prod(shape) * DTYPES[dtype].itemsize
            grid.add_row(*map(Text, (name, dtype, "x".join(map(str, shape)), f"{size:,}")))
            held += size
    size = path.stat().st_size
    print(f"{path}: format {metadata['format']} {metadata['version']}, {len(names)} tensors")
    print(f"{size:,} bytes: {held:,} of tensors, {size - held:,} of header")
    show(grid)
    if read_plan_text(path) is not None:
        print(f"plan:\n\n{lcq.read_plan(path)}")


def table_of_file(path: Path, reference: Path | None = None, page: Path | None = None, *, force: bool = False) -> None:
    """Prints what each leaf of a file costs and, with a reference, how far it is from that; writes both as a page.

    Args:
        path: of the .lcq file.
        reference: a checkpoint with the same leaves, or another .lcq file.
        page: of the HTML file to write, if any.
        force: whether that may be replaced.

    Raises:
        ValueError: files that are not what they should be, a reference with other leaves or shapes, a page that is
            there already.
    """
    if page is not None:
        refuse(force, page)
    tree, size = lcq.load(path), path.stat().st_size
    weights = None
    if reference is not None:
        weights = lcq.decompress(lcq.load(reference)) if reference.suffix == ".lcq" else checkpoint.read(reference)
    title = path.name if reference is None else f"{path.name} beside {reference.name}"
    try:
        if page is None:
            report = table(tree, weights, on_disk=size)
        else:
            report = write_page(page, tree, weights, title=title, on_disk=size)
    except ValueError as error:
        raise ValueError(f"{reference or path}: {error}") from error
    show(report)
