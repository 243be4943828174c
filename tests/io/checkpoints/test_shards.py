"""Safetensors checkpoints in shards: read whole, or refused with the name of what is wrong."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from lcq.io.checkpoints.checkpoint import read, read_checkpoint

A, B = (np.arange(6, dtype=np.float32).reshape(2, 3) + i for i in (0, 10))
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def folder(path, **changed):
    """A whole checkpoint of a and b, or one with changes: its shards, the map of its index, or the index's text."""
    path.mkdir()
    shards = changed.get("shards", {FILES[0]: {"layers.0.a": A}, FILES[1]: {"layers.0.b": B}})
    for name, tensors in shards.items():
        save_file(tensors, path / name, {"format": "pt", "shard": name})
    where = changed.get("where", {"layers.0.b": FILES[1], "layers.0.a": FILES[0]})
    index = {"metadata": {"total_size": 48}, "weight_map": where}
    (path / "model.safetensors.index.json").write_text(changed.get("text", json.dumps(index)))
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("given", ["", "model.safetensors.index.json"])
def test_a_sharded_checkpoint(tmp_path, given):
    found = read_checkpoint(folder(tmp_path / "hf") / given)
    assert list(found.tree) == ["layers.0.b", "layers.0.a"] and found.metadata == {"format": "pt"}
    np.testing.assert_array_equal(found.tree["layers.0.a"], A)
    np.testing.assert_array_equal(found.tree["layers.0.b"], B)


def test_an_index_with_a_byte_order_mark(tmp_path):
    """As editors of Windows write it."""
    path = folder(tmp_path / "hf") / "model.safetensors.index.json"
    path.write_text(path.read_text(), "utf-8-sig")
    assert path.read_bytes()[:3] == b"\xef\xbb\xbf"
    np.testing.assert_array_equal(read(tmp_path / "hf")["layers.0.b"], B)


def test_a_header_that_names_a_tensor_twice(tmp_path):
    tensor = b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b"{" + tensor + b"," + tensor + b"}"
    (tmp_path / "net.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    for lazy in (True, False):
        with pytest.raises(
            ValueError, match=r"net.safetensors: not a safetensors file, or damaged: a key occurs twice"
        ):
            read(tmp_path / "net.safetensors", lazy=lazy)


def test_a_folder_with_one_file(tmp_path):
    save_file({"w": A}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "tokenizer.json").write_text("{}")
    np.testing.assert_array_equal(read(tmp_path)["w"], A)
    save_file({"w": A}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"got 2 files, model.safetensors, other.safetensors.*name the one you mean"):
        read(tmp_path)


@pytest.mark.parametrize("there", [FILES[:1], FILES])
def test_shards_without_an_index_are_not_whole(tmp_path, there):
    """One of two would be read as a small checkpoint."""
    for name in there:
        save_file({name: A}, tmp_path / name)
    with pytest.raises(ValueError, match=f"expected an index .* beside shards, got {len(there)} files as {FILES[0]}"):
        read(tmp_path)
    assert list(read(tmp_path / FILES[0])) == [FILES[0]]
    (tmp_path / "one").mkdir()
    save_file({"w": A}, tmp_path / "one" / "model-00001-of-00001.safetensors")
    assert list(read(tmp_path / "one")) == ["w"]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"shards": {FILES[0]: {"layers.0.a": A}}}, f"1 are missing, {FILES[1]}; get the whole checkpoint"),
        ({"shards": {FILES[0]: {"layers.0.a": A}, FILES[1]: {"c": B}}}, "c: the index has this tensor nowhere"),
        (
            {"shards": {FILES[0]: {"layers.0.a": A}, FILES[1]: {"layers.0.b": B, "layers.0.a": B}}},
            f"{FILES[1]}: layers.0.a: the index has this tensor in {FILES[0]}",
        ),
        (
            {"where": {"layers.0.a": FILES[0], "layers.0.b": FILES[1], "layers.1.a": FILES[1]}},
            f"layers.1.a: expected this tensor in {FILES[1]}, which does not have it (1 of 3",
        ),
        ({"where": {}}, "expected an index with a weight_map"),
        ({"where": {"layers.0.a": 3}}, "expected an index with a weight_map"),
        ({"where": {"layers.0.a": "../secret.safetensors"}}, "expected names of .safetensors files beside the index"),
        ({"text": "{"}, "not an index of shards"),
        ({"text": '{"weight_map": {"a": "x", "a": "y"}}'}, "a key occurs twice"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(tmp_path, changed, complaint):
    with pytest.raises(ValueError) as caught:
        read(folder(tmp_path / "hf", **changed))
    assert complaint in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_damaged_shard_is_named(tmp_path):
    path = folder(tmp_path / "hf")
    (path / FILES[1]).write_bytes((path / FILES[1]).read_bytes()[:-4])
    with pytest.raises(ValueError, match=f"{FILES[1]}: not a safetensors file, or damaged"):
        read(path)
