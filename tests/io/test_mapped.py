"""Arrays of files that are read slice by slice: what numpy would give, of safetensors whole and in shards."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.io import MappedArray


def tensors():
    rng = np.random.default_rng(0)
    return {
        "layers/w": rng.normal(size=(3, 4, 5)).astype(np.float32),
        "layers/v": np.asarray(jnp.asarray(rng.normal(size=(3, 7)), jnp.bfloat16)),
        "odd": np.arange(3, dtype=np.int8),
        "wide": rng.normal(size=5),
        "none": np.zeros((0, 4), np.float32),
        "number": np.float32(3),
    }


def in_shards(folder):
    given, where = tensors(), {}
    for i, names in enumerate((["layers/w", "odd", "number"], ["layers/v", "wide", "none"])):
        lcq.io.write(folder / f"part{i}.safetensors", {name: given[name] for name in names}, {"format": "np"})
        where |= dict.fromkeys(names, f"part{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def whole(folder):
    lcq.io.write(folder / "net.safetensors", tensors())
    return folder / "net.safetensors"


@pytest.mark.parametrize("make", [in_shards, whole])
def test_lazy_leaves_are_those_of_the_file(tmp_path, make):
    path = make(tmp_path)
    plain, lazy = lcq.io.read(path), lcq.io.read(path, lazy=True)
    for name in ("layers", "odd", "wide", "none", "number"):
        for key, a in (plain[name] if name == "layers" else {name: plain[name]}).items():
            b = lazy[name][key] if name == "layers" else lazy[name]
            assert isinstance(b, MappedArray) and (b.shape, b.dtype, b.size, b.ndim) == (
                a.shape,
                a.dtype,
                a.size,
                a.ndim,
            )
            np.testing.assert_array_equal(np.asarray(b), a)
    w = lazy["layers"]["w"]
    for index in (1, (2, slice(1, 3)), slice(0, 2), (slice(None), 1), ()):
        np.testing.assert_array_equal(w[index], plain["layers"]["w"][index])
    assert w[1].flags.owndata and len(w) == 3 and repr(w).startswith("MappedArray(") and w[1].base is None


def test_what_takes_arrays_takes_lazy_leaves(tmp_path):
    path = whole(tmp_path)
    plain, lazy = lcq.io.read(path), lcq.io.read(path, lazy=True)
    rules = [lcq.Rule("layers/w", lcq.Uniform(4), stacked=1)]
    one, two = (lcq.compress(tree["layers"], [lcq.Rule("w", rules[0].scheme, stacked=1)]) for tree in (plain, lazy))
    np.testing.assert_array_equal(one["w"].dense(), two["w"].dense())
    sizes = [lcq.save(tmp_path / "one.lcq", tree) for tree in (one, two)]
    assert sizes[0] == sizes[1]
    lcq.io.write(tmp_path / "again.safetensors", lazy)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_other_formats_and_damaged_files(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones(2))
    with pytest.raises(ValueError, match=r"net\.npz: expected \.safetensors, whole or in shards, or \.gguf for lazy"):
        lcq.io.read(tmp_path / "net.npz", lazy=True)
    path = whole(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"net\.safetensors: not a safetensors file, or damaged"):
        lcq.io.read(path, lazy=True)
    with pytest.raises(ValueError, match="expected to copy what is read"):
        np.array(MappedArray(path, (2,), np.float32), copy=False)


def test_a_file_that_was_written_again_is_refused(tmp_path, monkeypatch):
    """Its arrays lie elsewhere: numbers of one tensor were taken for those of another, or of another checkpoint."""
    path = whole(tmp_path)
    monkeypatch.chdir(tmp_path)
    lazy = lcq.io.read("net.safetensors", lazy=True)
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(lazy["wide"], tensors()["wide"])
    lcq.io.write(path, {name: array + 1 for name, array in tensors().items()})
    for read in (lambda: lazy["layers"]["w"][1], lambda: np.asarray(lazy["wide"]), lambda: lcq.io.write(path, lazy)):
        with pytest.raises(ValueError, match=r"net\.safetensors: this file has changed .* read it again"):
            read()
    np.testing.assert_array_equal(lcq.io.read(path, lazy=True)["wide"], tensors()["wide"] + 1)
