"""The command line, through `main` and once through a process."""

import importlib.metadata
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import lcq
from lcq.io.checkpoints import checkpoint
from tests.cli.command import RULE, run, same, weights


@pytest.fixture
def source(tmp_path):
    checkpoint.write(tmp_path / "in.npz", weights())
    return tmp_path / "in.npz"


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
    assert "format lcq 3" in out and "dense0/kernel.codes" in out and "BF16" in out and "I64" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["dense0/kernel.levels", "F32", "1x1x4", "16", "raw", "16"] in lines
    assert ["count", "I64", "3", "24", "raw", "24"] in lines
    streams = [line for line in lines if len(line) > 4 and line[1] in ("F32", "U32", "BF16", "I64")]
    raw, held = (sum(int(line[i]) for line in streams) for i in (3, -1))
    share = np.bincount(expected["dense0"]["kernel"].codes.reshape(-1)) / expected["dense0"]["kernel"].codes.size
    least = -(share * np.log2(share)).sum() * expected["dense0"]["kernel"].codes.size / 8
    assert [line[4] for line in streams if line[-2] == "rans" and line[0] == "dense0/kernel.codes"] == [f"{least:.0f}"]
    size = packed.stat().st_size
    assert f"{size:,} bytes: {held:,} of streams, {size - held:,} of header and index\n" in out
    assert f"\n{raw:,} bytes of streams before coding\n" in out
    assert run("decompress", packed, "-o", back) == 0
    same(checkpoint.read(back), expected)


TOML = """
# dense1 stays
[[rule]]
pattern = 'dense1/.*'
scheme = "None"

[[rule]]
pattern = '(.*/)?kernel'
scheme = "KMeans(4)"
"""


def test_a_plan_is_read_kept_and_shown(source, tmp_path, capsys):
    plan, packed, again = tmp_path / "plan.toml", tmp_path / "out.lcq", tmp_path / "again.lcq"
    plan.write_text(TOML)
    rules = [lcq.Rule("dense1/.*", None), lcq.Rule("(.*/)?kernel", lcq.KMeans(4))]
    assert run("compress", source, "--plan", plan, "--dry-run") == 0
    assert "dense1/.*" in capsys.readouterr().out
    assert run("compress", source, "--plan", plan, "-o", packed) == 0
    same(lcq.load(packed), lcq.compress(weights(), rules))
    assert lcq.read_plan(packed) == lcq.read_plan(plan) == lcq.Plan(rules)
    assert run("compress", source, "--plan", packed, "-o", again) == 0
    assert again.read_bytes() == packed.read_bytes()
    assert run("compress", source, "--rule", "dense1/.*=None", "--rule", RULE, "-o", again, "--force") == 0
    assert again.read_bytes() == packed.read_bytes()
    capsys.readouterr()
    assert run("inspect", packed) == 0
    assert capsys.readouterr().out.endswith(f"{lcq.Plan(rules)}\n")


def test_a_set_of_files(source, tmp_path, capsys):
    packed, back = tmp_path / "out.lcq", tmp_path / "back.npz"
    assert run("compress", source, "--rule", RULE, "-o", packed, "--max-shard-bytes", "150") == 0
    shards = sorted(path.name for path in tmp_path.glob("out-*.lcq"))
    assert len(shards) > 1
    for command in ("inspect", "table"):
        capsys.readouterr()
        assert run(command, packed) == 0
        size = sum((tmp_path / name).stat().st_size for name in ["out.lcq", *shards])
        out = capsys.readouterr().out
        assert f"{size:,} bytes: " in out if command == "inspect" else f" {size:,} " in out
        assert all(name in out for name in shards) or command == "table"
    assert run("decompress", packed, "-o", back) == 0
    same(checkpoint.read(back), lcq.decompress(lcq.load(packed)))
    assert run("inspect", tmp_path / shards[0]) == 1
    assert "got a shard of a set; load the file without" in capsys.readouterr().err


