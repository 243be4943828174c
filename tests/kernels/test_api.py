"""Products with forms: every scheme, kernel, dtype and transformation, near the product with the dense array."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Codes, Columns
from lcq.forms.column_words import pack_columns
from lcq.kernels import reference, words_xla
from lcq.kernels.api import matmul
from lcq.kernels.code_product import code_product
from tests.kernels.products import CODED, form_of, near, product

RNG = np.random.default_rng(0)
MANTISSA = str(0x3F800000)  # bits of 1.0, which are in the program of the loop over words alone


OTHERS = [
    lcq.Cast("bfloat16"),
    lcq.LowRank(3),
    lcq.Prune(fraction=0.2),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(fraction=0.1)),
]


def plain(words, width, k):
    """Codes themselves as weights."""
    one = jnp.ones((1, 1))
    return Columns(words=words[None], first=0 * one, step=one, width=width, tail=(k, words.shape[1]), axes=(0, 1))


@pytest.mark.parametrize("scheme", CODED + OTHERS, ids=repr)
def test_the_product_is_that_with_the_dense_array(scheme):
    form = form_of(scheme)
    for rows, layout in (((1,), form), ((3, 4), form.pack())):
        x = RNG.normal(size=(*rows, 70)).astype(np.float32)
        y = product(jnp.asarray(x), layout)
        assert y.shape == (*rows, 130) and y.dtype == jnp.float32
        near(y, x, form.dense())


def test_a_vector_times_a_form_is_a_vector():
    form, x = form_of(lcq.KMeans(2)), RNG.normal(size=70).astype(np.float32)
    y = product(jnp.asarray(x), form)
    assert y.shape == (130,)
    near(y[None], x[None], form.dense())


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.KMeans(4, per="channel"), lcq.LowRank(2)], ids=repr)
def test_stacked_forms_multiply_one_by_one(scheme):
    form = form_of(scheme, (3, 20, 9))
    for rows in (2, 12):
        x = RNG.normal(size=(3, rows, 20)).astype(np.float32)
        y = product(jnp.asarray(x), form)
        for g in range(3):
            near(y[g], x[g], form.dense()[g])


@pytest.mark.parametrize("kind", ["grid", "levels", "fixed"])
def test_stacked_matrices_that_share_a_scale_or_a_table(kind):
    blocks, codes = (2, 5, 3), jnp.asarray(RNG.integers(0, 3, (4, 20, 9)), jnp.uint8)
    numbers = jnp.asarray(RNG.normal(size=(*blocks, 3)), jnp.float32)
    grid = {"scale": numbers[..., 0], "zero": jnp.ones(blocks, jnp.uint8), "values": (0.0, 1.0, 2.0)}
    form = Codes(codes, **{"grid": grid, "levels": {"levels": numbers}, "fixed": {"values": (-1.0, 0.0, 3.0)}}[kind])
    for rows in (2, 12):
        x = RNG.normal(size=(4, rows, 20)).astype(np.float32)
        near(product(jnp.asarray(x), form), x, form.dense())


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (2, 70, 130), (9, 33, 129)])
def test_products_with_codes_of_every_width(width, rows, k, n):
    codes = RNG.integers(0, 2**width, (k, n))
    x = RNG.normal(size=(rows, k)).astype(np.float32)
    words = pack_columns(jnp.asarray(codes, jnp.uint16), width)
    near(jax.jit(code_product)(jnp.asarray(x), plain(words, width, k)), x, codes, least=2.0**width)
    near(reference.code_product(jnp.asarray(x), words, width), x, codes)


@pytest.mark.parametrize(("rows", "block", "n"), [(1, 32, 128), (2, 13, 37)])  # whole words and vectors, and ragged
@pytest.mark.parametrize("levels", [3, 5, 16, 0])
def test_few_rows_by_words_in_blocks_of_any_length(rows, block, n, levels):
    """Against float64 numpy, of levels, and of equal steps with zeros and signed scales in 16 bits."""
    blocks, k = 3, 3 * block
    own = (blocks, block, n)
    codes, x = RNG.integers(0, levels or 8, own), RNG.normal(size=(rows, k)).astype(np.float32)
    words = pack_columns(jnp.asarray(codes, jnp.uint8), 2 if levels == 3 else 4)
    if levels:
        table = RNG.normal(size=(blocks, levels, n)).astype(np.float32)
        kept, dense = {"levels": table}, np.take_along_axis(table, codes, 1)
    else:
        step, zero = RNG.normal(size=(blocks, n)).astype(np.float16), RNG.integers(0, 8, (blocks, n)).astype(np.uint8)
        kept, dense = {"step": step, "zero": zero, "lowest": 0.0}, (codes - zero[:, None].astype(float)) * step[:, None]
    kept = {name: jnp.asarray(a) if name != "lowest" else a for name, a in kept.items()}
    form = Columns(words=words, width=2 if levels == 3 else 4, tail=(k, n), axes=(0, 1), **kept)
    y, dense = product(jnp.asarray(x), form, kernel="words"), np.asarray(dense, np.float64).reshape(k, n)
    near(y, x, dense, least=16 * np.abs(dense).max() / 7)


@pytest.mark.parametrize("kernel", ["words", "tiles", "dense"])
def test_every_kernel_gives_the_same(kernel):
    form = form_of(lcq.KMeans(2))
    for rows in (1, 20):
        x = RNG.normal(size=(rows, 70)).astype(np.float32)
        near(product(jnp.asarray(x), form, kernel=kernel), x, form.dense())


def test_few_rows_go_word_by_word_and_many_in_tiles():
    form, x = plain(jnp.zeros((3, 130), jnp.uint32), 1, 96), jnp.zeros((words_xla.FEW + 1, 96))
    few, many = (jax.jit(code_product).lower(x, form) for x in (x[1:], x))
    assert MANTISSA in few.as_text() and MANTISSA not in many.as_text()


@pytest.mark.parametrize(
    "scheme", [lcq.KMeans(2), lcq.Uniform(4, per=(35, 1)), lcq.KMeans(4), lcq.LowRank(3)], ids=repr
)
@pytest.mark.parametrize("rows", [2, 12])
def test_gradients_with_respect_to_activations(scheme, rows):
    form = form_of(scheme)
    x, g = (RNG.normal(size=(rows, n)).astype(np.float32) for n in (70, 130))
    y, pull = jax.vjp(lambda x: product(x, form), jnp.asarray(x))
    near(pull(jnp.asarray(g))[0], g, np.asarray(form.dense()).T)
    y, along = jax.jvp(lambda x: product(x, form), (jnp.asarray(x),), (jnp.asarray(x),))
    np.testing.assert_allclose(along, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [1, 4])
def test_gradients_of_stacked_matrices(width):
    """Of few rows by words, also where the loop over matrices is compiled."""
    codes, x = RNG.integers(0, 2**width, (3, 20, 9)), RNG.normal(size=(3, 2, 20)).astype(np.float32)
    form = Codes(jnp.asarray(codes, jnp.uint8), scale=jnp.ones((1, 1, 1)), values=tuple(map(float, range(2**width))))
    slopes = jax.jit(jax.grad(lambda x: (matmul(x, form) ** 2).sum()))(jnp.asarray(x))
    near(slopes, 2 * x @ codes, codes.swapaxes(1, 2))


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.Uniform(4, per=(35, 1))], ids=repr)
def test_second_derivatives_in_a_scan_and_mapped(scheme):
    form = form_of(scheme, (70, 70))

    def hessians(multiply):
        def three(x):
            rounds = jax.lax.scan(lambda x, _: (jnp.tanh(multiply(x) / 30), None), x, length=2)[0]
            return jnp.tanh(multiply(rounds)[:3]).sum()

        return jax.jit(jax.vmap(jax.hessian(three)))(x)

    x = jnp.asarray(RNG.normal(size=(2, 70)), jnp.float32)
    got, wanted = hessians(lambda x: matmul(x, form)), hessians(lambda x: x @ form.dense())
    np.testing.assert_allclose(got, wanted, atol=1e-4 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("rows", [1, 12])
def test_complex_activations(rows):
    form = form_of(lcq.KMeans(2))
    x = RNG.normal(size=(rows, 70)) + 1j * RNG.normal(size=(rows, 70))
    y = np.asarray(product(jnp.asarray(x, jnp.complex64), form))
    near(y.real, x.real, form.dense())
    near(y.imag, x.imag, form.dense())


@pytest.mark.parametrize("scheme", [lcq.Uniform(4, per="channel"), lcq.KMeans(2)], ids=repr)
def test_gradients_with_respect_to_the_numbers_of_a_form(scheme):
    form = form_of(scheme).prepack()
    x, g = (jnp.asarray(RNG.normal(size=(2, n)), jnp.float32) for n in (70, 130))

    def gradient(multiply):
        return jax.jit(jax.grad(lambda form: jnp.sum(multiply(x, form) * g), allow_int=True))(form)

    got, wanted = gradient(matmul), gradient(lambda x, form: jnp.matmul(x, form.dense(), precision="highest"))
    numbers = [name for name in ("first", "step", "table") if getattr(form, name, None) is not None]
    assert numbers
    for name in numbers:
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.KMeans(4)], ids=repr)
def test_mapped_over_activations_it_is_one_product_of_more_rows(scheme):
    form = form_of(scheme)
    x = RNG.normal(size=(6, 2, 70)).astype(np.float32)
    mapped = jax.jit(jax.vmap(lambda x: matmul(x, form)))
    near(mapped(jnp.asarray(x)), x, form.dense())
    assert MANTISSA not in mapped.lower(x).as_text()
    pulled = jax.jit(jax.vmap(jax.grad(lambda x: matmul(x, form).sum())))(jnp.asarray(x))
    near(pulled, np.ones((6, 2, 130)), np.asarray(form.dense()).T)


def test_short_activations_give_the_dtype_of_a_dense_product():
    w = jnp.asarray(RNG.normal(size=(70, 30)), jnp.bfloat16)
    x = jnp.asarray(RNG.normal(size=(3, 70)), jnp.bfloat16)
    for scheme in (lcq.KMeans(2), lcq.LowRank(2)):
        form = scheme.project(w)
        y = product(x, form)
        assert y.dtype == (x @ form.dense()).dtype
        wanted = np.asarray(x, np.float64) @ np.asarray(form.dense(), np.float64)
        np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=0.02, atol=0.06)


def test_a_tile_and_no_dense_array_is_in_memory():
    codes = jnp.asarray(RNG.integers(0, 4, (1024, 1024)), jnp.uint8)
    form = Codes(codes, levels=jnp.arange(4.0).reshape(1, 1, 4)).prepack()
    for rows in (1, 64):
        x = jnp.zeros((rows, 1024))
        memory = jax.jit(matmul).lower(x, form).compile().memory_analysis()
        assert memory.temp_size_in_bytes <= 4 * 1024 * 1024 / 4 + 3 * 4 * rows * 1024


def test_it_is_compiled_once():
    form = form_of(lcq.KMeans(2)).prepack()
    once = jax.jit(chex.assert_max_traces(matmul, 1))
    for i in range(3):
        once(jnp.full((2, 70), i, jnp.float32), form)


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.KMeans(4)], ids=repr)
def test_no_rows_and_float64_are_fine(scheme):
    form = form_of(scheme)
    assert product(jnp.zeros((0, 70)), form).shape == (0, 130)
    with jax.enable_x64(True):
        x = RNG.normal(size=(2, 70))
        y = product(jnp.asarray(x), form)
    assert y.dtype == np.float64
    near(y, x, form.dense())


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.Ternary(), lcq.KMeans(4)], ids=repr)
@pytest.mark.parametrize("rows", [2, 12])
def test_a_row_with_an_infinity_is_not_finite_and_one_with_nan_is_nan(scheme, rows):
    form, x = form_of(scheme), RNG.normal(size=(rows, 70)).astype(np.float32)
    for at, value in ((5, np.inf), (40, -np.inf)):
        bad = x.copy()
        bad[0, at], bad[1, at] = value, np.nan
        y = product(jnp.asarray(bad), form)
        assert not np.isfinite(y[0]).any() and np.isnan(y[1]).all()
        near(y[2:], x[2:], form.dense())


def test_what_does_not_fit_is_refused():
    form = form_of(lcq.KMeans(4))
    with pytest.raises(ValueError, match=r"expected x \[.., k\] and a form \(k, n\).*got \[2, 71\] and \[70, 130\]"):
        matmul(jnp.zeros((2, 71)), form)
    with pytest.raises(ValueError, match=r"expected one of the kernels tiles, .*words, .*, got 'fast'"):
        matmul(jnp.zeros((2, 70)), form, kernel="fast")
    with pytest.raises(ValueError, match=r"expected a form prepacked as the matrix it is, got axes \(1, 0\)"):
        matmul(jnp.zeros((2, 70)), dataclasses.replace(form.prepack(), axes=(1, 0)))
    with pytest.raises(ValueError, match=r"'words' wants .* equal steps or at most 16 of them, got a codebook of 20"):
        matmul(jnp.zeros((2, 70)), form_of(lcq.KMeans(20, per="channel")), kernel="words")
    with pytest.raises(ValueError, match="'pallas_tpu' wants codes of 1 bit, got 4 bits"):
        matmul(jnp.zeros((2, 70)), form_of(lcq.Uniform(3, per=(35, 1), zero_point=True)), kernel="pallas_tpu")
    with pytest.raises(ValueError, match=r"expected codes of a matrix \[K, n\], or stacked ones, got \[6\]"):
        lcq.KMeans(2).project(jnp.arange(6.0)).prepack()
    with pytest.raises(ValueError, match="'tiles' multiplies codes, got Factors"):
        matmul(jnp.zeros((2, 70)), form_of(lcq.LowRank(3)), kernel="tiles")


@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_that_this_platform_has_not_raises(kernel):
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)interpret|gpu|tpu"):
        matmul(jnp.zeros((2, 70)), form_of(lcq.KMeans(2)), kernel=kernel).block_until_ready()
