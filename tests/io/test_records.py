"""Trees and forms as records: nothing is lost, what is shared is stored once, and a wrong record names its leaf."""

import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Array

from lcq.forms import Cast, Codes
from lcq.forms.base import FORMS, Form, register_form, static
from lcq.io.records import Encoder, decode
from lcq.io.tree_paths import DEPTH, Leaf, flatten, nest


def through_json(tree):
    """Encode, pass the records through JSON, decode; returns the tree, the records and the streams."""
    encoder = Encoder()
    records = json.loads(json.dumps([encoder.encode(leaf) for leaf in flatten(tree)[0]], allow_nan=False))
    leaves = [decode(record, encoder.streams.__getitem__) for record in records]
    return nest(leaves), records, encoder.streams


def codes(shape=(4, 6), k=3, seed=0, **fields):
    """A stored form with a learned table, unless other fields are given."""
    indices = np.random.default_rng(seed).integers(0, k, shape).astype(np.uint8 if k <= 256 else np.uint16)
    if "values" not in fields:
        fields.setdefault("levels", np.arange(k, dtype=np.float32).reshape((1,) * len(shape) + (k,)))
    return Codes(indices, **fields).pack()


@dataclasses.dataclass(frozen=True)
class Layer:
    """Stands for a module of equinox: a dataclass whose attributes are children."""

    weight: Array
    value: Array
    bias: Array | None = None


jax.tree_util.register_dataclass(Layer, ["weight", "value", "bias"], [])


# Trees


def test_every_kind_of_key_comes_back():
    a, b, c, d, e, f = (np.full(2, i) for i in range(6))
    tree = {"list": [a, (b, c)], "ints": {0: d, 7: e}, "layer": Layer(f, a, None), "frozen": flax.core.freeze({"x": b})}
    back, records, _ = through_json(tree)
    assert jax.tree.all(jax.tree.map(lambda x, y: x is y, back["list"], [a, [b, c]]))
    assert back["ints"] == {0: d, 7: e}
    assert back["layer"] == {"weight": f, "value": a, "bias": None}
    assert back["frozen"] == {"x": b}
    kinds = {"/".join(map(str, r["path"])): r["kinds"] for r in records}
    assert kinds["list/1/0"] == "dss" and kinds["ints/7"] == "dd" and kinds["layer/value"] == "da"


def test_what_holds_nothing_is_kept():
    tree = {"w": [(np.ones(2), None), (), {"a": {}, "b": []}, np.ones(1)], "none": None}
    back, _, _ = through_json(tree)
    assert (
        back["w"][0][1] is None and back["w"][1] == [] and back["w"][2] == {"a": {}, "b": []} and back["none"] is None
    )
    for empty in (None, {}, []):
        assert through_json(empty)[0] == empty


def test_a_variable_of_nnx_is_its_array():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs)])

    state = nnx.state(Net(nnx.Rngs(0)))
    assert [leaf.path for leaf in flatten(state)[0]] == ["layers/0/bias", "layers/0/kernel"]


def test_an_attribute_named_value_stays_beside_others():
    assert [leaf.path for leaf in flatten(Layer(1, 2))[0]] == ["weight", "value", "bias"]
    nested = Layer(jnp.ones(1), {"x": jnp.ones(1)})
    assert [leaf.path for leaf in flatten(nested)[0]] == ["weight", "value/x", "bias"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a/b": 1, "a": {"b": 2}}, "'a/b': 2 leaves have this path"),
        ({("x", "y"): 1}, r"printable strings?, got \(\('x', 'y'\),\)"),
        ({True: 1}, "integer or a printable string"),
        ({"a\nb": 1}, "printable string"),
        ({"\ud800": 1}, "printable string"),
    ],
)
def test_keys_a_file_cannot_hold(tree, message):
    with pytest.raises(ValueError, match=message):
        flatten(tree)


def test_too_deep_a_tree():
    tree = 1
    for _ in range(DEPTH + 1):
        tree = {"a": tree}
    with pytest.raises(ValueError, match="at most 64 keys"):
        flatten(tree)


def test_contradicting_keys():
    with pytest.raises(ValueError, match="a: a leaf and a branch"):
        nest([Leaf(("a",), "d", 1), Leaf(("a", "b"), "dd", 2)])
    for wrong in ([Leaf((1,), "s", 1)], [Leaf((0,), "s", 1), Leaf(("x",), "d", 2)], [Leaf((10**9,), "s", 1)]):
        with pytest.raises(ValueError, match="places 0 to"):
            nest(wrong)


