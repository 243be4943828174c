"""`lcq demo` on a terminal's output that is none."""

import jax.numpy as jnp
import pytest

import lcq
from tests.cli.command import run


@pytest.mark.filterwarnings("ignore:the weights are:UserWarning")
def test_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    assert run("demo", "--out", out, "--quick") == 0
    files = ["accuracy.png", "dc-1bit.lcq", "float.lcq", "lc-1bit.lcq", "weights.png"]
    assert sorted(path.name for path in out.iterdir()) == files
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("float", "1 bit, direct", "1 bit, LC", "360 test digits", "found equal"))
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    tree = lcq.load(out / "lc-1bit.lcq")
    assert lcq.sizes(tree)["dense0/kernel"].bits == 640 + 64
    assert len(jnp.unique(tree["dense0"]["kernel"].dense())) == 2
    assert run("demo", "--out", out, "--quick") == 1
    assert "--force" in capsys.readouterr().err
