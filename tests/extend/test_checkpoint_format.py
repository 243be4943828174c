"""A checkpoint format of another package: read, written, and known to the command line."""

import json

import numpy as np
import pytest

import lcq
from lcq.cli.main import main
from lcq.io import CHECKPOINT_FORMATS, Checkpoint, CheckpointFormat, nested

W = {"dense": {"kernel": np.linspace(-1, 1, 64).reshape(8, 8).astype(np.float32)}}


class Json(CheckpointFormat):
    """Lists of numbers by name."""

    suffix = ".json"

    def read(self, path):
        arrays = {name: np.asarray(a, np.float32) for name, a in json.loads(path.read_text()).items()}
        return Checkpoint(nested(path, arrays), {})

    def write(self, path, leaves, metadata):
        path.write_text(json.dumps({leaf.path: leaf.value.tolist() for leaf in leaves}))


class Only(CheckpointFormat):
    """A folder with a mark, that is only read."""

    suffix = ".only"

    def recognises(self, path):
        return (path / "mark").exists()

    def read(self, path):
        return Checkpoint({"w": np.ones(2)}, {"kind": "only"})


@pytest.fixture(autouse=True)
def known():
    CHECKPOINT_FORMATS.register("json")(Json)
    CHECKPOINT_FORMATS.register("only")(Only)
    yield
    CHECKPOINT_FORMATS.unregister("json")
    CHECKPOINT_FORMATS.unregister("only")


def test_read_and_write(tmp_path):
    lcq.io.write(tmp_path / "net.json", W)
    np.testing.assert_array_equal(lcq.io.read(tmp_path / "net.json")["dense"]["kernel"], W["dense"]["kernel"])
    with pytest.raises(ValueError, match=r"net.json: expected a .safetensors file for metadata, got a; leave it out"):
        lcq.io.write(tmp_path / "net.json", W, {"a": "b"})
    with pytest.raises(ValueError, match=r"net.jsn: expected a .only, .json, .safetensors or .npz file"):
        lcq.io.write(tmp_path / "net.jsn", W)


def test_a_folder_that_is_only_read(tmp_path):
    (tmp_path / "mark").touch()
    assert lcq.io.read(tmp_path)["w"].sum() == 2
    with pytest.raises(ValueError, match=r"net.only: expected a format that can be written, got one that is only read"):
        lcq.io.write(tmp_path / "net.only", W)


def test_the_command_line(tmp_path):
    source, packed, back = (str(tmp_path / name) for name in ("net.json", "net.lcq", "back.json"))
    lcq.io.write(source, W)
    main(["compress", source, "--rule", "dense/kernel=Binary", "-o", packed])
    main(["decompress", packed, "-o", back])
    np.testing.assert_allclose(
        np.abs(lcq.io.read(back)["dense"]["kernel"]), np.abs(W["dense"]["kernel"]).mean(), rtol=1e-5
    )
