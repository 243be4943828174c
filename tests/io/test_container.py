"""Other readers read the file; one that is damaged is refused, and so is one that was made to do harm."""

import copy
import functools
import json
import random
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given

from lcq.forms import Cast, Codes
from lcq.forms.base import is_form
from lcq.io import container
from lcq.io.file import ArtifactError, load, save
from tests.io.files import arrays, codes_fields, forge, parts_of, same

plain = functools.partial(save, coded=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


PLAN = "[[rule]]\npattern = '(.*/)?kérnel\\d'\nscheme = \"KMeans(4)\"\n"


def loop_decode(words, bits, count):
    """Code i is bits b*i .. b*i + b - 1 of the little-endian stream."""
    stream = [(int(word) >> bit) & 1 for word in words for bit in range(32)]
    return [sum(stream[bits * i + j] << j for j in range(bits)) for i in range(count)]


@given(codes_fields())
def test_a_plain_safetensors_reader_can_decode(tmp_path_factory, fields):
    path, form = tmp_path_factory.mktemp("other") / "net.lcq", Codes(**fields)
    plain(path, {"w": form, "b": jnp.ones(3)})
    with safetensors.safe_open(path, "numpy") as reader:
        tensors = {name: reader.get_tensor(name) for name in reader.keys()}
        leaf = json.loads(reader.metadata()["index"])["leaves"][1]
    k = tensors["w.levels"].shape[-1] if "w.levels" in tensors else None
    values = leaf["static"].get("values")
    if k is None:
        k = len(values) if isinstance(values, list) else values["last"] - values["first"] + 1
    assert tensors.keys() - {"b"} == {
        f"w.{n}" for n in ("codes", "levels", "scale", "zero") if getattr(form, n) is not None
    }
    count = int(np.prod(leaf["static"]["packed"]))
    codes = np.array(loop_decode(tensors["w.codes"], max(k - 1, 0).bit_length(), count)).reshape(
        leaf["static"]["packed"]
    )
    np.testing.assert_array_equal(codes, form.codes)
    if form.levels is not None:
        np.testing.assert_array_equal(tensors["w.levels"], form.levels)


def test_safetensors_numpy_decodes_a_whole_net(path):
    levels, scale = np.array([[-1.0, 0.5, 4.0]], np.float32).reshape(1, 1, 3), np.full((1, 1), 2, np.float32)
    codes = np.random.default_rng(0).integers(0, 3, (7, 11)).astype(np.uint8)
    form = Codes(jnp.asarray(codes), jnp.asarray(levels), jnp.asarray(scale))
    plain(path, {"dense0": {"kernel": form, "bias": jnp.arange(3.0)}})
    tensors = safetensors.numpy.load_file(path)
    assert sorted(tensors) == ["dense0/bias", "dense0/kernel.codes", "dense0/kernel.levels", "dense0/kernel.scale"]
    back = np.array(loop_decode(tensors["dense0/kernel.codes"], 2, 77)).reshape(7, 11)
    dense = tensors["dense0/kernel.scale"] * tensors["dense0/kernel.levels"].reshape(-1)[back]
    np.testing.assert_array_equal(dense, form.dense())
    np.testing.assert_array_equal(tensors["dense0/bias"], np.arange(3.0))


def test_every_tensor_is_aligned(path):
    plain(
        path,
        {"a": np.ones(3, np.uint8), "b": np.ones(3), "c": Cast(jnp.ones(3, jnp.bfloat16)), "d": np.ones(3, np.int32)},
    )
    header, _, streams = parts_of(path.read_bytes())
    start = path.stat().st_size - len(streams)
    for name in header.keys() - {"__metadata__"}:
        entry = header[name]
        assert (start + entry["data_offsets"][0]) % container.DTYPES[entry["dtype"]].itemsize == 0


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


def test_every_truncation_is_refused(path, whole):
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    for length in {*range(0, 20), *range(20, header, 61), *range(header - 3, len(whole))}:
        refuse(path, whole[:length])
    refuse(path, whole + b"\0", "expected .* bytes; the file has")


def test_every_changed_byte_is_refused(path):
    tree = arrays()
    plain(path, {"w": tree["dense0"]["kernel"], "b": tree["dense0"]["bias"], "x": tree["step"]})
    whole, rng = path.read_bytes(), random.Random(0)
    for at in range(len(whole)):
        changes = {whole[at] ^ 1 << rng.randrange(8), rng.randrange(256), 32} - {whole[at]}
        refuse(path, whole[:at] + bytes([rng.choice(sorted(changes))]) + whole[at + 1 :])


def test_swapped_blocks_are_refused(path, whole):
    rng = random.Random(1)
    for _ in range(100):
        a, b, c = sorted(rng.sample(range(len(whole) + 1), 3))
        swapped = whole[:a] + whole[b:c] + whole[a:b] + whole[c:]
        if swapped != whole:
            refuse(path, swapped)


def test_damage_names_the_tensor(path, whole):
    assert "plain/0: its data is damaged" in refuse(path, whole.replace(arrays()["plain"][0].tobytes(), bytes(60)))


def test_forging_works(path, whole):
    path.write_bytes(forge(*parts_of(whole)))
    packed = load(path)
    path.write_bytes(whole)
    same(packed, load(path))


def tensor(dtype="U8", shape=(1,), begin=0, end=1):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


HOSTILE_TENSORS = [
    (tensor(dtype="F4"), "x: expected a known dtype"),
    (tensor(dtype=["U8"]), "x: expected a known dtype"),
    (tensor(shape=[-1]), "at most 64 axes"),
    (tensor(shape=[2**63]), "at most 64 axes"),
    (tensor(shape=[2**32, 2**32]), "at most 64 axes"),
    (tensor(shape=[2**62, 4, 0], end=0), "at most 64 axes"),
    (tensor(shape=[1] * 65), "at most 64 axes"),
    (tensor(shape=[10**4000 - 1]), "at most 64 axes"),
    (tensor(shape=[True]), "x: expected a known dtype"),
    (tensor(shape=[1.0]), "x: expected a known dtype"),
    (tensor(shape=["1"]), "x: expected a known dtype"),
    (tensor(shape=[2]), "x: expected a known dtype"),
    (tensor(begin=1, end=2), "x: expected data at 0, got 1"),
    (tensor(begin=-1, end=0), "x: expected a known dtype"),
    (tensor(begin=1, end=0), "x: expected a known dtype"),
    (tensor(shape=[9], end=9), "expected .* bytes; the file has"),
    (tensor(shape=[0], end=0), "expected .* bytes; the file has"),
    (tensor(shape=[2**50], end=2**50), "expected .* bytes; the file has"),
    (tensor(dtype="BOOL"), "x: expected truth values"),
    (tensor() | {"more": 1}, "x: expected a known dtype"),
    ({"dtype": "U8"}, "x: expected a known dtype"),
    (None, "x: expected a known dtype"),
    ([], "x: expected a known dtype"),
]


def one_tensor(entry, **more):
    header = {"__metadata__": {"format": "lcq", "version": "1"}, "x": entry} | more
    leaves = [{"path": [name], "kinds": "d", "array": name} for name in header if name != "__metadata__"]
    return header, {"leaves": leaves, "digests": dict.fromkeys(header.keys() - {"__metadata__"})}


@pytest.mark.parametrize(("entry", "message"), HOSTILE_TENSORS)
def test_a_hostile_tensor(path, entry, message):
    path.write_bytes(forge(*one_tensor(tensor()), b"\7"))
    same(load(path), {"x": np.array([7], np.uint8)})
    refuse(path, forge(*one_tensor(entry), b"\7"), message)


def test_overlaps_and_gaps(path):
    for other in (tensor(), tensor(begin=2, end=3)):
        refuse(path, forge(*one_tensor(tensor(), y=other), b"\7\7\7"), "y: expected data at 1")


def raw_file(header, streams=b""):
    header = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(header)) + header + streams


