"""The page: it stands alone, holds every leaf, and says what it leaves out."""

import dataclasses
import html as html_module
import html.parser
import itertools
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.reporting import html as page
from lcq.reporting.html import write_page
from lcq.reporting.summary import table
from lcq.reporting.svg import LEVELS, Point, escape, histogram, notable, scatter


class Reader(html.parser.HTMLParser):
    """Words, tags and attributes of a page, whose tags must close in order."""

    VOID = ("meta", "br", "wbr")

    def __init__(self, text):
        super().__init__()
        self.breaks = []
        self.joined = False
        self.words, self.tags, self.attributes, self.rows, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag == "wbr":  # a word goes on
            self.joined = True
            self.breaks.append(self.words[-1][-1])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.joined:
            self.words[-1] += data
            self.joined = False
        else:
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(self.words)

    def count(self, tag):
        return self.tags.count(tag)


@pytest.fixture
def make(tmp_path):
    def make(tree, reference=None, **options):
        write_page(tmp_path / "page.html", tree, reference, **options)
        return Reader((tmp_path / "page.html").read_text("utf-8"))

    return make


def weights(layers=3):
    rng = np.random.default_rng(0)
    return {
        f"dense{i}": {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "bias": jnp.arange(5.0)}
        for i in range(layers)
    }


def compressed(w):
    return lcq.compress(w, [lcq.Rule(".*/kernel", lcq.KMeans(2))])


def charts(tree, reference=None):
    """How many SVGs there should be: one for each form, and a wide and a narrow one of distortions."""
    forms = sum(row.form.startswith("codes") for row in table(tree).rows)
    return forms + 2 * (reference is not None)


@pytest.mark.parametrize("measured", [True, False])
def test_it_holds_what_the_table_holds(make, measured):
    w = weights()
    tree = compressed(w)
    reference = w if measured else None
    read = make(tree, reference, title="A net", on_disk=1234)
    expected = table(tree, reference, on_disk=1234)
    assert [row[0] for row in read.rows] == ["leaf", *(row.path for row in expected.rows), "total", "on disk"]
    assert [" ".join(filter(None, row)).split() for row in read.rows] == [
        line.split()
        for line in str(expected).splitlines()
        if line.strip() and "─" not in line and line != expected.note
    ]
    assert expected.note in str(expected).splitlines() and expected.note in read.text
    assert read.count("svg") == charts(tree, reference)
    assert "1,234" in read.text and "A net" in read.text
    assert ("distortion" in [row[-1] for row in read.rows]) == measured
    assert ("Not known without a reference" in read.text) != measured
    assert "Not drawn: 3 arrays stored as they were." in read.text or not measured


def test_sizes_are_coded_beside_those_of_a_fixed_width(make):
    skewed = jnp.zeros((64, 50)).at[:3].set(1.0).at[7].set(-1.0)
    tree = lcq.compress({"a": {"kernel": skewed}}, [lcq.Rule(".*", lcq.Levels((-1.0, 0.0, 1.0)))])
    (row,) = table(tree).rows
    read = make(tree)
    assert row.coded < row.bits / 2
    assert f"{-(-row.coded // 8):,} of {row.bytes:,} bytes, {row.dense / row.coded:.1f}" in read.text
    assert f"{row.coded / 3200:.2f}" in read.words
    assert f"coded; {row.entropy / 3200:.2f} by entropy, {row.bits / 3200:.2f} at fixed width" in read.text


def test_it_returns_its_table(tmp_path):
    w = weights()
    assert write_page(tmp_path / "page.html", compressed(w), w).rows == table(compressed(w), w).rows


def test_it_stands_alone(make, tmp_path):
    make(compressed(weights()), weights())
    text = (tmp_path / "page.html").read_text("utf-8")
    read = Reader(text)
    assert "//" not in text and "url(" not in text and "@import" not in text
    assert not {"script", "link", "img", "iframe", "object", "a"} & set(read.tags)
    assert not {"src", "href", "srcset"} & {name for name, _ in read.attributes}
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "default-src 'none'; style-src 'unsafe-inline'" in dict(read.attributes)["content"] or "default-src" in text


