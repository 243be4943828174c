"""Figures, without a display."""

import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.examples import figures


def weights():
    rng = np.random.default_rng(0)
    return {
        f"dense{i}": {"kernel": jnp.asarray(rng.normal(size=(40, 9)), jnp.float32), "bias": jnp.ones(9)}
        for i in range(4)
    }


def test_histograms(tmp_path):
    rules = [
        lcq.Rule("dense0/kernel", lcq.Uniform(8)),
        lcq.Rule(".*/kernel", lcq.KMeans(4)),
        lcq.Rule("dense0/bias", lcq.Binary()),
    ]
    figure = figures.histograms(lcq.compress(weights(), rules), weights())
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles[0] == "dense0/bias: 1 level" and titles[2] == "dense1/kernel: 4 levels" and len(titles) == 5
    stems = figure.axes[[axes.get_title() for axes in figure.axes].index(titles[2])]
    assert len(stems.patches) == 60 and sum(patch.get_height() for patch in stems.patches) == pytest.approx(100)
    figures.write(figure, tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_curves(tmp_path):
    figure = figures.curves({"LC": [(4, 99.0), (1, 97.5)], "DC": [(1, 60.0)]}, reference=("float", 99.0))
    (axes,) = figure.axes
    by_name = {line.get_label(): line for line in axes.lines}
    assert list(by_name) == ["float 99", "LC", "DC"]
    assert list(by_name["LC"].get_xdata()) == [1, 4] and list(by_name["LC"].get_ydata()) == [97.5, 99.0]
    assert axes.get_xlabel() and axes.get_ylabel()
    figures.write(figure, tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_refusals():
    with pytest.raises(ValueError, match="without forms"):
        figures.histograms(weights(), weights())
    tree = lcq.compress(weights(), [lcq.Rule("dense1/kernel", lcq.KMeans(2)), lcq.Rule(".*", None)])
    with pytest.raises(ValueError, match="dense1/kernel: expected a reference"):
        figures.histograms(tree, {"dense1": {"kernel": jnp.ones((40, 8))}})
    with pytest.raises(ValueError, match="at least one point"):
        figures.curves({"LC": []})


def test_no_global_state():
    code = "import sys; from lcq.examples import figures; figures.curves({'a': [(1, 2)]})"
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
