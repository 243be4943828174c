"""`lcq inspect` reads a file without making anything dense."""

import jax.numpy as jnp
import numpy as np
from rich.text import Text

import lcq
from lcq.forms import Factors
from tests.cli.command import run


def test_inspect_makes_nothing_dense(tmp_path, capsys, monkeypatch):
    ones = np.ones((1 << 17, 1), np.float32)
    form = Factors(left=ones, tail=(1 << 17, 1 << 17), right=ones.T.copy())
    lcq.save(tmp_path / "large.lcq", {"large": form, "small": lcq.KMeans(2).project(jnp.arange(8.0))})
    assert run("decompress", tmp_path / "large.lcq", "-o", tmp_path / "x.npz") == 1
    assert "--limit" in capsys.readouterr().err
    monkeypatch.setattr(Factors, "dense", None)
    assert run("inspect", tmp_path / "large.lcq") == 0
    assert "131072x1" in capsys.readouterr().out
    assert run("inspect", tmp_path / "large.lcq", "--limit", "0.9M") == 1
    assert run("inspect", tmp_path / "large.lcq", "--limit", "1.5MiB") == 0


def test_inspect_fits_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR", "1")
    lcq.save("net.lcq", {f"dense{i}": {"kernel": np.full((1200 * i, 300), i, np.float32)} for i in (1, 2)})
    assert run("inspect", "net.lcq") == 0
    lines = Text.from_ansi(capsys.readouterr().out).plain.splitlines()
    assert any("dense2" in line for line in lines) and max(map(len, lines)) <= 80
