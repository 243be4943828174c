"""Tables of what a tree costs."""

import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import lcq
from lcq.reporting.groups import grouped
from lcq.reporting.summary import Row, Table, describe, table


def params():
    rng = np.random.default_rng(0)
    shapes = {"[a]": (8, 4), "b": (6, 4)}
    tree = {name: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for name, s in shapes.items()}
    return tree | {"bias": jnp.linspace(0, 1, 7), "count": jnp.arange(3)}


RULES = [lcq.Rule(".*/kernel", lcq.KMeans(4), joint=True), lcq.Rule("bias", lcq.Cast("bfloat16"))]


def test_everything_is_counted():
    tree = lcq.compress(params(), RULES)
    report = table(tree, on_disk=100)
    bits = {row.path: row.bits for row in report.rows}
    assert bits == {"[a]/kernel": 2 * 32 + 4 * 32, "b/kernel": 2 * 24, "bias": 7 * 16, "count": 3 * 32}
    assert bits == {path: size.bits for path, size in lcq.sizes(tree).items()}
    assert report.total.bits == sum(bits.values()) and report.total.bytes == -(-sum(bits.values()) // 8)
    assert report.total.ratio == pytest.approx(lcq.ratio(tree)) == 32 * 66 / sum(bits.values())
    assert report.total.form == "66 numbers"


def test_distortion_is_relative_and_totals_are_of_the_compressed_leaves():
    w = params()
    tree = lcq.compress(w, RULES)
    report = table(tree, w)
    dense = lcq.decompress(tree)
    kernel, back = np.float64(w["b"]["kernel"]), np.float64(dense["b"]["kernel"])
    by_path = {row.path: row for row in report.rows}
    assert by_path["b/kernel"].distortion == pytest.approx(np.sum((kernel - back) ** 2) / np.sum(kernel**2))
    assert by_path["count"].distortion == 0
    w, dense = ({k: np.float64(v) for k, v in lcq.tree.rules.flatten(t)[0].items() if k != "count"} for t in (w, dense))
    far = sum(np.sum((w[k] - dense[k]) ** 2) for k in w) / sum(np.sum(w[k] ** 2) for k in w)
    assert report.total.distortion == pytest.approx(far)
    assert "total distortion: of the compressed leaves" in str(report)
    assert table(tree).total.distortion is None and "distortion" not in str(table(tree))


@pytest.mark.parametrize("more", [np.arange(512), np.full(9, 1e4, np.float32), np.full(3, 1e3j, np.complex64)])
def test_total_distortion_leaves_out_what_is_not_compressed(more):
    """Position numbers, or a bias that stays as it is, have nothing to lose, and may be large."""
    w = {"kernel": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    rules = [lcq.Rule("kernel", lcq.Uniform(3))]
    alone, both = (table(lcq.compress(t, rules), t).total for t in (w, w | {"more": more}))
    assert both.distortion == alone.distortion > 1e-3
    moved = w | {"more": more}
    plain = table(moved, w | {"more": more}).total
    assert plain.distortion == 0 and not plain.compressed


@pytest.mark.parametrize(("dtype", "bits"), [("bfloat16", 16), ("float16", 16), ("float32", 32)])
def test_ratios_are_to_the_dtype_that_the_net_had(dtype, bits):
    w = {"kernel": jnp.linspace(-1, 1, 128).reshape(16, 8).astype(dtype), "bias": jnp.ones(8, dtype)}
    rules = [lcq.Rule("kernel", lcq.Binary(scale=False))]
    tree = lcq.compress(w, rules)
    wanted = bits * 136 / (128 + bits * 8)
    assert lcq.ratio(tree) == table(tree).total.ratio == lcq.dry_run(w, rules).total.ratio == wanted
    assert f"ratio: to the leaves as they were, in {dtype}" in str(table(tree))
    wide = {name: x.astype(jnp.float32) for name, x in w.items()}
    assert table(tree, wide).total.ratio == 32 * 136 / (128 + bits * 8)
    assert lcq.ratio(w) == 1


def test_it_prints_whole_and_takes_no_markup(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = str(table(lcq.compress(params(), RULES), params(), on_disk=1234))
    for words in (
        "[a]/kernel",
        "8x4",
        "codes K=4, shared with [a]/kernel",
        "values bfloat16",
        "array int32",
        "on disk",
    ):
        assert words in text
    assert "1,234" in text and "distortion" in text and "total" in text and "rule" not in text
    console = Console(width=60)
    with console.capture() as captured:
        console.print(table(lcq.compress(params(), RULES)))
    assert max(map(len, captured.get().splitlines())) <= 60


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (lcq.KMeans(4), "codes K=4"),
        (lcq.KMeans(4, per="channel"), "codes K=4, 6 tables"),
        (lcq.Ternary(scale=False), "codes K=3, fixed"),
        (lcq.Ternary(), "codes K=3, fixed, scaled"),
        (lcq.Uniform(4, per=2, zero_point=True), "codes K=16, fixed, 12 scales, shifted"),
        (lcq.Cast("float16"), "values float16"),
    ],
)
def test_forms_in_words(scheme, words):
    form = scheme.project(jnp.linspace(-1, 1, 24).reshape(4, 6))
    assert describe(form) == describe(form.pack()) == words


def transformer():
    """Rows of 101 leaves, as a sentence encoder has."""
    names = ("query", "key", "value", "output", "up", "down", "attention_norm", "norm")
    paths = [f"layer{i}/{name}/{part}" for i in range(6) for name in names for part in ("kernel", "bias")]
    paths += [f"embeddings/{name}" for name in ("word", "position", "type", "norm/scale", "norm/bias")]
    one = Row("", (384, 1536), "codes K=16, fixed, 18432 scales", 10**7, 2_654_208, error=1.0, energy=100.0)
    one = one._replace(entropy=2e6, coded=2_485_538, blocks="32 of axis 0, axis 1", compressed=True)
    return tuple(one._replace(path=path) for path in paths)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_what_is_printed_of_many_leaves_fits_and_adds_up(width, monkeypatch):
    rows = transformer()
    report = Table(rows, on_disk=31_400_000)
    assert len(rows) == 101
    monkeypatch.setenv("COLUMNS", str(width))
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= width
    console = Console(width=width)
    with console.capture() as captured:
        console.print(report)
    assert [line.rstrip() for line in captured.get().splitlines()] == lines
    names = re.compile("[/_ ]").split("leaf total on disk " + " ".join(group.row.path for group in grouped(rows)))
    table_end = next(i for i, line in enumerate(lines) if line.startswith("ratio:"))
    printed = [line.split("  ")[0].strip() for line in lines[:table_end] if "─" not in line]
    assert {word for name in printed if not re.search("coded|bytes", name) for word in re.split("[/_ ]", name)} <= {
        *names,
        "",
    }
    (short, footer), (long, _) = report.columns(grouped(rows)), report.columns()
    for few, many in zip(short, long, strict=True):
        assert few.header == many.header and few.cells[-footer:] == many.cells[-footer:]
        if few.header in ("bits", "bytes", "entropy"):
            first, second = (sum(int(c.replace(",", "")) for c in x.cells[:-footer]) for x in (few, many))
            assert first == second == int(few.cells[-footer].replace(",", ""))
    assert sum(int(c.split(" \u00d7 ")[0]) if "\u00d7" in c else 1 for c in short[1].cells[:-footer]) == 101
    assert any(line.startswith("no room") for line in lines) == (width < 180)
    if width == 100:
        assert lines[-1] == "no room in 100 columns for: one per, bits, entropy" and "6 \u00d7 384x1536" in str(report)


def test_a_screen_of_leaves_is_printed_one_by_one():
    rows = tuple(Row(f"l{i}", (3,), "array float32", 96, 96) for i in range(24))
    assert all(f"l{i} " in str(Table(rows)) for i in range(24))
    assert " l0..24 " in str(Table((*rows, rows[0]._replace(path="l24"))))


def test_nothing_to_divide_by():
    assert Row("w", (3,), "", 96, 0).ratio == math.inf and Row("w", (0,), "", 0, 0).ratio == 1
    assert (
        Row("w", (3,), "", 96, 3, 0.0, 0.0).distortion == 0
        and Row("w", (3,), "", 96, 3, 1.0, 0.0).distortion == math.inf
    )
    assert Table(()).total.bits == 0 and "total" in str(Table(()))
    assert table({"n": 3, "x": 1.5}).total.bits > 0


def test_a_reference_must_fit():
    tree = lcq.compress(params(), RULES)
    with pytest.raises(ValueError, match="only in one of the two: bias"):
        table(tree, {key: value for key, value in params().items() if key != "bias"})
    with pytest.raises(ValueError, match="bias: expected a reference of shape"):
        table(tree, params() | {"bias": jnp.ones(8)})


@pytest.mark.parametrize(
    ("scheme", "settings", "words"),
    [
        (lcq.Uniform(4), {}, ""),
        (lcq.Uniform(4, per="channel"), {}, "axis 2"),
        (lcq.Uniform(4, per=2), {}, "2 of axis 1, axis 2"),
        (lcq.Uniform(4, per="channel"), {"stacked": 1}, "axis 0, axis 2"),
        (lcq.KMeans(2, per="channel"), {"layout": "oiw"}, "axis 0"),
        (lcq.KMeans(2, per=2), {"layout": "ioo"}, "2 of axis 0, axis 1, axis 2"),
        (lcq.PruneGroups("channel", count=2), {"layout": "wio"}, "axis 2"),
        (lcq.PruneGroups("channel", count=2), {"stacked": 1}, "axis 0, axis 2"),
        (lcq.Additive(lcq.Binary(per="channel"), lcq.Prune(count=2)), {"layout": "wio"}, "axis 2"),
        (lcq.LowRank(1), {}, ""),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:w. per=:UserWarning")
def test_tables_say_along_which_axes_there_are_scales(scheme, settings, words, monkeypatch):
    """Of forms in either layout, and before there are any."""
    monkeypatch.setenv("COLUMNS", "200")
    tree, rules = {"w": jnp.arange(192.0).reshape(4, 6, 8), "b": jnp.ones(3)}, [lcq.Rule("w", scheme, **settings)]
    forms = lcq.compress(tree, rules)
    stored = {"w": forms["w"].pack(), "b": forms["b"]}
    for report in (lcq.dry_run(tree, rules), table(forms), table(stored)):
        assert {row.path: row.blocks for row in report.rows} == {"b": "", "w": words}
        assert ("one per" in str(report)) == bool(words) and words in str(report)
