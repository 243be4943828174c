"""lcq inspect and lcq table: what an .lcq file is made of, and what its leaves cost."""

from pathlib import Path

import lcq
from lcq.cli.console import check_output, progress, refuse, show
from lcq.forms import bitpack
from lcq.io.checkpoints import checkpoint
from lcq.io.container import NAMES, bytes_of
from lcq.io.entropy_coding import rans
from lcq.io.file import each_leaf, read_index
from lcq.io.records import code_streams
from lcq.reporting.columns import Column, Columns
from lcq.reporting.html import write_page
from lcq.reporting.summary import table


def inspect_file(path: Path, limit: float | None = None) -> None:
    """Prints a file's make-up: format, streams, and the plan if it holds one; every digest is checked.

    Leaves are looked at one by one and never made dense, so the size of the file's dense tree does not matter.

    Args:
        path: of the .lcq file.
        limit: bytes that one leaf's streams and their decoding may take; by default as `lcq.load`.

    Raises:
        ArtifactError: not an lcq file, or a damaged one.
    """
    held, entropies = read_index(path), dict[str, str]()
    with progress(len(held.records)) as advance:
        for record, leaf in each_leaf(path, limit):
            advance(leaf.path, 1)
            for name, (stream, levels, count) in code_streams(record, leaf.value).items():
                codes = bitpack.unpack_host(stream, bitpack.width(levels), count)
                entropies[name] = f"{count * rans.entropy(codes, levels) / 8:,.0f}"
    columns = [
        Column("stream", tuple(held.structs)),
        Column("dtype", tuple(NAMES[struct.dtype] for struct in held.structs.values()), number=True),
        Column("shape", tuple("x".join(map(str, struct.shape)) for struct in held.structs.values()), number=True),
        Column("bytes", tuple(f"{bytes_of(struct):,}" for struct in held.structs.values()), number=True),
        Column("entropy", tuple(entropies.get(name, "") for name in held.structs), number=True),
        Column("codec", tuple(held.codecs[name] for name in held.structs), number=True),
        Column("in the file", tuple(f"{held.sizes[name]:,}" for name in held.structs), number=True),
    ]
    size, streams, raw = held.on_disk, sum(held.sizes.values()), sum(map(bytes_of, held.structs.values()))
    files = f" in {len(held.shards)} files beside it" if held.shards else ""
    print(f"{path}: format lcq {held.version}, {len(held.structs)} streams{files}")
    for name, there in held.shards.items():
        print(f"{name}: {there:,} bytes")
    print(f"{size:,} bytes: {streams:,} of streams, {size - streams:,} of header and index")
    print(f"{raw:,} bytes of streams before coding")
    show(Columns(columns))
    if held.metadata:
        print(f"metadata: {', '.join(f'{key!r}: {value!r:.200}' for key, value in held.metadata.items())}")
    if held.plan is not None:
        print(f"plan:\n\n{lcq.read_plan(path)}")


def table_of_file(
    path: Path,
    reference: Path | None = None,
    page: Path | None = None,
    *,
    force: bool = False,
    limit: float | None = None,
) -> None:
    """Prints what each leaf of a file costs and, with a reference, how far it is from that; writes both as a page.

    Args:
        path: of the .lcq file.
        reference: a checkpoint with the same leaves, or another .lcq file.
        page: of the HTML file to write, if any.
        force: whether that may be replaced.
        limit: bytes that a file's streams, and its forms made dense, may take together; by default as `lcq.load`.

    Raises:
        ValueError: files that are not what they should be, a reference with other leaves or shapes, a page that is
            there already.
    """
    if page is not None:
        refuse(force, page)
        check_output(page, path, *filter(None, [reference]))
    tree, size = lcq.load(path, limit=limit), read_index(path).on_disk
    weights = None
    if reference is not None and reference.suffix == ".lcq":
        weights = lcq.decompress(lcq.load(reference, limit=limit))
    elif reference is not None:
        weights = checkpoint.read(reference)
    title = path.name if reference is None else f"{path.name} beside {reference.name}"
    try:
        with progress() as advance:

            def step(number: int, total: int, name: str) -> None:
                advance(name, 1, total)

            if page is None:
                report = table(tree, weights, on_disk=size, progress=step)
            else:
                report = write_page(page, tree, weights, title=title, on_disk=size, progress=step)
    except ValueError as error:
        raise ValueError(f"{reference or path}: {error}") from error
    show(report)