# Forms


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5))
def test_fixed_values_come_back_bit_for_bit(values):
    form = codes(k=len(values), values=tuple(values))
    back = through_json(form)[0]
    assert np.array(back.values).tobytes() == np.array(values).tobytes()


@pytest.mark.parametrize(("first", "count"), [(-128.0, 256), (0.0, 3), (-1.0, 3), (-32768.0, 65536)])
def test_a_grid_takes_few_bytes(first, count):
    form = codes(k=2, values=tuple(first + i for i in range(count)))
    back, (record,), _ = through_json(form)
    assert back.values == form.values and all(type(v) is float for v in back.values)
    assert record["static"]["values"] == {"first": int(first), "last": int(first) + count - 1}


def test_negative_zero_is_no_whole_number_of_a_grid():
    back = through_json(codes(k=2, values=(-1.0, -0.0, 1.0)))[0]
    assert str(back.values) == "(-1.0, -0.0, 1.0)"


def test_names_of_streams():
    tree = {"w": codes(), "w.codes": np.ones(2), "__metadata__": np.zeros(1), "": np.ones(3)}
    back, _, streams = through_json(tree)
    assert set(streams) == {"", "__metadata__'", "w.codes", "w.codes'", "w.levels"}
    np.testing.assert_array_equal(back["w.codes"], np.ones(2))
    np.testing.assert_array_equal(back["w"].dense(), tree["w"].dense())


def test_what_a_joint_task_shares_is_stored_once():
    table = np.array([-1.0, 0.5, 2.0], np.float32)
    tree = {
        "a": codes((4, 6), levels=table.reshape(1, 1, 3), scale=np.full((1, 1), 2, np.float32), shared="a"),
        "b": codes((5,), seed=1, levels=table.reshape(1, 3), scale=np.full((1,), 2, np.float32), shared="a"),
        "c": codes((5,), seed=2, levels=table.reshape(1, 3)),
    }
    back, _, streams = through_json(tree)
    assert list(streams) == ["a.codes", "a.levels", "a.scale", "b.codes", "c.codes", "c.levels"]
    for name, form in tree.items():
        assert back[name].shared == form.shared and back[name].levels.shape == form.levels.shape
        np.testing.assert_array_equal(back[name].dense(), form.dense())


@pytest.mark.parametrize("field", ["levels", "scale", "zero"])
@pytest.mark.parametrize("change", ["value", "dtype", "missing"])
def test_leaves_that_share_must_agree(field, change):
    one = {"scale": np.ones((1, 1), np.float32), "zero": np.ones((1, 1), np.float32)}
    first = codes(shared="a", **one)
    other = np.copy(getattr(first, field))
    if change == "value":
        other.flat[-1] = np.nextafter(other.flat[-1], np.float32(9))
    if change == "dtype":
        other = other.astype(np.float64)
    if change == "missing" and field == "levels":
        second = codes(k=2, values=(0.0, 1.0), shared="a", **one)
    else:
        second = dataclasses.replace(first, **{field: None if change == "missing" else other})
    for tree in ({"a": first, "b": second}, {"a": second, "b": first}):
        with pytest.raises(ValueError, match=rf"b: expected the {field} of a, which shares it \(shared='a'\)"):
            through_json(tree)


def test_forms_in_forms():
    @register_form
    class Pair(Form):
        terms: tuple[Form, ...]
        rest: Form | None = None
        order: tuple[int, str] | None = static(default=None)

        shape = property(lambda self: self.terms[0].shape)
        bits = property(lambda self: sum(term.bits for term in self.terms))

        def dense(self):
            return sum(term.dense() for term in self.terms)

        def pack(self):
            return dataclasses.replace(self, terms=tuple(term.pack() for term in self.terms))

        unpack = pack

        def check_stored(self):
            for term in self.terms:
                term.check_stored()

    try:
        cast = Cast(np.ones((4, 6), np.float16))
        back, (record,), streams = through_json({"w": Pair((codes(), cast), cast, (3, "x"))})
        assert set(streams) == {"w.terms.0.codes", "w.terms.0.levels", "w.terms.1.values", "w.rest.values"}
        assert back["w"].order == (3, "x") and type(back["w"].rest) is Cast
        np.testing.assert_array_equal(back["w"].dense(), codes().dense() + 1)
        for wrong in ([3, 4], [3], [3, "x", "y"], "3x"):
            record["static"]["order"] = wrong
            with pytest.raises(ValueError, match="w: Pair: order: expected"):
                decode(record, streams.__getitem__)
        deep = record["arrays"]["rest"]
        for _ in range(200):
            deep = {"form": "Pair", "static": {}, "arrays": {"terms": {"tuple": [deep]}}}
        with pytest.raises(ValueError, match="w: expected a form"):
            decode(record | deep, streams.__getitem__)
    finally:
        FORMS.unregister("Pair")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_form_with_a_nan_or_an_infinity_is_refused(bad, dtype):
    values = np.array([1, bad, 2, bad], jnp.dtype(dtype))
    with pytest.raises(ValueError, match="w: values: expected finite numbers, got 2 NaN or infinite"):
        through_json({"w": Cast(values)})
    with pytest.raises(ValueError, match="w: levels: expected finite"):
        through_json({"w": codes(k=4, levels=values.reshape(1, 1, 4))})