def test_paths_and_titles_are_text(make, tmp_path):
    evil = "<script>alert(1)</script>&amp;\"' onload=x \u202egnp.exe\x07"
    w = {evil: {evil: jnp.asarray([1.0, 2.0, 3.0])}, "plain": jnp.asarray([1.0, 2.0, 4.0])}
    tree = lcq.compress(w, [lcq.Rule(".*", lcq.KMeans(2), joint=True)])
    read = make(tree, w, title=f"</title>{evil}")
    shown = evil.replace("\u202e", "\\u202e").replace("\x07", "\\x07")
    assert "script" not in read.tags and read.count("title") == 5  # of the page, and two points on each of two charts
    assert f"{shown}/{shown}" in [row[0] for row in read.rows]
    assert f"{shown}/{shown}" in read.words
    assert f"</title>{shown}" in read.words
    raw = (tmp_path / "page.html").read_text("utf-8")
    assert "<script" not in raw and "\u202e" not in raw and "\x07" not in raw
    assert escape("\ud800").encode() == b"\\ud800"


def test_it_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("before")
    with pytest.raises(ValueError, match="only in one of the two"):
        write_page(target, compressed(weights()), weights(2))
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_page(target, compressed(weights()), weights())
    assert target.read_text() == "before" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_many_leaves(make):
    w = weights(150)
    w["dense7"]["kernel"] = jnp.linspace(-1, 1, 300).reshape(20, 15)
    read = make(compressed(w), w)
    assert len(read.rows) == 302 + 5 and read.count("figure") == page._HISTOGRAMS
    assert [row[:2] for row in read.rows[:5]] == [
        ["leaf", "shape"],
        ["dense0..149/bias", "150 \u00d7 5"],
        ["dense0..6,8..149/kernel", "149 \u00d7 6x5"],
        ["dense7/kernel", "20x15"],
        ["total", ""],
    ]
    assert {row.path for row in table(compressed(w)).rows} <= {row[0] for row in read.rows[5:]}
    assert "The 90 smallest of 150 compressed leaves have no chart here." in read.text
    named = len(notable(points_of(compressed(w), w), page._LABELS))
    assert 1 <= named <= page._LABELS and f"Named are {named} of 150" in read.text
    assert "dense0..149 \u00d7\xa0150" in read.text and "dense7/kernel" in read.text and "58 more charts" in read.text
    assert ("open", None) not in read.attributes
    bars = [float(re.search(r"[\d.]+", v)[0]) for name, v in read.attributes if name == "style" and v.startswith("wid")]
    assert len(bars) == 2 * (1 + 150) and max(bars) <= 100
    assert sum(bars[2:]) == pytest.approx(sum(bars[:2]), abs=2)  # the layers of a group add up to its bar


def points_of(tree, reference):
    rows = [row for row in table(tree, reference).rows if row.compressed]
    return [Point(row.path, row.coded / math.prod(row.shape), row.distortion, math.prod(row.shape)) for row in rows]


def test_many_layers_that_no_number_tells_apart(make):
    letters = [f"{a}{b}" for a in "abcdef" for b in "abcde"]
    w = {name: {"kernel": jnp.linspace(-1, 1, 30 + (i >= 6))} for i, name in enumerate(letters)}
    read = make(compressed(w), w)
    assert "the 6 smaller layers together" in read.text and len(read.rows) == 32
    assert all(name in read.words for name in letters)


def transformer(layers=6):
    """101 leaves, named and shaped in proportion as a sentence encoder's are."""
    rng = np.random.default_rng(0)

    def dense(n, m):
        return {"kernel": rng.normal(size=(n, m)).astype(np.float32), "bias": np.ones(m, np.float32)}

    def norm():
        return {"scale": np.ones(8, np.float32), "bias": np.zeros(8, np.float32)}

    tables = {
        name: rng.normal(size=(n, 8)).astype(np.float32) for name, n in (("word", 96), ("position", 16), ("type", 2))
    }
    tree = {"embeddings": {**tables, "norm": norm()}}
    for i in range(layers):
        square = {name: dense(8, 8) for name in ("query", "key", "value", "output")}
        tree[f"layer{i}"] = {
            **square,
            "attention_norm": norm(),
            "up": dense(8, 32),
            "down": dense(32, 8),
            "norm": norm(),
        }
    rules = [lcq.Rule("layer.*/kernel", lcq.Uniform(4, per=4)), lcq.Rule("embeddings/(word|position)", lcq.Uniform(3))]
    return lcq.compress(tree, rules), tree


