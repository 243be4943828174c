"""Sums: what their parts add up to, and what joint sums share."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Cast, Sum
from lcq.io import records
from lcq.io.tree_paths import flatten

RNG = np.random.default_rng(0)
A, B = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((6, 4), (5, 2)))
SCHEME = lcq.Additive(lcq.KMeans(2, exact=True), lcq.Prune(count=6, values=lcq.KMeans(3, exact=True)), lcq.LowRank(1))


@pytest.fixture(scope="module")
def forms():
    return lcq.compress({"a": A, "b": B}, [lcq.Rule("a|b", SCHEME, joint=True)])


def test_dense_is_the_sum_in_the_order_of_the_parts(forms):
    for form in forms.values():
        total = np.zeros(form.shape, np.float32)
        for part in form.parts:
            total = total + np.asarray(part.dense())
        for layout in (form, form.pack(), form.pack().unpack()):
            np.testing.assert_array_equal(layout.dense(), total)


def test_layouts_are_the_same_object_where_nothing_changes(forms):
    stored = forms["a"].pack()
    assert stored.pack() is stored and forms["a"].unpack() is forms["a"]


def test_joint_sums_store_and_count_what_they_share_once(tmp_path, forms):
    lcq.save(tmp_path / "net.lcq", forms)
    back, encoder = lcq.load(tmp_path / "net.lcq"), records.Encoder()
    for leaf in flatten(back)[0]:
        encoder.encode(leaf)
    tables = [f"a.parts.{i}.levels" for i in (0, 1)]
    own = [f"{leaf}.parts.{name}" for leaf in "ab" for name in ("0.codes", "1.mask", "1.values", "2.left", "2.right")]
    assert sorted(encoder.streams) == sorted(tables + own)
    for name, form in forms.items():
        np.testing.assert_array_equal(back[name].dense(), form.dense())
    kept = [form.parts[1].kept for form in back.values()]
    assert sum(kept) == 6
    places = [32 + 32 if n else 0 for n in kept]  # a word each for places and codes, if there are any
    first = 24 + 2 * 32 + places[0] + 3 * 32 + 32 * 10
    second = 10 + places[1] + 32 * 7
    assert forms["b"].shared_bits == 2 * 32 + 3 * 32
    assert [row.bits for row in lcq.sizes(back).values()] == [first, second]
    assert [row.bits for row in lcq.sizes(forms).values()] == [first, second]


def test_leaves_that_share_must_agree(tmp_path, forms):
    other = forms["b"].parts
    other = (dataclasses.replace(other[0], levels=other[0].levels + 1), *other[1:])
    with pytest.raises(ValueError, match=r"b: expected the parts.0.levels of a, which shares it"):
        lcq.save(tmp_path / "net.lcq", {"a": forms["a"], "b": dataclasses.replace(forms["b"], parts=other)})


CAST = Cast(np.ones((2, 3), np.float16))


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (Sum(()), "parts: expected at least one form, got none"),
        (
            Sum((CAST, Cast(np.ones((3, 2), np.float16)))),
            r"parts: 1: expected the shape \[2, 3\] of the first, got \[3, 2\]",
        ),
        (Sum((CAST, Cast(np.ones((2, 3), np.int16)))), "parts: 1: values: expected one of"),
        (Sum((CAST,), dtype="bool"), "dtype: expected one of"),
        (Sum((CAST, Cast(np.full((2, 3), np.nan, np.float16)))), "expected finite numbers, got 6"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, form, message):
    with monkeypatch.context() as unchecked:
        unchecked.setattr(records, "check_form", lambda form: None)
        lcq.save(tmp_path / "net.lcq", {"w": form})
    with pytest.raises(lcq.ArtifactError, match=f"w: .*{message}"):
        lcq.load(tmp_path / "net.lcq")


def test_a_very_deep_sum_is_refused(tmp_path, monkeypatch):
    form = CAST
    for _ in range(12):
        form = Sum((form,))
    with monkeypatch.context() as unchecked:
        unchecked.setattr(records, "check_form", lambda form: None)
        lcq.save(tmp_path / "net.lcq", {"w": form})
    with pytest.raises(lcq.ArtifactError, match="w: expected a form"):
        lcq.load(tmp_path / "net.lcq")
