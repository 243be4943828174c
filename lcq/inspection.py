"""lcq inspect and lcq table: what an .lcq file is made of, and what its leaves cost."""

from pathlib import Path

import rich.table
from rich import box
from rich.text import Text

import lcq
from lcq import packing
from lcq.artifact import checkpoint, rans
from lcq.artifact.codec import Encoder
from lcq.artifact.container import NAMES, bytes_of
from lcq.artifact.file import read_index
from lcq.artifact.paths import flatten
from lcq.page import write_page
from lcq.report import table
from lcq.terminal import refuse, show


def inspect_file(path: Path) -> None:
    """Prints a file's make-up: format, streams, and the plan if it holds one; every digest is checked.

    Raises:
        ArtifactError: not an lcq file, or a damaged one.
    """
    leaves, _ = flatten(lcq.load(path))
    held, encoder = read_index(path), Encoder()
    for leaf in leaves:
        encoder.encode(leaf)
    grid = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("stream", overflow="fold", style="bold")
    for name in ("dtype", "shape", "bytes", "entropy", "in the file"):
        grid.add_column(name, justify="right", no_wrap=True)
    for name, struct in held.structs.items():
        words = (name, NAMES[struct.dtype], "x".join(map(str, struct.shape)), f"{bytes_of(struct):,}")
        grid.add_row(*map(Text, (*words, _entropy(encoder, name), f"{held.sizes[name]:,}")))
    size, streams, raw = path.stat().st_size, sum(held.sizes.values()), sum(map(bytes_of, held.structs.values()))
    print(f"{path}: format lcq {held.version}, {len(held.structs)} streams")
    print(f"{size:,} bytes: {streams:,} of streams ({raw:,} before coding), {size - streams:,} of header and index")
    show(grid)
    if held.plan is not None:
        print(f"plan:\n\n{lcq.read_plan(path)}")


def _entropy(encoder: Encoder, name: str) -> str:
    """Bytes that the codes of a stream would take at their entropy, one by one; nothing for what is no codes."""
    if name not in encoder.codes:
        return ""
    levels, count = encoder.codes[name]
    codes = packing.unpack_host(encoder.streams[name], packing.width(levels), count)
    return f"{count * rans.entropy(codes, levels) / 8:,.0f}"


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
