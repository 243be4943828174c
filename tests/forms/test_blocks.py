"""Leaves are cut into blocks and joined again, and a number for each block meets the elements that are its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lcq.forms.blocks import block_counts, blocks, compute_dtype, cut_axes, explicit_sharding, join_axes

SHAPES = [
    ((6,), (3,)),
    ((6,), (6,)),
    ((4, 6), (1, 1)),
    ((4, 6), (2, 6)),
    ((2, 4, 6), (1, 2, 3)),
    ((2, 4, 6), (2, 4, 2)),
]


@pytest.mark.parametrize(("shape", "counts"), SHAPES)
def test_a_number_for_each_block_meets_its_elements(shape, counts):
    x = np.random.default_rng(0).normal(size=shape)
    cut = blocks(shape, counts)
    split = np.asarray(cut_axes(jnp.asarray(x, jnp.float32), counts))
    assert split.shape == cut.split and cut.size == x.size // np.prod(counts)
    sums = split.sum(cut.axes, keepdims=True)
    assert sums.shape == cut.stat
    lengths = [length // count for length, count in zip(shape, counts, strict=True)]
    for block in itertools.product(*map(range, counts)):
        here = tuple(slice(i * length, (i + 1) * length) for i, length in zip(block, lengths, strict=True))
        np.testing.assert_allclose(sums.reshape(counts)[block], x[here].sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("shape", "counts"), SHAPES)
def test_joining_is_the_inverse_of_cutting(shape, counts):
    x = jnp.arange(np.prod(shape)).reshape(shape)
    np.testing.assert_array_equal(join_axes(cut_axes(x, counts), shape), x)


@pytest.mark.parametrize(
    ("per", "shape", "counts"),
    [
        (None, (2, 4, 6), (1, 1, 1)),
        (None, (), ()),
        ("channel", (4, 6), (1, 6)),
        ("channel", (6,), (6,)),
        (2, (3, 4, 6), (1, 2, 6)),
        ((1, 0), (4, 6), (4, 1)),
        ((2, 3), (5, 4, 6), (1, 2, 2)),
    ],
)
def test_what_shares_a_number(per, shape, counts):
    assert block_counts(per, shape) == counts


@pytest.mark.parametrize(
    ("per", "shape", "message"),
    [
        (5, (4, 6), "cuts axis 0 .* into groups of 5, which do not divide 4"),
        (2, (6,), "needs at least 2 axes"),
        ("channel", (), "needs at least 1 axes"),
        ("row", (4, 6), "expected per=None"),
        (0, (4, 6), "expected per=None"),
        (True, (4, 6), "expected per=None"),
        ((-1, 2), (4, 6), "expected per=None"),
    ],
)
def test_what_cuts_nothing_is_refused(per, shape, message):
    with pytest.raises(ValueError, match=message):
        block_counts(per, shape)


def test_sums_are_float32_or_wider():
    wide = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}
    assert {name: str(np.dtype(compute_dtype(name))) for name in wide} == wide


def test_a_sharded_axis_stays_where_it_is():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.arange(48.0).reshape(8, 6), jax.NamedSharding(mesh, jax.P("d", None)))
    assert explicit_sharding(x).spec == jax.P("d", None) and explicit_sharding(jnp.ones(3)) is None
    cut = cut_axes(x, (1, 2))
    assert cut.shape == (8, 2, 3) and explicit_sharding(cut).spec == jax.P("d", None, None)
    np.testing.assert_array_equal(join_axes(cut, x.shape), np.arange(48.0).reshape(8, 6))
