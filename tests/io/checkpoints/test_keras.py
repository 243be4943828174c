"""Weights of Keras, in files of HDF5 that are laid out as Keras 3 does."""

import importlib.util

import jax.numpy as jnp
import numpy as np
import pytest

from lcq.io.checkpoints.checkpoint import read, write

h5py = pytest.importorskip("h5py")


def make(path):
    arrays = {
        f"layers/{name}/vars/{i}": np.full((2, 3)[: 2 - i], i, np.float32)
        for name in ("dense", "dense_1")
        for i in (0, 1)
    }
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file.create_group("optimizer/vars")
    return arrays


def test_names_are_places_and_that_is_said(tmp_path):
    arrays = make(tmp_path / "net.weights.h5")
    with pytest.warns(UserWarning, match="Keras names weights by their order"):
        tree = read(tmp_path / "net.weights.h5")
    assert list(tree) == ["layers"] and list(tree["layers"]) == ["dense", "dense_1"]
    for name in ("dense", "dense_1"):
        for i in "01":
            np.testing.assert_array_equal(tree["layers"][name]["vars"][i], arrays[f"layers/{name}/vars/{i}"])
    with pytest.raises(ValueError, match=r"expected a .safetensors or .npz file, .*to be read alone"):
        write(tmp_path / "other.weights.h5", tree)


def test_numbers_that_hdf5_has_no_name_for(tmp_path):
    """Keras keeps bfloat16 as two bytes without a type, and its name as an attribute; others have another order."""
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        data = file.create_dataset("layers/dense/vars/0", data=np.array([1.5, -2], jnp.bfloat16))
        data.attrs["dtype"] = "bfloat16"
        file["layers/dense/vars/1"] = np.arange(3, dtype=">f4")
        file["layers/dense/vars/2"] = np.float64(3)
    with pytest.warns(UserWarning, match="by their order"):
        found = read(tmp_path / "net.weights.h5")["layers"]["dense"]["vars"]
    assert [found[i].dtype for i in "012"] == [jnp.bfloat16, np.float32, np.float64] and found["1"].dtype.isnative
    assert [found[i].tolist() for i in "012"] == [[1.5, -2], [0, 1, 2], 3]


def test_files_that_lead_elsewhere(tmp_path):
    make(tmp_path / "other.weights.h5")
    for link in (h5py.ExternalLink("other.weights.h5", "/layers"), h5py.SoftLink("/a")):
        with h5py.File(tmp_path / "net.weights.h5", "w") as file:
            file["a"] = np.ones(2)
            file["b"] = link
        with pytest.raises(ValueError, match=r"net.weights.h5: b: expected arrays and groups, got a link"):
            read(tmp_path / "net.weights.h5")
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        file.create_dataset("a", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])
    with pytest.raises(ValueError, match="a: expected numbers in this file, got some in another"):
        read(tmp_path / "net.weights.h5")


def test_what_is_no_number_and_no_file(tmp_path):
    with h5py.File(tmp_path / "net.weights.h5", "w") as file:
        file["name"] = "text"
    with pytest.raises(ValueError, match="name: expected numbers"):
        read(tmp_path / "net.weights.h5")
    data = (tmp_path / "net.weights.h5").read_bytes()
    for bad in (b"", data[:300], b"x" * 100):
        (tmp_path / "net.weights.h5").write_bytes(bad)
        with pytest.raises(ValueError, match="not an HDF5 file, or damaged"):
            read(tmp_path / "net.weights.h5")


def test_without_h5py(tmp_path, monkeypatch):
    make(tmp_path / "net.weights.h5")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "h5py" else found(name))
    with pytest.raises(ValueError, match="needs h5py; pip install h5py"):
        read(tmp_path / "net.weights.h5")
