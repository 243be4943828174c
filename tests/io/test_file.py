"""A file gives back what was saved; what it cannot hold is refused; it is written whole or not at all."""

import functools
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from hypothesis import given

import lcq
from lcq.forms import Cast, Codes
from lcq.forms.base import is_form
from lcq.io import container, writing
from lcq.io import file as file_module
from lcq.io.file import ArtifactError, load, read_index, save
from tests.io.files import arrays, codes_fields, same

plain = functools.partial(save, coded=False)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "net.lcq"


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


PLAN = "[[rule]]\npattern = '(.*/)?kérnel\\d'\nscheme = \"KMeans(4)\"\n"


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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
def test_a_failure_leaves_the_old_file(path, monkeypatch, error, step):
    save(path, {"w": np.zeros(3)})
    old = path.read_bytes()

    def fail(*_):
        raise error

    if step == "write":  # the head is written
        monkeypatch.setattr(writing.shutil, "copyfileobj", fail)
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


def test_a_tree_in_the_place_of_the_path(tmp_path):
    """In a process of its own, in which nothing checks annotations."""
    calls = ("lcq.save", "lcq.io.write")
    swapped = "".join(
        f"try:\n    {call}({{'w': 1}}, 'net.npz')\nexcept ValueError as error:\n    print(error)\n" for call in calls
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import lcq\n{swapped}"], cwd=tmp_path, capture_output=True, text=True
    )
    words = "expected the name of a file first, got dict; the order is"
    assert done.stdout.splitlines() == [f"{words} {call}(path, tree)" for call in calls]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; make it, or choose another name: '[^']*/no'$"):
        save(tmp_path / "no" / "net.lcq", {"w": 1})
    with pytest.raises(FileNotFoundError, match=r"no such folder; make it, or choose another name: '[^']*/no'$"):
        lcq.io.write(tmp_path / "no" / "net.npz", {"w": np.ones(1)})
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "net.lcq")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "net.lcq"
    plain(path, arrays(), plan=PLAN)
    return path.read_bytes()


def small_leaves(count):
    rng = np.random.default_rng(0)
    return {f"layers.{i}.lora_A": rng.normal(size=(8, 32)).astype(np.float32) for i in range(count)}


def test_thousands_of_small_leaves(tmp_path):
    forms = lcq.compress(small_leaves(200), [lcq.Rule(".*", lcq.KMeans(4))])
    seen = []
    lcq.save(tmp_path / "a.lcq", forms, progress=lambda *call: seen.append(call))
    assert seen[0] == (1, 400, "layers.0.lora_A.codes") and seen[-1][:2] == (400, 400)
    assert len(lcq.table(forms).rows) == 200
    back = lcq.load(tmp_path / "a.lcq")
    for name, form in forms.items():
        np.testing.assert_array_equal(back[name].dense(), form.dense())


@pytest.mark.parametrize(
    "scheme", [lcq.KMeans(8, rate=0.05), lcq.KMeans(2), lcq.Uniform(4, per=8), lcq.Prune(count=40)]
)
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
    rules = [
        lcq.Rule("[ab]", lcq.KMeans(4), joint=True),
        lcq.Rule("c", lcq.Additive(lcq.KMeans(2), lcq.Prune(count=9))),
    ]
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
