"""Factors against loops over a convolution, layouts, and two layers in place of one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Factors
from lcq.forms.factors import as_matrix, from_matrix
from lcq.io import records


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_both_views_of_a_convolution():
    x = normal(2, 3, 4, 5)
    whole, separable = np.zeros((2 * 3 * 4, 5)), np.zeros((2 * 4, 3 * 5))
    for i, j, c, k in np.ndindex(2, 3, 4, 5):
        whole[(i * 3 + j) * 4 + c, k] = separable[i * 4 + c, j * 5 + k] = x[i, j, c, k]
    for flag, matrix in ((False, whole), (True, separable)):
        np.testing.assert_array_equal(as_matrix(x, flag), matrix)
        np.testing.assert_array_equal(from_matrix(jnp.asarray(matrix, jnp.float32), x.shape, flag), x)


def working(tail, rank, room, separable=False, stacked=(), seed=0):
    rows, columns = (tail[0] * tail[2], tail[1] * tail[3]) if separable else (int(np.prod(tail[:-1])), tail[-1])
    rank = np.broadcast_to(rank, stacked).astype(np.int32)
    some = (np.arange(room) < rank[..., None]).astype(np.float32)
    left, right = normal(*stacked, rows, room, seed=seed) * some[..., None, :], normal(*stacked, room, columns, seed=1)
    return Factors(left, tail, right * some[..., None], jnp.asarray(rank), separable=separable)


CASES = {
    "thin": (working((60, 40), 3, 40), 32 * 3 * 100),
    "rank 0": (working((6, 4), 0, 4), 0),
    "one below": (working((6, 4), 2, 4), 32 * 20),
    "as large": (working((6, 3), 2, 3), 32 * 18),
    "full": (working((6, 4), 4, 4), 32 * 24),
    "convolution": (working((3, 3, 4, 8), 2, 8), 32 * 2 * 44),
    "separable": (working((3, 5, 4, 2), 3, 10, True), 32 * 3 * 22),
    "stacked": (working((6, 5), [1, 0, 2], 5, stacked=(3,)), 3 * 32 * 2 * 11),
    "stacked, one full": (working((6, 5), [1, 0, 5], 5, stacked=(3,)), 3 * 32 * 30),
}


@pytest.mark.parametrize("case", CASES)
def test_layouts_are_equal_and_as_small_as_they_can_be(tmp_path, case):
    form, bits = CASES[case]
    stored = form.pack()
    matrices = np.asarray(form.left, np.float64) @ np.asarray(form.right, np.float64)
    for layout in (form, stored, stored.unpack(), stored.unpack().pack()):
        dense = layout.dense().reshape(-1, *form.tail)
        for matrix, one in zip(matrices.reshape(-1, *matrices.shape[-2:]), dense, strict=True):
            np.testing.assert_allclose(as_matrix(one, form.separable), matrix, atol=1e-5)
        assert layout.shape == form.shape and layout.bits == bits
    assert (stored.right is None) == (case in ("as large", "full", "stacked, one full"))
    stored.check_stored()
    lcq.save(tmp_path / "net.lcq", {"w": form})
    back = lcq.load(tmp_path / "net.lcq")["w"]
    np.testing.assert_array_equal(back.dense(), stored.dense())
    assert back.bits == bits


def test_bits_of_what_is_not_computed_are_those_of_the_largest_rank():
    def estimate(scheme):
        return jax.eval_shape(lambda x: scheme.project(x, mu=1.0), jnp.ones((60, 40))).bits

    assert estimate(lcq.LowRank(3)) == 32 * 3 * 100
    assert estimate(lcq.LowRank(penalty=1.0)) == 32 * 60 * 40


# Two layers


def convolve(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
    )


def test_two_dense_layers_are_the_one():
    x, form = normal(7, 6), lcq.LowRank(2).project(normal(6, 5, seed=1))
    first, second = form.layers()
    assert (first.shape, second.shape) == ((6, 2), (2, 5))
    np.testing.assert_allclose(x @ first @ second, x @ form.dense(), atol=1e-5)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((2, 1), (0, 3))], ids=str)
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)], ids=str)
def test_two_convolutions_are_the_one(strides, padding):
    x, kernel = normal(2, 9, 11, 4), normal(3, 5, 4, 6, seed=1)
    one = convolve(x, lcq.LowRank(3).project(kernel).dense(), strides, padding)
    first, second = lcq.LowRank(3).project(kernel).layers()
    assert (first.shape, second.shape) == ((3, 5, 4, 3), (1, 1, 3, 6))
    two = convolve(convolve(x, first, strides, padding), second, (1, 1), "VALID")
    np.testing.assert_allclose(two, one, atol=1e-4)
    high, wide = lcq.LowRank(3, separable=True).project(kernel).layers()
    assert (high.shape, wide.shape) == ((3, 1, 4, 3), (1, 5, 3, 6))
    one = convolve(x, lcq.LowRank(3, separable=True).project(kernel).dense(), strides, padding)
    each = (padding, padding) if isinstance(padding, str) else ((padding[0], (0, 0)), ((0, 0), padding[1]))
    two = convolve(convolve(x, high, (strides[0], 1), each[0]), wide, (1, strides[1]), each[1])
    np.testing.assert_allclose(two, one, atol=1e-4)


def test_a_convolution_along_one_axis():
    x, form = normal(2, 9, 4), lcq.LowRank(2).project(normal(3, 4, 6, seed=1))
    first, second = form.layers()

    def along(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))

    two = jnp.matmul(along(x, first), second[0])
    np.testing.assert_allclose(two, along(x, form.dense()), atol=1e-4)


@pytest.mark.parametrize(
    ("form", "message"),
    [(CASES["full"][0], "a matrix without smaller factors"), (CASES["stacked"][0], r"got shape \[3, 6, 5\]")],
)
def test_what_has_no_two_layers(form, message):
    with pytest.raises(ValueError, match=message):
        form.layers()


# Files that nobody should write

GOOD = CASES["one below"][0].pack()
MATRIX = CASES["full"][0].pack()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": np.int32(2)}, "got the working layout"),
        ({"tail": (6,)}, "expected at least two axes"),
        ({"tail": ()}, "expected at least two axes"),
        ({"tail": (-6, -4)}, "at most 64 axes"),
        ({"tail": (6, 5)}, r"expected factors of a matrix \[6, 5\]"),
        ({"tail": (1 << 40, 1 << 40)}, "at most 64 axes"),
        ({"separable": True}, "expected a convolution's kernel"),
        ({"dtype": "int32"}, "dtype: expected one of"),
        ({"left": GOOD.left.astype(np.int32)}, "left: expected one of"),
        ({"right": GOOD.right.astype(np.int64)}, "right: expected one of"),
        ({"left": GOOD.left[:, :1]}, "expected factors of a matrix"),
        ({"left": GOOD.left[0]}, "expected factors of a matrix"),
        ({"left": np.float32(1).reshape(())}, "expected factors of a matrix"),
        ({"right": GOOD.right.T}, "expected factors of a matrix"),
        ({"right": GOOD.right[None]}, "expected factors of a matrix"),
        ({"right": None}, "expected factors of a matrix"),
        ({"left": MATRIX.left[:5], "right": None}, "expected factors of a matrix"),
        ({"left": GOOD.left * np.float32(np.nan)}, "left: expected finite numbers, got 12"),
        ({"right": GOOD.right + np.float32(np.inf)}, "right: expected finite numbers, got 8"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, monkeypatch, changes, message):
    with monkeypatch.context() as unchecked:
        unchecked.setattr(records, "check_form", lambda form: None)
        unchecked.setattr(Factors, "pack", lambda self: self)
        lcq.save(tmp_path / "net.lcq", {"w": dataclasses.replace(GOOD, **changes)})
    with pytest.raises(lcq.ArtifactError, match=f"w: .*{message}"):
        lcq.load(tmp_path / "net.lcq")
