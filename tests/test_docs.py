"""The documentation covers what there is, and its code blocks run."""

import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lcq

DOCS = Path(__file__).parent.parent / "docs"
BLOCKS = {
    str(path.relative_to(DOCS)): re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    for path in sorted(DOCS.glob("**/*.md"))
}


@pytest.mark.parametrize("page", [page for page, blocks in BLOCKS.items() if blocks])
def test_code_blocks_run_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), names)


def test_every_namespace_has_a_page():
    namespaces = {name for name in lcq.__all__ if inspect.ismodule(getattr(lcq, name))} - {"cli"}
    assert namespaces == {page.stem for page in DOCS.glob("api/*.md")} - {"index"}


def test_a_namespace_shows_what_is_public():
    names = [name for _, name, package in pkgutil.walk_packages(lcq.__path__, "lcq.") if package]
    spaces = [lcq, *map(importlib.import_module, names)]
    of_modules = {space.__name__ for space in spaces if not hasattr(space, "__all__")}
    assert of_modules == {"lcq.cli", "lcq.examples", "lcq.io.entropy_coding", "lcq.layers"}
    for space in spaces:
        if space.__name__ not in of_modules:
            assert dir(space) == sorted(space.__all__), f"{space.__name__}: give it the __dir__ of the others"
            assert all(hasattr(space, name) for name in dir(space)), space.__name__


def test_every_name_of_the_face_is_in_one_namespace():
    namespaces = [getattr(lcq, name) for name in lcq.__all__ if inspect.ismodule(getattr(lcq, name))]
    for name in set(lcq.__all__) - {"__version__"}:
        found = [space for space in namespaces if name in getattr(space, "__all__", ())]
        homes = [space for space in found if getattr(space, name) is getattr(lcq, name)]
        assert inspect.ismodule(getattr(lcq, name)) or len(homes) == 1, name


def test_the_architecture_page_has_the_rooms_of_today():
    told = subprocess.run([sys.executable, DOCS / "rooms.py"], capture_output=True, text=True, check=True).stdout
    assert told in (DOCS / "architecture.md").read_text(), (
        "put what python docs/rooms.py says into docs/architecture.md"
    )


def test_the_deploy_page_has_what_each_target_holds_today():
    told = subprocess.run([sys.executable, DOCS / "targets.py"], capture_output=True, text=True, check=True).stdout
    assert told in (DOCS / "guides" / "deploy.md").read_text(), (
        "put what python docs/targets.py says into docs/guides/deploy.md"
    )


def test_the_page_of_formats_is_that_of_the_code(monkeypatch):
    """Both tables; and a format that is registered has its row."""
    monkeypatch.syspath_prepend(str(DOCS))
    formats = importlib.import_module("formats")
    shown = (DOCS / "guides" / "formats.md").read_text()
    for part in formats.page():
        assert part in shown, "put what python docs/formats.py says into docs/guides/formats.md"
    rows = [cells[:2] for cells in formats.formats()]
    for way, registry in (("in", lcq.io.CHECKPOINT_FORMATS), ("out", lcq.io.EXPORT_FORMATS)):
        assert all((way, f"`{name}`") in rows for name in registry)


def test_a_format_of_ones_own_is_in_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    formats = importlib.import_module("formats")

    class Text(lcq.io.CheckpointFormat):
        """Numbers in a text file."""

        suffix = ".txt"

        def read(self, path):
            raise NotImplementedError

    class Lines(lcq.io.ExportFormat):
        """Codes in a text file."""

        suffix = ".txt"
        declare = encode = write = None

    added = ((lcq.io.CHECKPOINT_FORMATS, Text), (lcq.io.EXPORT_FORMATS, Lines))
    for registry, format in added:
        registry.register("mine")(format)
    try:
        assert {cells[:4] for cells in formats.formats()} >= {
            ("in", "`mine`", "`.txt`", "Numbers in a text file."),
            ("out", "`mine`", "`.txt`", "Codes in a text file."),
        }
    finally:
        for registry, _ in added:
            registry.unregister("mine")


def test_docstrings_are_shown_as_they_are_written():
    """Equations stand as they are, stars and bars mean nothing, names in backticks are code."""
    spec = importlib.util.spec_from_file_location("plain_docstrings", DOCS / "_ext" / "plain_docstrings.py")
    shown = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shown)
    equation, example = ["", "    min ||w||^2", "    q_t", ""], ["", "Example:", "    >>> a_ * b_"]
    written = ["The nearest *w_i*, |w|.", *equation, "More of `w`.", *example]
    restructured = [r"The nearest \*w\_i\*, \|w\|.", "", "::", *equation, "More of ``w``.", *example]
    assert shown.restructured(written) == restructured
