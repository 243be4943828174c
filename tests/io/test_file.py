"""The `.lcq` file: every tree comes back bit for bit, and nothing but a whole, honest file is loaded."""

import copy
import functools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

import lcq
from lcq.forms import Cast, Codes
from lcq.forms.base import is_form
from lcq.io import container
from lcq.io import file as file_module
from lcq.io.file import ArtifactError, load, read_index, save
from lcq.io.index import LONGEST_PLAN

plain = functools.partial(save, coded=False)


def same(a, b):
    """Bit for bit: class, dtype, shape, bytes, and every static field."""
    if is_form(a):
        assert type(a) is type(b)
        a_fields, b_fields = vars(a), vars(b)
        assert a_fields.keys() == b_fields.keys()
        for name in a_fields:
            same(a_fields[name], b_fields[name])
    elif hasattr(a, "dtype"):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert type(a) is type(b) and a == b and str(a) == str(b)


@st.composite
def codes_fields(draw):
    """Fields of `Codes` of every shape: learned or fixed tables, blocks, scales, zeros, dtypes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    k = draw(st.one_of(st.integers(1, 9), st.integers(1, 300)))
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    counts = tuple(draw(st.sampled_from([c for c in range(1, n + 1) if n % c == 0])) for n in shape)
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    fields = {"codes": rng.integers(0, k, shape).astype(np.uint8 if k <= 256 else np.uint16), "dtype": dtype}
    if draw(st.booleans()):
        fields["levels"] = np.sort(rng.normal(size=(*counts, k)), axis=-1).astype(jnp.dtype(dtype))
    else:
        first = draw(st.sampled_from([-3.0, 0.0, 0.25, -0.0]))
        fields["values"] = tuple(first + i for i in range(k))
    for name in ("scale", "zero"):
        if draw(st.booleans()):
            fields[name] = rng.normal(size=counts).astype(np.float32)
    return fields


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(3, 5)).astype(np.float32)
    table = jnp.array([[[-1.0, 0.0, 2.0]]])
    return {
        "dense0": {
            "kernel": Codes(jnp.asarray(rng.integers(0, 3, (6, 4)), jnp.uint8), table, shared="dense0/kernel"),
            "bias": Cast(jnp.asarray(w[0], jnp.bfloat16)),
        },
        "dense1": Codes(jnp.asarray(rng.integers(0, 3, (9,)), jnp.uint8), table.reshape(1, 3), shared="dense0/kernel"),
        "plain": [w, (jnp.asarray(w, jnp.bfloat16), None), ()],
        "step": jnp.int32(7),
    }


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


# Round trips


@given(codes_fields())
def test_codes_come_back_bit_for_bit(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("codes") / "net.lcq"
    form = jax.tree.map(jnp.asarray, Codes(**fields))
    assert save(path, {"w": form}) == path.stat().st_size
    back = load(path)["w"]
    same(back, form.pack())
    same(load(path, like={"w": jax.ShapeDtypeStruct(form.shape, form.dtype)})["w"], back)


@pytest.mark.parametrize("k", [1, 2, 3, 16, 256, 257, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dense_is_the_same_before_and_after(path, k, dtype):
    codes = np.random.default_rng(k).integers(0, k, (4, 3, 5))
    levels = jnp.asarray(np.linspace(-1, 1, 5 * k).reshape(1, 1, 5, k), dtype)
    codes = jnp.asarray(codes, jnp.uint16 if k > 256 else jnp.uint8)
    form = Codes(codes, levels, scale=jnp.full((1, 1, 5), 3.0), dtype=dtype)
    save(path, form)
    same(load(path).dense(), form.dense())


def test_stacked_levels(path):
    form = Codes(jnp.ones((3, 2, 4), jnp.uint8), jnp.arange(6.0).reshape(3, 1, 1, 2))
    save(path, form)
    same(load(path), form.pack())
    same(load(path).dense()[:, 0, 0], jnp.array([1.0, 3.0, 5.0]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 1, 3)])
def test_cast_comes_back(path, dtype, shape):
    form = Cast(jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype), dtype="float32")
    save(path, {"w": form})
    same(load(path)["w"], form.pack())


@pytest.mark.parametrize("name", sorted(container.DTYPES))
def test_plain_leaves_of_every_dtype_and_shape(path, name):
    dtype = container.DTYPES[name]
    bits = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, 24 * dtype.itemsize).astype(np.uint8)
    whole = bits.view(dtype)
    tree = {"one": whole[0].reshape(()), "none": whole[:0].reshape(0, 3), "cube": whole.reshape(2, 3, 4)}
    tree["fortran"] = np.asfortranarray(tree["cube"])
    tree["strided"] = whole[::-2]
    save(path, tree)
    same(load(path), dict(sorted(tree.items())))


def test_bytes_of_the_other_order_are_stored_by_value(path):
    save(path, {"w": np.arange(5, dtype=">f4"), "i": np.arange(5, dtype=">i8")})
    same(load(path), {"i": np.arange(5), "w": np.arange(5, dtype=np.float32)})


def test_numbers_become_arrays_without_axes(path):
    save(path, {"a": True, "b": 3, "c": 2.5, "d": np.float32(1)})
    back = load(path)
    same(back, {"a": np.array(True), "b": np.array(3), "c": np.array(2.5), "d": np.array(1, np.float32)})


def test_a_tree_of_everything(path):
    tree = arrays()
    assert save(path, tree) == path.stat().st_size
    packed = jax.tree.map(lambda x: x.pack() if is_form(x) else np.asarray(x), tree, is_leaf=is_form)
    packed["plain"] = [packed["plain"][0], [packed["plain"][1][0], None], []]
    back = load(path)
    same(back, packed)
    again = path.with_name("again.lcq")
    save(again, back)
    same(load(again), back)


@pytest.mark.parametrize("tree", [{}, None, [], np.ones(3), Cast(jnp.ones(2))])
def test_a_tree_of_one_node(path, tree):
    save(path, tree)
    same(load(path), tree.pack() if is_form(tree) else tree)


def test_equal_trees_give_equal_bytes(path):
    save(path, arrays())
    first = path.read_bytes()
    reordered = dict(reversed(arrays().items()))
    save(path, reordered)
    assert path.read_bytes() == first
    save(path, load(path, like=arrays()))
    assert path.read_bytes() == first
    save(path, flax.core.freeze(arrays()))
    assert path.read_bytes() == first


# A plan in the file, which is only text on this floor

PLAN = "[[rule]]\npattern = '(.*/)?kérnel\\d'\nscheme = \"KMeans(4)\"\n"


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"])))
def test_a_plan_comes_back(tmp_path_factory, words):
    path, plan = tmp_path_factory.mktemp("plan") / "net.lcq", f"# {words}\n{PLAN}"
    assert save(path, arrays(), plan=plan) == path.stat().st_size
    assert read_index(path).plan == plan
    tree = load(path)
    save(path, arrays())
    same(load(path), tree)
    assert read_index(path).plan is None


def test_a_plan_changes_nothing_but_the_index(path):
    plain(path, arrays())
    without = path.read_bytes()
    plain(path, arrays(), plan="")
    assert read_index(path).plan == ""
    header, index, streams = parts_of(path.read_bytes())
    assert index.pop("plan") == "" and parts_of(without) == (
        header | {"__metadata__": parts_of(without)[0]["__metadata__"]},
        index,
        streams,
    )
    with safetensors.safe_open(path, "numpy") as reader:
        assert set(reader.keys()) == header.keys() - {"__metadata__"}


@pytest.mark.parametrize("plan", [[("kernel", "Binary")], "[[rule]", 3.5, "a" * 10, "x = '\ud800'"])
def test_what_is_no_plan_is_not_saved(path, plan):
    with pytest.raises(ValueError, match=r"expected plan= an lcq.Plan\(rules\), or its text|surrogates"):
        save(path, arrays(), plan=plan)
    assert not path.exists()


def test_a_plan_has_a_size(path):
    longest = "#" + "é" * (LONGEST_PLAN // 2 - 1) + "!"
    assert len(longest.encode()) == LONGEST_PLAN
    plain(path, {"w": 1}, plan=longest)
    assert read_index(path).plan == longest and load(path)["w"] == 1
    with pytest.raises(ValueError, match="expected a plan of at most 4194304 bytes, got 4194305"):
        plain(path, {"w": 1}, plan=longest + "!")
    header, index, streams = parts_of(path.read_bytes())
    refuse(path, forge(header, index | {"plan": longest + "!"}, streams), "expected a plan of at most")


@pytest.mark.parametrize("plan", [None, 3, True, [PLAN], {"rule": []}, {}, "\ud800"])
def test_a_hostile_plan(path, plan):
    plain(path, arrays(), plan=PLAN)
    header, index, streams = parts_of(path.read_bytes())
    data = forge(header, index | {"plan": plan}, streams)
    refuse(path, data, r"expected a plan that is text|surrogates")
    with pytest.raises(ArtifactError, match=r"net.lcq: "):
        read_index(path)
    refuse(path, forge(header, index | {"plans": PLAN}, streams), "expected an index of leaves")
    for text in ("", "no TOML = ", "\0\x1b[2J", "[[rule]]\npattern = 3"):  # is for who reads the plan to refuse
        path.write_bytes(forge(header, index | {"plan": text}, streams))
        assert read_index(path).plan == text
        same(load(path)["step"], np.array(7, np.int32))


def test_a_damaged_plan_is_refused(path):
    plain(path, arrays(), plan=PLAN)
    whole = path.read_bytes()
    start = whole.index(b"KMeans(4)") - 60
    for at in range(start, start + 80):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        for reader in (load, read_index):
            with pytest.raises(ArtifactError, match=r"net.lcq: "):
                reader(path)


def test_a_plan_is_read_without_the_streams(path):
    plain(path, {"w": np.ones(10_000_000, np.uint8)}, plan=PLAN)
    tracemalloc.start()
    assert read_index(path).plan == PLAN
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


# like=


def test_like_restores_every_kind_of_tree(path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 2, rngs=rngs)])

    state = nnx.state(Net(nnx.Rngs(0)))
    save(path, state)
    back = load(path, like=nnx.state(Net(nnx.Rngs(1))))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(same, back, state)
    pure = nnx.to_pure_dict(state)
    same(load(path), pure)
    same(load(path, like=pure), pure)

    tree = flax.core.freeze({"a": (jnp.ones(2), {}, None)})
    save(path, tree)
    like = jax.eval_shape(lambda: tree)
    assert jax.tree.structure(load(path, like=like)) == jax.tree.structure(tree)
    assert load(path, like={"a": [jnp.ones(2)]})["a"][0].shape == (2,)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": 1, "b": np.ones((2, 3)), "c": 1}, r"the file has no c \(1 of 3 leaves\)"),
        ({"a": 1}, r"like= has no b \(1 of 2 leaves\)"),
        ({"a": 1, "b": np.ones((3, 2))}, r"b: expected \[3, 2\] as in like=, got \[2, 3\]"),
        ({"a": [1], "b": np.ones((2, 3))}, "the file has no a/0"),
    ],
)
def test_like_that_does_not_fit(path, like, message):
    save(path, {"a": 1, "b": Cast(jnp.ones((2, 3)))})
    with pytest.raises(ArtifactError, match=rf"net.lcq: {message}"):
        load(path, like=like)


# What cannot be saved


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (jax.random.key(0), "w/x: expected numbers, got a PRNG key; save jax.random.key_data"),
        ("text", "w/x: expected an array, a number or None, got str"),
        (object(), "w/x: .*got object"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "w/x: .*got ShapeDtypeStruct"),
        (np.array(["a"]), "w/x: expected one of bool, .*, got <U1"),
        (np.array([None]), "w/x: .*got object"),
        (2**70, "w/x: .*got object"),
        (1j, "w/x: .*got complex128"),
        (np.ones(2, jnp.int4), "w/x: .*got int4"),
        (np.ones(2, [("a", "f4")]), "w/x: expected one of"),
        (Cast(jnp.array([1.0, jnp.nan])), "w/x: values: expected finite"),
        (Codes(jnp.array([5], jnp.uint8), jnp.ones((1, 2))), "w/x: expected codes below 2"),
        (Cast(jnp.ones(2, jnp.int32)), "w/x: values: expected one of float64, float32"),
    ],
)
def test_a_leaf_that_no_file_can_hold(path, leaf, message):
    with pytest.raises(ValueError, match=message):
        save(path, {"w": {"x": leaf}})
    assert list(path.parent.iterdir()) == []


def test_a_traced_or_deleted_leaf(path):
    with pytest.raises(ValueError, match="w: expected a concrete array, got a traced one"):
        jax.jit(lambda w: save(path, {"w": w}))(jnp.ones(3))
    with pytest.raises(ValueError, match="w: expected a concrete array"):
        jax.jit(lambda w: save(path, {"w": Cast(w)}))(jnp.ones(3))
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ValueError, match="w: expected an array, got a deleted one"):
        save(path, {"w": gone})


def test_arrays_sharded_over_devices_of_this_process(path):
    mesh = jax.make_mesh((8,), ("x",))
    spread = jax.device_put(jnp.arange(16.0), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x")))
    save(path, {"w": spread, "c": Cast(spread)})
    same(load(path), {"c": Cast(np.arange(16, dtype=np.float32)), "w": np.arange(16, dtype=np.float32)})


PROCESS = """
import sys, jax, numpy as np
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from lcq.io.file import save
from lcq.forms import Cast
folder, rank = sys.argv[3], jax.process_index()
mesh = jax.make_mesh((2,), ("x",))
def spread(*axes):
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    return jax.make_array_from_callback((4,), sharding, lambda i: np.arange(4, dtype=np.float32)[i])
print(save(f"{folder}/{rank}.lcq", {"w": spread(), "c": Cast(spread())}))
for leaf in (spread("x"), Cast(spread("x"))):
    try:
        save(f"{folder}/bad.lcq", {"w": leaf})
    except ValueError as error:
        print(error)
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", PROCESS, address]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in both:
        size, *errors = process.communicate(timeout=120)[0].splitlines()
        assert int(size) == (tmp_path / "0.lcq").stat().st_size
        assert len(errors) == 2 and all("w: expected an array that this process can read" in e for e in errors)
    assert [p.name for p in tmp_path.iterdir()] == ["0.lcq"]
    same(load(tmp_path / "0.lcq")["c"], Cast(np.arange(4, dtype=np.float32)))


