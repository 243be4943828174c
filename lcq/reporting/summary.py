"""What a compressed tree costs and how far it is from the weights: a table of its leaves."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text

from lcq.forms.base import FORMS, Form
from lcq.forms.processes import on_host
from lcq.io.entropy_coding.coded_bits import coded_bits
from lcq.reporting.columns import Column, fit, grid, terminal_width
from lcq.reporting.groups import WHOLE, Group, grouped, sum_or_none
from lcq.reporting.row import Row
from lcq.tree.compress import sizes
from lcq.tree.paths import flatten

_SPARE = ("entropy", "bits", "one per", "form", "shape")
"""Columns that are left out where there is no room, the first of them first."""


@dataclasses.dataclass(frozen=True)
class Table:
    """The leaves of a tree and their sum; prints as text, and in colour through rich.

    What is printed fits the terminal (100 columns where there is none, or as many as the environment's COLUMNS says):
    of more than 24 leaves, those that differ only in a number are one line, with their count before the shape and
    their sums; columns for which there is no room are left out, and named below. `rows` has all of it.

    Attributes:
        rows: One row for each leaf, in the order of the tree.
        on_disk: Bytes of the file it is in; None if there is none.
    """

    rows: tuple[Row, ...]
    on_disk: int | None = None

    @property
    def total(self) -> Row:
        """All rows together; of bits nothing is left out, of distortion all but the compressed leaves, whose it is.

        If no leaf is compressed, it is that of all floating-point leaves.
        """
        compressed = [row for row in self.rows if row.compressed]
        floating = (row for row in self.rows if jnp.issubdtype(row.dtype, jnp.floating))
        measured = [row for row in compressed or floating if row.error is not None]
        return Row(
            path="total",
            shape=(),
            form=f"{sum(math.prod(row.shape) for row in self.rows):,} numbers",
            dense=sum(row.dense for row in self.rows),
            bits=sum(row.bits for row in self.rows),
            entropy=sum_or_none(row.entropy for row in self.rows),
            coded=sum_or_none(row.coded for row in self.rows),
            error=math.fsum(row.error or 0 for row in measured) if measured else None,
            energy=math.fsum(row.energy or 0 for row in measured) if measured else None,
            dtype=", ".join(sorted({row.dtype for row in self.rows})),
            compressed=bool(compressed),
        )

    @property
    def note(self) -> str:
        """What ratios compare with, and of which leaves the total distortion is."""
        whose = "the compressed" if self.total.compressed else "floating-point"
        far = f"; total distortion: of {whose} leaves" if self.total.error is not None else ""
        return f"ratio: to the leaves as they were, in {self.total.dtype}{far}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        shown, footer = self.columns(grouped(self.rows) if len(self.rows) > WHOLE else None)
        fitting, out, space = fit(shown, options.max_width - 2, _SPARE)  # 2: the edges
        yield grid(fitting, space, footer)
        if self.rows:
            yield Text(self.note)
        if out:
            yield Text(f"no room in {options.max_width} columns for: {', '.join(out)}")

    def columns(self, groups: Sequence[Group] | None = None) -> tuple[list[Column], int]:
        """The table as text: a line for each leaf, or each group of leaves, and lines for their sum.

        Args:
            groups: of the leaves; None for each on its own.

        Returns:
            The columns, and how many of their last lines are sums.
        """
        total = self.total
        lines = [
            (group.row, len(group.rows))
            for group in ([Group((row,)) for row in self.rows] if groups is None else groups)
        ]
        rows = [row for row, _ in lines] + [total]
        disk = [] if self.on_disk is None else [self.on_disk]

        def column(name: str, words: Callable[[Row], str], *more: str, number: bool = True) -> Column:
            return Column(name, (*map(words, rows), *(more or [""] * len(disk))), number)

        made = [column("leaf", lambda row: row.path, *["on disk" for _ in disk], number=False)]
        shapes = ["x".join(map(str, row.shape)) for row in rows[:-1]]
        shapes = [
            f"{many} \u00d7 {shape or 'scalar'}" if many > 1 else shape
            for shape, (_, many) in zip(shapes, lines, strict=True)
        ]
        made.append(Column("shape", (*shapes, "", *[""] * len(disk))))
        if any(row.rule is not None for row in self.rows):
            made.append(column("rule", lambda row: row.rule or "", number=False))
            made.append(column("scheme", lambda row: row.scheme or "", number=False))
        made.append(column("form", lambda row: row.form, number=False))
        if any(row.blocks for row in self.rows):
            made.append(column("one per", lambda row: row.blocks, number=False))
        made.append(column("bits", lambda row: f"{row.bits:,}", *[f"{8 * size:,}" for size in disk]))
        made.append(column("bytes", lambda row: f"{row.bytes:,}", *[f"{size:,}" for size in disk]))
        ratios = [f"{total.dense / 8 / size if size else math.inf:.2f}" for size in disk]
        made.append(column("ratio", lambda row: f"{row.ratio:.2f}", *ratios))
        if total.coded is not None:
            made.append(column("entropy", lambda row: f"{row.entropy or 0:,.0f}"))
            made.append(column("coded bytes", lambda row: f"{-(-(row.coded or 0) // 8):,}"))
        if any(row.error is not None for row in self.rows):
            made.append(column("distortion", lambda row: "" if row.distortion is None else f"{row.distortion:.2e}"))
        return made, 1 + len(disk)

    def __str__(self) -> str:
        return text(self)


def table(
    tree: PyTree,
    reference: PyTree = None,
    *,
    on_disk: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Table:
    """Bits, entropy, coded bytes and distortion of every leaf of a compressed tree, and their totals.

    Leaves on the devices of several processes are gathered one by one: all processes call this, or none.

    Args:
        tree: as given by `compress`, `extract` or `load`.
        reference: the weights it came from; adds ||w - Delta(Theta)||^2 / ||w||^2, and ratios are to their dtypes.
        on_disk: bytes of the file it is in.
        progress: called after each leaf with its number from 1, how many there are, and its path.

    Returns:
        A value with `rows` and `total`; print it, or give it to rich.

    Raises:
        ValueError: a reference with other leaves or shapes.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> w = {"bias": jnp.zeros(2), "kernel": jnp.ones((8, 4))}
        >>> total = table(lcq.compress(w, [lcq.Rule("kernel", lcq.Binary())])).total
        >>> total.bits, total.bytes, round(total.ratio, 2)
        (128, 16, 8.5)
    """
    leaves = flatten(tree)[0]
    originals = None if reference is None else flatten(reference)[0]
    if originals is not None and leaves.keys() != originals.keys():
        odd = sorted(leaves.keys() ^ originals.keys())
        raise ValueError(f"expected a reference with the same leaves; only in one of the two: {', '.join(odd[:4])}")
    seen, made = set[str](), list[Row]()
    for number, row in enumerate(rows(tree), 1):
        leaf = leaves[row.path]
        priced = _priced(row, leaf, seen)
        made.append(priced if originals is None else _measured(priced, leaf, originals[row.path]))
        if progress is not None:
            progress(number, len(leaves), row.path)
    return Table(tuple(made), on_disk)


def rows(tree: PyTree) -> tuple[Row, ...]:
    """A row for each leaf; arrays may be shape structs."""
    leaves = flatten(tree)[0]
    return tuple(
        Row(
            path,
            tuple(np.shape(leaves[path])),
            describe(leaves[path]),
            size.dense,
            size.bits,
            blocks=leaves[path].one_per() if isinstance(leaves[path], Form) else "",
            dtype=_dtype(leaves[path]).name,
            compressed=isinstance(leaves[path], Form),
        )
        for path, size in sizes(tree).items()
    )


def _dtype(leaf: PyTree) -> np.dtype:
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf).dtype
    return jnp.dtype(jnp.uint32 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype)


def describe(leaf: PyTree) -> str:
    """What is stored for a leaf, in a few words.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> describe(lcq.Binary(per="channel").project(jnp.ones((3, 5))))
        'codes K=2, fixed, 5 scales'
    """
    if not isinstance(leaf, Form):
        return f"array {_dtype(leaf)}"
    return leaf.describe() if leaf.shared is None else f"{leaf.describe()}, shared with {leaf.shared}"


def dense_of(form: Form) -> Array:
    """Delta(Theta), by one program for all forms of one structure and shape; step by step of what is no pytree."""
    return _dense(form) if FORMS.name_of(type(form)) else form.dense()


@jax.jit
def _dense(form: Form) -> jax.Array:
    return form.dense()


def text(renderable: RenderableType) -> str:
    """A rich renderable as plain text: a `Table` as wide as the terminal, other things as wide as they need to be."""
    width = terminal_width() if isinstance(renderable, Table) else 10_000
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _priced(row: Row, leaf: PyTree, seen: set[str]) -> Row:
    """The row with entropy and coded size; what joint leaves share counts at the first of them, and is then `seen`."""
    price, shared = coded_bits(leaf), getattr(leaf, "shared", None)
    again = leaf.shared_bits if shared in seen else 0
    if shared is not None:
        seen.add(shared)
    return row._replace(entropy=price.entropy - again, coded=price.coded - again)


def _measured(row: Row, leaf: PyTree, original: PyTree) -> Row:
    if row.shape != tuple(np.shape(original)):
        raise ValueError(f"{row.path}: expected a reference of shape {list(row.shape)}, got {list(np.shape(original))}")
    if hasattr(original, "dtype") and jnp.issubdtype(original.dtype, jax.dtypes.prng_key):
        return row  # no number, so no distance
    dtype = _dtype(original)
    wide = np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
    w = np.asarray(on_host(original), wide)
    delta = np.asarray(on_host(dense_of(leaf) if isinstance(leaf, Form) else leaf), wide)
    error, energy = (float(np.sum(np.abs(x) ** 2)) for x in (w - delta, w))
    return row._replace(error=error, energy=energy, dense=8 * w.size * dtype.itemsize, dtype=dtype.name)