META = '{"__metadata__":{"format":"lcq","version":%s,"index":"%s","digest":"%s"}%s}'


def signed(index, version='"1"', more=""):
    raw = META % (version, index.replace('"', '\\"'), "0" * 32, more)
    return raw_file(raw.replace("0" * 32, container.digest(raw.encode())))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an lcq file, or cut short"),
        (b"\0" * 8, "not an lcq file, or cut short"),
        (b"\xff" * 64, "not an lcq file, or cut short"),
        (struct.pack("<Q", 2**62) + b"{}", "cut short"),
        (raw_file("[]"), "does not name the format"),
        (raw_file("{}"), "does not name the format"),
        (raw_file("[" * 100_000), "net.lcq"),
        (raw_file('{"a":' * 50_000), "net.lcq"),
        (raw_file("9" * 10_000), "net.lcq"),
        (raw_file("NaN"), "NaN in its JSON"),
        (raw_file("-Infinity"), "-Infinity in its JSON"),
        (raw_file('{"a":1,"a":1}'), "a key occurs twice"),
        (raw_file(b'{"\xff":1}'), "utf-8"),
        (raw_file('{"__metadata__":3}'), "does not name the format"),
        (raw_file(META % ('"1"', "x", "y" * 32, "")), "header is damaged"),
        (raw_file(META % ('"1"', "x", "", "")), "header is damaged"),
        (raw_file(META % ('"1"', "x", "\\ud800", "")), "net.lcq"),
        (signed("{}", version='"5"'), "expected format version 1, 2, 3, 4, got '5'"),
        (signed("{}", version="1"), "expected format version 1, 2, 3, 4, got 1"),
        (signed("{}", version='"2"'), "expected the metadata and tensors of a coded file"),
        (signed("{}"), "expected an index of leaves"),
        (signed("{}", version='"3"'), "expected an index of leaves"),
        (signed("[]"), "expected an index of leaves"),
        (signed("NaN"), "NaN in its JSON"),
        (signed("[" * 100_000), "net.lcq"),
        (signed('{"leaves":{},"digests":{}}'), "expected an index of leaves"),
        (signed('{"leaves":[1],"digests":{"x":""}}'), "x: expected as many digests as tensors"),
        (signed('{"leaves":[],"digests":{},"more":1}'), "expected an index of leaves"),
        (signed('{"leaves":[null],"digests":{}}'), "expected a leaf"),
        (signed('{"leaves":[],"digests":{}}'), "expected an index of leaves"),
    ],
)
def test_a_hostile_header(path, data, message):
    refuse(path, data, message)


