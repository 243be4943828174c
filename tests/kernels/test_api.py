import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Codes, Sparse
from lcq.forms.column_words import pack_columns
from lcq.kernels import codes_xla, reference
from lcq.kernels.api import matmul
from lcq.kernels.code_product import code_product

RNG = np.random.default_rng(0)
MANTISSA = str(0x3F800000)
"""Bits of 1.0, which are in the program of the loop over words alone."""

SCHEMES = [
    lcq.Binary(scale=True),
    lcq.KMeans(1),
    lcq.KMeans(2),
    lcq.KMeans(2, per="channel"),
    lcq.KMeans(4),
    lcq.KMeans(4, per=(10, 1)),
    lcq.KMeans(20, per="channel"),
    lcq.KMeans(300),
    lcq.Ternary(),
    lcq.PowersOfTwo(2),
    lcq.Uniform(3, per=(35, 1), zero_point=True),
    lcq.Uniform(8, per=(70, 5)),
    lcq.Cast("bfloat16"),
    lcq.LowRank(3),
    lcq.Prune(kept=0.2),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(kept=0.1)),
]


def near(y, x, dense, ulps=16, least=1e-30):
    """Errors are at most so many units of rounding of sum |x| max |Delta|, or of sum |x| least."""
    x, dense = np.asarray(x, np.float64), np.asarray(dense, np.float64)
    scale = np.abs(x).sum(-1, keepdims=True) * max(np.abs(dense).max(), least)
    assert (np.abs(np.asarray(y, np.float64) - x @ dense) <= ulps * 2.0**-24 * scale).all()


product = jax.jit(matmul, static_argnames="kernel")


@functools.cache
def form_of(scheme, shape=(70, 130)):
    w = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    project = jax.vmap(scheme.project) if len(shape) == 3 else scheme.project
    return jax.jit(project)(w)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
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


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if type(form_of(s)) is Codes], ids=repr)
def test_columns_hold_the_same_matrix(scheme):
    form = form_of(scheme)
    ready = form.prepack()
    assert ready.shape == form.shape and ready.dtype == form.dtype
    scale = float(jnp.abs(form.dense()).max())
    np.testing.assert_allclose(ready.dense(), form.dense(), rtol=3e-7, atol=3e-7 * scale)
    with pytest.raises(ValueError, match="save the forms that it was made of"):
        ready.pack()


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.KMeans(4, per="channel"), lcq.LowRank(2)], ids=repr)
def test_stacked_forms_multiply_one_by_one(scheme):
    form = form_of(scheme, (3, 20, 9))
    for rows in (2, 12):
        x = RNG.normal(size=(3, rows, 20)).astype(np.float32)
        y = product(jnp.asarray(x), form)
        for g in range(3):
            near(y[g], x[g], form.dense()[g])


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("rows", "k", "n"), [(1, 1, 1), (2, 70, 130), (9, 33, 129)])
def test_products_with_codes_of_every_width(width, rows, k, n):
    codes = RNG.integers(0, 2**width, (k, n))
    x = RNG.normal(size=(rows, k)).astype(np.float32)
    words = pack_columns(jnp.asarray(codes, jnp.uint16), width)
    near(jax.jit(code_product, static_argnums=2)(jnp.asarray(x), words, width), x, codes, least=2.0**width)
    near(reference.code_product(jnp.asarray(x), words, width), x, codes)


FEW = [lcq.Prune(kept=0.1), lcq.Prune(kept=0.15, values=lcq.KMeans(4)), lcq.Prune(kept=0), lcq.Prune(kept=0.1, group=2)]


@pytest.mark.parametrize("scheme", FEW, ids=repr)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_lists_of_few_weights(scheme, lead):
    """Prepacked from either layout they are the same matrix, and so are their products, of few rows and of many."""
    form = form_of(scheme, (*lead, 70, 131 - len(lead) - (scheme.group == 2)))
    dense = np.asarray(form.dense())
    for each in (form, jax.tree.map(jnp.asarray, form.pack()) if not lead else form):
        ready = each.prepack()
        assert ready.shape == dense.shape and ready.places.shape[-2] == (dense != 0).sum(-2).max()
        np.testing.assert_array_equal(ready.dense(), dense)
    for rows in (1, 2, 40):
        x, g = (jnp.asarray(RNG.normal(size=(*lead, rows, n)), jnp.float32) for n in (70, dense.shape[-1]))
        y, pull = jax.vjp(lambda x: product(x, ready), x)
        near(y, x, dense)
        near(pull(g)[0], g, np.swapaxes(dense, -1, -2))


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_list_hides_no_activation_that_is_not_finite(rows, odd):
    """Row 5 is in no list; the dense product meets it in a zero."""
    ready = Sparse(jnp.arange(18).reshape(9, 2) < 2, jnp.ones((9, 2))).prepack()
    y = np.asarray(jax.jit(matmul)(jnp.ones((rows, 9)).at[0, 5].set(odd), ready))
    assert np.isnan(y[0]).all() and (y[1:] == 1).all()


def test_lists_of_bfloat16():
    form = lcq.Prune(kept=0.1).project(jnp.asarray(RNG.normal(size=(70, 131)), jnp.bfloat16))
    ready = form.prepack()
    assert ready.dtype == ready.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ready.dense(), form.dense())
    x = jnp.asarray(RNG.normal(size=(3, 70)), jnp.bfloat16)
    y = matmul(x, ready)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64) @ np.asarray(form.dense(), np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), wide, rtol=2**-8, atol=1e-5)


def test_long_lists_and_traced_forms_are_not_prepacked():
    form = form_of(lcq.Prune(kept=0.1))
    long = form_of(lcq.Prune(kept=0.6))
    assert long.prepack() is long
    assert jax.jit(lambda form: form.prepack() is form)(form)
    with pytest.raises(ValueError, match="multiplies codes, got Ell"):
        matmul(jnp.ones((1, 70)), form.prepack(), kernel="words")
    with pytest.raises(ValueError, match="a leaf prepacked for products; save the forms"):
        form.prepack().pack()


def test_words_run_down_the_columns_from_the_lowest_bits():
    codes = RNG.integers(0, 16, (19, 3))
    words = np.asarray(pack_columns(jnp.asarray(codes, jnp.uint8), 4))
    for k in range(19):
        np.testing.assert_array_equal(words[k // 8] >> (4 * (k % 8)) & 15, codes[k])
    assert (words[2] >> 12 == 0).all()


@pytest.mark.parametrize("kernel", ["words", "tiles", "dense"])
def test_every_kernel_gives_the_same(kernel):
    form = form_of(lcq.KMeans(2))
    for rows in (1, 20):
        x = RNG.normal(size=(rows, 70)).astype(np.float32)
        near(product(jnp.asarray(x), form, kernel=kernel), x, form.dense())


def test_few_rows_go_word_by_word_and_many_in_tiles():
    words, x = jnp.zeros((3, 130), jnp.uint32), jnp.zeros((codes_xla.FEW + 1, 96))
    few, many = (jax.jit(code_product, static_argnums=2).lower(x, words, 1) for x in (x[1:], x))
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
    with pytest.raises(ValueError, match="'words' wants levels with equal steps, got a codebook of 4"):
        matmul(jnp.zeros((2, 70)), form, kernel="words")
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


@pytest.mark.parametrize(
    "scheme",
    [
        lcq.Uniform(4, per=32),
        lcq.Uniform(4, per=32, zero_point=True),
        lcq.Uniform(3, per=32, scale_dtype="float16"),
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
