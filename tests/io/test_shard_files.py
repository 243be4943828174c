"""A set of files gives back what was saved; it is replaced as a whole; what is not whole is refused."""

import json
import re
import struct
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.io import container, shard_files
from lcq.io.file import ArtifactError, each_leaf, load, read_index, read_metadata, save
from tests.io.files import arrays, same


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


def names(path):
    return sorted(each.name for each in path.parent.iterdir())


def leaves(count=6, seed=0):
    rng = np.random.default_rng(seed)
    tree = {f"w{i}": rng.normal(size=(32, 32 * (i + 1))).astype(np.float32) for i in range(count)}
    return lcq.compress(tree, [lcq.Rule("w[0-3]", lcq.Uniform(4, per=32))]) | {"nothing": None}


@pytest.mark.parametrize("most", [1, 2000, 10_000, 1 << 30])
def test_a_set_gives_back_what_one_file_does(path, most):
    tree = arrays() | {"more": leaves()}
    size = save(path, tree, max_shard_bytes=most, plan="rule = []", metadata={"format": "pt"})
    held = read_index(path)
    assert size == sum(each.stat().st_size for each in path.parent.iterdir()) == held.on_disk
    assert names(path) == sorted([path.name, *held.shards])
    assert all(
        re.fullmatch(rf"net-{i:05}-of-{len(held.shards):05}-[0-9a-f]{{16}}\.lcq", name)
        for i, name in enumerate(held.shards, 1)
    )
    longest = max(held.sizes.values())
    for name, there in held.shards.items():
        assert there == (path.parent / name).stat().st_size <= max(most, longest + shard_files.HEADER)
    assert len(held.shards) == (len(held.sizes) if most == 1 else 1 if most == 1 << 30 else len(held.shards))
    one = path.with_name("one.lcq")
    save(one, tree, plan="rule = []", metadata={"format": "pt"})
    same(load(path), load(one))
    same(load(path, like=tree, on_device=True)["more"]["w0"].codes, load(one, like=tree)["more"]["w0"].codes)
    for (record, leaf), (other, expected) in zip(each_leaf(path), each_leaf(one), strict=True):
        assert record == other
        same(leaf.value, expected.value)
    assert (held.plan, read_metadata(path)) == ("rule = []", {"format": "pt"})
    assert (held.version, read_index(one).version, read_index(one).shards) == ("4", "3", {})


def test_equal_trees_give_equal_sets_and_may_be_moved(path, tmp_path):
    save(path, leaves(), max_shard_bytes=3000)
    first = {name: (path.parent / name).read_bytes() for name in names(path)}
    save(path, load(path), max_shard_bytes=3000)
    assert {name: (path.parent / name).read_bytes() for name in names(path)} == first
    (tmp_path / "there").mkdir()
    for name, data in first.items():
        (tmp_path / "there" / ("other.lcq" if name == path.name else name)).write_bytes(data)
    same(load(tmp_path / "there" / "other.lcq"), load(path))


def test_what_a_set_replaces_goes_and_nothing_else(path):
    old = [f"net-00001-of-00009-{'0' * 16}.lcq", "net-1.lcq", f"other-00001-of-00009-{'0' * 16}.lcq"]
    for name in old:  # of others: no index here names them
        (path.parent / name).write_bytes(b"")
    save(path, leaves(), max_shard_bytes=3000)
    first = set(read_index(path).shards)
    save(path, leaves(5), max_shard_bytes=3000)
    second = set(read_index(path).shards)
    assert names(path) == sorted([path.name, *old, *second]) and not first <= second
    save(path, {"w": np.ones(3)})
    assert names(path) == sorted([path.name, *old])
    save(path, leaves(), max_shard_bytes=3000)
    save(path, {"w": np.ones(3)}, coded=False)
    assert names(path) == sorted([path.name, *old])


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("replace", -1)])
def test_a_failure_leaves_the_old_set(path, monkeypatch, error, at):
    save(path, leaves(), max_shard_bytes=3000)
    old = {name: (path.parent / name).read_bytes() for name in names(path)}
    step, number = at
    calls, real = [], getattr(shard_files.os, step)

    def fail(*args):
        calls.append(args)
        if len(calls) == number or (number < 0 and str(args[-1]).endswith("net.lcq")):
            raise error
        return real(*args)

    monkeypatch.setattr(shard_files.os, step, fail)
    with pytest.raises(type(error)):
        save(path, leaves(5) | {"w2": np.ones(5000)}, max_shard_bytes=3000)
    monkeypatch.undo()
    assert {name: (path.parent / name).read_bytes() for name in names(path)} == old