def test_another_safetensors_file(path):
    refuse(path, safetensors.numpy.save({"w": np.ones(3)}), "does not name the format")


def test_a_tensor_of_no_leaf_or_two_leaves(path):
    header, index = one_tensor(tensor())
    empty = {"path": ["x"], "kinds": "d", "empty": None}
    refuse(path, forge(header, index | {"leaves": [empty]}, b"\7"), "x: no leaf has this tensor")
    refuse(path, forge(header, index | {"leaves": index["leaves"] * 2}, b"\7"), "'x': 2 leaves have this path")
    below = {"path": ["x", "y"], "kinds": "dd", "array": "x"}
    refuse(path, forge(header, index | {"leaves": [*index["leaves"], below]}, b"\7"), "x: a leaf and a branch")
    other = {"path": ["y"], "kinds": "d", "array": "y"}
    refuse(path, forge(header, index | {"leaves": [other]}, b"\7"), "y: .*no such tensor")


def declares(shape, leaves=1):
    """A file of a few bytes whose forms of one level are dense arrays of `shape`."""
    header, index = one_tensor(tensor(dtype="U32", shape=[0], end=0))
    form = {"form": "Codes", "static": {"packed": list(shape), "values": [1.0]}, "arrays": {"codes": "x"}}
    index["leaves"] = [{"path": [i], "kinds": "d", **form} for i in range(leaves)]
    return forge(header, index, b"")


def test_limit(path):
    path.write_bytes(declares((1000, 250), leaves=3))
    assert load(path, limit=3_000_000)[0].shape == (1000, 250)
    with pytest.raises(
        ArtifactError, match="at most 2999999 bytes; the file declares 0 of streams and 3000000 of forms"
    ):
        load(path, limit=2_999_999)
    plain(path, {"w": np.ones(100, np.uint8)})
    load(path, limit=100)
    with pytest.raises(ArtifactError, match="declares 100 of streams"):
        load(path, limit=99)


def test_nothing_is_allocated_for_a_file_that_is_refused(path):
    plain(path, {"w": np.ones(10_000_000, np.uint8), "c": Cast(np.ones(3))})
    good = path.read_bytes()
    hostile = [declares((2**40,)), declares((2**25,), leaves=300), good[:-1], good.replace(b"Cast", b"Cost")]
    header, index, streams = parts_of(good)
    index["leaves"][0]["static"] = {"dtype": "int32"}
    hostile.append(forge(header, index, streams))
    for data in hostile:
        path.write_bytes(data)
        del data
        tracemalloc.start()
        with pytest.raises(ArtifactError):
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8_000_000


HOSTILE_VALUES = [
    None,
    True,
    -1,
    0,
    3,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    "",
    "x",
    "w",
    "__metadata__",
    [],
    [[]],
    {},
    {"first": 0, "last": 10**9},
    {"tuple": []},
    "Codes",
    "U32",
    [2**62, 2**62, 0],
    "dense0/kernel.codes",
]


def places(node, above=()):
    """Every place inside JSON."""
    yield above
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        yield from places(child, (*above, key))


def mutate(root, rng):
    """Replaces, drops, doubles or swaps something in JSON."""
    root = copy.deepcopy(root)
    everywhere = [place for place in places(root) if place]
    place, other = rng.choice(everywhere), rng.choice(everywhere)
    node, source = root, root
    for key in place[:-1]:
        node = node[key]
    for key in other:
        source = source[key]
    action = rng.randrange(4)
    if action == 0:
        del node[place[-1]]
    elif action == 1 and isinstance(node, list):
        node.append(copy.deepcopy(source))
    elif action == 2:
        node[place[-1]] = copy.deepcopy(source)
    else:
        node[place[-1]] = rng.choice(HOSTILE_VALUES)
    return root


def test_fuzzed_headers_are_refused_or_load_to_forms_that_work(path, whole):
    """Right digests throughout, so that every check behind them is reached."""
    rng = random.Random(0)
    header, index, streams = parts_of(whole)
    loaded = 0
    for _ in range(400):
        both = mutate({"header": header, "index": index}, rng)
        if rng.random() < 0.3:
            both = mutate(both, rng) if both.keys() == {"header", "index"} else both
        try:
            data = forge(both["header"], both["index"], streams)
        except (KeyError, TypeError, AttributeError):
            continue
        path.write_bytes(data)
        try:
            tree = load(path)
        except ArtifactError as error:
            assert str(error).startswith(str(path))
            continue
        loaded += 1
        for leaf in jax.tree.leaves(tree, is_leaf=is_form):
            if is_form(leaf):
                assert leaf.dense().shape == leaf.shape
    assert loaded > 10