def test_a_hundred_leaves_are_a_screen_of_groups_and_none_is_lost(make, tmp_path):
    tree, w = transformer()
    read, expected = make(tree, w), table(tree, w)
    assert len(expected.rows) == 101
    short, long = read.rows[: 21 + 2], read.rows[21 + 2 :]
    counts = [int(row[1].split(" \u00d7 ")[0]) if "\u00d7" in row[1] else 1 for row in short[1:-1]]
    assert sum(counts) == 101 and counts.count(6) == 16
    at = short[0].index("bytes")
    assert [row[0] for row in long[1:-1]] == [row.path for row in expected.rows] and short[-1] == long[-1]
    assert sum(int(row[at].replace(",", "")) for row in short[1:-1]) == expected.total.bytes
    assert set(read.breaks) <= set("/_") and "anywhere" not in re.sub(
        r"\.tile b\{[^}]*\}", "", (tmp_path / "page.html").read_text()
    )
    labels = re.findall(r"^ *--size:(\d+)ch", "\n".join(v for k, v in read.attributes if k == "style"), re.M)
    sizes = [words for words in read.words if re.fullmatch(r"[\d,]+ of [\d,]+ bytes, [\d.]+\u00d7", words)]
    assert len(sizes) == 8 * 7 + 2 and max(map(len, sizes)) <= int(labels[0])


@dataclasses.dataclass(frozen=True)
class Halved(lcq.forms.Form):
    """A form that the page has never seen."""

    values: np.ndarray | None = None

    shape = property(lambda self: self.values.shape)
    bits = property(lambda self: 3 * self.values.size)

    def dense(self):
        return jnp.asarray(self.values / 2)

    def pack(self):
        return self

    unpack = pack

    def check_stored(self):
        pass


def test_every_form(make):
    x = jnp.linspace(-1, 1, 240).reshape(12, 20)
    schemes = {
        "few": lcq.KMeans(4),
        "many": lcq.KMeans(100),
        "fixed": lcq.Ternary(),
        "scales": lcq.Uniform(4, per="channel", zero_point=True),
        "cast": lcq.Cast("bfloat16"),
    }
    w = dict.fromkeys(schemes, x) | {"new": x}
    forms = {name: scheme.project(x).pack() for name, scheme in schemes.items()}
    read = make(forms | {"new": Halved(np.asarray(x))}, w)
    assert read.count("figure") == len(w) and "halved" in read.text and "values bfloat16" in read.text
    assert read.count("svg") == len(w) + 2


def test_odd_leaves(make):
    """No axes, no weights, equal weights, all zeros, numbers that are none, joint ones; a tree of nothing."""
    w = {
        "scalar": jnp.float32(3.0),
        "same": jnp.full(4, 2.0),
        "zero": jnp.zeros(6),
        "a": jnp.arange(4.0),
        "b": jnp.arange(8.0),
        "empty": np.zeros((0, 3), np.float32),
        "count": np.arange(3),
        "number": 7,
    }
    rules = [lcq.Rule("scalar|same|zero", lcq.KMeans(2)), lcq.Rule("a|b", lcq.KMeans(2), joint=True)]
    tree = lcq.compress(w, rules)
    read = make(tree, w)
    assert read.count("figure") == 5 and "shared with a" in read.text and "3 arrays stored as they were" in read.text
    changed = w | {"zero": jnp.ones(6).at[0].set(jnp.nan), "same": jnp.zeros(4), "count": np.arange(1, 4)}
    read = make(tree, changed)
    assert "without a finite distortion: same, zero." in read.text and "1 not finite and left out" in read.text
    assert "1 arrays that are not compressed, but differ" in read.text
    assert make(tree).count("figure") == 5
    assert "No leaf is compressed." in make({"bias": jnp.ones(3)}, {"bias": jnp.ones(3)}).text
    assert make({}).rows[1][0] == "total"


# The charts


def circles(svg, kind):
    return [tuple(map(float, found)) for found in re.findall(rf'class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_histogram_draws_levels_to_scale():
    w = np.linspace(-2, 2, 101)
    svg = histogram(np.array([-1.0, 0.0, 1.0]), np.array([10, 40, 20]), w, width=216, height=126)
    (x0, y0), (x1, y1), (x2, y2) = circles(svg, "level")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 == 108 and y1 == 8  # the tallest reaches the top
    assert [y0, y2] == [83, 58]  # a quarter and a half of the way up from 108
    assert 'class="weights"' in svg and "outline" not in svg and ">0<" in svg
    assert 'class="weights"' not in histogram(np.array([1.0]), np.array([3]))


def test_histogram_of_many_values():
    levels, counts = np.linspace(-1, 1, LEVELS + 1), np.full(LEVELS + 1, 2)
    svg = histogram(levels, counts, levels)
    assert 'class="outline"' in svg and not circles(svg, "level")
    assert 'class="outline filled"' in histogram(levels, counts)
    counts[LEVELS // 2] = 1000  # a pruned leaf
    svg = histogram(levels, counts, levels)
    assert len(circles(svg, "level")) == 1 and 'class="outline"' in svg


def inside(svg):
    width, height = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    places = re.findall(r'(?:cx|x)="([\d.-]+)" (?:cy|y)="([\d.-]+)"', svg)
    return all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in places)


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 0.1)],
        [(1.0, 0.0)],
        [(0.0, 0.0), (2.0, 0.5)],
        [(1.0, 0.1)] * 9,
        [(k, 10.0**-k) for k in range(1, 33)],
        [(1e-3, 1e-30), (64.0, 1e30)],
        [(3, 1e-300)],
    ],
)
@pytest.mark.parametrize("width", [1000, 350])
def test_scatter_stays_inside_and_its_names_apart(points, width):
    svg = scatter([Point(f"layer{i}/kernel", x, y) for i, (x, y) in enumerate(points)], "x", "y", width=width)
    assert inside(svg) and len(circles(svg, "point")) == len(points)
    names = [float(y) for y in re.findall(r'y="([\d.]+)" text-anchor="start">layer', svg)]
    assert len(names) == len(points) and all(b - a >= 12 for a, b in itertools.pairwise(names))


