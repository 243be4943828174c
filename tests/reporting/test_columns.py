"""Text in columns: within the width, and no word broken."""

import re

import pytest
from rich.console import Console

from lcq.reporting.columns import Column, Columns, fit, fold, terminal_width

PATHS = ("encoder/layers_0..11/self_attention/query/kernel", "encoder/layers_0..11/mlp/wi/kernel", "token_embedder")
COLUMNS = [
    Column("leaf", PATHS),
    Column("form", ("codes K=16, fixed, 18432 scales",) * 3),
    Column("bits", ("1,234,567", "1", "22"), number=True),
    Column("coded bytes", ("1", "2", "3"), number=True),
]


@pytest.mark.parametrize("width", [1, 8, 20, 100])
def test_fold_breaks_between_words_only(width):
    for path in PATHS:
        lines = fold(path, width).split("\n")
        assert "".join(lines) == path and all(re.search("[/_]$", line) for line in lines[:-1])
        assert all(len(line) <= width or not re.search("[/_].", line) for line in lines)
    assert fold("codes K=16, fixed", 12) == "codes K=16,\nfixed" and fold("", 3) == ""


@pytest.mark.parametrize("width", range(30, 130, 7))
def test_columns_fit(width):
    fitting, out, gap = fit(COLUMNS, width, ["bits", "form"])
    wide = [max(len(line) for cell in (c.header, *c.cells) for line in cell.split("\n")) for c in fitting]
    assert sum(wide) + gap * (len(wide) - 1) <= width
    assert [c.header.replace("\n", " ") for c in fitting] == [c.header for c in COLUMNS if c.header not in out]
    assert out == ["form", "bits"][2 - len(out) :] or out == ["bits"]
    for column in fitting:
        (before,) = (c for c in COLUMNS if c.header == column.header.replace("\n", " "))
        assert [re.sub(r"\n", "", cell) for cell in column.cells] == [
            re.sub(r"(?<=,) (?=\n)|\n", "", c) for c in before.cells
        ] or (column.header == "form")
    if width >= 110:
        assert fitting == COLUMNS and out == []


@pytest.mark.parametrize("width", [44, 60, 150])
def test_a_console_prints_them_as_wide_as_it_is(width):
    console = Console(width=width)
    with console.capture() as captured:
        console.print(Columns(COLUMNS))
    lines = captured.get().splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    assert re.sub(r"\s", "", "".join(line[1:27] for line in lines[2:] if "\u2500" not in line)).count("encoder/") == 2
    assert sum("1,234,567" in line for line in lines) == 1


def test_the_width_is_the_terminal_s(monkeypatch):
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal_width() == 77
