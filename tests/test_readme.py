"""The README and the notebooks do what they say: every block runs, every table is the committed one."""

import json
import os
import re
from pathlib import Path

import matplotlib
import pytest

from benchmarks.harness import artifacts, tables
from lcq.examples import data

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.skipif("optimization_level=0" in os.environ["XLA_FLAGS"], reason="runs in test_optimized.py")
def test_code_blocks_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "net.lcq").exists()
    assert float(names["accuracy"]) > 0.95


def test_tables_are_the_committed_results():
    texts = {path: path.read_text() for path in tables.documents()}
    for path, text in texts.items():
        assert text == tables.filled(text), f"{path}; run: python -m benchmarks.harness.tables"
    assert set(tables.TABLES) == {name for text in texts.values() for _, name, _ in tables.BLOCK.findall(text)}


def test_results_say_how_they_were_made_and_every_file_is_in_one():
    runs = {}
    for path in (ROOT / "benchmarks/results").glob("*.json"):
        result = json.loads(path.read_text())
        facts = {"command", "commit", "seeds", "versions", "machine", "wall_seconds", "cpu_seconds"}
        assert facts <= result["made"].keys(), path
        assert not re.search(r"(^|[\s='])/\w", result["made"]["command"]), path
        files = {run["artifact"]: (run["bytes"], run["sha256"]) for run in artifacts.named(result["rows"])}
        assert not (files and result["made"]["uncommitted_changes"]), path
        runs |= files
    here = {path.name: (path.stat().st_size, artifacts.sha256(path)) for path in artifacts.ARTIFACTS.glob("*.lcq")}
    assert here and here.items() <= runs.items()


LONG = ("01_compress_a_net.ipynb", "02_choose_a_scheme.ipynb", "05_one_bit_and_below.ipynb")


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_run(path, tmp_path, monkeypatch):
    """Every cell as it stands; the long ones see every fourth image, so that their epochs have fewer updates."""
    monkeypatch.chdir(tmp_path)
    if path.name in LONG:
        whole = data.digits()
        few = whole._replace(x_train=whole.x_train[::4], y_train=whole.y_train[::4])
        monkeypatch.setattr(data, "digits", lambda: few)
    matplotlib.use("agg")
    names: dict = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)


HOME = "https://github.com/lcq-authors/lcq/"
RAW = "https://raw.githubusercontent.com/lcq-authors/lcq/main/"


def test_links_lead_somewhere():
    """All are absolute, so that the package index shows them; those to lcq's own files are checked."""
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", README)
    own = [target for target in targets if target.startswith((HOME, RAW))]
    assert own and all(target.startswith("https://") for target in targets)
    for target in own:
        path = target.removeprefix(RAW).removeprefix(HOME).removeprefix("blob/main/").removeprefix("tree/main/")
        assert (ROOT / path).exists(), target


def test_readme_is_short():
    assert len(README.splitlines()) <= 200
