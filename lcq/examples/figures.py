"""Figures: weights beside the levels they went to, and accuracy against size. The only file with matplotlib."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import PyTree
from matplotlib.axes import Axes  # noqa: TID251
from matplotlib.figure import Figure  # noqa: TID251

from lcq.forms.base import is_form
from lcq.tree.paths import flatten

_GREY, _BLUE, _RED = "#b8bec6", "#1f6feb", "#d1495b"
_COLOURS = (_BLUE, _RED, "#2a9d5c", "#b07d12", "#7b5cc4")
_MARKERS = "osD^v"
_LEVELS = 64
"""Up to this many values of Delta(Theta) are drawn as stems; more as a second histogram."""


def histograms(tree: PyTree, reference: Any, *, bins: int = 60, title: str | None = None) -> Figure:
    """The weights' histogram of every compressed leaf, with the values of Delta(Theta) and their shares.

    Args:
        tree: as given by `compress`, `extract` or `load`.
        reference: the weights to draw, a tree with the same leaves; for LC the trained net it started from.
        bins: of a histogram.
        title: of the figure; None for no title.

    Raises:
        ValueError: no form in the tree, or no leaf of the same path and shape in `reference`.
    """
    originals = flatten(reference)[0]
    leaves = {path: leaf for path, leaf in flatten(tree)[0].items() if is_form(leaf)}
    if not leaves:
        raise ValueError("expected a compressed tree, got one without forms")
    for path, leaf in leaves.items():
        if path not in originals or np.shape(originals[path]) != leaf.shape:
            raise ValueError(f"{path}: expected a reference of shape {list(leaf.shape)} at this path")
    columns = min(3, len(leaves))
    lines = math.ceil(len(leaves) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axes, (path, leaf) in zip(grid, leaves.items(), strict=False):
        _histogram(axes, path, np.asarray(originals[path], np.float64), np.asarray(leaf.dense(), np.float64), bins)
    for axes in grid[len(leaves) :]:
        axes.set_axis_off()
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    if title is not None:
        figure.suptitle(title)
    return figure


def curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    reference: tuple[str, float] | None = None,
    x: str = "bits per weight",
    y: str = "test accuracy, %",
) -> Figure:
    """Accuracy against size, a curve for each method, both axes labelled and the points marked.

    Args:
        series: by name, points (size, accuracy).
        reference: name and accuracy of the uncompressed net, a dashed line.
        x: label of the sizes, drawn on a log axis in base 2.
        y: label of the accuracies.

    Raises:
        ValueError: no points.
    """
    if not any(series.values()):
        raise ValueError("expected at least one point to draw")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    if reference is not None:
        name, value = reference
        axes.axhline(value, color="#555555", linestyle="--", linewidth=1.2, label=f"{name} {value:.4g}")
    for i, (name, points) in enumerate(series.items()):
        across, up = zip(*sorted(points), strict=True) if points else ((), ())
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(across, up, color=colour, marker=marker, linewidth=1.8, markersize=6, label=name, zorder=3 - i / 8)
    ticks = sorted({size for points in series.values() for size, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="#e6e8eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    return figure


def write(figure: Figure, path: str | Path, *, dpi: int = 150) -> None:
    """Saves a figure in the format of the path's ending, .png for one; needs no display."""
    figure.savefig(path, dpi=dpi, facecolor="white")


def _histogram(axes: Axes, path: str, w: np.ndarray, delta: np.ndarray, bins: int) -> None:
    """Weights as shares per bin, levels as stems with their share of the weights on the same leaf."""
    low, high = float(min(w.min(), delta.min())), float(max(w.max(), delta.max()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, bins + 1).tolist()
    share = np.full(w.size, 100 / w.size)
    axes.hist(w.reshape(-1), edges, weights=share, color=_GREY, label="weights, % per bin")
    levels, counts = np.unique(delta, return_counts=True)
    axes.set_title(f"{path}: {levels.size:,} level{'s' * (levels.size != 1)}", fontsize=10)
    axes.set_ylabel("weights, % per bin", fontsize=8, color="#6b7280")
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    if levels.size > _LEVELS:
        axes.hist(delta.reshape(-1), edges, weights=share, histtype="step", color=_BLUE, label="compressed, % per bin")
        return
    right = axes.twinx()
    right.vlines(levels, 0, 100 * counts / delta.size, color=_BLUE, linewidth=1.6)
    right.plot(levels, 100 * counts / delta.size, "o", color=_BLUE, markersize=4)
    right.set_ylim(0, None)
    right.set_ylabel("weights, % at a level", fontsize=8, color=_BLUE)
    right.tick_params(labelsize=8, colors=_BLUE)
    right.spines[["top", "left"]].set_visible(False)
    axes.plot([], [], "o-", color=_BLUE, linewidth=1.6, markersize=4, label="levels, % of the weights at each")
