"""A plan goes along with a file as text, changes nothing else in it, and is looked at with distrust."""

import functools
import tracemalloc

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from lcq.io.file import ArtifactError, load, read_index, save
from lcq.io.index import LONGEST_PLAN
from tests.io.files import arrays, forge, parts_of, same

plain = functools.partial(save, coded=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


PLAN = "[[rule]]\npattern = '(.*/)?kérnel\\d'\nscheme = \"KMeans(4)\"\n"


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_a_plan_comes_back(tmp_path_factory, words):
    path, plan = tmp_path_factory.mktemp("plan") / "net.lcq", f"# {words}\n{PLAN}"
    assert save(path, arrays(), plan=plan) == path.stat().st_size
    assert read_index(path).plan == plan
    tree = load(path)
    save(path, arrays())
    same(load(path), tree)
    assert read_index(path).plan is None


def test_a_plan_changes_nothing_but_the_index(path):
    plain(path, arrays())
    without = path.read_bytes()
    plain(path, arrays(), plan="")
    assert read_index(path).plan == ""
    header, index, streams = parts_of(path.read_bytes())
    assert index.pop("plan") == "" and parts_of(without) == (
        header | {"__metadata__": parts_of(without)[0]["__metadata__"]},
        index,
        streams,
    )
    with safetensors.safe_open(path, "numpy") as reader:
        assert set(reader.keys()) == header.keys() - {"__metadata__"}


@pytest.mark.parametrize("plan", [[("kernel", "Binary")], "[[rule]", 3.5, "a" * 10, "x = '\ud800'"])
def test_what_is_no_plan_is_not_saved(path, plan):
    with pytest.raises(ValueError, match=r"expected plan= an lcq.Plan\(rules\), or its text|surrogates"):
        save(path, arrays(), plan=plan)
    assert not path.exists()


def test_a_plan_has_a_size(path):
    longest = "#" + "é" * (LONGEST_PLAN // 2 - 1) + "!"
    assert len(longest.encode()) == LONGEST_PLAN
    plain(path, {"w": 1}, plan=longest)
    assert read_index(path).plan == longest and load(path)["w"] == 1
    with pytest.raises(ValueError, match="expected a plan of at most 4194304 bytes, got 4194305"):
        plain(path, {"w": 1}, plan=longest + "!")
    header, index, streams = parts_of(path.read_bytes())
    refuse(path, forge(header, index | {"plan": longest + "!"}, streams), "expected a plan of at most")


@pytest.mark.parametrize("plan", [None, 3, True, [PLAN], {"rule": []}, {}, "\ud800"])
def test_a_hostile_plan(path, plan):
    plain(path, arrays(), plan=PLAN)
    header, index, streams = parts_of(path.read_bytes())
    data = forge(header, index | {"plan": plan}, streams)
    refuse(path, data, r"expected a plan that is text|surrogates")
    with pytest.raises(ArtifactError, match=r"net.lcq: "):
        read_index(path)
    refuse(path, forge(header, index | {"plans": PLAN}, streams), "expected an index of leaves")
    for text in ("", "no TOML = ", "\0\x1b[2J", "[[rule]]\npattern = 3"):  # is for who reads the plan to refuse
        path.write_bytes(forge(header, index | {"plan": text}, streams))
        assert read_index(path).plan == text
        same(load(path)["step"], np.array(7, np.int32))


def test_a_damaged_plan_is_refused(path):
    plain(path, arrays(), plan=PLAN)
    whole = path.read_bytes()
    start = whole.index(b"KMeans(4)") - 60
    for at in range(start, start + 80):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for reader in (load, read_index):
            with pytest.raises(ArtifactError, match=r"net.lcq: "):
                reader(path)


def test_a_plan_is_read_without_the_streams(path):
    plain(path, {"w": np.ones(10_000_000, np.uint8)}, plan=PLAN)
    tracemalloc.start()
    assert read_index(path).plan == PLAN
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "net.lcq"
    plain(path, arrays(), plan=PLAN)
    return path.read_bytes()


def refuse(path, data, message="net.lcq"):
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)
