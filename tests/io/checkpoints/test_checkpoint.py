"""Checkpoints of other tools: what is written is read back under the same names, and errors say what to do."""

import importlib.util
import random
import zipfile

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lcq
from lcq.forms import Cast, Codes
from lcq.io.checkpoints.checkpoint import read, read_checkpoint, write
from lcq.io.container import DTYPES
from lcq.io.file import load, save


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes())


def tree():
    w = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    return {"dense0": {"kernel": w, "bias": w[0]}, "layers.0.weight": w.T, "step": np.int64(3), "file": w[1:]}


names = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), max_size=5)


@given(
    st.dictionaries(st.lists(names, min_size=1, max_size=4).map("/".join), st.integers(0, 9), min_size=1, max_size=6)
)
def test_names_round_trip(tmp_path_factory, numbers):
    names = sorted(numbers)
    tensors = {name: np.full(2, numbers[name]) for name in names if not any(n.startswith(f"{name}/") for n in names)}
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("names") / "net.safetensors"
    safetensors.numpy.save_file(tensors, path)
    write(path, read(path))
    back = safetensors.numpy.load_file(path)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name])


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_files(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    write(path, tree())
    same(read(path), tree())
    first = path.read_bytes()
    write(path, read(path))
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_others_read_what_is_written(tmp_path):
    write(tmp_path / "net.safetensors", tree())
    write(tmp_path / "net.npz", tree())
    flat = {"dense0/kernel": tree()["dense0"]["kernel"], "dense0/bias": tree()["dense0"]["bias"]}
    flat |= {name: tree()[name] for name in ("layers.0.weight", "step", "file")}
    same(safetensors.numpy.load_file(tmp_path / "net.safetensors"), flat)
    with np.load(tmp_path / "net.npz") as archive:
        same({name: archive[name] for name in archive.files}, flat)


def test_what_others_write_is_read(tmp_path):
    np.savez(tmp_path / "plain.npz", **{"a/b": np.ones(2), "c": np.zeros(())})
    np.savez_compressed(tmp_path / "small.npz", **{"a/b": np.ones(2), "c": np.zeros(())})
    for name in ("plain", "small"):
        same(read(tmp_path / f"{name}.npz"), {"a": {"b": np.ones(2)}, "c": np.zeros(())})


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_through_safetensors(tmp_path, name):
    leaf = np.ones((2, 3)).astype(DTYPES[name])
    write(tmp_path / "net.safetensors", {"w": leaf, "none": leaf[:0], "one": leaf[0, 0]})
    same(read(tmp_path / "net.safetensors"), {"w": leaf, "none": leaf[:0], "one": leaf[0, 0]})


ORDERS = {
    "transposed": lambda w: w.T,
    "strided": lambda w: w[:, ::2],
    "reversed": lambda w: w[::-1, ::-1],
    "fortran": np.asfortranarray,
    "slices": lambda w: np.swapaxes(np.stack([w, w + 1]), 0, 2)[1:],
    "broadcast": lambda w: np.broadcast_to(w[0], (4, *w[0].shape)),
    "big endian": lambda w: w.T.astype(">f4", order="K"),
}
"""Arrays whose memory is not that of their values in row-major order."""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", [".safetensors", ".npz", "", ".lcq", "plain.lcq"])
def test_the_order_of_memory_is_no_matter(tmp_path, kind, order):
    """safetensors itself writes the memory as it lies."""
    w = ORDERS[order](np.arange(24, dtype=np.float32).reshape(4, 6))
    path, bits = tmp_path / f"net{kind}", (w.astype(np.uint8) % 3)
    assert order == "big endian" or not (w.flags.c_contiguous and w.strides[0] > 0)
    if kind.endswith(".lcq"):
        levels = np.arange(3, dtype=np.float32).reshape(*(1,) * w.ndim, 3)
        forms = {"codes": Codes(codes=bits, levels=levels, dtype="float32"), "cast": Cast(w)}
        save(path, {"w": w, **forms}, coded=kind == ".lcq")
        back = lcq.decompress(load(path))
        np.testing.assert_array_equal(back["codes"], bits)
        np.testing.assert_array_equal(back["cast"], w)
    else:
        write(path, {"w": w})
        back = read(path)
    np.testing.assert_array_equal(back["w"], w)
    assert back["w"].dtype == np.float32


def test_states_of_flax(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 2, rngs=rngs)])

    state = nnx.state(Net(nnx.Rngs(0)))
    write(tmp_path / "net.npz", state)
    kernel = nnx.to_pure_dict(state)["layers"][0]["kernel"]
    same(read(tmp_path / "net.npz")["layers"]["0"]["kernel"], kernel)
    write(tmp_path / "net.npz", flax.core.freeze({"a": (kernel, kernel)}))
    same(read(tmp_path / "net.npz"), {"a": {"0": kernel, "1": kernel}})


# Orbax


