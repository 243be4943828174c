"""Leaves alike in all but a number are one group, and nothing else is."""

import math

import pytest

from lcq.reporting.groups import by_pattern, grouped, pattern
from lcq.reporting.row import Row


def row(path, form="codes K=4", shape=(2, 3), **more):
    return Row(path, shape, form, 192, 12, **more)


def test_sums_and_order():
    rows = [
        row(f"block_{i}/{name}", error=1.0 + i, energy=4.0, entropy=10.5, coded=16, compressed=True)
        for i in range(3)
        for name in ("up", "down")
    ]
    first, second = grouped(rows)
    assert first.row.path == "block_0..2/up" and second.rows == tuple(rows[1::2])
    assert (first.row.bits, first.row.dense, first.row.coded, first.row.entropy) == (36, 576, 48, 31.5)
    assert first.row.ratio == rows[0].ratio and first.row.distortion == 6 / 12 and first.row.compressed
    assert [each for group in grouped(rows) for each in group.rows].sort() == rows.sort()


@pytest.mark.parametrize(
    "other",
    [
        row("l1/w", shape=(3, 2)),
        row("l1/w", "codes K=16"),
        row("l1/v"),
        row("l1/w", dtype="bfloat16"),
        row("l1/w", blocks="axis 1"),
        row("l1/w", rule="w", scheme="KMeans(4)"),
        row("l1/w", compressed=True),
        row("l#/w"),
    ],
)
def test_other_leaves_are_other_groups(other):
    groups = grouped([row("l0/w"), other])
    assert [group.row for group in groups] == [row("l0/w"), other]


def test_forms_and_rules_that_differ_in_a_number():
    rows = [
        row(f"l{i}/w", f"sparse float32, {kept:,} kept, gaps of {i + 4} bits", rule=f"l{i}/w", scheme="Prune(count=9)")
        for i, kept in enumerate((12_000, 980, 3_021))
    ]
    (group,) = grouped(rows)
    assert group.row.form == "sparse float32, 980..12,000 kept, gaps of 4..6 bits"
    assert group.row.rule == "l0..2/w" and group.row.error is None


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (["a"], "a"),
        (["a7"], "a7"),
        (["a9", "a10", "a11"], "a9..11"),
        (["a0", "a2", "a3"], "a0,2..3"),
        ([f"a{2 * i}" for i in range(9)], "a0..16"),
        (["s0/b0", "s0/b1", "s1/b0", "s1/b1"], "s0..1/b0..1"),
        (["conv2d_0/w", "conv2d_1/w"], "conv2d_0..1/w"),
        (["a" + "1" * 5000, "a" + "1" * 4999 + "2"], "a" + "1" * 4986 + "1" * 13 + "1..2"),
    ],
)
def test_patterns(paths, words):
    assert pattern(paths) == words or len(words) > 4000
    assert by_pattern(paths) == {pattern(paths): paths}


def test_missing_numbers_stay_missing():
    assert grouped([row("a0", entropy=1.0, coded=1), row("a1")])[0].row.coded is None
    assert grouped([row("a0", error=math.inf, energy=1.0), row("a1", error=1.0, energy=1.0)])[0].row.error == math.inf