# Whole or not at all


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_failure_leaves_the_old_file(path, monkeypatch, error, step):
    save(path, {"w": np.zeros(3)})
    old = path.read_bytes()

    def fail(*_):
        raise error

    if step == "write":  # half of the file is written

        class Pieces(list):
            def __iter__(self):
                yield b"{}"
                fail()

        monkeypatch.setattr(file_module, "coded_layout", lambda *_: Pieces())
    else:
        monkeypatch.setattr(file_module.os, step, fail)
    with pytest.raises(type(error)):
        save(path, {"a": np.zeros(3), "w": np.ones(4)})
    monkeypatch.undo()
    assert path.read_bytes() == old
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(path):
    path.write_bytes(b"old")
    with file_module.replacing(path) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"half"


def test_links_and_permissions_are_as_for_any_file(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "net.lcq"
    link.symlink_to(tmp_path / "there" / "real.lcq")
    save(link, {"w": np.ones(2)})
    assert link.is_symlink() and (tmp_path / "there" / "real.lcq").is_file()
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert (tmp_path / "there" / "real.lcq").stat().st_mode == plain.stat().st_mode


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "no" / "net.lcq", {"w": 1})
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "net.lcq")


# Another reader


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


# Damage


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


# Files that someone wrote to do harm: every digest is right


