"""The command line, through `main` and once through a process."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lcq
from lcq.artifact import checkpoint
from lcq.cli import main

RULE = "(.*/)?kernel=KMeans(4)"


def weights():
    rng = np.random.default_rng(0)
    kernels = {f"dense{i}": {"kernel": rng.normal(size=(12, 8)).astype(np.float32)} for i in range(2)}
    return kernels | {"bias": np.arange(5, dtype=np.float32), "count": np.arange(3)}


@pytest.fixture
def source(tmp_path):
    checkpoint.write(tmp_path / "in.npz", weights())
    return tmp_path / "in.npz"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def same(a, b):
    x, y = (lcq.decompress(tree) for tree in (a, b))
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize("kind", [".safetensors", ".npz", ""])
def test_there_and_back(tmp_path, kind, capsys):
    source, packed, back = tmp_path / f"in{kind}", tmp_path / "out.lcq", tmp_path / f"back{kind}"
    checkpoint.write(source, weights())
    assert run("compress", source, "--rule", "bias=Cast", "--rule", RULE, "-o", packed) == 0
    expected = lcq.compress(weights(), [lcq.Rule("bias", lcq.Cast()), lcq.Rule("(.*/)?kernel", lcq.KMeans(4))])
    same(lcq.load(packed), expected)
    out = capsys.readouterr().out
    assert "codes K=4" in out and "distortion" in out and f"{packed.stat().st_size:,}" in out
    assert run("inspect", packed) == 0
    out = capsys.readouterr().out
    assert "format lcq 1" in out and "values bfloat16" in out and "array int64" in out and "of header" in out
    assert f"{packed.stat().st_size:,} bytes: {lcq.table(expected).total.bytes:,} of forms" in out
    assert run("decompress", packed, "-o", back) == 0
    same(checkpoint.read(back), expected)


def test_dry_run_writes_nothing(source, tmp_path, capsys):
    assert run("compress", source, "--rule", RULE, "-o", tmp_path / "out.lcq", "--dry-run") == 0
    assert run("compress", source, "--rule", RULE, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "(.*/)?kernel" in out and "KMeans(4)" in out and "codes K=4" in out
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]


def test_nothing_is_replaced_unless_asked(source, tmp_path, capsys):
    packed, back, folder = tmp_path / "out.lcq", tmp_path / "back.safetensors", tmp_path / "folder"
    first = ("compress", source, "--rule", RULE, "-o", packed)
    assert run(*first) == 0
    before = packed.read_bytes()
    assert run("compress", source, "--rule", "(.*/)?kernel=KMeans(2)", "-o", packed) == 1
    assert "--force" in capsys.readouterr().err and packed.read_bytes() == before
    assert run("compress", source, "--rule", "(.*/)?kernel=KMeans(2)", "-o", packed, "--force") == 0
    assert packed.read_bytes() != before
    for out in (back, folder):
        assert [run("decompress", packed, "-o", out, *more) for more in ((), (), ("--force",))] == [0, 1, 0]
        same(checkpoint.read(out), lcq.load(packed))
    other = tmp_path / "mine"
    other.mkdir()
    (other / "letter.txt").write_text("keep me")
    assert run("decompress", packed, "-o", other, "--force") == 1
    assert (other / "letter.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "back.safetensors",
        "folder",
        "in.npz",
        "mine",
        "out.lcq",
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("compress", "gone.npz", "--rule", RULE, "-o", "x.lcq"), "gone.npz"),
        (("compress", "in.npz", "--rule", "kernle=KMeans(4)", "-o", "x.lcq"), "nearest of 4 paths: dense1/kernel"),
        (("compress", "in.npz", "--rule", "count=KMeans(4)", "-o", "x.lcq"), "wants a floating-point array"),
        (("compress", "nan.npz", "--rule", "w=KMeans(4)", "-o", "x.lcq"), "w: wanted finite weights"),
        (("compress", "in.npz", "--rule", RULE, "-o", "no/such/folder/x.lcq"), "No such file"),
        (("compress", "in.txt", "--rule", RULE, "-o", "x.lcq"), "in.txt"),
        (("inspect", "gone.lcq"), "No such file or directory: gone.lcq"),
        (("inspect", "in.npz"), "in.npz: not an lcq file"),
        (("decompress", "in.npz", "-o", "x.npz"), "in.npz: not an lcq file"),
        (("decompress", "plain.safetensors", "-o", "x.npz"), "not an lcq file"),
    ],
)
def test_bad_input_is_one_line_and_status_1(source, arguments, complaint, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    np.savez("nan.npz", w=np.array([1, np.nan], np.float32))
    (source.parent / "in.txt").write_text("weights")
    safetensors.numpy.save_file({"w": np.ones(2)}, "plain.safetensors")
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert complaint in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (source.parent / "x.lcq").exists() and not (source.parent / "x.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "required"),
        (("explode",), "invalid choice"),
        (("compress", "in.npz", "-o", "x.lcq"), "--rule"),
        (("compress", "in.npz", "--rule", RULE), "wanted -o OUT.lcq, or --dry-run"),
        (("compress", "in.npz", "--rule", "kernel=Kmeens(4)", "-o", "x.lcq"), "known schemes: KMeans(k"),
        (("decompress", "in.lcq"), "-o"),
        (("demo", "--seed", "x"), "invalid int"),
    ],
)
def test_bad_usage_is_status_2(arguments, complaint, capsys):
    assert run(*arguments) == 2
    assert complaint in capsys.readouterr().err


def test_help_is_status_0(capsys):
    assert run("--help") == 0 and "demo" in capsys.readouterr().out
    assert run("compress", "--help") == 0 and "PATTERN=SCHEME" in capsys.readouterr().out


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


def test_as_a_process(source):
    command = [sys.executable, "-m", "lcq", "compress", str(source), "--rule", RULE, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "dense0/kernel" in done.stdout and done.stderr == ""
    done = subprocess.run([*command[:3], "inspect", "gone.lcq"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "gone.lcq" in done.stderr
