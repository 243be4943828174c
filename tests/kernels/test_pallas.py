"""The Pallas kernels, emulated on CPU, against int64 and float64 arithmetic on unpacked bits.

Emulation proves what a kernel means, not that it compiles: tests/aot does that.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.kernels import pallas_gpu, pallas_tpu

BACKENDS = {"tpu": pallas_tpu, "gpu": pallas_gpu}

# m, k, n: one word; ragged everywhere; aligned; several blocks of K; several blocks of rows and columns
SHAPES = [(1, 7, 1), (5, 300, 130), (16, 256, 128), (9, 4400, 20), (260, 40, 1030)]
XNOR = [(backend, unit) for backend in BACKENDS for unit in ("matrix", "popcount")]
BITS = [(backend, dtype) for backend in BACKENDS for dtype in ("float32", "bfloat16")]


def words_of(bits):
    """Rows of bits as little-endian 32-bit words, zeros behind the end."""
    padded = np.pad(bits.astype(np.uint8), ((0, 0), (0, -bits.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view("<u4").astype(np.uint32)


def random_bits(*shape, seed):
    return np.random.default_rng(seed).integers(0, 2, shape)


@functools.partial(jax.jit, static_argnames=("backend", "k", "unit"))
def xnor(a, b, backend, k, unit):
    return BACKENDS[backend].xnor(a, b.T, k, unit=unit, interpret=True)


@functools.partial(jax.jit, static_argnames="backend")
def bit_product(x, b, backend):
    return BACKENDS[backend].bit_product(x, b.T, interpret=True)


@pytest.mark.parametrize(("backend", "unit"), XNOR)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_xnor_is_the_product_of_signs(backend, unit, m, k, n):
    a, b = random_bits(m, k, seed=k), random_bits(n, k, seed=n)
    y = xnor(words_of(a), words_of(b), backend, k, unit)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, (2 * a - 1) @ (2 * b - 1).T)


@pytest.mark.parametrize(("backend", "dtype"), BITS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_bit_product_sums_what_the_bits_choose(backend, dtype, m, k, n):
    """Within 1e-6 of the sum of magnitudes: nothing but float32 sums is rounded, in either dtype."""
    x = jnp.asarray(np.random.default_rng(m).normal(size=(m, k)), dtype)
    b, exact = random_bits(n, k, seed=n), np.asarray(x, np.float64)
    y = bit_product(x, words_of(b), backend)
    assert y.dtype == jnp.float32 and y.shape == (m, n)
    assert np.all(np.abs(y - exact @ b.T) <= 1e-6 * (np.abs(exact) @ b.T))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_bit_of_a_float32_is_lost(backend):
    k = 70
    x = np.random.default_rng(0).uniform(1, 2, (3, k)).astype(np.float32) * 10.0 ** np.arange(-30, 30, 20)[:, None]
    x = x.astype(np.float32)
    np.testing.assert_array_equal(bit_product(x, words_of(np.eye(k)), backend), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_makes_its_row_nan(backend, value):
    x, b = np.ones((3, 70), np.float32), random_bits(5, 70, seed=0)
    x[1, 40] = value
    y = np.asarray(bit_product(jnp.asarray(x), words_of(b), backend))
    assert np.isnan(y[1]).all()
    np.testing.assert_array_equal(y[::2], np.stack([b.sum(1)] * 2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "counts"), [(1, True), (8, True), (9, False)])
def test_bits_are_counted_up_to_eight_rows(backend, m, counts):
    a, b = np.zeros((m, 8), np.uint32), np.zeros((8, 8), np.uint32)
    jaxpr = jax.make_jaxpr(lambda a, b: BACKENDS[backend].xnor(a, b, 256))(a, b)
    assert ("dot_general" not in str(jaxpr)) == counts


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("k", "words", "rows", "unit", "message"),
    [
        (33, 1, 2, None, r"expected 2 words a row.*k=33, got a \[3, 1\]"),
        (20, 1, 3, None, r"as many rows of words, for k=20, got a \[3, 1\], words \[3, 5\]"),
        (20, 1, 1, "vpu", "expected unit='matrix', 'popcount' or None, got 'vpu'"),
    ],
)
def test_operands_of_xnor_that_do_not_fit_are_refused(backend, k, words, rows, unit, message):
    def call(a, b):
        return BACKENDS[backend].xnor.__wrapped__(a, b, k, unit=unit)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.zeros((3, words), np.uint32), np.zeros((rows, 5), np.uint32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_operands_of_bit_product_that_do_not_fit_are_refused(backend, dtype):
    rows = 3 if dtype == "float32" else 2

    def call(x, b):
        return BACKENDS[backend].bit_product.__wrapped__(x, b)

    with pytest.raises(
        ValueError, match="expected float32 or bfloat16 x, and 2 rows of words for 40 bits, got x " + dtype
    ):
        jax.eval_shape(call, np.zeros((2, 40), dtype), np.zeros((rows, 5), np.uint32))


def test_lcq_is_imported_without_pallas():
    code = (
        "import lcq, sys; assert not {f'jax.experimental.pallas.{name}' for name in ('tpu', 'triton')} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