def parts_of(data):
    """Header, index and streams of a file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["index"]), data[8 + length :]


def forge(header, index, streams, pad=True):
    """A file with right digests of the header and, where the header points into the streams, of these."""
    index = copy.deepcopy(index)
    for name, entry in header.items():
        try:
            begin, end = entry["data_offsets"]
            index["digests"][name] = container.digest(streams[begin:end])
        except (KeyError, TypeError, ValueError):
            pass
    metadata = header["__metadata__"] | {"index": json.dumps(index), "digest": "0" * 32}
    raw = json.dumps(header | {"__metadata__": metadata})
    raw = (raw + " " * (-len(raw) % 8)).encode()
    raw = raw.replace(b"0" * 32, container.digest(raw).encode())
    return struct.pack("<Q", len(raw)) + raw + streams


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
        (signed("{}", version='"4"'), "expected format version 1, 2, 3, got '4'"),
        (signed("{}", version="1"), "expected format version 1, 2, 3, got 1"),
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


def small_leaves(count):
    rng = np.random.default_rng(0)
    return {f"layers.{i}.lora_A": rng.normal(size=(8, 32)).astype(np.float32) for i in range(count)}


def test_thousands_of_small_leaves(tmp_path):
    forms = lcq.compress(small_leaves(200), [lcq.Rule(".*", lcq.KMeans(4))])
    seen = []
    start = time.process_time()
    lcq.save(tmp_path / "a.lcq", forms, progress=lambda *call: seen.append(call))
    assert time.process_time() - start < 1
    assert seen[0] == (1, 400, "layers.0.lora_A.codes") and seen[-1][:2] == (400, 400)
    assert len(lcq.table(forms).rows) == 200
    back = lcq.load(tmp_path / "a.lcq")
    for name, form in forms.items():
        np.testing.assert_array_equal(back[name].dense(), form.dense())


@pytest.mark.parametrize("scheme", [lcq.KMeans(8, rate=0.05), lcq.KMeans(2), lcq.Uniform(4, per=8), lcq.Prune(kept=40)])
def test_small_leaves_of_other_kinds(tmp_path, scheme):
    forms = lcq.compress(small_leaves(100), [lcq.Rule(".*", scheme)])
    lcq.save(tmp_path / "a.lcq", forms)
    back = lcq.load(tmp_path / "a.lcq")
    for name, form in forms.items():
        np.testing.assert_array_equal(back[name].dense(), form.dense())


@pytest.mark.parametrize("coded", [True, False])
def test_metadata_are_kept_and_files_without_are_as_they_were(tmp_path, coded, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what is checked here is the message
    tree = {"w": np.arange(6, dtype=np.float32)}
    bare, said = tmp_path / "bare.lcq", tmp_path / "said.lcq"
    save(bare, tree, coded=coded)
    assert file_module.read_metadata(bare) == {}
    save(said, tree, coded=coded, metadata={"format": "pt", "a": "é"}, plan="rule = []")
    assert file_module.read_metadata(said) == {"format": "pt", "a": "é"} and read_index(said).plan == "rule = []"
    np.testing.assert_array_equal(load(said)["w"], tree["w"])
    save(said, tree, coded=coded, metadata={})
    assert said.read_bytes() == bare.read_bytes()
    for bad in ({"n": 3}, {3: "n"}):
        with pytest.raises(ValueError, match="expected metadata= a dict of strings by name"):
            save(said, tree, coded=coded, metadata=bad)
    with pytest.raises(ValueError, match="expected metadata of at most"):
        save(said, tree, coded=coded, metadata={"long": "x" * (1 << 22)})


@pytest.mark.parametrize("coded", [True, False])
def test_leaves_one_by_one_are_those_of_load(tmp_path, coded):
    x = np.random.default_rng(0).normal(size=(8, 32)).astype(np.float32)
    rules = [lcq.Rule("[ab]", lcq.KMeans(4), joint=True), lcq.Rule("c", lcq.Additive(lcq.KMeans(2), lcq.Prune(kept=9)))]
    tree = lcq.compress({"a": x, "b": x + 1, "c": x, "d": x}, rules) | {"e": None, "n": 3}
    size = save(tmp_path / "net.lcq", tree, coded=coded)
    whole = load(tmp_path / "net.lcq")
    each = {leaf.path: leaf.value for _, leaf in file_module.each_leaf(tmp_path / "net.lcq")}
    assert each.keys() == whole.keys()
    for name, value in whole.items():
        same(each[name], value)
    data = (tmp_path / "net.lcq").read_bytes()
    (tmp_path / "bad.lcq").write_bytes(data[:-1] + bytes([data[size - 1] ^ 1]))
    with pytest.raises(ArtifactError, match="digest"):
        list(file_module.each_leaf(tmp_path / "bad.lcq"))
