"""Charts as SVG text: no scripts, no fonts and no colours of their own; the style sheet of the page draws them."""

import html
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVELS = 32
"""Up to this many values of Delta(Theta) are drawn as stems. Of more, only those that hold a tenth of the weights, such
as the zeros of a pruned leaf; the rest is a second histogram."""
_BINS = 48
_FAR, _NEAR, _SAME = 3.0, 0.1, 1e-6
_ROW = 15
"""Height of a line of labels."""


class Point(NamedTuple):
    """A point of a scatter chart.

    Attributes:
        label: Name of the point.
        x: Horizontal position, at least 0.
        y: Vertical position, at least 0.
        weight: Weight that sets its area.
    """

    label: str
    x: float
    y: float
    weight: float = 1.0


def escape(words: str) -> str:
    """Words as HTML or SVG text; characters that do not print are shown by their numbers.

    Example:
        >>> escape("<b>\\x07")
        '&lt;b&gt;\\\\x07'
    """
    return html.escape("".join(c if c.isprintable() else ascii(c)[1:-1] for c in words))


def histogram(
    levels: np.ndarray, counts: np.ndarray, w: np.ndarray | None = None, *, width: int = 300, height: int = 120
) -> str:
    """Values of Delta(Theta), as stems or an outline, over the histogram of the weights.

    Bars and stems have a scale of their own: the tallest of each is as tall as the chart. Bars and outline share one.

    Args:
        levels: what the leaf became, each value once; at least one, ascending and finite.
        counts: how often.
        w: what it was; finite numbers of any count.
    """
    w = np.empty(0) if w is None else w
    low, high = (float(f(np.append(levels, w))) for f in (np.min, np.max))
    air = (high - low) / 50 if low < high else (abs(low) or 1.0) / 2
    low, high = low - air, high + air
    edges = np.linspace(low, high, _BINS + 1)
    left, right, top, bottom = 8.0, width - 8.0, 8.0, height - 18.0

    def across(value: float) -> float:
        return left + (right - left) * ((value - low) / (high - low))

    alone = counts >= (counts.sum() / 10 if levels.size > LEVELS else 0)
    bars = np.histogram(w, edges)[0]
    rest = np.histogram(levels[~alone], edges, weights=counts[~alone])[0]
    most = int(max(bars.max(), rest.max(), 1))
    parts = [_steps("weights", bars / most, left, right, top, bottom)] if w.size else []
    if not alone.all():
        parts.append(_steps("outline" if w.size else "outline filled", rest / most, left, right, top, bottom))
    tips = [
        (_number(across(x)), _number(bottom - (bottom - top) * y / counts.max()))
        for x, y in zip(levels[alone], counts[alone], strict=True)
    ]
    if tips:
        lines = "".join(f"M{x} {_number(bottom)}V{y}" for x, y in tips)
        parts.append(f'<path class="stem" d="{lines}"/>')
        parts += [f'<circle class="level" cx="{x}" cy="{y}" r="2.5"/>' for x, y in tips]
    parts.append(_line(left, bottom, right, bottom))
    for tick in _round_numbers(low, high, 6):
        x = min(max(across(tick), 16.0), width - 16.0)
        parts.append(_line(across(tick), bottom, across(tick), bottom + 3))
        parts.append(_text(x, height - 4, f"{tick:g}", "middle"))
    return _svg(width, height, parts)


