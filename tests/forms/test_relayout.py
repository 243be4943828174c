"""A change that moves elements: where they go, and what becomes of tables; and what forms say by default."""

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Cast, MatrixView, Relayout

W = jnp.asarray(np.random.default_rng(0).normal(size=(4, 6, 2)), jnp.float32)


def test_where_elements_go():
    turned, flat = Relayout((4, 6, 2), lambda a: a.transpose(1, 0, 2)[:, 1]), Relayout((4, 6, 2), lambda a: a.ravel())
    assert turned.result == (6, 2) and not turned.in_order and flat.in_order and not flat.idle
    np.testing.assert_array_equal(np.asarray(W).ravel()[turned.places], W[1])
    assert Relayout((4, 6, 2), lambda a: a.reshape(24, 2).reshape(4, 6, 2)).idle


def test_tables_follow_their_blocks():
    """A step for each index of the first axis and each pair of the second; None where blocks are as small."""
    steps = jnp.arange(12.0).reshape(4, 3, 1)
    spread = np.repeat(np.asarray(steps), 2, 1).repeat(2, 2)
    for change in (lambda a: a.transpose(2, 1, 0), lambda a: a[1:3], lambda a: a.reshape(24, 2)):
        moved = Relayout((4, 6, 2), change)
        found = np.asarray(moved.tables({"step": steps})["step"])
        for axis, length in enumerate(moved.result):
            found = found.repeat(length // found.shape[axis], axis)
        np.testing.assert_array_equal(found, change(spread))
    assert Relayout((4, 6, 2), lambda a: a.reshape(4, 12).T.reshape(3, 16)).tables({"step": steps}) is None


def test_a_view_as_matrices():
    view = MatrixView((1, 0), 6)
    assert view.stacked((4, 6, 2)) == (4,) and view.of((4, 6, 2)).result == (4, 2, 6) and view.allows == {"rows"}
    np.testing.assert_array_equal(view.of((4, 6, 2)).function(W), W.swapaxes(1, 2))


def test_a_form_of_the_leafs_shape_needs_to_say_nothing():
    form, rows = Cast(W.astype(jnp.bfloat16)), jnp.array([2, 0])
    np.testing.assert_array_equal(form.relayout(Relayout(form.shape, jnp.transpose)).dense(), form.dense().T)
    np.testing.assert_array_equal(form.take_rows(rows).dense(), form.dense()[rows])
    assert form.unstack().shape == form.shape and form.prepack() is form and form.product(W, jnp.matmul) is None


@pytest.mark.parametrize(
    ("scheme", "decoding"),
    [
        (lcq.Binary(), "many rows"),
        (lcq.Uniform(4, per=3), "many rows"),
        (lcq.KMeans(2), "many rows"),
        (lcq.KMeans(4), "many rows"),
        (lcq.KMeans(17), "always"),
        (lcq.PowersOfTwo(2), "many rows"),
        (lcq.LowRank(1), "never"),
        (lcq.Cast("bfloat16"), "always"),
    ],
    ids=repr,
)
def test_prepacked_or_not_a_form_is_decoded_alike(scheme, decoding):
    form = scheme.project(W[0])
    assert form.decoding == form.prepack().decoding == decoding
