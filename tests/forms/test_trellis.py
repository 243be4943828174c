"""A leaf on a trellis: decoded one weight at a time by numpy, moved, cut, packed, prepacked."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Trellis, TrellisColumns
from lcq.forms.paths import piece_length
from lcq.forms.relayout import MatrixView, Relayout
from lcq.forms.state_values import table_of

RNG = np.random.default_rng(0)


def value(state, memory, code):
    if code != "computed":
        return table_of(memory, code)[state]
    hashed = (int(state) * 2032882385 + 2198257139) % 2**32
    return (sum(hashed.to_bytes(4, "little")) - 510) / np.sqrt(4 * (256**2 - 1) / 12)


def decoded(steps, along, length, width, memory, code):
    """Every weight by itself, from the bits that were written last down its piece."""
    axes = [i % steps.ndim for i in along]
    rest = [i for i in range(steps.ndim) if i not in axes]
    out = np.zeros(steps.shape)
    lengths = [steps.shape[i] for i in axes]
    for other in np.ndindex(*[steps.shape[i] for i in rest]):
        at = []
        for place in np.ndindex(*lengths):
            index = [0] * steps.ndim
            for axis, i in zip([*axes, *rest], [*place, *other], strict=True):
                index[axis] = i
            at.append(tuple(index))
        for first in range(0, len(at), length):
            piece = at[first : first + length]
            for i, here in enumerate(piece):
                text = "".join(f"{int(steps[piece[j % length]]):0{width}b}" for j in range(i - 40, i + 1))
                out[here] = value(int(text[-memory:], 2), memory, code)
    return out


def form_of(shape, along, length, width, memory, code="computed", scale=None):
    steps = RNG.integers(0, 1 << width, shape).astype(np.uint8)
    scale = np.ones((1,) * len(shape)) if scale is None else scale
    table = table_of(memory, "learned") if code == "learned" else None
    arrays = [None if a is None else jnp.asarray(a, jnp.float32) for a in (scale, table)]
    return Trellis(jnp.asarray(steps), *arrays, width=width, memory=memory, code=code, along=along, length=length)


FORMS = [
    form_of((12, 5), (-2,), 12, 2, 7),
    form_of((12, 5), (-2,), 4, 2, 8, "gaussian", RNG.normal(size=(3, 5))),
    form_of((12, 4), (-1,), 4, 3, 11, scale=RNG.normal(size=(12, 1))),
    form_of((2, 3, 4, 3), (-4, -3, -2), 8, 1, 6, scale=RNG.normal(size=(1, 1, 1, 3))),
    form_of((3, 10, 2), (-2,), 10, 4, 12, "learned"),
    form_of((9,), (-1,), 9, 5, 16),
    form_of((3, 2), (-2, -1), 2, 8, 8, "gaussian"),
    form_of((), (), 1, 2, 2),
]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.shape} {form.describe()}")
def test_each_weight_is_the_last_bits_of_its_path(form):
    values = decoded(np.asarray(form.steps), form.along, form.length, form.width, form.memory, form.code)
    scale = np.asarray(form.scale, np.float64)
    for axis, (count, many) in enumerate(zip(scale.shape, form.shape, strict=True)):
        scale = scale.repeat(many // count, axis)
    np.testing.assert_allclose(form.dense(), values * scale, rtol=2e-6, atol=1e-6)
    stored = form.pack()
    stored.check_stored()
    np.testing.assert_array_equal(stored.dense(), form.dense())
    assert stored.bits == form.width * form.steps.size + sum(
        32 * a.size for a in (form.scale, form.table) if a is not None
    )


CHANGES = [
    (FORMS[0], lambda w: w.T),
    (FORMS[0], lambda w: w[:, 1:3]),
    (FORMS[0], lambda w: w.reshape(3, 4, 5)),
    (FORMS[1], lambda w: w.T[None]),
    (FORMS[3], lambda w: w.transpose(3, 2, 0, 1)),
    (FORMS[3], lambda w: w.reshape(24, 3)),
    (FORMS[4], lambda w: w.transpose(0, 2, 1)),
    (FORMS[4], lambda w: w.reshape(30, 2)),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_paths_follow_a_change_of_layout(number):
    form, change = CHANGES[number]
    for given in (form, form.pack()):
        moved = given.relayout(Relayout(form.shape, change))
        assert isinstance(moved, Trellis)
        np.testing.assert_array_equal(moved.dense(), change(form.dense()))


def test_paths_that_are_torn_are_none():
    for change in (lambda w: w[1:], lambda w: w[::-1], lambda w: w.reshape(5, 12)):
        assert FORMS[0].relayout(Relayout((12, 5), change)) is None
    assert FORMS[4].relayout(Relayout((3, 10, 2), lambda w: w.reshape(15, 4))) is None


def test_rows_are_taken_where_paths_run_along_them():
    rows = jnp.array([2, 0, 2])
    for form in (FORMS[2], FORMS[4], FORMS[4].pack()):
        np.testing.assert_array_equal(form.take_rows(rows).dense(), form.dense()[rows])
        each = form.unstack()
        one = jax.tree.map(lambda a: a[1], each)
        np.testing.assert_array_equal(one.dense(), form.dense()[1])
    assert FORMS[0].take_rows(rows) is None and FORMS[0].unstack() is None


def test_tables_of_stacked_layers():
    layers = [form_of((6, 4), (-2,), 6, 2, 4, "learned") for _ in range(3)]
    layers = [dataclasses.replace(form, table=form.table * (i + 1)) for i, form in enumerate(layers)]
    stack = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    dense = jnp.stack([form.dense() for form in layers])
    stack.pack().check_stored()
    np.testing.assert_array_equal(stack.dense(), dense)
    np.testing.assert_allclose(stack.prepack().dense(), dense, rtol=1e-6)
    np.testing.assert_array_equal(stack.take_rows(jnp.array([1])).dense(), dense[1:2])
    turned = stack.relayout(Relayout(stack.shape, lambda w: w.transpose(0, 2, 1)))
    np.testing.assert_array_equal(turned.dense(), dense.transpose(0, 2, 1))
    assert stack.relayout(Relayout(stack.shape, lambda w: w[::-1])) is None


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("length", [3, 16, 37])
def test_words_hold_the_same_matrix(width, length):
    memory = min(12 if width < 8 else 16, width * length)
    form = form_of((2 * length, 5), (-2,), length, width, memory, scale=RNG.normal(size=(2, 5)))
    ready = form.prepack()
    assert isinstance(ready, TrellisColumns) and ready.words.shape[1] == 1 + -(-length // (32 // width))
    np.testing.assert_allclose(ready.dense(), form.dense(), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(ready.take_columns(jnp.array([4, 1])).dense(), ready.dense()[:, jnp.array([4, 1])])


def test_other_views_are_prepacked():
    ready = FORMS[3].prepack(MatrixView((0, 1, 2, 3), 3))
    np.testing.assert_allclose(ready.dense(), FORMS[3].dense(), rtol=1e-6)
    rows = FORMS[2].prepack(MatrixView((1, 0), 12))
    assert isinstance(rows, TrellisColumns) and rows.rows == 4
    np.testing.assert_allclose(rows.dense(), FORMS[2].dense(), rtol=1e-6)
    assert FORMS[2].prepack() is FORMS[2]  # across the columns: made dense


def test_pieces_are_equal():
    assert [piece_length(n, 1024) for n in (1, 1500, 2048, 5632, 50257)] == [1, 1500, 1024, 1408, 1733]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 9}, "expected 1 to 8 bits"),
        ({"memory": 17}, "a memory of 2 to 16"),
        ({"code": "magic"}, "a code of computed, gaussian, learned"),
        ({"along": (-3,)}, "along: expected axes"),
        ({"along": (-2, -2)}, "along: expected axes"),
        ({"length": 5}, "length: expected one that divides paths of 12"),
        ({"length": 3}, "holds 7 bits"),
        ({"scale": None}, "expected a scale"),
        ({"scale": np.ones((5, 1), np.float32)}, "expected block counts"),
        ({"code": "learned"}, "table: expected one of a learned code"),
        ({"code": "learned", "table": np.ones(64, np.float32)}, r"table: expected 2\^7 values"),
        ({"steps": np.zeros(3, np.uint32)}, r"steps: expected uint32\[4\]"),
        ({"dtype": "int8"}, "dtype: expected one of"),
    ],
)
def test_what_is_no_stored_trellis_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(FORMS[0].pack(), **changes).check_stored()
    with pytest.raises(ValueError, match="got the working layout"):
        FORMS[0].check_stored()


def test_the_tables():
    for memory in (2, 8):
        table = table_of(memory, "gaussian")
        ordered = np.sort(table)
        assert len(set(table.tolist())) == 1 << memory and np.allclose(ordered, -ordered[::-1])
    sums = table_of(12, "computed")
    assert abs(sums.mean()) < 0.02 and abs(sums.std() - 1) < 0.02
    np.testing.assert_allclose(sums[:9], [value(s, 12, "computed") for s in range(9)], rtol=1e-6)


def test_through_a_file(tmp_path):
    w = jnp.asarray(RNG.normal(size=(2, 24, 6)), jnp.float32)
    params = {"layers": w, "head": w[0], "tail": w[1]}
    rules = [
        lcq.Rule("layers", lcq.Trellis(2, memory=6, per="channel", code="learned"), stacked=1),
        lcq.Rule("head|tail", lcq.Trellis(1, memory=5, code="learned"), joint=True),
    ]
    forms = lcq.compress(params, rules)
    assert forms["head"].table is not None and lcq.sizes(forms) is not None
    lcq.save(tmp_path / "net.lcq", forms)
    back = lcq.load(tmp_path / "net.lcq")
    for name in params:
        np.testing.assert_array_equal(back[name].dense(), forms[name].dense())
    assert "trellis 2 bits, learned L=6" in str(lcq.table(forms))