def scatter(points: Sequence[Point], x: str, y: str, *, width: int = 1000, labelled: int = 32) -> str:
    """Points on two log axes, their names in a column beside them, each joined to its point by a line.

    Zeros have places of their own below the axes' low ends. Of more than `labelled` points the `notable` are named.

    Args:
        points: at least one; finite.
        x: words for the x axis.
        y: words for the y axis.
        width: in pixels.
        labelled: how many points are named at most.
    """
    named = notable(points, labelled)
    height = max(250, _ROW * (len(named) + 1) + 70)
    left, right, top, bottom = 50.0, width * (0.74 if width > 500 else 0.5), 30.0, height - 42.0
    across = _log_axis([p.x for p in points], 2, left, right, 6 if width > 500 else 4)
    up = _log_axis([p.y for p in points], 10, bottom, top, 6)
    parts = [_text(2, 14, y, "start", "axis"), _text((left + right) / 2, height - 6, x, "middle", "axis")]
    for place, words in across.ticks:
        parts += [_line(place, top, place, bottom, "grid"), _text(place, bottom + 15, words, "middle")]
    for place, words in up.ticks:
        parts += [_line(left, place, right, place, "grid"), _text(left - 6, place + 4, words, "end")]
    parts += [_line(left, bottom, right, bottom), _line(left, top, left, bottom)]
    places = _apart([up.at(p.y) for p in named], _ROW, top, bottom)
    shared, names = _shorten([p.label for p in named], int((width - right - 18) / 6.6))
    parts.append(_text(right + 17, 14, shared, "start", "axis"))
    for point, name, place in zip(named, names, places, strict=True):
        parts.append(_line(across.at(point.x), up.at(point.y), right + 14, place, "leader"))
        parts.append(_text(right + 17, place + 4, name, "start"))
    most = max(p.weight for p in points) or 1.0
    for point in sorted(points, key=lambda p: -p.weight):
        title = f"<title>{escape(f'{point.label}: {point.x:.4g}, {point.y:.3g}')}</title>"
        at = f'cx="{_number(across.at(point.x))}" cy="{_number(up.at(point.y))}"'
        radius = _number(2.5 + 5.5 * math.sqrt(point.weight / most))
        parts.append(f'<circle class="point" {at} r="{radius}">{title}</circle>')
    return _svg(width, height, parts)


def notable(points: Sequence[Point], most: int) -> list[Point]:
    """Points worth a name, the largest y first: all, if there are at most `most`; else those that stand out.

    These are outliers, more than 3 standard deviations from the median in log x or log y, as estimated by the median
    absolute deviation, at most `most` of them, the farthest first; and points of the Pareto front, such that no other
    has both a smaller x and a smaller y, the largest y first, where none is named within a tenth of the chart.

    Example:
        >>> points = [Point(f"l{i}", 4 + i / 100, 0.01 + i / 1000) for i in range(20)] + [Point("far", 4.1, 1.0)]
        >>> [point.label for point in notable(points, 12)]
        ['far', 'l0']
    """
    if len(points) <= most:
        return sorted(points, key=lambda p: -p.y)
    places = np.log(np.maximum([(p.x, p.y) for p in points], np.finfo(float).tiny))
    off = np.abs(places - np.median(places, axis=0))
    far = np.max(off / np.maximum(1.4826 * np.median(off, axis=0), _SAME), axis=1)
    at = places / np.maximum(np.ptp(places, axis=0), _SAME)
    ranked = sorted(range(len(points)), key=lambda i: -far[i])
    named = [i for i in ranked if far[i] > _FAR][:most]
    for i in sorted(ranked, key=lambda i: -points[i].y):
        crowded = any(np.max(np.abs(at[i] - at[j])) < _NEAR for j in named)
        if len(named) < most and not crowded and not any(_beats(other, points[i]) for other in points):
            named.append(i)
    return sorted((points[i] for i in named), key=lambda p: -p.y)


def _beats(other: Point, point: Point) -> bool:
    """Whether a point is at most as large in x and y, and smaller in one."""
    return (other.x, other.y) != (point.x, point.y) and other.x <= point.x and other.y <= point.y


class _Axis(NamedTuple):
    """A log axis from pixel `start` for `low` to pixel `end` for `high`, and the place of zero."""

    low: float
    high: float
    start: float
    end: float
    zero: float
    ticks: tuple[tuple[float, str], ...] = ()

    def at(self, value: float) -> float:
        if value <= 0:
            return self.zero
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + (self.end - self.start) * share


