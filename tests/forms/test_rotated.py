"""Forms in turned coordinates, against the matrix R written out in float64 from the page on files."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Rotated
from lcq.forms.rotation import signs, turned, turned_back
from lcq.kernels import matmul

SIZES = [1, 2, 3, 12, 43, 64, 96, 172]


def rotation(size, seed):
    """R = diag(s) (H (x) C) / sqrt(N), entry by entry."""
    odd = size
    while odd % 2 == 0:
        odd //= 2

    def entry(i, j):
        (high, a), (other, b) = divmod(i, odd), divmod(j, odd)
        angle = 2 * np.pi * a * b / odd
        return (-1) ** bin(high & other).count("1") * (np.cos(angle) + np.sin(angle))

    def sign(i):
        x = ((i + 1) * 0x9E3779B1 + seed * 0x85EBCA77) % 2**32
        for _ in range(2):
            x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        return -1 if (x ^ x >> 16) >> 31 else 1

    table = np.array([[entry(i, j) for j in range(size)] for i in range(size)])
    return np.array([sign(i) for i in range(size)])[:, None] * table / np.sqrt(size)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1])
def test_the_rotation_is_what_the_page_says(size, seed):
    r, x = rotation(size, seed), np.random.default_rng(0).normal(size=(5, size))
    np.testing.assert_allclose(r @ r.T, np.eye(size), atol=1e-12)
    assert np.abs(r).max() <= np.sqrt(2 / size) + 1e-12
    np.testing.assert_allclose(turned(jnp.asarray(x, jnp.float32), (-1,), seed), x @ r, atol=2e-6)
    np.testing.assert_allclose(turned_back(jnp.asarray(x, jnp.float32), (-1,), seed), x @ r.T, atol=2e-6)


def test_in_float64_it_is_exact():
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(96, 3)))
        np.testing.assert_allclose(turned(x, (-2,), 5), rotation(96, 5).T @ np.asarray(x), atol=1e-14)


def test_several_axes_are_one_in_their_order():
    x, r = np.random.default_rng(2).normal(size=(3, 4, 8, 5)).astype(np.float32), rotation(24, 1)
    flat = x.transpose(0, 2, 1, 3).reshape(24, 20)
    found = turned(jnp.asarray(x), (-4, -2), 1)
    np.testing.assert_allclose(np.transpose(found, (0, 2, 1, 3)).reshape(24, 20), r.T @ flat, atol=2e-6)
    np.testing.assert_allclose(turned_back(found, (-4, -2), 1), x, atol=2e-6)


def test_signs_of_two_seeds_have_nothing_in_common():
    one, two = (signs(4096, seed).astype(float) for seed in (0, 1))
    assert abs(one.mean()) < 0.05 and abs(two.mean()) < 0.05 and abs((one * two).mean()) < 0.05


def form(shape=(96, 10), inner=None, **settings):
    w = jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)
    return lcq.Rotated(inner or lcq.Uniform(4, per="channel"), **settings).project(w)


def test_dense_is_the_turned_form():
    made = form(seed=3)
    expected = rotation(96, 3) @ np.asarray(made.inner.dense(), np.float64)
    np.testing.assert_allclose(made.dense(), expected, atol=2e-6)
    assert made.bits == made.inner.bits and made.axes == (-2,) and made.describe() == f"rotated {made.inner.describe()}"
    packed = made.pack()
    packed.check_stored()
    np.testing.assert_array_equal(packed.dense(), made.dense())
    np.testing.assert_array_equal(packed.unpack().dense(), made.dense())


@pytest.mark.parametrize("inner", [None, lcq.Trellis(2, memory=6, per="channel"), lcq.Uniform(4, per=8), lcq.KMeans(4)])
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_products_turn_the_activations(inner, rows):
    made = form(inner=inner)
    x = jnp.asarray(np.random.default_rng(4).normal(size=(rows, 96)), jnp.float32)
    expected = np.asarray(x, np.float64) @ np.asarray(made.dense(), np.float64)
    for each in (made, made.pack(), made.prepack()):
        np.testing.assert_allclose(matmul(x, each), expected, atol=3e-5)
    assert matmul(x.astype(jnp.bfloat16), dataclasses.replace(made, dtype="bfloat16")).dtype == jnp.bfloat16


def test_activations_are_no_coarser_than_the_product():
    """Short ones are exact beside float32 weights, so their turned ones are not rounded to a short format."""
    made = form()
    x = jnp.asarray(np.random.default_rng(4).normal(size=(5, 96)), jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(made.dense(), np.float64)
    assert matmul(x, made).dtype == jnp.float32
    np.testing.assert_allclose(matmul(x, made), expected, atol=3e-5)


def test_stacked_products_and_complex_activations():
    w = jnp.asarray(np.random.default_rng(5).normal(size=(3, 32, 4)), jnp.float32)
    made = lcq.Rotated(lcq.Uniform(4, per="channel"), along=(-2,)).project(w)
    x = jnp.asarray(np.random.default_rng(6).normal(size=(3, 7, 32)), jnp.float32)
    np.testing.assert_allclose(matmul(x, made), x @ made.dense(), atol=1e-5)
    one = form((32, 4))
    np.testing.assert_allclose(matmul(x[0] + 1j * x[1], one), (x[0] + 1j * x[1]) @ one.dense(), atol=1e-5)


def test_changes_of_layout_follow_the_inputs():
    made = form((4, 8, 6), lcq.Trellis(2, memory=5, per="channel"))
    assert made.axes == (-3, -2)
    changes = (jnp.transpose, lambda w: w.reshape(32, 6), lambda w: w[..., 1:3], lambda w: w.reshape(32, 6).T)
    for change in changes:
        moved = made.relayout(lcq.forms.Relayout(made.shape, change))
        assert isinstance(moved, Rotated)
        np.testing.assert_allclose(moved.dense(), change(made.dense()), atol=1e-6)
    assert made.relayout(lcq.forms.Relayout(made.shape, lambda w: w[1:])) is None
    assert made.take_rows(jnp.array([0])) is None and made.unstack() is None


def test_runs_of_inputs_side_by_side_are_not_one():
    """Heads that are turned one by one, in a product over all of them."""
    made = form((2, 4, 6), along=(-2,))
    assert made.relayout(lcq.forms.Relayout(made.shape, lambda w: w.reshape(8, 6))) is None
    x = jnp.asarray(np.random.default_rng(7).normal(size=(5, 8)), jnp.float32)
    net = lambda w, x: x @ w.reshape(8, 6)  # noqa: E731
    np.testing.assert_allclose(lcq.packed(net)(made, x), net(made.dense(), x), atol=1e-5)


def test_a_map_over_inputs_is_refused():
    with pytest.raises(ValueError, match=r"axes \[-3, -2\] are turned together, got a part \[8, 6\]"):
        jax.vmap(lcq.packed(lambda w, x: x @ w))(form((3, 8, 6), lcq.Cast("bfloat16")), jnp.ones((3, 2, 8)))
    apart = form((3, 8, 6), lcq.Cast("bfloat16"), along=(-2,))
    found = jax.vmap(lcq.packed(lambda w, x: x @ w))(apart, jnp.ones((3, 2, 8)))
    np.testing.assert_allclose(found, jnp.ones((3, 2, 8)) @ apart.dense(), atol=1e-5)


def test_rows_and_layers_that_are_no_inputs():
    made = form((6, 16, 4), along=(-2,))
    np.testing.assert_allclose(made.take_rows(jnp.array([4, 1])).dense(), made.dense()[jnp.array([4, 1])], atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda f: f.dense())(made.unstack()), made.dense(), atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"axes": (-3,)},
        {"axes": (-2, -2)},
        {"seed": -1},
        {"seed": 2**32},
        {"dtype": "int8"},
    ],
)
def test_what_is_no_stored_form(change):
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(form().pack(), **change).check_stored()
    with pytest.raises(ValueError, match="inner: expected packed codes"):
        form().check_stored()
    with pytest.raises(ValueError, match="not rotated itself"):
        dataclasses.replace(form().pack(), inner=form().pack()).check_stored()


def test_a_module_named_inner_is_no_form():
    tree = {"inner": {"values": np.ones(3, np.float32)}}
    np.testing.assert_array_equal(lcq.decompress(tree)["inner"]["values"], 1)