def test_a_leaf_that_fails_leaves_nothing(path):
    with pytest.raises(ValueError, match="z: values: expected finite"):
        save(path, leaves() | {"z": lcq.forms.Cast(jnp.array([jnp.nan]))}, max_shard_bytes=3000)
    assert names(path) == []


def forged(path, change):
    """The file of an index with other contents, its digests right."""
    data = path.read_bytes()
    start = 8 + struct.unpack("<Q", data[:8])[0]
    index = json.loads(zlib.decompress(data[start:], wbits=-15))
    change(index)
    deflate = zlib.compressobj(9, wbits=-15)
    raw = deflate.compress(json.dumps(index).encode()) + deflate.flush()
    path.write_bytes(container.header({"coded": container.digest(raw, 8)}, {"index": len(raw)}, "4") + raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"][0].__setitem__(0, "../net.lcq"), "expected the name of a shard beside"),
        (lambda index: index["shards"][0].__setitem__(0, "/etc/passwd"), "expected the name of a shard beside"),
        (lambda index: index["shards"][0].__setitem__(0, "net.lcq"), "expected the name of a shard beside"),
        (lambda index: index["shards"][0].__setitem__(2, 1 << 60), "expected the streams that the index names"),
        (lambda index: index["shards"][0].__setitem__(1, 1 << 60), "expected shards for .* streams"),
        (lambda index: index["shards"][0].__setitem__(1, 0), "expected shards with their streams and bytes"),
        (lambda index: index["shards"][0].__setitem__(1, True), "expected shards with their streams and bytes"),
        (lambda index: index["shards"].__setitem__(1, index["shards"][0]), "expected shards with their streams"),
        (lambda index: index.__setitem__("shards", 3), "expected shards with their streams and bytes"),
        (lambda index: index.pop("shards"), "expected an index of leaves and streams"),
        (lambda index: index["streams"].reverse(), "expected the streams that the index names, got others"),
        (lambda index: index["streams"][0].__setitem__(2, 1 << 60), "expected the streams that the index names"),
        (lambda index: index["streams"].__setitem__(0, 7), "expected the streams that the index names"),
    ],
)
def test_an_index_that_is_forged(path, change, message):
    save(path, leaves(), max_shard_bytes=3000)
    forged(path, change)
    for reader in (load, read_index, lambda path: list(each_leaf(path))):
        with pytest.raises(ArtifactError, match=message):
            reader(path)


def test_shards_that_are_not_what_they_were(path):
    save(path, leaves(), max_shard_bytes=3000)
    one, two = sorted(read_index(path).shards)[:2]
    first, second = path.with_name(one), path.with_name(two)
    with pytest.raises(ArtifactError, match="got a shard of a set; load the file without"):
        load(first)
    data = first.read_bytes()
    first.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"w\d\.?\w*: its data is damaged: the digest differs"):
        load(path)
    first.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match=f"{one}: expected .* bytes; the file has"):
        load(path)
    first.write_bytes(second.read_bytes())
    with pytest.raises(ArtifactError, match=f"{one}: expected the streams that the index names, got others"):
        load(path)
    first.unlink()
    with pytest.raises(ArtifactError, match=f"{one}: this shard is missing; get all files of the set"):
        load(path)


def test_settings_that_make_no_set(path):
    for most in (0, -3, True):
        with pytest.raises(ValueError, match=r"expected max_shard_bytes= a number above 0, or None, got .*; 5 GB are"):
            save(path, {"w": 1}, max_shard_bytes=most)
    with pytest.raises(ValueError, match="expected a coded file with max_shard_bytes="):
        save(path, {"w": 1}, coded=False, max_shard_bytes=10)
    save(path, {"a": None}, max_shard_bytes=10)
    assert load(path) == {"a": None} and read_index(path).shards == {}


def test_the_default_limit_grows_with_the_files_and_guards_small_ones(path, monkeypatch):
    save(path, leaves(), max_shard_bytes=3000)
    on_disk = read_index(path).on_disk
    monkeypatch.setattr("lcq.io.file.LIMIT", 1000)
    same(load(path), load(path, limit=64 * on_disk))
    save(path, lcq.compress({"w": np.zeros((1000, 1000), np.float32)}, [lcq.Rule("w", lcq.Binary())]))
    with pytest.raises(ArtifactError, match=r"expected at most \d+ bytes; the file declares"):
        load(path)
    assert load(path, limit=1e8)["w"].shape == (1000, 1000)
