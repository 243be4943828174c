"""Codecs: the contract of each, one that is defined here and not in lcq, and what a file does without it."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import bitpack
from lcq.forms.base import is_form
from lcq.io import CODECS, ArtifactError, Codec, Stream, load, save
from lcq.io.file import each_leaf, read_index


class Deflate(Codec):
    """Stands for a codec of another package: takes every array."""

    level = 9

    def encode(self, array, codes):
        return np.frombuffer(bytes([self.level]) + zlib.compress(array.tobytes(), self.level), np.uint8)

    def memory(self, stream, size):
        if size < 9:
            raise ValueError(f"expected 9 bytes or more, got {size}")
        return size

    def decode(self, data, stream, on_device):
        size = int(np.prod(stream.struct.shape)) * stream.struct.dtype.itemsize
        inflate = zlib.decompressobj()
        try:
            raw = inflate.decompress(data[1:], size + 1)
        except zlib.error as error:
            raise ValueError(f"deflate: {error}") from error
        if len(raw) != size or not inflate.eof:
            raise ValueError(f"expected {size} deflated bytes, got others")
        return np.frombuffer(raw, stream.struct.dtype).reshape(stream.struct.shape)


@pytest.fixture
def deflate():
    CODECS.register("deflate")(Deflate)
    yield Deflate
    CODECS.unregister("deflate")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


def tree():
    w = np.sin(np.arange(600, dtype=np.float32) ** 2).reshape(20, 30)
    rules = [lcq.Rule("a|b", lcq.KMeans(3)), lcq.Rule("c", lcq.Prune(count=30))]
    forms = lcq.compress({"a": w, "b": w + 1, "c": w}, rules) | {"zeros": np.zeros((50, 2)), "flags": np.eye(2) > 0}
    return jax.tree.map(lambda leaf: leaf.pack() if is_form(leaf) else leaf, forms, is_leaf=is_form)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


# The contract


def streams():
    rng = np.random.default_rng(0)
    for array in (rng.normal(size=(3, 5)).astype(np.float32), np.zeros((0, 2)), np.eye(3) > 0, np.array(7)):
        yield array, None
    yield np.asarray(jnp.arange(6, dtype=jnp.bfloat16)).reshape(2, 3), None
    for levels, size in ((2, 1), (3, 1000), (256, 77), (65536, 40), (5, 0), (2, 5000)):
        codes = np.minimum(rng.geometric(0.5, size) - 1, levels - 1).astype(np.uint16)
        yield bitpack.pack(codes, bitpack.width(levels)), (levels, size)


@pytest.mark.parametrize("name", [*CODECS, "deflate"])
@pytest.mark.parametrize("on_device", [False, True])
def test_arrays_come_back_bit_for_bit(deflate, name, on_device):
    codec, taken = CODECS[name](), 0
    for array, codes in streams():
        data = codec.encode(array, codes)
        if data is None:
            continue
        taken += 1
        assert bytes(data) == bytes(codec.encode(array.copy(), codes))
        stream = Stream(jax.ShapeDtypeStruct(array.shape, array.dtype), codes)
        assert codec.memory(stream, len(data)) >= 0
        same(codec.decode(np.frombuffer(bytes(data), np.uint8), stream, on_device), array)
    assert taken >= 6


def test_a_codec_that_returns_bytes_is_told_what_to_return(deflate, monkeypatch, path):
    monkeypatch.setattr(Deflate, "encode", lambda self, array, codes: zlib.compress(array.tobytes()))
    with pytest.raises(ValueError, match=r"encode of codec 'deflate' .* uint8 array .*, got bytes; np.frombuffer"):
        save(path, tree(), codecs=["deflate"])


@pytest.mark.parametrize("name", [*CODECS, "deflate"])
def test_any_bytes_are_an_array_or_a_value_error(deflate, name):
    codec, rng = CODECS[name](), np.random.default_rng(1)
    for array, codes in streams():
        stream, whole = Stream(jax.ShapeDtypeStruct(array.shape, array.dtype), codes), codec.encode(array, codes)
        for size in (0, 1, 5, array.nbytes, array.nbytes + 1, 200):
            data = rng.integers(0, 256, size).astype(np.uint8)
            if whole is not None and whole.size and size == 200:
                data = np.frombuffer(bytes(whole), np.uint8).copy()
                data[rng.integers(data.size) : rng.integers(data.size) + 1] ^= 1
            try:
                codec.memory(stream, data.size)
                back = codec.decode(data, stream, False)
            except ValueError:
                continue
            assert (back.shape, back.dtype) == (array.shape, array.dtype)


# A codec of another package


def test_a_codec_defined_elsewhere_saves_and_loads(deflate, path):
    size = save(path, tree(), codecs=["deflate"])
    assert set(read_index(path).codecs.values()) == {"deflate"}
    back = load(path)
    same(back, load(path, on_device=True))
    assert {leaf.path for _, leaf in each_leaf(path)} == back.keys()
    save(path, tree())
    same(load(path), back)
    same(tree(), back)
    for codecs in (["deflate", "rans"], ("rans", "deflate"), ["rans", "deflate", "raw"]):
        assert save(path, tree(), codecs=codecs) < size
    held = read_index(path)
    assert held.codecs["a.codes"] == "rans" and held.codecs["zeros"] == "deflate" and held.codecs["flags"] == "raw"
    same(load(path), back)


def test_of_like_sizes_the_first_codec_counts(path):
    class Copy(CODECS["raw"]):
        pass

    CODECS.register("copy")(Copy)
    try:
        for codecs in (["copy", "raw"], ["raw", "copy"]):
            save(path, {"w": np.ones(3)}, codecs=codecs)
            assert read_index(path).codecs == {"w": codecs[0]}
        first = path.read_bytes()
        save(path, {"w": np.ones(3)})
        assert path.read_bytes() == first
    finally:
        CODECS.unregister("copy")


def test_without_its_codec_a_file_names_stream_codec_and_remedy(path):
    CODECS.register("deflate")(Deflate)
    save(path, tree(), codecs=["rans", "deflate"])
    CODECS.unregister("deflate")
    for reader in (load, read_index, lambda path: list(each_leaf(path))):
        with pytest.raises(
            ArtifactError,
            match=r"net.lcq: a.levels: expected one of the codecs .*, got 'deflate'; import the package that registers",
        ):
            reader(path)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda array: array.astype(np.float32), r"w: expected float64\[50, 2\] of codec 'deflate', got float32"),
        (lambda array: array.reshape(-1), r"w: expected float64\[50, 2\] of codec 'deflate', got float64\[100\]"),
    ],
)
def test_what_a_codec_gives_is_checked(deflate, path, monkeypatch, wrong, message):
    save(path, {"w": np.zeros((50, 2))}, codecs=["deflate"])
    right = Deflate.decode
    monkeypatch.setattr(Deflate, "decode", lambda self, *how: wrong(right(self, *how)))
    with pytest.raises(ArtifactError, match=message):
        load(path)


def test_what_decoding_takes_counts_for_the_limit(deflate, path, monkeypatch):
    save(path, {"w": np.zeros((50, 2))}, codecs=["deflate"])
    with monkeypatch.context() as larger:
        larger.setattr(Deflate, "memory", lambda self, stream, size: 1 << 40)
        with pytest.raises(ArtifactError, match=f"the file declares {(1 << 40) + 800} of streams"):
            load(path)
        with pytest.raises(ArtifactError, match="w: expected at most"):
            list(each_leaf(path))
    monkeypatch.setattr(Deflate, "level", 1)
    save(path, {"w": np.zeros((50, 2))}, codecs=["deflate"])
    monkeypatch.setattr(Deflate, "level", 9)
    same(load(path)["w"], np.zeros((50, 2)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"codecs": ["lzma"]}, "expected one of the codecs .*rans.*, got 'lzma'; import the package"),
        ({"codecs": "rans"}, r"expected codecs= a list of names, got 'rans'; write \['rans'\]"),
        ({"codecs": ["rans"], "coded": False}, "expected no codecs= for a file that is not coded"),
    ],
)
def test_codecs_that_no_file_can_be_saved_with(path, how, message):
    with pytest.raises(ValueError, match=message):
        save(path, tree(), **how)
    assert not path.exists()


def test_without_codecs_every_stream_is_raw(path):
    save(path, tree(), codecs=[])
    assert set(read_index(path).codecs.values()) == {"raw"}
    same(load(path), tree())
    save(path, tree(), coded=False)
    assert set(read_index(path).codecs.values()) == {"raw"}