def test_a_plan_is_shown_without_what_a_terminal_would_run(tmp_path, capsys):
    path, escape = tmp_path / "net.lcq", "\\u001b"
    for pattern, scheme in ((f"{escape}2J", "None"), ("w", f"KMeans('{escape}2J')")):
        lcq.save(path, weights(), plan=f'[[rule]]\npattern = "{pattern}"\nscheme = "{scheme}"')
        assert run("inspect", path) == (scheme != "None")
        out = "".join(capsys.readouterr())
        assert "\x1b" not in out and ("U0000001b2J" in out or "x1b2J" in out)


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
        (("compress", "nan.npz", "--rule", "w=KMeans(4)", "-o", "x.lcq"), "w: expected finite weights"),
        (("compress", "in.npz", "--rule", RULE, "-o", "no/such/folder/x.lcq"), "no/such/folder: no such folder"),
        (("compress", "in.npz", "--rule", RULE, "-o", "."), "already there"),
        (("compress", "in.npz", "--rule", RULE, "-o", ".", "--force"), "expected the name of a file, got a folder"),
        (("compress", "in.npz", "--rule", RULE, "-o", "in.npz", "--force"), "expected another file than the input"),
        (("compress", "in.npz", "--rule", RULE, "-o", "/proc/x.lcq"), "/proc: cannot write there"),
        (
            ("compress", "in.npz", "--rule", RULE, "-o", "x.npz"),
            "x.npz: expected the name of an .lcq file, got that of",
        ),
        (("import", "in.npz", "-o", "x.safetensors"), "x.safetensors: expected the name of an .lcq file"),
        (("compress", "in.npz", "--rule", ".*=KMeans(4)", "-o", "x.lcq"), "exclude it with --rule 'count=None' before"),
        (("decompress", "small.lcq", "-o", "x.txt"), "x.txt: expected a .safetensors or .npz file"),
        (("decompress", "small.lcq", "-o", "small.lcq", "--force"), "of .lcq files lcq decompress makes checkpoints"),
        (("decompress", "small.lcq", "-o", "x.npz", "--limit", "10"), "raise --limit if you trust it"),
        (("inspect", "small.lcq", "--limit", "10"), "raise --limit if you trust it"),
        (("compress", "in.txt", "--rule", RULE, "-o", "x.lcq"), "in.txt"),
        (("compress", "in.npz", "--plan", "gone.toml", "-o", "x.lcq"), "No such file or directory: gone.toml"),
        (
            ("compress", "in.npz", "--plan", "bad.toml", "-o", "x.lcq"),
            "bad.toml: rule 2: expected a scheme, got 'Kmeens",
        ),
        (("compress", "in.npz", "--plan", "without.lcq", "-o", "x.lcq"), "none: save one with lcq compress or"),
        (("inspect", "gone.lcq"), "No such file or directory: gone.lcq"),
        (("inspect", "in.npz"), "in.npz: not an lcq file"),
        (("table", "in.npz"), "in.npz: not an lcq file"),
        (("table", "small.lcq", "--reference", "gone.npz"), "gone.npz: no such file"),
        (("table", "small.lcq", "--reference", "in.npz"), "in.npz: expected a reference with the same leaves; only in"),
        (
            ("table", "small.lcq", "--reference", "short.npz", "--html", "x.npz"),
            "bias: expected a reference of shape [5]",
        ),
        (("table", "small.lcq", "--html", "no/such/x.html"), "no/such: no such folder"),
        (("decompress", "in.npz", "-o", "x.npz"), "in.npz: not an lcq file"),
        (("decompress", "plain.safetensors", "-o", "x.npz"), "format; lcq compress makes .lcq files of those of other"),
        (("decompress", "small.lcq", "-o", "x.gguf"), "to be read alone, .weights.h5, .gguf; lcq export writes .gguf"),
    ],
)
def test_bad_input_is_one_line_and_status_1(source, arguments, complaint, capsys, monkeypatch):
    monkeypatch.chdir(source.parent)
    np.savez("nan.npz", w=np.array([1, np.nan], np.float32))
    np.savez("short.npz", bias=np.ones(4, np.float32))
    lcq.save("small.lcq", {"bias": np.ones(5, np.float32)})
    (source.parent / "in.txt").write_text("weights")
    safetensors.numpy.save_file({"w": np.ones(2)}, "plain.safetensors")
    lcq.save("without.lcq", weights())
    Path("bad.toml").write_text(TOML.replace("KMeans", "Kmeens"))
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert complaint in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not (source.parent / "x.lcq").exists() and not (source.parent / "x.npz").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "required"),
        (("inspect", "x.lcq", "--limit", "much"), "expected a number of bytes, such as 40G, got 'much'"),
        (("explode",), "invalid choice"),
        (("compress", "in.npz", "-o", "x.lcq"), "--rule"),
        (("compress", "in.npz", "--rule", RULE), "expected -o OUT.lcq, or --dry-run"),
        (("compress", "in.npz", "--rule", "kernel=Kmeens(4)", "-o", "x.lcq"), "known schemes: Additive, Cast, "),
        (("compress", "in.npz", "--rule", "bias=Cast(bfloat16)", "-o", "x.lcq"), 'put it in quotes: "bfloat16"'),
        (
            ("compress", "in.npz", "--rule", RULE, "--plan", "plan.toml", "-o", "x.lcq"),
            "not allowed with argument --rule",
        ),
        (("decompress", "in.lcq"), "-o"),
        (
            ("quantize", "in.npz", "in.npz", "--data", "x.npz", "--rule", RULE, "-o", "x.lcq"),
            "expected MODULE:FUNCTION",
        ),
        (("quantize", "a:b", "in.npz", "--rule", RULE, "-o", "x.lcq"), "--data"),
        (("quantize", "a:b", "in.npz", "--data", "x.npz", "--rule", RULE), "-o"),
        (("quantize", "a:b", "in.npz", "--data", "x.npz", "--rule", RULE, "-o", "y", "--batch", "0"), "above 0"),
        (("quantize", "a:b", "in.npz", "--data", "x.npz", "--rule", RULE, "-o", "y", "--method", "gtpq"), "gptq"),
        (("demo", "--seed", "x"), "invalid int"),
    ],
)
def test_bad_usage_is_status_2(arguments, complaint, capsys):
    assert run(*arguments) == 2
    assert complaint in capsys.readouterr().err