def test_orbax(tmp_path):
    half = jnp.ones(2, jnp.bfloat16)
    write(
        tmp_path / "checkpoint",
        tree() | {"list": [half, {"x": half}], "tuple": (half,), "none": None, "ints": {3: half}},
    )
    back = read(tmp_path / "checkpoint")
    same(back, tree() | {"list": [half, {"x": half}], "tuple": [half], "none": None, "ints": {"3": half}})
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(back))
    with pytest.raises(ValueError, match="checkpoint: expected a new folder; it exists"):
        write(tmp_path / "checkpoint", tree())


def test_orbax_with_strings_in_the_tree(tmp_path):
    """As flax's guide writes them, a model and its settings: the whole tree was called damaged."""
    ocp = pytest.importorskip("orbax.checkpoint")
    settings = {"name": "dense", "sizes": np.array([2, 3]), "kinds": ["a", np.ones(2), "b"]}
    with ocp.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", {"model": {"w": np.ones(3)}, "config": settings})
    found = read_checkpoint(tmp_path / "net")
    same(
        found.tree,
        {"model": {"w": np.ones(3)}, "config": {"sizes": np.array([2, 3]), "kinds": [None, np.ones(2), None]}},
    )
    assert found.metadata == {"config/name": "dense", "config/kinds/0": "a", "config/kinds/2": "b"}


