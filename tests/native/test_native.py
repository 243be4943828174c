"""Compiled products for CPUs, where the package in `native/` is installed, as `.ci/native` does.

They are near the product in float64, of every form and instruction set, and under what JAX does with a function.
"""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Codes, Columns
from lcq.kernels import KERNELS, matmul
from lcq.kernels.api import way
from tests.kernels.products import near

native = pytest.importorskip("lcq_native", reason="lcq_native is not installed: pip install ./native")

RNG = np.random.default_rng(0)
HERE = native.instruction_set()
SETS = {"plain": ["plain"], "avx2": ["plain", "avx2"], "avx512": ["plain", "avx2", "avx512"]}[HERE]
ROWS, BLOCK, N = 70, 35, 130
EVEN = {  # levels, numbers of scales, their dtype, zeros and their dtype
    "1 bit": (2, (1, 1), "float32", None),
    "ternary by channel": (3, (1, N), "bfloat16", None),
    "2 bits in groups": (4, (ROWS // BLOCK, N), "float16", None),
    "3 bits with zeros": (8, (ROWS // BLOCK, N), "float32", "uint8"),
    "4 bits with zeros": (16, (1, N), "float32", "float32"),
    "8 bits": (256, (ROWS // BLOCK, 1), "float32", None),
    "9 bits": (512, (1, N), "float32", None),
}
BOOKS = {
    "leaf of 4": (4, (1, 1)),
    "channels of 3": (3, (1, N)),
    "leaf of 16": (16, (1, 1)),
    "groups of 11": (11, (2, N)),
}


def form_of(case):
    if case in BOOKS:
        count, blocks = BOOKS[case]
        codes, levels = RNG.integers(0, count, (ROWS, N), np.uint8), RNG.normal(size=(*blocks, count))
        return Codes(jnp.asarray(codes), levels=jnp.asarray(levels, jnp.float32)).prepack()
    count, blocks, dtype, zeros = EVEN[case]
    codes = jnp.asarray(RNG.integers(0, count, (ROWS, N)), jnp.uint8 if count <= 256 else jnp.uint16)
    zero = None if zeros is None else jnp.asarray(RNG.integers(0, count, blocks), zeros)
    values = tuple(float(level if zeros else level - count // 2) for level in range(count))
    return Codes(codes, values=values, scale=jnp.asarray(RNG.uniform(-1, 1, blocks), dtype), zero=zero).prepack()


def numbers(form):
    """The weights in float64, and the largest number that is added up, by numpy alone."""
    words, width = np.asarray(form.words), form.width
    codes = (words[:, :, None, :] >> np.arange(0, 32, width, dtype=np.uint32)[:, None]) & np.uint32(2**width - 1)
    codes = codes.reshape(words.shape[0], -1, N)[:, : ROWS // words.shape[0]].astype(np.int64)
    if form.levels is not None:
        levels = np.broadcast_to(np.asarray(form.levels, np.float64), (*form.levels.shape[:2], N))
        weights = np.take_along_axis(levels, codes, 1)
        return weights.reshape(ROWS, N), np.abs(levels).max()
    step = np.asarray(form.step.astype(jnp.float32), np.float64)[:, None]
    if form.lowest is None:
        first = np.asarray(form.first, np.float64)[:, None]
    else:
        first = (form.lowest - (0 if form.zero is None else np.asarray(form.zero, np.float64)[:, None])) * step
    return (first + step * codes).reshape(ROWS, N), max(np.abs(first).max(), np.abs(step).max() * 2**width)


@pytest.mark.parametrize("case", [*EVEN, *BOOKS])
def test_products_are_near_those_with_the_weights(case):
    form = form_of(case)
    weights, most = numbers(form)
    compute = jax.jit(KERNELS["native"]().compute, static_argnames="instructions")
    for rows in (1, 2, 7, 13):
        x = RNG.normal(size=(rows, ROWS)).astype(np.float32)
        for name in SETS:
            near(compute(jnp.asarray(x), form, name), x, weights, least=most)


def test_it_is_found_and_named_where_it_serves():
    codes = jnp.asarray(RNG.integers(0, 20, (ROWS, N), np.uint8))
    large = Codes(codes, levels=jnp.asarray(RNG.normal(size=(1, 1, 20)), jnp.float32))
    forms = {"w": form_of("leaf of 16"), "v": large.prepack()}
    run, x = lcq.packed(lambda p, x: (x @ p["w"], x @ p["v"])), jnp.ones((3, ROWS))
    wanted = "native" if HERE != "plain" else "tiles"
    assert [use.kernel for use in run.report(forms, x)] == [wanted, "tiles"]
    if HERE != "plain":
        assert "lcq_book" in jax.jit(run).lower(forms, x).as_text()
        ways = {case: [way(form_of(case), rows) for rows in (1, 13)] for case in ("1 bit", "8 bits", "groups of 11")}
        assert ways == {"1 bit": ["native"] * 2, "8 bits": ["words", "native"], "groups of 11": ["native"] * 2}
    with pytest.raises(ValueError, match="at most 16 of them, got a codebook of 20; leave kernel= out"):
        matmul(x, large, kernel="native")


def test_under_what_jax_does_with_a_function():
    form = form_of("leaf of 16")
    weights = numbers(form)[0]
    x = RNG.normal(size=(2, 3, ROWS)).astype(np.float32)

    def product(x):
        return matmul(x, form, kernel="native")

    near(jax.vmap(product)(jnp.asarray(x)).reshape(6, N), x.reshape(6, ROWS), weights)
    near(jax.lax.map(product, jnp.asarray(x)).reshape(6, N), x.reshape(6, ROWS), weights)
    slope = jax.jit(jax.grad(lambda x: product(x).sum()))(jnp.asarray(x[0]))
    np.testing.assert_allclose(slope, np.broadcast_to(weights.sum(1), (3, ROWS)), rtol=1e-4, atol=1e-4)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), form)
    both = matmul(jnp.asarray(x), stacked, kernel="native")
    near(both.reshape(6, N), x.reshape(6, ROWS), weights)


def test_dtypes_of_activations():
    form = form_of("4 bits with zeros")
    weights, most = numbers(form)
    x = jnp.asarray(RNG.normal(size=(2, ROWS)), jnp.bfloat16)
    y = matmul(x, form, kernel="native")
    assert y.dtype == jnp.float32
    near(y, np.asarray(x, np.float64), weights, least=most)
    with jax.enable_x64(True):
        double = jnp.asarray(np.asarray(x, np.float64))
        y = matmul(double, form, kernel="native")
        assert y.dtype == jnp.float64
        near(y, np.asarray(double), weights, least=most)


def test_an_exported_program_does_without():
    form, x = form_of("leaf of 16"), jnp.ones((2, ROWS))
    program = jax.jit(lambda x: matmul(x, form, kernel="native"))
    exported = jax.export.export(program)(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert "lcq_book" not in exported.mlir_module()
    again = jax.export.deserialize(exported.serialize()).call(x)
    np.testing.assert_allclose(again, program(x), rtol=1e-4, atol=1e-4)
    cross = jax.export.export(program, platforms=["cuda"])(jax.ShapeDtypeStruct(x.shape, x.dtype))
    assert "lcq_book" not in cross.mlir_module()


def test_threads_share_columns_of_any_number():
    for columns in (1, 64, 65, 1000):
        codes = jnp.asarray(RNG.integers(0, 2, (64, columns)), jnp.uint8)
        form = Codes(codes, values=(-1.0, 1.0), scale=jnp.ones((1, 1))).prepack()
        x = RNG.normal(size=(1, 64)).astype(np.float32)
        near(matmul(jnp.asarray(x), form, kernel="native"), x, 2.0 * np.asarray(codes) - 1)


@pytest.mark.skipif(HERE == "plain", reason="no instruction set that it would be taken for")
def test_it_is_not_taken_where_the_compiler_shares_out_the_work():
    form = form_of("leaf of 16")
    assert isinstance(form, Columns) and way(form, 1) == "native"
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    ):
        assert way(form, 1) == "words"


def test_what_does_not_fit_is_refused():
    call = jax.ffi.ffi_call("lcq_book", jax.ShapeDtypeStruct((1, 5), jnp.float32))
    words, levels = jnp.zeros((1, 2, 5), jnp.uint32), jnp.zeros((1, 16, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="expected words of as many rows as x has columns"):
        jax.block_until_ready(call(jnp.zeros((1, 9 + 8)), words, levels, width=4, set=""))
    with pytest.raises(
        jax.errors.JaxRuntimeError, match="expected an instruction set that this processor has, got sse"
    ):
        jax.block_until_ready(call(jnp.zeros((1, 16)), words, levels, width=4, set="sse"))