def test_the_output_is_checked_before_the_work(source, tmp_path, monkeypatch):
    def work(*given, **more):
        raise AssertionError

    for door in ("read", "read_checkpoint"):
        monkeypatch.setattr(checkpoint, door, work)
    monkeypatch.setattr(lcq, "load", work)
    lcq.save(tmp_path / "net.lcq", weights())
    link = tmp_path / "link.lcq"
    link.symlink_to(source)
    for out in ("no/x.lcq", "/proc/x.lcq", str(tmp_path), str(source), str(link)):
        assert run("compress", source, "--rule", RULE, "-o", out, "--force") == 1
    for out in ("no/x.npz", "/proc/x.npz", "x.txt", str(tmp_path / "net.lcq")):
        assert run("decompress", tmp_path / "net.lcq", "-o", out, "--force") == 1
    assert run("table", tmp_path / "net.lcq", "--html", "no/x.html") == 1


def test_a_sharded_checkpoint(tmp_path, capsys):
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    (tmp_path / "hf").mkdir()
    for i, name in enumerate(names):
        w = {f"layers.{i}.proj.weight": weights()["dense0"]["kernel"] + i}
        safetensors.numpy.save_file(w, tmp_path / "hf" / name, {"format": "pt"})
    index = {"weight_map": {f"layers.{i}.proj.weight": name for i, name in enumerate(names)}}
    where = tmp_path / "hf" / "model.safetensors.index.json"
    where.write_text(json.dumps(index))
    packed, back = tmp_path / "o.lcq", tmp_path / "back.safetensors"
    assert run("compress", tmp_path / "hf", "--rule", ".*proj.weight=KMeans(4)", "-o", packed) == 0
    assert run("compress", where, "--rule", ".*proj.weight=KMeans(4)", "-o", packed, "--force") == 0
    assert sorted(lcq.load(packed)) == ["layers.0.proj.weight", "layers.1.proj.weight"]
    assert run("table", packed, "--reference", tmp_path / "hf") == 0
    assert run("inspect", packed) == 0 and "metadata: 'format': 'pt'" in capsys.readouterr().out
    assert run("decompress", packed, "-o", back) == 0
    with safetensors.safe_open(back, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert run("decompress", packed, "-o", tmp_path / "back.npz") == 0
    assert "no place for the metadata format" in capsys.readouterr().err
    (tmp_path / "hf" / names[1]).unlink()
    assert run("compress", tmp_path / "hf", "--rule", ".*=KMeans(4)", "-o", packed, "--force") == 1
    assert names[1] in capsys.readouterr().err


def test_warnings_are_a_line_in_the_words_of_the_command(tmp_path, capsys):
    checkpoint.write(tmp_path / "in.npz", {"layers": {"kernel": np.ones((3, 8, 4), np.float32)}})
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("compress", tmp_path / "in.npz", "--rule", ".*=Uniform(4, per='channel')", "--dry-run") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(lines) == 1 and lines[0].startswith("lcq compress: warning: layers/kernel: ")
    assert "'; stacked=1' behind the scheme" in lines[0] and "lcq.Rule" not in lines[0]


def test_the_command_runs_where_lcq_is_not_installed(capsys, monkeypatch):
    """`python -m lcq` on a copy of the source, found by PYTHONPATH, looked for the metadata of a package."""
    version = importlib.metadata.version

    def of_others(name):
        if name == "lcq":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", of_others)
    assert run("--version") == 0 and capsys.readouterr().out.startswith(f"lcq {lcq.__version__} (jax ")


def test_version(capsys):
    assert run("--version") == 0 and capsys.readouterr().out.startswith("lcq 0.")


def test_help_is_status_0(capsys):
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert "demo" in shown and "lcq.forms" not in shown, "about commands, not about the package"
    assert run("compress", "--help") == 0
    shown = capsys.readouterr().out
    assert "PATTERN=SCHEME" in shown and "layout=oi" in shown
    for command in ("compress", "quantize"):
        assert run(command, "--help") == 0
        shown = capsys.readouterr().out
        assert re.search(r"^  IN +the checkpoint$", shown, re.MULTILINE) and "CHECKPOINT" not in shown, command


def test_a_reader_that_leaves_is_no_error(source, tmp_path):
    lcq.save(tmp_path / "net.lcq", {f"leaf{i}": np.ones(3) for i in range(3000)})
    command = f"{sys.executable} -m lcq inspect {tmp_path}/net.lcq | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=240)
    assert done.stdout.count("\n") == 1 and done.stderr == ""


def test_as_a_process(source):
    command = [sys.executable, "-m", "lcq", "compress", str(source), "--rule", RULE, "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "dense0/kernel" in done.stdout and done.stderr == ""
    done = subprocess.run([*command[:3], "inspect", "gone.lcq"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "gone.lcq" in done.stderr