def test_a_plain_leaf_may_hold_anything():
    leaf = np.array([np.nan, np.inf])
    assert through_json({"w": leaf})[0]["w"] is leaf


WRONG_FORMS = {
    "working layout": lambda form: dataclasses.replace(form, packed=None),
    "at most 64 axes and": lambda form: dataclasses.replace(form, packed=(-4, -6)),
    "dtype: expected one of": lambda form: dataclasses.replace(form, dtype="int32"),
    "either learned levels": lambda form: dataclasses.replace(form, values=(1.0, 2.0, 3.0)),
    "or fixed values": lambda form: dataclasses.replace(form, levels=None),
    "levels: expected block counts": lambda form: dataclasses.replace(form, levels=form.levels[0]),
    "scale: expected block counts": lambda form: dataclasses.replace(form, scale=np.ones((3, 1), np.float32)),
    "zero: expected block counts": lambda form: dataclasses.replace(form, zero=np.ones((0, 1), np.float32)),
    "same blocks": lambda form: dataclasses.replace(form, scale=np.ones((2, 1), np.float32)),
    "levels: expected one of": lambda form: dataclasses.replace(form, levels=form.levels.astype(np.int32)),
    "1 to 65,536 levels, got 0": lambda form: dataclasses.replace(form, levels=form.levels[..., :0]),
    "float32 can hold": lambda form: dataclasses.replace(form, levels=None, values=(0.0, 1e39, 1e40)),
    r"expected uint32\[2\] for 24 codes of 2 bits, got uint32\[1\]": lambda form: dataclasses.replace(
        form, codes=form.codes[:1]
    ),
    r"got uint32\[2, 1\]": lambda form: dataclasses.replace(form, codes=form.codes[:, None]),
    "got int32": lambda form: dataclasses.replace(form, codes=form.codes.astype(np.int32)),
    r"expected uint32\[3\] for 24 codes of 3 bits": lambda form: dataclasses.replace(
        form, levels=np.ones((1, 1, 5), np.float32)
    ),
    "expected codes below 3, got a larger": lambda form: dataclasses.replace(form, codes=form.codes | np.uint32(3)),
}


@pytest.mark.parametrize("message", WRONG_FORMS)
def test_a_form_that_is_not_well_formed(message):
    with pytest.raises(ValueError, match=rf"w: .*{message}"):
        through_json({"w": WRONG_FORMS[message](codes())})


@given(st.integers(1, 300), st.integers(1, 100), st.data())
def test_a_code_outside_the_table_is_found_anywhere(k, size, data):
    form = codes((size,), k=k, levels=np.zeros((1, k), np.float32))
    form.check_stored()
    width = (k - 1).bit_length()
    if k == 1 << width:
        return
    at = data.draw(st.integers(0, size - 1))
    stream = int.from_bytes(form.codes.astype("<u4").tobytes(), "little") | (2**width - 1) << (at * width)
    words = np.frombuffer(stream.to_bytes(form.codes.nbytes, "little"), "<u4")
    with pytest.raises(ValueError, match=f"expected codes below {k}"):
        dataclasses.replace(form, codes=words).check_stored()


# Records that nobody should write

GOOD = {
    "path": ["w"],
    "kinds": "d",
    "form": "Codes",
    "static": {"packed": [4, 6], "dtype": "float32"},
    "arrays": {"codes": "w.codes", "levels": "w.levels"},
}


def changed(**changes):
    return GOOD | changes


