import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.forms.column_words import pack_signs
from lcq.kernels import reference, xnor_xla
from lcq.kernels.api import binary_matmul
from lcq.kernels.signs import signs

SHAPES = [
    (1, 1, 1),
    (1, 31, 5),
    (2, 32, 64),
    (3, 33, 65),
    (5, 200, 250),
    (17, 4096, 3),
    (4, 4128, 70),
    (2, 8300, 64),
]


def drawn(m, k, n):
    rng = np.random.default_rng(m * k + n)
    return rng.choice([-1, 1], (m, k)), rng.choice([-1, 1], (n, k))


def packed(s):
    """Bit j of word i is sign 32 i + j; np.packbits on bytes, the lowest bit first."""
    k = s.shape[1]
    bits = np.pad(s > 0, ((0, 0), (0, -k % 32)))
    return np.packbits(bits, axis=1, bitorder="little").view("<u4")


@pytest.mark.parametrize("shape", SHAPES)
def test_xnor_counts_what_a_product_of_signs_sums(shape):
    s, t = drawn(*shape)
    got = xnor_xla.xnor(jnp.asarray(packed(s)), xnor_xla.tile(jnp.asarray(packed(t))), shape[1])
    np.testing.assert_array_equal(got[:, : shape[2]], s @ t.T)


@pytest.mark.parametrize("shape", SHAPES[:5])
def test_the_reference_means_the_same(shape):
    s, t = drawn(*shape)
    np.testing.assert_array_equal(reference.xnor(jnp.asarray(packed(s)), jnp.asarray(packed(t)), shape[1]), s @ t.T)


def test_signs_are_packed_from_the_lowest_bit_and_zero_is_plus():
    x = np.random.default_rng(0).normal(size=(3, 2, 70)).astype(np.float32)
    x[0, 0, :3] = (0.0, -0.0, -1e-30)
    s = np.where(x >= 0, 1, -1).reshape(6, 70)
    np.testing.assert_array_equal(pack_signs(jnp.asarray(x)).reshape(6, -1), packed(s))
    assert s[0, :3].tolist() == [1, 1, -1]


def test_mapped_over_rows_and_over_weights():
    (s, t), k = drawn(6, 40, 64), 40
    a, b = jnp.asarray(packed(s)).reshape(3, 2, -1), xnor_xla.tile(jnp.asarray(packed(t)))
    one = jax.vmap(lambda a: xnor_xla.xnor(a, b, k))(a)
    np.testing.assert_array_equal(one.reshape(6, 64), s @ t.T)
    each = jax.vmap(lambda a, b: xnor_xla.xnor(a, b, k))(a, jnp.stack([b, ~b, b]))
    np.testing.assert_array_equal(each[0], s[:2] @ t.T)


@pytest.mark.parametrize("columns", [64, 256])
def test_a_tile_of_columns_stays_innermost_in_the_compiled_program(columns):
    """Lost, the loops are turned round and the product is slower by 5 to 30."""
    a, tiles = jax.ShapeDtypeStruct((16, 32), jnp.uint32), jax.ShapeDtypeStruct((8, 32, columns), jnp.uint32)
    text = jax.jit(xnor_xla.xnor, static_argnums=2).lower(a, tiles, 1024).compile().as_text()
    assert re.search(rf"s32\[8,16,{columns}\]\{{2,1,0\}} fusion\(", text), text


@pytest.mark.parametrize(
    ("n", "words", "tiles"),
    [
        (1024, 32, (4, 256)),
        (1024, 64, (8, 128)),
        (1024, 65, (16, 64)),
        (64, 2, (1, 64)),
        (192, 2, (3, 64)),
        (250, 2, (1, 256)),
    ],
)
def test_tiles_are_wide_if_they_fit_a_cache_and_hold_no_more(n, words, tiles):
    t, c = tiles
    assert jax.eval_shape(xnor_xla.tile, jax.ShapeDtypeStruct((n, words), jnp.uint32)).shape == (t, words, c)


@pytest.mark.parametrize("rows", [(), (1,), (3, 4), (20,), (0,)], ids=str)
def test_the_door_multiplies_packed_signs(rows):
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(*rows, 70)), rng.normal(size=(70, 9))
    y = jax.jit(binary_matmul)(pack_signs(jnp.asarray(x)), signs(jnp.asarray(w)))
    assert y.shape == (*rows, 9) and y.dtype == jnp.int32
    np.testing.assert_array_equal(y, np.where(x >= 0, 1, -1) @ np.where(w >= 0, 1, -1))


def test_signs_of_what_is_no_matrix_and_for_no_platform_are_refused():
    for w, platform in ((jnp.ones(3), None), (jnp.ones((3, 2)), "cuda")):
        with pytest.raises(ValueError, match=r"expected a matrix .* and a platform of xla, tpu, gpu or None, got .3"):
            inspect.unwrap(signs)(w, platform)


def test_the_door_wants_as_many_signs_as_there_are_weights():
    with pytest.raises(ValueError, match=r"expected 3 words of 70 signs, got \[2, 2\]"):
        binary_matmul(jnp.zeros((2, 2), jnp.uint32), signs(jnp.ones((70, 3))))
