"""The coded layout: what it holds, damage, files written to do harm, and golden files that pin both layouts."""

import copy
import hashlib
import json
import random
import struct
import tracemalloc
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import lcq
from lcq.forms import Codes, Sparse
from lcq.forms.base import is_form
from lcq.io.container import bytes_of
from lcq.io.entropy_coding import rans
from lcq.io.file import ArtifactError, load, read_index, save

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


def digest(data, size):
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def tree():
    """Every form, from numbers that no generator of random numbers can change."""
    w = np.sin(np.arange(384, dtype=np.float32) ** 2).reshape(24, 16)
    stored = {
        "codes": lcq.KMeans(3),
        "channel": lcq.Uniform(4, per="channel", zero_point=True),
        "binary": lcq.Binary(),
        "few": lcq.Prune(count=12),
        "some": lcq.Prune(fraction=0.3, values=lcq.KMeans(4)),
        "blocks": lcq.PruneGroups((4, 2), fraction=0.25),
        "factors": lcq.LowRank(rank=2),
        "sum": lcq.Additive(lcq.KMeans(2), lcq.Prune(count=10)),
        "cast": lcq.Cast("bfloat16"),
    }
    rules = [lcq.Rule(name, scheme) for name, scheme in stored.items()]
    rules.append(lcq.Rule("joint/.", lcq.KMeans(2), joint=True))
    plain = {"bias": jnp.arange(5.0), "step": 3, "none": None, "joint": {"a": w[:3], "b": w[3:6]}}
    packed = lcq.compress(dict.fromkeys(stored, jnp.asarray(w)) | plain, rules)
    return jax.tree.map(lambda leaf: leaf.pack() if is_form(leaf) else leaf, packed, is_leaf=is_form)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "net.lcq"
    save(path, tree())
    return path.read_bytes()


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def refuse(path, data, message="net.lcq"):
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path)
    assert str(caught.value).startswith(str(path))


