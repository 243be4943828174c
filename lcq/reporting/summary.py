"""What a compressed tree costs and how far it is from the weights: a table of its leaves."""

import dataclasses
import io
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import rich.table
from rich import box
from rich.console import Console, Group
from rich.text import Text

from lcq import forms
from lcq.forms.axes import shares
from lcq.forms.base import FORMS, Form, share
from lcq.io.entropy_coding.rates import rate
from lcq.tree.compress import sizes
from lcq.tree.paths import flatten


class Row(NamedTuple):
    """One leaf, or a sum of leaves.

    Attributes:
        path: of the leaf.
        shape: of the leaf; () in sums.
        form: what is stored, in words.
        dense: bits of the leaf as it was, in its own dtype: what every ratio compares with.
        bits: bits of what is stored, codes at a fixed width; what joint leaves share counts at the first of them.
        error: ||w - Delta(Theta)||^2, if there was a reference.
        energy: ||w||^2 likewise.
        rule: the pattern that decides, in a dry run.
        scheme: what it asks for.
        entropy: `bits` with codes at their entropy, None where there are no concrete arrays.
        coded: bits that an entropy-coded file takes for it, names and digests aside; None likewise.
        blocks: along which axes it has scales, codebooks or groups of their own, such as "axis 3", or "32 of axis 0,
            axis 1" for one for each 32; "" for one in all.
        dtype: of the leaf as it was; of several leaves, all there are.
        compressed: whether a form is stored; in a sum, of any leaf.
    """

    path: str
    shape: tuple[int, ...]
    form: str
    dense: int
    bits: int
    error: float | None = None
    energy: float | None = None
    rule: str | None = None
    scheme: str | None = None
    entropy: float | None = None
    coded: int | None = None
    blocks: str = ""
    dtype: str = "float32"
    compressed: bool = False

    @property
    def bytes(self) -> int:
        """`bits` in whole bytes."""
        return -(-self.bits // 8)

    @property
    def ratio(self) -> float:
        """`dense` / `bits`."""
        return self.dense / self.bits if self.bits else math.inf if self.dense else 1.0

    @property
    def distortion(self) -> float | None:
        """||w - Delta(Theta)||^2 / ||w||^2, None without a reference."""
        if self.error is None or self.energy is None:
            return None
        return self.error / self.energy if self.energy else math.inf if self.error else 0.0


@dataclasses.dataclass(frozen=True)
class Table:
    """The leaves of a tree and their sum; prints as text, and in colour through rich.

    Attributes:
        rows: one for each leaf, in the order of the tree.
        on_disk: bytes of the file it is in, if there is one.
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
            entropy=_sum(row.entropy for row in self.rows),
            coded=_sum(row.coded for row in self.rows),
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

    def __rich__(self) -> Group:
        return Group(self.grid(), *([Text(self.note)] if self.rows else []))

    def grid(self) -> rich.table.Table:
        """The lines and columns, without the note."""
        dry = any(row.rule is not None for row in self.rows)
        measured = any(row.error is not None for row in self.rows)
        priced = self.total.coded is not None
        grid = rich.table.Table(box=box.SIMPLE_HEAD, pad_edge=False)
        grid.add_column("leaf", overflow="fold", style="bold")
        grid.add_column("shape", overflow="fold")
        for name in ["rule", "scheme"] if dry else []:
            grid.add_column(name, overflow="fold")
        grid.add_column("form", overflow="fold")
        cut = any(row.blocks for row in self.rows)
        if cut:
            grid.add_column("one per", overflow="fold")
        prices = ["entropy", "coded bytes"] if priced else []
        for name in ["bits", "bytes", "ratio", *prices, *(["distortion"] if measured else [])]:
            grid.add_column(name, justify="right", no_wrap=True)

        def add(row: Row, **style: Any) -> None:
            shape = "x".join(map(str, row.shape)) if row is not total else ""
            words = [row.path, shape, *([row.rule or "", row.scheme or ""] if dry else []), row.form]
            words += [row.blocks] if cut else []
            far = "" if row.distortion is None else f"{row.distortion:.2e}"
            numbers = [f"{row.bits:,}", f"{row.bytes:,}", f"{row.ratio:.2f}"]
            if row.entropy is not None and row.coded is not None:
                numbers += [f"{row.entropy:,.0f}", f"{-(-row.coded // 8):,}"]
            grid.add_row(*map(Text, words + numbers + ([far] if measured else [])), **style)

        total = self.total
        for row in self.rows:
            add(row, end_section=row is self.rows[-1])
        add(total, style="bold")
        if self.on_disk is not None:
            ratio = total.dense / 8 / self.on_disk if self.on_disk else math.inf
            words = [
                "on disk",
                *[""] * ((4 if dry else 2) + cut),
                f"{8 * self.on_disk:,}",
                f"{self.on_disk:,}",
                f"{ratio:.2f}",
            ]
            grid.add_row(*words, *[""] * (len(prices) + measured), style="bold")
        return grid

    def __str__(self) -> str:
        return text(self)


def table(
    tree: Any,
    reference: Any = None,
    *,
    on_disk: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Table:
    """Bits, entropy, coded bytes and distortion of every leaf of a compressed tree, and their totals.

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


def rows(tree: Any) -> tuple[Row, ...]:
    """A row for each leaf; arrays may be shape structs."""
    leaves = flatten(tree)[0]
    return tuple(
        Row(
            path,
            tuple(np.shape(leaves[path])),
            describe(leaves[path]),
            size.dense,
            size.bits,
            blocks=apart(leaves[path]),
            dtype=_dtype(leaves[path]).name,
            compressed=isinstance(leaves[path], Form),
        )
        for path, size in sizes(tree).items()
    )


def _dtype(leaf: Any) -> Any:
    if not hasattr(leaf, "dtype"):
        return np.asarray(leaf).dtype
    return jnp.dtype(jnp.uint32 if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype)


def describe(leaf: Any) -> str:
    """What is stored for a leaf, in a few words.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> describe(lcq.Binary(per="channel").project(jnp.ones((3, 5))))
        'codes K=2, fixed, 5 scales'
    """
    match leaf:
        case forms.Codes():
            words = [f"codes K={leaf.size_of_table}"]
            if leaf.values is not None:
                words.append("fixed")
            elif leaf.levels is not None and (many := leaf.levels.size // leaf.levels.shape[-1]) > 1:
                words.append(f"{many} tables")
            if leaf.scale is not None:
                words.append(f"{leaf.scale.size} scales" if leaf.scale.size > 1 else "scaled")
            if leaf.zero is not None:
                words.append("shifted")
        case forms.Cast():
            words = [f"values {leaf.values.dtype}"]
        case forms.Sparse():
            words = [f"sparse {leaf.values.dtype if leaf.levels is None else f'K={leaf.levels.shape[-1]}'}"]
            if leaf.packed is not None:
                words.append(f"{leaf.kept:,} kept")
                words.append("bit mask" if leaf.gap is None else f"gaps of {leaf.gap} bits")
        case forms.Factors():
            rank = "room for rank" if leaf.rank is not None else "rank"
            words = ["matrix"] if leaf.right is None else [f"{rank} {leaf.left.shape[-1]}"]
        case forms.Sum():
            words = [" + ".join(describe(share(part, None)) for part in leaf.parts)]
        case Form():
            words = [type(leaf).__name__.lower()]
        case _:
            words = [f"array {_dtype(leaf)}"]
    if isinstance(leaf, Form) and leaf.shared is not None:
        words.append(f"shared with {leaf.shared}")
    return ", ".join(words)


def dense_of(form: Form) -> Any:
    """Delta(Theta), by one program for all forms of one structure and shape; step by step of what is no pytree."""
    return _dense(form) if FORMS.name_of(type(form)) else form.dense()


@jax.jit
def _dense(form: Form) -> jax.Array:
    return form.dense()


def apart(leaf: Any) -> str:
    """Along which axes of a leaf scales, codebooks or groups are told apart, in words; "" for one in all.

    Example:
        >>> import jax.numpy as jnp, lcq
        >>> apart(lcq.Uniform(4, per=3).project(jnp.ones((6, 5)))), apart(lcq.Uniform(4).project(jnp.ones((6, 5))))
        ('3 of axis 0, axis 1', '')
    """
    if isinstance(leaf, forms.Sum):
        return "; ".join(dict.fromkeys(filter(None, map(apart, leaf.parts))))
    if isinstance(leaf, forms.Sparse) and leaf.group:
        lengths = (1,) * (len(leaf.shape) - len(leaf.group)) + leaf.group
        return shares(leaf.shape, [n // g for n, g in zip(leaf.shape, lengths, strict=True)])
    if not isinstance(leaf, forms.Codes):
        return ""
    numbers = [a.shape[: len(leaf.shape)] for a in (leaf.scale, leaf.levels, leaf.zero) if a is not None]
    return shares(leaf.shape, numbers[0]) if numbers else ""


def text(renderable: Any) -> str:
    """A rich renderable as plain text, as wide as it needs to be."""
    console = Console(file=io.StringIO(), width=10_000, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def _priced(row: Row, leaf: Any, seen: set[str]) -> Row:
    """The row with entropy and coded size; what joint leaves share counts at the first of them, and is then `seen`."""
    price, shared = rate(leaf), getattr(leaf, "shared", None)
    again = leaf.shared_bits if shared in seen else 0
    if shared is not None:
        seen.add(shared)
    return row._replace(entropy=price.entropy - again, coded=price.coded - again)


def _sum(numbers: Iterable[Any]) -> Any:
    """The sum, or None if one is."""
    numbers = list(numbers)
    return None if None in numbers else sum(numbers)


def _measured(row: Row, leaf: Any, original: Any) -> Row:
    if row.shape != tuple(np.shape(original)):
        raise ValueError(f"{row.path}: expected a reference of shape {list(row.shape)}, got {list(np.shape(original))}")
    if hasattr(original, "dtype") and jnp.issubdtype(original.dtype, jax.dtypes.prng_key):
        return row  # no number, so no distance
    dtype = _dtype(original)
    wide = np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
    w = np.asarray(original, wide)
    delta = np.asarray(dense_of(leaf) if isinstance(leaf, Form) else leaf, wide)
    error, energy = (float(np.sum(np.abs(x) ** 2)) for x in (w - delta, w))
    return row._replace(error=error, energy=energy, dense=8 * w.size * dtype.itemsize, dtype=dtype.name)
