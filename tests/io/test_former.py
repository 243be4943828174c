"""Files of versions 1 and 2: they load for ever, to what they held, and harm as little."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

import lcq
from lcq.io.container import bytes_of
from lcq.io.file import ArtifactError, each_leaf, load, read_index, save
from lcq.io.former import current_metadata, current_stream

GOLDEN = Path(__file__).parent / "golden"
NAMES = {"plain": ("1", "dense"), "coded": ("2", "dense"), "wide": ("2", "wide")}


def by_path(arrays):
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    return {"/".join(str(key.key) for key in keys): np.asarray(leaf) for keys, leaf in leaves}


@pytest.mark.parametrize("name", NAMES)
def test_former_golden_files(name, tmp_path):
    (version, arrays), path = NAMES[name], GOLDEN / "former" / f"{name}.lcq"
    assert read_index(path).version == version
    expected, back = np.load(GOLDEN / f"{arrays}.npz"), load(path)
    flat = by_path(lcq.decompress(back))
    assert flat.keys() == set(expected.files)
    for leaf, array in flat.items():
        np.testing.assert_array_equal(array, expected[leaf], err_msg=leaf)
    save(tmp_path / "net.lcq", back, coded=name != "plain")
    now = load(tmp_path / "net.lcq")
    assert read_index(tmp_path / "net.lcq").version == "3"
    assert jax.tree.structure(now) == jax.tree.structure(back)
    for a, b in zip(*map(jax.tree.leaves, (now, back)), strict=True):
        assert (a.dtype, a.tobytes()) == (b.dtype, b.tobytes())
    assert len(list(each_leaf(path))) == len(read_index(path).records)


def test_former_codes_are_coded_by_rans():
    held = read_index(GOLDEN / "former" / "wide.lcq")
    coded = {name for name, codec in held.codecs.items() if codec == "rans"}
    assert coded == {"codes.codes", "mask.mask", "gaps.mask"}
    assert all(held.sizes[name] < bytes_of(held.structs[name]) and held.decoding[name] for name in coded)
    assert set(read_index(GOLDEN / "former" / "plain.lcq").codecs.values()) == {"raw"}


@pytest.mark.parametrize(
    "stream", [None, [], "x", ["w", "U32", [1], 4, "0", [2, 3], 1], ["w", "F32", [1], 4, "0", [2, 3]]]
)
def test_what_is_no_stream_of_version_2(stream):
    with pytest.raises(ValueError, match="expected a stream of version 2, got"):
        current_stream("2", stream)
    assert current_stream("3", stream) is stream
    assert current_stream("3", ["w", "F32", [1], 4, "0"]) == ["w", "F32", [1], 4, "0"]


def test_version_2_renames_the_digest_of_its_index():
    assert current_metadata({"version": "2", "index": "0"}) == {"version": "2", "coded": "0"}
    assert current_metadata({"version": "1", "index": "0"}) == {"version": "1", "index": "0"}


def digest(data, size):
    return hashlib.blake2b(data, digest_size=size).hexdigest()


def forge(change, **metadata):
    """The coded file of version 2 with another index and right digests."""
    whole = (GOLDEN / "former" / "coded.lcq").read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    cut = start + json.loads(whole[8:start])["index"]["shape"][0]
    index, data = json.loads(zlib.decompress(whole[start:cut], wbits=-15)), whole[cut:]
    change(next(stream for stream in index["streams"] if stream[0] == "codes.codes"))
    deflate = zlib.compressobj(9, wbits=-15)
    raw = deflate.compress(json.dumps(index).encode()) + deflate.flush()
    cuts = {"index": (0, len(raw)), "data": (len(raw), len(raw) + len(data))}
    header = {k: {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for k, (a, b) in cuts.items()}
    said = {"format": "lcq", "version": "2", "index": digest(raw, 8), "digest": "0" * 32} | metadata
    text = json.dumps({"__metadata__": said} | header).encode()
    text += b" " * (-len(text) % 8)
    text = text.replace(b"0" * 32, digest(text, 16).encode())
    return struct.pack("<Q", len(text)) + text + raw + data


HOSTILE = {
    "a dtype": (lambda s: s.__setitem__(1, "F32"), "expected a stream of version 2"),
    "a size": (lambda s: s.__setitem__(3, -1), "expected a stream of the coded layout"),
    "one level": (lambda s: s.__setitem__(5, [1, 384]), "expected a stream of the coded layout"),
    "levels": (lambda s: s.__setitem__(5, [2, 384]), "codes: expected uint32"),
    "a count": (lambda s: s.__setitem__(5, [3, 385]), "codes: expected uint32"),
    "a huge count": (lambda s: s.__setitem__(5, [3, 1 << 60]), "expected a stream of the coded layout"),
    "a flag": (lambda s: s.__setitem__(5, [3, True]), "expected a stream of the coded layout"),
    "raw": (lambda s: s.pop(), "codes.codes: expected 96 raw bytes"),
    "a codec": (
        lambda s: s.__setitem__(slice(1, None), ["rans", s[3], s[4], 3, 384]),
        "expected a stream of version 2",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_of_version_2(tmp_path, name):
    change, message = HOSTILE[name]
    path = tmp_path / "net.lcq"
    path.write_bytes(forge(lambda stream: None))
    load(path)
    path.write_bytes(forge(change))
    with pytest.raises(ArtifactError, match=message):
        load(path)


def test_hostile_metadata_of_version_2(tmp_path):
    path = tmp_path / "net.lcq"
    for metadata in ({"coded": "0" * 16}, {"version": "1"}, {"version": "3"}, {"index": 3}):
        path.write_bytes(forge(lambda stream: None, **metadata))
        with pytest.raises(ArtifactError, match=r"net.lcq: "):
            load(path)