def boxes(svg):
    """Left, right, top and bottom of each text, as wide as sans-serif of 12 pixels is on average."""
    found = re.findall(r'<text class="\w+" x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">([^<]*)<', svg)
    for x, y, anchor, words in found:
        wide = 6.2 * len(html_module.unescape(words))
        left = float(x) - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
        yield left, left + wide, float(y) - 9, float(y) + 3


@pytest.mark.parametrize("width", [1000, 350])
@pytest.mark.parametrize("case", ["transformer", "few", "long names", "one far", "equal"])
def test_labels_of_a_chart_lie_inside_and_apart(case, width):
    rng = np.random.default_rng(1)
    points = {
        "transformer": lambda: points_of(*transformer()),
        "few": lambda: [Point(f"dense{i}/kernel", 2 + i / 9, 0.1) for i in range(4)],
        "long names": lambda: [
            Point(f"encoder/block_{i}/multi_head_attention/query_projection/kernel", x, y)
            for i, (x, y) in enumerate(rng.uniform(1, 2, (60, 2)).tolist())
        ],
        "one far": lambda: [Point("far", 8.0, 1e-12), *(Point(f"l{i}", 2.0, 0.1 + i / 1e4) for i in range(200))],
        "equal": lambda: [Point(f"l{i}", 2.0, 0.1) for i in range(200)],
    }[case]()
    svg = scatter(points, "coded bits a weight", "distortion", width=width, labelled=page._LABELS)
    wide, high = map(float, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    found = list(boxes(svg))
    assert all(0 <= x0 and x1 <= wide and 0 <= y0 and y1 <= high for x0, x1, y0, y1 in found)
    for (l0, r0, t0, b0), (l1, r1, t1, b1) in itertools.combinations(found, 2):
        assert r0 <= l1 or r1 <= l0 or b0 <= t1 or b1 <= t0
    assert len(circles(svg, "point")) == len(points)


def test_named_points_stand_out():
    cloud = [Point(f"l{i}", 4 + i / 1000, 0.01 + i / 10_000) for i in range(50)]
    far = [Point("bits", 16.0, 0.01), Point("worst", 4.0, 3.0), Point("lost", 0.0, 0.01)]
    named = [point.label for point in notable([*cloud, *far], 12)]
    assert named[0] == "worst" and {"bits", "lost"} <= set(named) and len(named) <= 5
    assert len(notable([*cloud, *far], 2)) == 2
    assert notable(cloud, 50) == cloud[::-1]


def test_long_names_are_cut_between_words():
    points = [Point(f"adapter_{i}/down_projection_kernel", 1.0, 10.0**-i) for i in range(3)] + [Point("z", 1.0, 1.0)]
    svg = scatter(points, "x", "y", width=350)
    assert re.findall(r">(adapter_[^<]*\u2026[^<]*)</text>", svg) == [
        f"adapter_{i}/down_\u2026kernel" for i in range(3)
    ]


def test_scatter_names_the_worst_in_order():
    points = [Point(f"net/l{i}/kernel", 1 + i, 10.0**-i, weight=i) for i in range(5)]
    svg = scatter(points, "x", "y", labelled=3)
    assert re.findall(r">(l\d)<", svg) == ["l0", "l1", "l2"] and "net/…/kernel" in svg
    xs, ys = zip(*sorted(circles(svg, "point")), strict=True)
    assert len(set(np.diff(ys).round())) == 1 and list(xs) == sorted(xs)
    zero = circles(scatter([Point("a", 1, 0.0), Point("b", 1, 1e-9)], "x", "y"), "point")
    assert zero[0][1] > zero[1][1] and ">0<" in scatter([Point("a", 1, 0.0)], "x", "y")