def test_what_orbax_cannot_hold_is_named(tmp_path):
    """Before orbax begins, which leaves a folder behind."""
    for tree, message in (
        ({"a": {"w": np.zeros((0, 2))}, "b": np.ones(2)}, r"a/w: expected numbers, got an array \[0, 2\] of none"),
        ({}, r"net: expected a tree with a leaf, got \{\}"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "net", tree)
    assert not list(tmp_path.iterdir())


def test_orbax_from_a_training_run(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(5, args=ocp.args.StandardSave({"w": jnp.ones(3)}))
    with pytest.raises(ValueError, match="run: no orbax checkpoint of a tree; those inside: 5/default"):
        read(tmp_path / "run")
    same(read(tmp_path / "run/5/default"), {"w": np.ones(3, np.float32)})
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.device_put(jnp.arange(16.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "spread", {"w": spread})
    same(read(tmp_path / "spread"), {"w": np.arange(16, dtype=np.float32)})


@pytest.mark.parametrize("nested", [{"b": jnp.zeros(2)}, [jnp.zeros(2)]])
def test_orbax_keys_with_dots(tmp_path, nested):
    ocp = pytest.importorskip("orbax.checkpoint")
    dotted = {"a": nested, f"a.{'b' if isinstance(nested, dict) else 0}": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"ours: a/[b0] and a\.[b0]: orbax keeps both in one place; .* rename one"):
        write(tmp_path / "ours", dotted)
    assert not (tmp_path / "ours").exists()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", dotted)
    with pytest.raises(ValueError, match=r"theirs: a/[b0] and a\.[b0]: orbax keeps both in one place; one was"):
        read(tmp_path / "theirs")
    write(tmp_path / "apart", {"a.c": jnp.ones(2), "a": nested})
    assert len(jax.tree.leaves(read(tmp_path / "apart"))) == 2


@pytest.mark.parametrize("missing", ["orbax", "orbax.checkpoint"])
def test_without_orbax(tmp_path, monkeypatch, missing):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found(name))
    for use in (read, lambda path: write(path / "new", {"w": 1})):
        with pytest.raises(ValueError, match="a folder needs orbax; pip install orbax-checkpoint"):
            use(tmp_path)


# Errors


@pytest.mark.parametrize("name", ["net.pt", "net.lcq", "net.h5", "net.SAFETENSORS"])
def test_unknown_kinds(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    hint = "lcq.load and lcq.save are for .lcq" if name.endswith("lcq") else "expected a .safetensors or .npz file"
    with pytest.raises(ValueError, match=hint):
        read(tmp_path / name)
    with pytest.raises(ValueError, match=hint):
        write(tmp_path / name, {"w": np.ones(2)})


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"net\.npz: no such file or folder"):
        read(tmp_path / "net.npz")
    with pytest.raises(ValueError, match="no orbax checkpoint of a tree; those inside: none"):
        read(tmp_path)
    (tmp_path / "checkpoint").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a \.safetensors or \.npz file"):
        read(tmp_path / "checkpoint")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_leaf_and_a_folder_of_one_name(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    both = {"a": np.ones(1), "a/b": np.ones(1)}
    np.savez(path, **both) if suffix == ".npz" else safetensors.numpy.save_file(both, path)
    with pytest.raises(ValueError, match=r"net.*: a: a leaf and a branch have this path"):
        read(path)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (Cast(jnp.ones(2)), "w: expected an array, got Cast; call lcq.decompress first"),
        (None, "w: expected an array, got None, which .npz cannot hold; leave it out"),
        ({}, r"w: expected an array, got \{\}"),
        ("text", "w: expected an array, a number or None, got str"),
        (jax.random.key(0), "w: expected numbers, got a PRNG key"),
        (jnp.ones(2, jnp.bfloat16), "w: npz cannot hold bfloat16; write .safetensors"),
        (jnp.ones(2, jnp.float8_e5m2), "w: npz cannot hold float8_e5m2"),
    ],
)
def test_leaves_that_cannot_be_written(tmp_path, leaf, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "net.npz", {"w": leaf})
    assert list(tmp_path.iterdir()) == []


def test_the_name_that_safetensors_keeps_for_itself(tmp_path):
    with pytest.raises(ValueError, match=r"^__metadata__: expected another name, .* rename the leaf"):
        write(tmp_path / "net.safetensors", {"__metadata__": np.ones(2), "w": np.ones(2)})
    assert list(tmp_path.iterdir()) == []
    write(tmp_path / "net.npz", {"__metadata__": np.ones(2)})
    assert read(tmp_path / "net.npz")["__metadata__"].shape == (2,)


def test_arrays_without_a_name_for_their_dtype(tmp_path):
    np.savez(tmp_path / "net.npz", w=np.ones(2, jnp.bfloat16))
    with pytest.raises(
        ValueError, match=r"w: expected numbers, got .V2; npz drops the names of dtypes such as bfloat16"
    ):
        read(tmp_path / "net.npz")
    np.savez(tmp_path / "net.npz", w=np.ones(2, jnp.float8_e5m2))  # numpy cannot even read it
    with pytest.raises(ValueError, match=r"w: expected numbers, got a dtype without a name; npz drops the names"):
        read(tmp_path / "net.npz")
    np.savez(tmp_path / "net.npz", w=np.array([None]))
    with pytest.raises(ValueError, match="not an npz file of numbers"):
        read(tmp_path / "net.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_damaged_files(tmp_path, suffix):
    path = tmp_path / f"net{suffix}"
    write(path, tree())
    whole, rng = path.read_bytes(), random.Random(0)
    for data in [b"", b"x" * 100, *(whole[: rng.randrange(len(whole))] for _ in range(50))]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"net{suffix}: not a"):
            read(path)
    for _ in range(200):  # neither format has digests for all: some changes cannot be seen
        at = rng.randrange(len(whole))
        path.write_bytes(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
        try:
            read(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
    np.save(tmp_path / "array.npy", np.ones(3))
    path.write_bytes((tmp_path / "array.npy").read_bytes())
    with pytest.raises(ValueError, match=rf"net{suffix}: not a"):
        read(path)


def test_files_of_another_kind_under_the_name_of_one(tmp_path):
    """numpy would have them read as pickles, which run code; of an .lcq file one would take the index for a leaf."""
    write(tmp_path / "net.safetensors", tree())
    np.save(tmp_path / "array.npy", np.ones(3))
    for other in ("net.safetensors", "array.npy"):
        (tmp_path / "net.npz").write_bytes((tmp_path / other).read_bytes())
        with pytest.raises(ValueError, match=r"net.npz: not an npz file, or damaged: .* name it as what it is$"):
            read(tmp_path / "net.npz")
    for coded in (True, False):
        lcq.save(tmp_path / "net.safetensors", tree(), coded=coded)
        for lazy in (True, False):
            with pytest.raises(ValueError, match=r"net.safetensors: expected tensors of another .* got an .lcq file"):
                read(tmp_path / "net.safetensors", lazy=lazy)
    with zipfile.ZipFile(tmp_path / "net.npz", "w") as archive:
        archive.write(tmp_path / "array.npy", "a/w.npy")
        archive.writestr("a/readme.txt", "words")
    with pytest.raises(ValueError, match=r"net.npz: a/readme.txt: .* it is no array, but a file of another kind"):
        read(tmp_path / "net.npz")


def test_a_big_endian_npz(tmp_path):
    w = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "net.npz", a=w.astype(">f4"), n=np.arange(3).astype(">i8"))
    same(read(tmp_path / "net.npz"), {"a": w, "n": np.arange(3)})


@pytest.mark.parametrize(
    ("bad", "remedy"), [(np.array(["x"]), "convert it first"), (np.array([{}], object), "pickle"), ("M8[s]", "convert")]
)
def test_what_an_npz_should_not_hold_is_named(tmp_path, bad, remedy):
    bad = np.zeros(2, bad) if isinstance(bad, str) else bad
    np.savez(tmp_path / "net.npz", ok=np.ones(2), odd=bad)
    with pytest.raises(ValueError, match=rf"net.npz: odd: .*{remedy}"):
        read(tmp_path / "net.npz")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("net.pt", "safetensors.torch"),
        ("net.lcq", "lcq.load"),
        ("i.json", "index"),
        ("net.eqx", "tree_deserialise_leaves"),
        ("net.msgpack", "msgpack_restore"),
        ("net.h5", "save_weights"),
    ],
)
def test_other_kinds_are_told_what_to_do(tmp_path, name, hint):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=rf"{name}: expected a .safetensors or .npz file, .*{hint}"):
        read(tmp_path / name)


def test_metadata_are_for_safetensors(tmp_path):
    with pytest.raises(ValueError, match=r"net.npz: expected a .safetensors file for metadata, got format"):
        write(tmp_path / "net.npz", {"a": np.ones(2)}, {"format": "pt"})