def parts_of(data):
    """The index, and the bytes of the streams."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    cut = 8 + length + header["index"]["shape"][0]
    return json.loads(zlib.decompress(data[8 + length : cut], wbits=-15)), data[cut:]


def forge(index, data, *, raw=None, metadata=(), tensors=()):
    """A coded file with right digests."""
    if raw is None:
        begin = 0
        for stream in index.get("streams", []) if isinstance(index, dict) else []:
            if isinstance(stream, list) and len(stream) > 3 and type(stream[2]) is int:
                stream[3] = digest(data[begin : begin + max(stream[2], 0)], 8)
                begin += max(stream[2], 0)
        deflate = zlib.compressobj(9, wbits=-15)
        raw = deflate.compress(json.dumps(index).encode()) + deflate.flush()
    cuts = {"index": (0, len(raw)), "data": (len(raw), len(raw) + len(data))}
    header = {k: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for k, (a, b) in cuts.items()} | dict(
        tensors
    )
    said = {"format": "lcq", "version": "3", "coded": digest(raw, 8)} | dict(metadata) | {"digest": "0" * 32}
    text = json.dumps({"__metadata__": said} | header).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(b"0" * 32, digest(text, 16).encode())
    return struct.pack("<Q", len(text)) + text + raw + data


def test_forging_works(path, whole):
    path.write_bytes(forge(*parts_of(whole)))
    again = load(path)
    path.write_bytes(whole)
    same(again, load(path))


def test_both_layouts_hold_the_same(path):
    save(path, tree())
    coded = load(path)
    save(path, tree(), coded=False)
    same(load(path), coded)
    same(jax.tree.leaves(coded), jax.tree.leaves(tree()))


@pytest.mark.parametrize("coded", [True, False])
def test_codes_are_decoded_on_the_device(path, coded):
    save(path, tree(), coded=coded)
    host, there = load(path), load(path, on_device=True)
    same(host, there)
    assert isinstance(there["codes"].codes, jax.Array) == isinstance(there["some"].mask, jax.Array) == coded
    assert isinstance(host["codes"].codes, np.ndarray) and isinstance(there["bias"], np.ndarray)


@pytest.mark.parametrize("on_device", [True, False])
def test_codes_that_no_level_has_are_refused(path, whole, on_device):
    """The stream is right for four levels, the form has three."""
    index, data = parts_of(whole)
    place = 0
    for entry in index["streams"]:
        if entry[0] == "codes.codes":
            break
        place += entry[2]
    piece, length = rans.encode(np.full(24 * 16, 3, np.uint8), 4), entry[2]
    entry[2], entry[4:] = len(piece), [4, 24 * 16]
    path.write_bytes(forge(index, data[:place] + piece + data[place + length :]))
    with pytest.raises(ArtifactError, match="codes: expected codes below 3, got a larger one"):
        load(path, on_device=on_device)


def test_any_reader_of_safetensors_finds_two_tensors(path, whole):
    path.write_bytes(whole)
    tensors = safetensors.numpy.load_file(path)
    assert {name: array.dtype for name, array in tensors.items()} == dict.fromkeys(("data", "index"), np.uint8)


def test_a_coded_file_is_smaller(path):
    few = np.where(np.arange(20_000) % 50 == 0, 1.0, -1.0).astype(np.float32)
    form = lcq.KMeans(4).project(jnp.asarray(few * (1 + np.arange(20_000) % 7 // 6)))
    plain = save(path, {"w": form}, coded=False)
    assert save(path, {"w": form}) < plain / 3


def test_sizes_of_streams_add_up(path, whole):
    path.write_bytes(whole)
    held = read_index(path)
    assert held.version == "3" and held.sizes.keys() == held.structs.keys()
    assert sum(held.sizes.values()) == len(parts_of(whole)[1])
    assert all(
        held.sizes[name] <= 4 * struct.size + 16 for name, struct in held.structs.items() if struct.dtype == np.uint32
    )


# Damage


def test_every_truncation_and_every_changed_byte_is_refused(path):
    save(path, {"w": tree()["some"], "b": np.arange(3.0)})
    whole, rng = path.read_bytes(), random.Random(0)
    for at in range(0, len(whole), 3):
        refuse(path, whole[:at])
    refuse(path, whole + b"\0", "expected .* bytes; the file has")
    for at in range(len(whole)):
        refuse(path, whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])


def test_damage_names_the_stream(path, whole):
    refuse(path, whole[:-1] + bytes([whole[-1] ^ 1]), "sum.parts.1.*: its data is damaged")


# Files that someone wrote to do harm: every digest is right


def stream(index, name):
    return next(s for s in index["streams"] if s[0] == name)


def edited(whole, change):
    index, data = parts_of(whole)
    index = copy.deepcopy(index)
    data = change(index, data) or data
    return forge(index, data)


def put(name, place, value):
    def change(index, data):
        stream(index, name)[place] = value

    return change


def longer(index, data):
    stream(index, "codes.codes")[2] += 1
    return data + b"\0"


def unnamed(index, data):
    del index["leaves"][0]


def twice(index, data):
    index["streams"].append(copy.deepcopy(index["streams"][-1]))
    return data + data[len(data) - index["streams"][-1][2] :]


HOSTILE = {
    "no list": (lambda index, data: index.update(streams={}), "expected an index of leaves and streams"),
    "no leaves": (lambda index, data: index.update(leaves=[]), "expected an index of leaves and streams"),
    "more": (lambda index, data: index.update(more=1), "expected an index of leaves and streams"),
    "a plan that is no text": (lambda index, data: index.update(plan=3), "expected a plan that is text"),
    "a dtype": (put("bias", 4, "F3"), "expected a stream of the coded layout"),
    "a shape": (put("bias", 5, [6]), "bias: expected 24 raw bytes, got 20"),
    "an axis": (put("bias", 5, [-5]), "at most 64 axes"),
    "a size": (put("bias", 2, 19), "bias: expected 20 raw bytes, got 19"),
    "a negative size": (put("codes.codes", 2, -1), "expected a stream of the coded layout"),
    "one level": (put("codes.codes", 4, 1), "expected a stream of the coded layout"),
    "levels": (put("codes.codes", 4, 2), r"codes: expected uint32\[24\] for 384 codes of 2 bits, got uint32\[12\]"),
    "many levels": (put("codes.codes", 4, 65537), "expected a stream of the coded layout"),
    "a count": (put("codes.codes", 5, 385), r"codes: expected uint32\[24\] for 384 codes of 2 bits, got uint32\[25\]"),
    "a huge count": (put("codes.codes", 5, 1 << 60), "expected a stream of the coded layout"),
    "a flag": (put("codes.codes", 5, True), "expected a stream of the coded layout"),
    "a flag for a size": (put("codes.codes", 2, True), "expected a stream of the coded layout"),
    "a codec": (
        put("codes.codes", 1, "x" * 99),
        f"codes.codes: expected one of the codecs .*raw.*, got '{'x' * 80}'; imp",
    ),
    "a codec that is none": (put("codes.codes", 1, ["rans"]), "expected a stream of the coded layout"),
    "a codec of codes for what is none": (put("bias", 1, "rans"), r"bias: expected packed codes for rans, got float32"),
    "raw codes of other bytes": (put("codes.codes", 1, "raw"), r"codes.codes: expected 96 raw bytes, got \d+"),
    "codes that are none": (put("codes.codes", 5, None), "expected a stream of the coded layout"),
    "a longer stream": (longer, "codes.codes"),
    "a stream of no leaf": (unnamed, "no leaf has this tensor"),
    "a name twice": (twice, "two streams have this name"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index(path, whole, name):
    change, message = HOSTILE[name]
    refuse(path, edited(whole, change), message)


def test_a_hostile_container(path, whole):
    index, data = parts_of(whole)
    refuse(path, forge(index, data, metadata={"coded": "0" * 16}), "index: its data is damaged")
    refuse(path, forge(index, data, metadata={"more": ""}), "expected the metadata and tensors of a coded file")
    refuse(path, forge(index, data, metadata={"version": "5"}), "expected format version 1, 2, 3, 4, got '5'")
    refuse(path, forge(index, data, metadata={"version": "4"}), "tensors of a coded file, index, got others")
    extra = {"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    refuse(path, forge(index, data, tensors=extra), "expected the metadata and tensors of a coded file")
    refuse(path, forge(index, b""), "bytes of data")
    refuse(path, forge(index, data, raw=b"\xff\xff"), "index: ")
    text = zlib.compressobj(wbits=-15)
    whole_text = text.compress(b"[]") + text.flush()
    refuse(path, forge(index, data, raw=whole_text + b"\0"), "one whole deflated text")
    refuse(path, forge(index, data, raw=whole_text[:-1]), "one whole deflated text|index: ")
    refuse(path, forge([[]], data), "expected an index of leaves and streams")


def test_nothing_is_allocated_for_a_file_that_is_refused(path, whole):
    bomb = zlib.compressobj(9, wbits=-15)
    raw = bomb.compress(b"[" + b"0," * 50_000_000) + bomb.flush()
    index, data = parts_of(whole)
    big = copy.deepcopy(index)
    stream(big, "codes.codes")[5] = 32 * 10**8
    hostile = {forge(index, data, raw=raw): "expected an index of at most", forge(big, data): "expected uint32"}
    for file, message in hostile.items():
        path.write_bytes(file)
        tracemalloc.start()
        with pytest.raises(ArtifactError, match=message):
            load(path, limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
        tracemalloc.stop()


CODES = {
    "mask": lambda rng, n: (lcq.Prune(fraction=0.4), rng.normal(size=n)),
    "gaps": lambda rng, n: (lcq.Prune(fraction=0.01), rng.normal(size=n)),
    "binary": lambda rng, n: (lcq.Binary(), rng.normal(size=n)),
    "skewed": lambda rng, n: (lcq.Levels((0.0, 1.0, 2.0)), rng.geometric(0.7, n) - 1.0),
    "constant": lambda rng, n: (lcq.Levels((0.0, 1.0, 2.0)), np.zeros(n)),
    "grid": lambda rng, n: (lcq.Uniform(12), rng.normal(size=n)),
}


@pytest.mark.parametrize("name", CODES)
def test_loading_takes_no_more_memory_than_the_least_limit(path, name):
    size = 600_000
    scheme, w = CODES[name](np.random.default_rng(0), size)
    save(path, {"w": scheme.project(jnp.asarray(w, jnp.float32)), "b": np.zeros(10)})

    def fits(limit):
        try:
            load(path, limit=limit)
        except ArtifactError as error:
            assert "expected at most" in str(error)
            return False
        return True

    low, high = 4 * size, 40 * size
    assert fits(high) and not fits(low)
    while high - low > size // 100:
        low, high = (low, middle) if fits(middle := (low + high) // 2) else (middle, high)
    tracemalloc.start()
    load(path, limit=high)
    assert tracemalloc.get_traced_memory()[1] < high + (4 << 20)
    tracemalloc.stop()


def test_gap_codes_of_no_bytes_are_refused_before_they_are_decoded_for_the_leaf(path, whole):
    """4e8 gap codes of a leaf of 384 weights, in a stream of a table alone."""
    index, data = parts_of(whole)
    changed, place = copy.deepcopy(index), 0
    for entry in changed["streams"]:
        if entry[0] == "few.mask":
            break
        place += entry[2]
    few = entry[2]
    bits = next(leaf["static"]["gap"] for leaf in changed["leaves"] if leaf["path"] == ["few"])
    piece, count = rans.encode(np.zeros(1000, np.uint8), 1 << bits), 32 * 10**6 // bits
    entry[2:] = [len(piece), digest(piece, 8), 1 << bits, count]
    path.write_bytes(forge(changed, data[:place] + piece + data[place + few :]))
    tracemalloc.start()
    with pytest.raises(ArtifactError, match="expected gaps between"):
        load(path, limit=1 << 27)
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


@pytest.mark.parametrize("limit", [0, -5, float("nan")])
def test_a_limit_that_is_no_number_of_bytes(path, limit):
    save(path, {"b": np.zeros(10)})
    load(path, limit=1e9)
    with pytest.raises(ValueError, match="expected limit= in bytes"):
        load(path, limit=limit)


def test_hostile_streams_raise_nothing_else(path, whole):
    """Random bytes in coded streams, with right digests: refused, or forms that work."""
    index, data = parts_of(whole)
    rng, loaded = random.Random(0), 0
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.randint(1, 6)):
            changed[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(forge(copy.deepcopy(index), bytes(changed)))
        try:
            back = load(path)
        except ArtifactError:
            continue
        loaded += 1
        for leaf in jax.tree.leaves(back, is_leaf=is_form):
            assert np.shape(leaf) == leaf.shape
    assert loaded > 3


# Golden files: what was written once is read for ever


def scattered(n):
    """Numbers below 2^32, in whole numbers, that look random."""
    i = np.arange(1, n + 1, dtype=np.uint64)
    return (i * 2654435761 ^ (i * i * 40503 >> 7)) % (1 << 32)


def many(n, levels):
    """Numbers below `levels` of which few are large."""
    return ((scattered(n) >> 16) % levels * (scattered(n) % (1 << 16) % levels) // levels).astype(np.uint16)


STREAMS = {
    "lanes": ((np.arange(6000, dtype=np.int64) ** 3 // 7 % 11 % 5).astype(np.uint8), 5, {"block": 2, "lanes": 64}),
    "remainder": (many(1000, 5).astype(np.uint8), 5, {"block": 3}),
    "nested": (many(2000, 512), 512, {}),
    "constant": (np.full(77, 2, np.uint8), 3, {}),
    "raw": ((scattered(45) >> 20).astype(np.uint16), 4096, {}),
}
"""Codes, how many levels, and what else `rans.encode` is told; each stream is of another kind."""


def wide():
    """Forms whose codes, masks and gaps are many enough to be coded, of numbers that no solver has touched."""
    levels = jnp.arange(300.0).reshape(1, 1, 300) / 7
    codes = Codes(jnp.asarray(many(6000, 300).reshape(60, 100)), levels=levels)
    i, noise = np.arange(6000), scattered(6000)
    masks = {"mask": (i % 3 > 0) ^ (noise % 50 == 0), "gaps": (i % 37 == 0) | (noise % 300 == 0)}
    values = jnp.asarray(noise.astype(np.float32).reshape(60, 100))
    few = {name: Sparse(jnp.asarray(mask.reshape(60, 100)), values) for name, mask in masks.items()}
    return jax.tree.map(lambda form: form.pack(), {"codes": codes, **few}, is_leaf=is_form)


GOLDENS = {"plain": (tree, "dense", False), "coded": (tree, "dense", True), "wide": (wide, "wide", True)}
"""Files: what they hold, where that is dense, and whether they are coded."""


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_files(path, name):
    """`python tests/io/test_index.py` writes them; that is for a new layout, never for a changed one."""
    golden, (_, arrays, coded) = GOLDEN / f"{name}.lcq", GOLDENS[name]
    expected = np.load(GOLDEN / f"{arrays}.npz")
    back = load(golden)
    flat = by_path(lcq.decompress(back))
    assert flat.keys() == set(expected.files)
    for name, array in flat.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)
    save(path, back, coded=coded)
    written, read = path.read_bytes(), golden.read_bytes()
    if coded:  # a deflated text is not the same by every zlib
        assert parts_of(written) == parts_of(read)
    else:
        assert written == read


def test_the_wide_golden_file_has_codes_of_every_kind():
    index, held = parts_of((GOLDEN / "wide.lcq").read_bytes())[0], read_index(GOLDEN / "wide.lcq")
    levels = {entry[0]: entry[4] for entry in index["streams"] if entry[1] == "rans"}
    shorter = {name: held.sizes[name] < bytes_of(held.structs[name]) for name in levels}
    gap = next(leaf["static"]["gap"] for leaf in index["leaves"] if leaf["path"] == ["gaps"])
    assert levels == {"codes.codes": 300, "mask.mask": 2, "gaps.mask": 1 << gap} and all(shorter.values())


@pytest.mark.parametrize("name", STREAMS)
def test_golden_streams(name):
    codes, levels, how = STREAMS[name]
    stream = (GOLDEN / f"{name}.rans").read_bytes()
    for decode in (rans.decode, rans.decode_on_device):
        np.testing.assert_array_equal(decode(stream, codes.size, levels), codes)
    assert rans.encode(codes, levels, **how) == stream


def test_golden_streams_are_of_every_kind():
    data = {name: (GOLDEN / f"{name}.rans").read_bytes() for name in STREAMS}
    blocks = {name: stream[0] for name, stream in data.items()}
    assert blocks == {"lanes": 2, "remainder": 3, "nested": 1, "constant": blocks["constant"], "raw": 0}
    assert data["nested"][2] == 0xF0 != data["lanes"][2]
    assert len(data["constant"]) < 8


def by_path(arrays):
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {"/".join(str(key.key) for key in keys): np.asarray(leaf) for keys, leaf in leaves}


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, (made, arrays, coded) in GOLDENS.items():
        print(name, save(GOLDEN / f"{name}.lcq", made(), coded=coded))
        np.savez_compressed(GOLDEN / f"{arrays}.npz", **by_path(lcq.decompress(made())))
    for name, (codes, levels, how) in STREAMS.items():
        (GOLDEN / f"{name}.rans").write_bytes(rans.encode(codes, levels, **how))
