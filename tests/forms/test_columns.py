"""Codes packed down the columns: the same matrix, short in memory, whatever the sign of their steps."""

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms.column_words import pack_columns
from lcq.kernels.api import matmul
from tests.kernels.products import CODED, form_of

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("scheme", CODED, ids=repr)
def test_columns_hold_the_same_matrix(scheme):
    form = form_of(scheme)
    ready = form.prepack()
    assert ready.shape == form.shape and ready.dtype == form.dtype
    scale = float(jnp.abs(form.dense()).max())
    np.testing.assert_allclose(ready.dense(), form.dense(), rtol=3e-7, atol=3e-7 * scale)
    with pytest.raises(ValueError, match="save the forms that it was made of"):
        ready.pack()


def test_words_run_down_the_columns_from_the_lowest_bits():
    codes = RNG.integers(0, 16, (19, 3))
    words = np.asarray(pack_columns(jnp.asarray(codes, jnp.uint8), 4))
    for k in range(19):
        np.testing.assert_array_equal(words[k // 8] >> (4 * (k % 8)) & 15, codes[k])
    assert (words[2] >> 12 == 0).all()


@pytest.mark.parametrize(
    "scheme",
    [
        lcq.Uniform(4, per=32),
        lcq.Uniform(4, per=32, zero_point=True),
        lcq.Uniform(3, per=32, scale_dtype="float16"),
        lcq.Uniform(3, per=32, zero_point=True, scale_bits=6),
        lcq.Binary(per=32),
        lcq.Binary(per=32, scale_dtype="float16"),
        lcq.Levels((-1.0, 0.25, 2.0), scale=True, per=32),
    ],
    ids=repr,
)
def test_numbers_of_groups_are_short_in_memory(scheme):
    w = np.random.default_rng(8).normal(size=(96, 10)).astype(np.float32)
    form = scheme.project(jnp.asarray(w))
    ready = form.prepack()
    np.testing.assert_allclose(ready.dense(), form.dense(), rtol=1e-6, atol=1e-7)
    for rows in (1, 9):
        x = np.random.default_rng(rows).normal(size=(rows, 96)).astype(np.float32)
        wanted = x.astype(np.float64) @ np.asarray(form.dense(), np.float64)
        np.testing.assert_allclose(matmul(jnp.asarray(x), ready), wanted, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            matmul(jnp.asarray(x), ready.take_columns(jnp.array([3, 1]))), wanted[:, [3, 1]], atol=1e-4
        )
    if getattr(scheme, "scale_bits", None) is not None:
        return
    if isinstance(scheme, lcq.Uniform) or (scheme.scale_dtype is None and len(scheme.values) == 2):
        short = 16 + 8 * (form.zero is not None)
        assert ready.bits == 8 * ready.words.nbytes + 30 * short


def test_levels_that_go_down_multiply_as_they_are():
    w = np.random.default_rng(9).normal(size=(64, 6)).astype(np.float32)
    form = lcq.Uniform(2, per="channel").project(jnp.asarray(w))
    form = type(form)(form.codes, scale=form.scale * jnp.array([[1, -1, 1, -1, -1, 1.0]]), values=form.values)
    assert bool((form.scale < 0).any())
    for rows, kernel in ((1, "words"), (9, "tiles"), (3, "dense")):
        x = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
        wanted = x.astype(np.float64) @ np.asarray(form.dense(), np.float64)
        np.testing.assert_allclose(matmul(jnp.asarray(x), form, kernel=kernel), wanted, rtol=1e-4, atol=1e-4)
