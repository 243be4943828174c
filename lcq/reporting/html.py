"""One HTML file about a compressed tree: headline numbers, tables and charts; it loads nothing and runs nothing."""

import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from lcq.forms.base import is_form
from lcq.io.atomic import replacing
from lcq.reporting.groups import WHOLE, Group, by_pattern, grouped
from lcq.reporting.row import Row
from lcq.reporting.summary import Table, table
from lcq.reporting.svg import LEVELS, Point, escape, histogram, notable, scatter
from lcq.tree.aliases import Leaves
from lcq.tree.paths import flatten

_LAYERS = 24
"""How many layers have a bar of their own; the smaller ones share one."""
_HISTOGRAMS = 60
_LABELS = 12
"""How many points of the chart are named; of more, those that stand out."""

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--card:#f6f7f9;--ink:#1c2128;--soft:#5b6470;--line:#d9dde3;
--weights:#b8bec6;--form:#1f6feb;--kept:#c98a1b}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--card:#1d2126;--ink:#e6e9ed;--soft:#9aa4b0;--line:#363c44;
--weights:#59626d;--form:#6aa8ff;--kept:#e0ab4b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:20px 16px 48px;max-width:1120px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:0;overflow-wrap:break-word}
h2{font-size:1.15rem;margin:2.2rem 0 .4rem}
p{margin:.3rem 0 .8rem;color:var(--soft);max-width:46rem;overflow-wrap:break-word}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:1.2rem}
.tile,figure{background:var(--card);border-radius:8px;padding:12px 14px;margin:0;min-width:0}
.tile b{display:block;font-size:1.6rem;line-height:1.3;overflow-wrap:anywhere}
.tile span,figcaption,.size{color:var(--soft);font-size:.875rem}
.row{display:grid;grid-template:"name bar size"/minmax(0,17rem) minmax(0,1fr) var(--size);gap:2px 12px;
align-items:center;font-size:.875rem;overflow-wrap:break-word;margin-bottom:4px}.row .size{grid-area:size}
.many>.row>:first-child::before{content:"\u25b8 "}.many[open]>.row>:first-child::before{content:"\u25be "}
summary.row{color:inherit}.many>.row~.row>:first-child{padding-left:1.2em}.many>.row~.row>:first-child::before{content:""}
.bar{grid-area:bar;display:flex;height:14px;background:var(--card);border-radius:3px;overflow:hidden}
.bar i,.key{background:var(--form)}.bar i.kept,.key.kept{background:var(--kept)}.key.weights{background:var(--weights)}
.key{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin:0 .35em 0 .8em}.key:first-child{margin-left:0}
.size{white-space:nowrap;text-align:right}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(270px,1fr));gap:12px}
figcaption{overflow-wrap:break-word}figcaption b{color:var(--ink)}.more{margin-top:12px}.more .plots{margin-top:8px}
svg{display:block;width:100%;height:auto}.narrow{display:none}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg .axis{fill:var(--ink)}
path{fill:none}.rule{stroke:var(--soft)}.grid{stroke:var(--line)}.leader{stroke:var(--weights);stroke-width:.7}
.weights{fill:var(--weights)}.outline{stroke:var(--form);stroke-width:1.4}.filled{fill:var(--form)}
.stem{stroke:var(--form);stroke-width:1.8}.level,.point{fill:var(--form)}
.point{fill-opacity:.75;stroke:var(--paper)}
summary{cursor:pointer;color:var(--soft)}
.wide-table{overflow-x:auto}
table{border-collapse:collapse;font-size:.875rem;min-width:100%}
th,td{padding:4px 12px 4px 0;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper);min-width:12rem;max-width:42vw;
overflow-wrap:break-word}
td:nth-child(2){white-space:nowrap}td:nth-child(n+3):not(.n){min-width:7rem}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}tfoot td{font-weight:600}
@media(max-width:760px){.tile b{font-size:1.25rem}td:nth-child(n+2){white-space:nowrap}
th:first-child,td:first-child{min-width:8.5rem}.wide{display:none}.narrow{display:block;margin:auto;max-width:480px}
.row{grid-template:"name" "bar" "size"/minmax(0,1fr);margin-bottom:10px}.row .size{text-align:left}}
"""


class _Leaf(NamedTuple):
    """A row of the table with what it is about."""

    row: Row
    value: PyTree
    original: PyTree

    @property
    def weights(self) -> int:
        return math.prod(self.row.shape)


class _Size(NamedTuple):
    """Bits of a layer: of its forms and its arrays, coded; of both with codes at a fixed width; as they were."""

    form: int = 0
    kept: int = 0
    fixed: int = 0
    dense: int = 0

    @property
    def stored(self) -> int:
        return self.form + self.kept

    @property
    def words(self) -> str:
        ratio = self.dense / self.stored if self.stored else 0
        return f"{-(-self.stored // 8):,} of {-(-self.fixed // 8):,} bytes, {ratio:.1f}\u00d7"

    def plus(self, other: "_Size") -> "_Size":
        return _Size(*(a + b for a, b in zip(self, other, strict=True)))


def write_page(
    path: str | os.PathLike[str],
    tree: PyTree,
    reference: PyTree = None,
    *,
    title: str = "Compressed parameters",
    on_disk: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Table:
    """Writes what a compressed tree costs, and how far it is from the weights, as one HTML file.

    The file stands alone, without scripts, and follows the reader's choice of light or dark. It appears whole or not at
    all. What is left out of a chart, because there are too many leaves, is said under it.

    Args:
        path: of the file, replaced if it exists.
        tree: as given by `compress`, `extract` or `load`.
        reference: the weights it came from; adds distortions and the weights' histograms.
        title: of the page.
        on_disk: bytes of the file that the tree is in.
        progress: as of `table`.

    Returns:
        The table that is on the page.

    Raises:
        ValueError: a reference with other leaves or shapes.

    Example:
        >>> import tempfile, pathlib, jax.numpy as jnp, lcq
        >>> w = {"bias": jnp.zeros(2), "kernel": jnp.linspace(-1, 1, 32).reshape(8, 4)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = pathlib.Path(folder, "net.html")
        ...     report = write_page(page, lcq.compress(w, [lcq.Rule("kernel", lcq.KMeans(2))]), w, title="A net")
        ...     "<title>A net</title>" in page.read_text("utf-8")
        True
    """
    report = table(tree, reference, on_disk=on_disk, progress=progress)
    values = flatten(tree)[0]
    originals: Leaves = {} if reference is None else flatten(reference)[0]
    leaves = [_Leaf(row, values[row.path], originals.get(row.path)) for row in report.rows]
    compressed = sum(is_form(leaf.value) for leaf in leaves)
    parts = [
        f"<h1>{breakable(title)}</h1>",
        f"<p>{len(leaves):,} leaves, {compressed:,} of them compressed; {report.total.form}.</p>",
        _headline(report, leaves),
        _sizes(leaves),
        _distortions(leaves, reference is not None),
        _histograms([leaf for leaf in leaves if is_form(leaf.value)], reference is not None),
        _leaves(report),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'"  # a browser fetches and runs nothing, whatever is in here
    head = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>\n"
    )
    with replacing(path) as file:
        file.write((head + "\n".join(filter(None, parts)) + "\n</body></html>\n").encode())
    return report


def _headline(report: Table, leaves: Sequence[_Leaf]) -> str:
    total = report.total
    size = -(-(total.coded or 0) // 8) if report.on_disk is None else report.on_disk
    fixed, entropy, coded = (_rate(leaves, field) for field in ("bits", "entropy", "coded"))
    before = f"smaller than before: {total.dense // 8:,} bytes in {escape(total.dtype)}"
    tiles = [
        (f"{size:,}", "bytes, entropy-coded" if report.on_disk is None else "bytes on disk"),
        (f"{total.dense / 8 / size if size else 1:.2f}&times;", before),
        (f"{coded:.2f}", f"bits a compressed weight, coded; {entropy:.2f} by entropy, {fixed:.2f} at fixed width"),
    ]
    if total.distortion is not None:
        whose = "compressed" if total.compressed else "floating-point"
        tiles.append((f"{total.distortion:.3g}", f"distortion ‖w &minus; Δ(Θ)‖² / ‖w‖² of the {whose} leaves"))
    cards = "".join(f'<div class="tile"><b>{number}</b><span>{words}</span></div>' for number, words in tiles)
    return f'<div class="tiles">{cards}</div>'


def _rate(leaves: Sequence[_Leaf], field: str) -> float:
    """Bits a weight of the compressed leaves."""
    forms = [leaf for leaf in leaves if is_form(leaf.value)]
    return sum(getattr(leaf.row, field) for leaf in forms) / max(sum(leaf.weights for leaf in forms), 1)


def _sizes(leaves: Sequence[_Leaf]) -> str:
    """A bar for each layer, the largest first: coded bits of forms, and of arrays kept as they are."""
    layers: dict[str, _Size] = {}
    for leaf in leaves:
        row, coded = leaf.row, leaf.row.coded or 0
        kept = 0 if is_form(leaf.value) else coded
        name = row.path.rpartition("/")[0] or row.path
        layers[name] = layers.get(name, _Size()).plus(_Size(coded - kept, kept, row.bits, row.dense))
    groups = by_pattern(layers) if len(layers) > WHOLE else {name: [name] for name in layers}
    sums = {name: functools.reduce(_Size.plus, (layers[each] for each in alike)) for name, alike in groups.items()}
    order = sorted(sums, key=lambda name: -sums[name].stored)
    shown, others = order[:_LAYERS], [layer for name in order[_LAYERS:] for layer in groups[name]]
    if others:
        name = f"the {len(others):,} smaller layers together"
        groups[name], sums[name] = others, functools.reduce(_Size.plus, map(layers.__getitem__, others))
        shown.append(name)
    most = max((sums[name].stored for name in shown), default=0) or 1
    bars = []
    for name in shown:
        alike = groups[name]
        if len(alike) == 1:
            bars.append(f'<div class="row">{_bar(breakable(name), sums[name], most)}</div>')
            continue
        words = breakable(name) + ("" if name.endswith("together") else f" &times;&nbsp;{len(alike):,}")
        each = "".join(f'<div class="row">{_bar(breakable(layer), layers[layer], most)}</div>' for layer in alike)
        head = f'<summary class="row">{_bar(words, sums[name], most)}</summary>'
        bars.append(f'<details class="many">{head}{each}</details>')
    keys = '<span class="key"></span>compressed <span class="key kept"></span>stored as arrays'
    words = "Entropy-coded, of what codes at a fixed width take; and how many times less than before."
    room = max((len(sums[name].words) for name in shown), default=0)
    return f'<h2>Size by layer</h2><p>{keys}<br>{words}</p><div style="--size:{room}ch">{"".join(bars)}</div>'


def _bar(name: str, size: _Size, most: int) -> str:
    """Name, bytes and bar of a layer, as parts of a row; `most` bits fill it."""
    shares = (f"width:{100 * bits / most:.2f}%" for bits in (size.form, size.kept))
    parts = '<i style="{}"></i><i class="kept" style="{}"></i>'.format(*shares)
    words = size.words.replace("\u00d7", "&times;")
    return f'<span>{name}</span><span class="size">{words}</span><span class="bar">{parts}</span>'


def _distortions(leaves: Sequence[_Leaf], measured: bool) -> str:
    """Coded bits a weight against relative distortion, a point for each compressed leaf."""
    start = "<h2>Bits and distortion by layer</h2>"
    if not measured:
        return f"{start}<p>Not known without a reference, the weights from before.</p>"
    points, lost = [], []
    for leaf in leaves:
        far = leaf.row.distortion
        if not is_form(leaf.value) or not leaf.weights:
            continue
        if far is None or not math.isfinite(far):
            lost.append(leaf.row.path)
        else:
            points.append(Point(leaf.row.path, (leaf.row.coded or 0) / leaf.weights, far, leaf.weights))
    notes = ["A point is a compressed leaf, its area the number of weights."]
    if len(points) > _LABELS:
        named = len(notable(points, _LABELS))
        notes.append(
            f"Named are {named} of {len(points):,}: the farthest from the others, and some that no other leaf beats in "
            "both bits and distortion. The table below has all."
        )
    if lost:
        notes.append(f"Not drawn, without a finite distortion: {breakable(', '.join(lost))}.")
    arrays = [leaf.row for leaf in leaves if not is_form(leaf.value)]
    if changed := sum(row.error != 0 for row in arrays):
        notes.append(f"Not drawn: {changed:,} arrays that are not compressed, but differ from the reference.")
    if same := len(arrays) - changed:
        notes.append(f"Not drawn: {same:,} arrays stored as they were.")
    axes = "coded bits a weight", "distortion"
    charts = [
        f'<div class="{kind}">{scatter(points, *axes, width=width, labelled=_LABELS)}</div>'
        for kind, width in (("wide", 1000), ("narrow", 350))
        if points
    ]
    return f"{start}<p>{' '.join(notes)}</p>{''.join(charts)}"


def _histograms(leaves: Sequence[_Leaf], measured: bool) -> str:
    """Small charts of the largest compressed leaves, in the order of the tree."""
    start = f"<h2>{'Weights and codebooks' if measured else 'Codebooks'}</h2>"
    if not leaves:
        return f"{start}<p>No leaf is compressed.</p>"
    largest = {leaf.row.path for leaf in sorted(leaves, key=lambda leaf: -leaf.weights)[:_HISTOGRAMS]}
    notes = [
        '<span class="key weights"></span>weights before' if measured else "",
        f'<span class="key"></span>values of Δ(Θ): up to {LEVELS} of them as stems; else those that '
        "hold a tenth of the weights, and an outline of the rest.",
        "The tallest bar and the tallest stem of a chart reach its top.",
        f"The {len(leaves) - len(largest):,} smallest of {len(leaves):,} compressed leaves have no chart here."
        if len(leaves) > len(largest)
        else "",
    ]
    drawn = {leaf.row.path: leaf for leaf in leaves if leaf.row.path in largest}
    groups = grouped([leaf.row for leaf in leaves]) if len(drawn) > WHOLE else ()
    shown = ([row for row in group.rows if row.path in drawn] for group in groups)
    first = {
        max(rows, key=lambda row: row.distortion or 0).path: group
        for rows, group in zip(shown, groups, strict=True)
        if rows
    }
    if more := len(drawn) - len(first) if groups else 0:
        notes.append(
            "Of leaves alike in all but a number, the one with the largest distortion comes first."
            if measured
            else "Of leaves alike in all but a number, the first."
        )
    charts = "".join(_figure(leaf, first.get(path)) for path, leaf in drawn.items() if path in first or not groups)
    others = "".join(_figure(leaf) for path, leaf in drawn.items() if groups and path not in first)
    folded = f'<details class="more"><summary>{more:,} more charts</summary><div class="plots">{others}</div></details>'
    return f'{start}<p>{" ".join(notes)}</p><div class="plots">{charts}</div>{folded if more else ""}'


def _figure(leaf: _Leaf, group: Group | None = None) -> str:
    """Histograms of a leaf, which may stand for its group."""
    delta, w = (
        np.asarray(array, np.float64).reshape(-1)
        for array in (leaf.value.dense(), [] if leaf.original is None else leaf.original)
    )
    levels, counts = np.unique(delta[np.isfinite(delta)], return_counts=True)
    words = [leaf.row.form, f"{levels.size:,} value{'s' * (levels.size != 1)}"]
    if levels.size:
        words.append(f"the commonest {100 * counts.max() / delta.size:.3g} %")
    if odd := int(np.sum(~np.isfinite(w)) + np.sum(~np.isfinite(delta))):
        words.append(f"{odd:,} not finite and left out")
    chart = histogram(levels, counts, w[np.isfinite(w)]) if levels.size else ""
    if group is not None and len(group.rows) > 1:
        words.append(f"one of {len(group.rows):,}, {group.row.path}")
    caption = f"<b>{breakable(leaf.row.path)}</b><br>{breakable('; '.join(words)).replace(' %', '&nbsp;%')}"
    return f"<figure>{chart}<figcaption>{caption}</figcaption></figure>"


def _leaves(report: Table) -> str:
    """The table as it is printed; of many leaves in groups, and one by one below."""
    many, groups = len(report.rows), grouped(report.rows)
    notes = [escape(report.note)]
    if short := WHOLE < many > len(groups):
        notes.append(f"{len(groups):,} groups of leaves alike in all but a number; sizes are sums")
    start = f'<h2>Leaves</h2><p>{"; ".join(notes)}<span class="narrow">It scrolls sideways.</span></p>'
    if many <= WHOLE:
        return f"{start}{_grid(report)}"
    one_by_one = f"<details><summary>{many:,} leaves and their sum</summary>{_grid(report)}</details>"
    return f"{start}{_grid(report, groups) if short else ''}{one_by_one}"


def _grid(report: Table, groups: Sequence[Group] | None = None) -> str:
    columns, footer = report.columns(groups)
    classes = [' class="n"' if column.number else "" for column in columns]

    def line(tag: str, words: Sequence[str]) -> str:
        shown = [breakable(words[0]), *map(escape, words[1:])]
        return f"<tr>{''.join(f'<{tag}{kind}>{word}</{tag}>' for kind, word in zip(classes, shown, strict=True))}</tr>"

    lines = [line("td", words) for words in zip(*(column.cells for column in columns), strict=True)]
    body, foot = "".join(lines[:-footer]), "".join(lines[-footer:])
    head = line("th", [column.header for column in columns])
    return (
        f'<div class="wide-table"><table><thead>{head}</thead><tbody>{body}</tbody><tfoot>{foot}</tfoot></table></div>'
    )


def breakable(words: str) -> str:
    """Words as HTML that a browser may break after "/" and "_", and not within a name.

    Example:
        >>> breakable("layer_0/<w>")
        'layer_<wbr>0/<wbr>&lt;w&gt;'
    """
    return re.sub(r"(?<=[/_])(?=[^/_])", "<wbr>", escape(words))
