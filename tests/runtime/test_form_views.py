"""Forms moved, taken in part and apart: the dense array of the result is that of the form, moved by numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.forms import Cast, Codes, Factors, Sparse, Sum
from lcq.runtime.form_views import relayout, take_rows, unstack

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def codes(shape, blocks, k=4, **kwargs):
    return Codes(jnp.asarray(RNG.integers(0, k, shape), jnp.uint8), levels=jnp.sort(normal(*blocks, k)), **kwargs)


STACK = (4, 8, 6)
FORMS = {  # shape (4, 8, 6), which is a leaf of four layers or a kernel of a convolution along one axis
    "codes": codes(STACK, (1, 1, 1)),
    "codes of layers": codes(STACK, (4, 1, 1)),
    "codes of pairs of layers": codes(STACK, (2, 1, 1)),
    "codes of channels": codes(STACK, (1, 1, 6)),
    "codes in groups": dataclasses.replace(
        codes(STACK, (4, 2, 6)), levels=None, values=(-1.0, 0.0, 2.0, 3.0), scale=normal(4, 2, 6), zero=normal(4, 2, 6)
    ),
    "sparse groups": Sparse(jnp.asarray(np.repeat(RNG.random((4, 8, 1)) < 0.4, 6, 2)), normal(*STACK), group=(1, 6)),
    "sparse codes": Sparse(jnp.asarray(RNG.random(STACK) < 0.4), codes(STACK, (1, 1, 1)).codes, normal(4, 1, 1, 3)),
    "factors": Factors(normal(32, 3), right=normal(3, 6), tail=STACK, rank=jnp.int32(3)),
    "factors of layers": Factors(normal(4, 8, 3), right=normal(4, 3, 6), tail=(8, 6), rank=jnp.full(4, 3)),
    "factors as large": Factors(normal(32, 6), tail=STACK),
    "cast": Cast(normal(*STACK).astype(jnp.bfloat16)),
    "sum": Sum((codes(STACK, (1, 1, 1)), Factors(normal(32, 3), right=normal(3, 6), tail=STACK))),
    "prepacked": codes(STACK, (4, 1, 1)).prepack(),
    "lists": Sparse(jnp.asarray(np.arange(192).reshape(STACK) % 5 == 0), normal(*STACK)).prepack(),
}
MOVES = {  # of arrays of numpy and of jax alike
    "flat": lambda a: a.reshape(32, 6),
    "turned": lambda a: a.transpose(0, 2, 1),
    "flat and turned": lambda a: a.reshape(32, 6).T,
    "one layer": lambda a: a[2],
    "rows": lambda a: a.reshape(32, 6)[6:12],
    "columns": lambda a: a[..., 2:5],
    "outer axes swapped": lambda a: a.transpose(1, 0, 2),
    "reversed": lambda a: a[:, ::-1],
    "inner axes joined": lambda a: a.reshape(4, 48),
    "a row": lambda a: a[1, 2],
}
NEVER = {  # what a form cannot say: more entries of tables than half the elements, factors of no matrix
    "factors": {"outer axes swapped", "reversed", "inner axes joined", "a row"},
    "factors of layers": {"flat", "flat and turned", "rows", "outer axes swapped", "reversed"}
    | {"inner axes joined", "a row"},
    "prepacked": set(MOVES),
    "codes in groups": {"inner axes joined"},
}
NEVER["sum"] = NEVER["factors"]
NEVER["lists"] = NEVER["prepacked"]


@pytest.mark.parametrize("kind", FORMS)
def test_relayout(kind):
    form = FORMS[kind] if kind in ("prepacked", "lists", "factors") else FORMS[kind].pack()

    @jax.jit
    def moved(form):
        made = {name: relayout(form, function) for name, function in MOVES.items()}
        return {name: None if form is None else form.dense() for name, form in made.items()}

    dense = np.asarray(form.dense())
    for name, got in moved(form).items():
        assert (got is None) == (name in NEVER.get(kind, ())), name
        if got is not None:
            np.testing.assert_allclose(got, MOVES[name](dense), rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", FORMS)
def test_take_rows_and_unstack(kind):
    form, rows = FORMS[kind], jnp.array([3, 1, 2])
    got = jax.jit(lambda form: (take_rows(form, rows).dense(), jax.vmap(lambda each: each.dense())(unstack(form))))(
        form
    )
    dense = np.asarray(form.dense())
    for one, wanted in zip(got, (dense[rows], dense), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=1e-5, atol=1e-6)


def test_what_stays_packed():
    """Whole words of rows do, and what keeps its order; words that hold codes of two rows are unpacked."""
    form, odd = FORMS["codes of layers"].pack(), codes((5, 7), (1, 1)).pack()
    rows = jnp.array([1, 2])
    assert relayout(form, lambda a: a.reshape(32, 6)).packed == (32, 6)
    assert relayout(form, jnp.transpose).packed is None
    assert (take_rows(form, rows).packed, unstack(form).packed, unstack(form).codes.shape) == (
        (2, 8, 6),
        (8, 6),
        (4, 3),
    )
    assert take_rows(odd, rows).packed is None and unstack(odd).packed is None
    np.testing.assert_array_equal(take_rows(odd, rows).dense(), odd.dense()[1:3])


def test_what_is_prepacked():
    """As the matrix that it was prepacked as, of another shape; columns of it are rows of a leaf that was turned."""
    whole = codes((8, 6), (1, 6), 3).prepack()
    leaf = dataclasses.replace(whole, tail=(2, 4, 6), axes=(0, 1, 2))
    np.testing.assert_array_equal(relayout(leaf, lambda a: a.reshape(8, 6)).matrix(), whole.matrix())
    assert relayout(leaf, lambda a: a.reshape(8, 6)[::-1]) is None
    turned = dataclasses.replace(whole, tail=(6, 8), axes=(1, 0))
    assert (
        relayout(turned, lambda a: a) is None and unstack(turned) is None and take_rows(whole, jnp.array([1])) is None
    )
    np.testing.assert_array_equal(relayout(turned, jnp.transpose).matrix(), whole.matrix())
    np.testing.assert_array_equal(take_rows(turned, jnp.array([5, 0])).dense(), turned.dense()[np.array([5, 0])])
    few = Sparse(jnp.asarray(np.arange(48).reshape(8, 6) % 5 == 0), normal(8, 6)).prepack()
    turned = dataclasses.replace(few, tail=(6, 2, 4), axes=(1, 2, 0))
    np.testing.assert_array_equal(turned.dense(), np.asarray(few.dense()).reshape(2, 4, 6).transpose(2, 0, 1))
    np.testing.assert_array_equal(take_rows(turned, jnp.array([5, 0])).dense(), turned.dense()[np.array([5, 0])])
    np.testing.assert_array_equal(relayout(turned, lambda a: a.transpose(1, 2, 0).reshape(8, 6)).dense(), few.dense())
    assert relayout(turned, lambda a: a.reshape(8, 6)) is None


def test_a_separable_kernel():
    """It is no matrix of the convolution, and is the matrix that it was made as."""
    form = Factors(normal(6, 2), right=normal(2, 20), tail=(3, 4, 2, 5), separable=True)
    dense = np.asarray(form.dense())
    assert relayout(form, lambda a: a.reshape(24, 5)) is None
    got = relayout(form, lambda a: a.transpose(0, 2, 1, 3).reshape(6, 20))
    np.testing.assert_allclose(got.dense(), dense.transpose(0, 2, 1, 3).reshape(6, 20), rtol=1e-5)
    assert take_rows(form, jnp.array([0])) is None and unstack(form) is None


def test_groups_of_a_convolution_share_the_left_factor():
    form = Factors(normal(8, 2), right=normal(2, 6), tail=(8, 6))
    got = relayout(form, lambda a: a.reshape(8, 3, 2).transpose(1, 0, 2))
    assert got.left.shape == (3, 8, 2) and got.right.shape == (3, 2, 2)
    np.testing.assert_allclose(got.dense(), np.asarray(form.dense()).reshape(8, 3, 2).transpose(1, 0, 2), rtol=1e-5)