WRONG_RECORDS = [
    (None, "path and kinds"),
    ([], "path and kinds"),
    (changed(path="w"), "path and kinds"),
    (changed(kinds="dd"), "path and kinds"),
    (changed(path=["w"] * 65, kinds="d" * 65), "path and kinds"),
    (changed(path=[1.5]), "keys of the kinds"),
    (changed(path=[None]), "keys of the kinds"),
    (changed(path=[True]), "keys of the kinds"),
    (changed(path=["w"], kinds="s"), "keys of the kinds"),
    (changed(path=[1], kinds="a"), "keys of the kinds"),
    (changed(kinds="?"), "keys of the kinds"),
    (changed(form="Code"), "w: expected one of the forms Cast, Codes.*, got 'Code'"),
    (changed(form=["Codes"]), "expected a form with"),
    (changed(more=1), "expected a form with"),
    (changed(static=[]), "expected a form with"),
    (changed(static={}), "working layout"),
    (changed(static={"packed": [4, 6], "codes": 1}), "its fields only"),
    (changed(static={"packed": [4, 6], "colour": "red"}), r"its fields only, got \['colour'\]"),
    (changed(static={"packed": 24}), "packed: expected"),
    (changed(static={"packed": ["4", "6"]}), "packed: expected"),
    (changed(static={"packed": [4.0, 6.0]}), "packed: expected"),
    (changed(static={"packed": [True, 6]}), "packed: expected"),
    (changed(static={"packed": [[4], 6]}), "packed: expected"),
    (changed(static={"packed": {"first": 4, "last": 6}}), "packed: expected"),
    (changed(static={"packed": [2**62, 2**62]}), "at most 64 axes"),
    (changed(static={"packed": [10**300, 0]}), "at most 64 axes"),
    (changed(static={"packed": [1] * 65}), "at most 64 axes"),
    (changed(static={"packed": [6, 4], "dtype": 32}), "dtype: expected"),
    (changed(static={"packed": [4, 6], "dtype": "object"}), "dtype: expected one of"),
    (changed(static={"packed": [4, 6], "shared": 3}), "shared: expected"),
    (changed(static={"packed": [4, 6], "values": [1.0, float("inf")]}), "expected finite numbers, got inf"),
    (changed(static={"packed": [4, 6], "values": {"first": 0, "last": 10**9}}), "values: expected"),
    (changed(static={"packed": [4, 6], "values": {"first": 10**400, "last": 10**400}}), "values: expected"),
    (changed(arrays={"levels": "w.levels"}), "codes is missing"),
    (changed(arrays={"codes": "w.codes", "levels": "nothing"}), "no tensor nothing"),
    (changed(arrays={"codes": ["w.codes", [3]], "levels": "w.levels"}), "w.codes: expected a stream that fits"),
    (changed(arrays={"codes": ["w.codes", [-1, -2]], "levels": "w.levels"}), "expected a form with"),
    (changed(arrays={"codes": ["w.codes", [1] * 65], "levels": "w.levels"}), "expected a form with"),
    (changed(arrays={"codes": 3, "levels": "w.levels"}), "expected a form with"),
    (changed(arrays={"codes": {"tuple": []}, "levels": "w.levels"}), r"codes: expected .*, got \(\)"),
    (changed(arrays={"codes": {"tuple": ["w.codes"]}, "levels": "w.levels"}), "codes: expected .*, got"),
    (changed(arrays={"codes": {"tuple": 3}, "levels": "w.levels"}), "expected a form with"),
    (changed(arrays={"codes": GOOD, "levels": "w.levels"}), "expected a form with"),
    ({"path": [], "kinds": "", "array": 3}, "expected a form with"),
    ({"path": [], "kinds": "", "array": "nothing"}, "no tensor nothing"),
    ({"path": [], "kinds": "", "array": "w.codes", "form": "Codes"}, "expected a form with"),
    ({"path": [], "kinds": "", "empty": 0}, "expected a form with"),
    ({"path": [], "kinds": "", "empty": [1]}, "expected a form with"),
    ({"path": [], "kinds": "", "empty": {"a": 1}}, "expected a form with"),
]


@pytest.mark.parametrize(("record", "message"), WRONG_RECORDS)
@pytest.mark.parametrize("allocated", [False, True])
def test_a_wrong_record_is_refused(record, message, allocated):
    form = codes()
    arrays = {"w.codes": form.codes, "w.levels": form.levels}

    def stream(name):
        if name not in arrays:
            raise ValueError(f"no tensor {name}")
        array = arrays[name]
        return array if allocated else jax.ShapeDtypeStruct(array.shape, array.dtype)

    decode(GOOD, stream)
    with pytest.raises(ValueError, match=message):
        decode(record, stream)