def _log_axis(values: Sequence[float], base: int, start: float, end: float, many: int) -> _Axis:
    """Holds all values with some air, and spans at least a factor of 2; has about `many` ticks."""
    positive = [value for value in values if value > 0] or [1.0]
    direction = math.copysign(1.0, end - start)
    zeros = any(value <= 0 for value in values)
    zero = start + 12 * direction
    start += 34 * direction if zeros else 0
    low, high = min(positive), max(positive)
    air = max((2 * low / high) ** 0.5, (high / low) ** 0.06)
    low, high = low / air, high * air
    first, last = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    if last - first >= 1:
        ticks = [float(base) ** k for k in range(first, last + 1, -(-(last - first + 1) // (many + 1)))]
    else:
        ticks = [tick for tick in _round_numbers(low, high, many) if tick > 0]
    axis = _Axis(low, high, start, end, zero)
    marks = [(axis.at(tick), f"{tick:g}") for tick in ticks]
    return axis._replace(ticks=tuple(marks + [(zero, "0")] * zeros))


def _round_numbers(low: float, high: float, many: int) -> list[float]:
    """At most about `many` multiples of 1, 2 or 5 times a power of ten, from low to high."""
    raw = (high - low) / many
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{k * step:.6g}") for k in range(first, last + 1)]


def _shorten(paths: Sequence[str], room: int) -> tuple[str, list[str]]:
    """What all paths begin and end with, and each of them without that and, where it is too long, its middle.

    Example:
        >>> _shorten(["net/conv1/kernel", "net/a_long_name_for_a_layer/kernel"], 12)
        ('net/…/kernel', ['conv1', 'a_…a_layer'])
    """
    split = [path.split("/") for path in paths]
    most = min(map(len, split)) - 1 if len(split) > 1 else 0
    first = next((i for i in range(most) if len({keys[i] for keys in split}) > 1), most)
    last = next((i for i in range(most - first) if len({keys[-1 - i] for keys in split}) > 1), most - first)
    names = ["/".join(keys[first : len(keys) - last]) for keys in split]
    start, end = (
        "".join(f"{key}/" for key in split[0][:first]),
        "".join(f"/{key}" for key in split[0][-last:] if last),
    )
    return _cut(f"{start}…{end}" if first + last else "", room), [_cut(name, room) for name in names]


def _cut(words: str, room: int) -> str:
    """Words without their middle where they are too long: cut at "/" or "_", within a name only if it is too long."""
    if len(words) <= room:
        return words
    pieces = re.findall(r"[^/_]+[/_]*|[/_]+", words)
    start, end, middle = "", "", pieces
    while True:
        if middle and len(start + middle[-1] + end) < room:
            end, middle = middle[-1] + end, middle[:-1]
        elif not end or not middle or len(start + middle[0] + end) >= room:
            break
        if middle and len(start + middle[0] + end) < room:
            start, middle = start + middle[0], middle[1:]
    keep = room - 1
    return f"{start}…{end}" if end else f"{words[: keep // 2]}…{words[len(words) - (keep + 1) // 2 :]}"


def _apart(wanted: Sequence[float], space: float, low: float, high: float) -> list[float]:
    """Ascending places, at least `space` apart, near the wanted ones, which ascend too."""
    places: list[float] = []
    for place in wanted:
        places.append(max(place, places[-1] + space if places else low))
    for i in reversed(range(len(places))):
        places[i] = min(places[i], places[i + 1] - space if i + 1 < len(places) else high)
    return places


def _steps(kind: str, shares: np.ndarray, left: float, right: float, top: float, bottom: float) -> str:
    """The outline of a histogram, from base line to base line; a share of 1 is as tall as the chart."""
    ends = np.linspace(left, right, shares.size + 1)[1:]
    moves = [f"V{_number(bottom - (bottom - top) * y)}H{_number(x)}" for x, y in zip(ends, shares, strict=True)]
    outline = f"M{_number(left)} {_number(bottom)}{''.join(moves)}V{_number(bottom)}"
    return f'<path class="{kind}" d="{outline}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str = "rule") -> str:
    return f'<path class="{kind}" d="M{_number(x1)} {_number(y1)}L{_number(x2)} {_number(y2)}"/>'


def _text(x: float, y: float, words: str, anchor: str, kind: str = "tick") -> str:
    place = f'x="{_number(x)}" y="{_number(y)}" text-anchor="{anchor}"'
    return f'<text class="{kind}" {place}>{escape(words)}</text>'


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img">{"".join(parts)}</svg>'


def _number(value: float) -> str:
    """A pixel's place, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
