"""The page: it stands alone, holds every leaf, and says what it leaves out."""

import dataclasses
import html.parser
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.reporting import html as page
from lcq.reporting.html import write_page
from lcq.reporting.summary import table
from lcq.reporting.svg import LEVELS, Point, escape, histogram, scatter


class Reader(html.parser.HTMLParser):
    """Words, tags and attributes of a page, whose tags must close in order."""

    VOID = ("meta", "br")

    def __init__(self, text):
        super().__init__()
        self.words, self.tags, self.attributes, self.rows, self.open = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
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
    assert f"{shown}/{shown}".replace("\\x07", "") in [row[0] for row in read.rows]  # a rich text has none
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
    assert len(read.rows) == 302 and read.count("figure") == page._HISTOGRAMS
    assert "The 90 smallest of 150 compressed leaves have no chart here." in read.text
    assert f"Named are the {page._LABELS} of 150 with the largest distortion." in read.text
    assert "the 126 smaller layers together" in read.text and "dense7/kernel" in read.text
    assert ("open", None) not in read.attributes
    bars = [float(re.search(r"[\d.]+", v)[0]) for name, v in read.attributes if name == "style" and v.startswith("wid")]
    assert len(bars) == 2 * (page._LAYERS + 1) and max(bars) <= 100


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


def test_scatter_names_the_worst_in_order():
    points = [Point(f"net/l{i}/kernel", 1 + i, 10.0**-i, weight=i) for i in range(5)]
    svg = scatter(points, "x", "y", labelled=3)
    assert re.findall(r">(l\d)<", svg) == ["l0", "l1", "l2"] and "net/…/kernel" in svg
    xs, ys = zip(*sorted(circles(svg, "point")), strict=True)
    assert len(set(np.diff(ys).round())) == 1 and list(xs) == sorted(xs)
    zero = circles(scatter([Point("a", 1, 0.0), Point("b", 1, 1e-9)], "x", "y"), "point")
    assert zero[0][1] > zero[1][1] and ">0<" in scatter([Point("a", 1, 0.0)], "x", "y")
