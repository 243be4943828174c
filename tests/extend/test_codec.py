"""A codec of another package: a file is written with it, read by its name, and refused by who does not know it."""

import math
import zlib

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.io import CODECS, Codec


class Deflate(Codec):
    """Bytes by zlib."""

    def encode(self, array, codes):
        return np.frombuffer(zlib.compress(array.tobytes()), np.uint8)

    def memory(self, stream, size):
        return size

    def decode(self, data, stream, on_device):
        size = math.prod(stream.struct.shape) * stream.struct.dtype.itemsize
        raw = zlib.decompressobj().decompress(data, size)
        if len(raw) != size:
            raise ValueError(f"expected {size} bytes, got {len(raw)}")
        return np.frombuffer(raw, stream.struct.dtype).reshape(stream.struct.shape)


@pytest.fixture(autouse=True)
def known():
    CODECS.register("deflate")(Deflate)
    yield
    if "deflate" in CODECS:
        CODECS.unregister("deflate")


def test_a_file_of_its_own(tmp_path):
    tree = {"w": lcq.KMeans(4).project(jnp.linspace(-1, 1, 4096).reshape(64, 64)), "zeros": jnp.zeros(4096)}
    plain = lcq.save(tmp_path / "plain.lcq", tree)
    small = lcq.save(tmp_path / "small.lcq", tree, codecs=["rans", "raw", "deflate"])
    assert small < plain / 4
    back = lcq.load(tmp_path / "small.lcq")
    np.testing.assert_array_equal(back["w"].dense(), tree["w"].dense())
    np.testing.assert_array_equal(back["zeros"], tree["zeros"])
    CODECS.unregister("deflate")
    with pytest.raises(lcq.ArtifactError, match="got 'deflate'; import the package that registers it"):
        lcq.load(tmp_path / "small.lcq")
