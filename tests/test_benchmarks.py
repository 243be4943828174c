"""The harness of the benchmarks: it names files of nets, says how a missing one is made, and puts tables in place."""

import hashlib
import importlib
from pathlib import Path

import pytest

from benchmarks.harness import artifacts, markdown, record, tables

ROOT = Path(__file__).parent.parent


def test_refresh_names_the_files_that_are_here_and_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ARTIFACTS", tmp_path)
    (tmp_path / "here.lcq").write_bytes(b"net")
    absent = {"artifact": "absent.lcq", "bytes": 5, "sha256": "named before"}
    row = {"runs": [{"artifact": "here.lcq", "bytes": 0}, dict(absent)], "median": {"bytes": 0, "test_error": 2.0}}
    artifacts.refresh([row, {"other": "row", "median": 1.0}])
    here = {"artifact": "here.lcq", "bytes": 3, "sha256": hashlib.sha256(b"net").hexdigest()}
    assert row == {"runs": [here, absent], "median": {"bytes": 4.0, "test_error": 2.0}}


def test_a_missing_input_says_how_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "ARTIFACTS", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected .*net\.lcq, got no such file; make it again with `python"):
        artifacts.find("net.lcq", "python -m benchmarks.experiments.lenet300")
    (tmp_path / "net.lcq").touch()
    assert artifacts.find("net.lcq", "") == tmp_path / "net.lcq"


def test_record_says_the_command_and_names_the_files(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(artifacts, "ARTIFACTS", tmp_path)
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks/micro/kernels.py"), "--kept"])
    monkeypatch.setattr(record, "_git", lambda *args: "")
    (tmp_path / "net.lcq").write_bytes(b"net")
    record.record("a", [{"artifact": "net.lcq"}], seeds=[0])
    assert '"command": "python -m benchmarks.micro.kernels --kept"' in (tmp_path / "a.json").read_text()
    assert record.stored("a") == [{"artifact": "net.lcq", "bytes": 3, "sha256": hashlib.sha256(b"net").hexdigest()}]


def test_a_table_goes_between_its_markers(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"t": lambda: markdown.grid(["a", "b"], [["x", "1"]])})
    text = "before\n<!-- table: t -->\nold\n<!-- end -->\nafter\n"
    assert tables.filled(text) == text.replace("old\n", "| a | b |\n| --- | ---: |\n| x | 1 |\n")
    with pytest.raises(KeyError):
        tables.filled(text.replace("table: t", "table: none"))


@pytest.mark.parametrize("name", ["experiments.hemp", "experiments.gpfq_images", "checks.verify", "micro.kernels"])
def test_scripts_run_as_modules(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)
