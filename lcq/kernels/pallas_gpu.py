"""Products with one-bit weights on GPU, in Pallas on Triton: bits are unpacked in the kernel and go to tensor cores.

Words run down the columns, so that neighbouring threads read neighbouring ones. Four words of a column become 128 rows
of an operand, (w[i] >> j) & 1 in row 32 i + j, signs in int8 or bits in bfloat16. For up to 8 rows, which would leave
half of the smallest tensor-core tile empty, bits are counted instead: there the time goes into reading the words.

Blocks are powers of two, as Triton wants them: the rows rounded up, 16 to 64 (1 to 8 when counting), and 128 columns,
so that a sum takes 64 registers of each of 128 threads; 32 columns where there is one block of rows, or when counting,
so that 4,096 columns still occupy 128 processors. Masks cut off what is beyond an end.

Triton under Pallas is deprecated from jax 0.11 on; its successor needs Hopper. Nothing outside this file knows of it.

Compiled for sm_80 and sm_90a by tests/aot; not run on any GPU yet.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Int32, UInt32

from lcq.forms.meshes import struct_varied
from lcq.kernels.reference import check_bits, check_signs

_FEW = 8
"""Rows up to which bits are counted."""

_ROWS, _COLUMNS, _FEW_COLUMNS = 64, 128, 32
"""Largest blocks: rows of the result, its columns, and its columns where there is one block of rows."""

_WORDS, _COUNTED_WORDS = 4, 32
"""Words of K that are multiplied, or counted, at a time."""


def xnor(
    a: UInt32[Array, "m w"],
    words: UInt32[Array, "w n"],
    k: int,
    *,
    unit: Literal["matrix", "popcount"] | None = None,
    interpret: bool = False,
) -> Int32[Array, "m n"]:
    """`reference.xnor`, the product of two matrices of signs, with the words of one down its columns.

    Args:
        a: words along rows, zero bits beyond k.
        words: b's words, down its columns, see `columns.pack_columns`; zero bits beyond k.
        k: elements of a row.
        unit: "matrix" multiplies int8 in tensor cores; "popcount" counts bits; None is "popcount" up to 8 rows.
        interpret: emulate on any platform.

    Raises:
        ValueError: words that do not hold k bits, another unit.

    Example:
        >>> a, b = jnp.array([[0b101]], jnp.uint32), jnp.array([[0b111], [0b010]], jnp.uint32)
        >>> xnor(a, b.T, 3, interpret=True)
        Array([[ 1, -3]], dtype=int32)
    """
    check_signs(a, words, k, unit)
    if unit is None:
        unit = "popcount" if a.shape[0] <= _FEW else "matrix"
    return (_xnor_popcount if unit == "popcount" else _xnor_matrix)(a, words, k, interpret)


def _xnor_matrix(a: Array, words: Array, k: int, interpret: bool) -> Array:
    pad = 32 * _WORDS * pl.cdiv(a.shape[1], _WORDS) - k  # elements beyond k are -1 in both operands

    def signs(words: Array, axis: int) -> Array:
        return 2 * _bits(words, axis).astype(jnp.int8) - 1

    def step(a: Array, words: Array, total: Array) -> Array:
        return total + _dot(signs(a, 1), signs(words, 0), jnp.int32)

    return _product("xnor_matrix", step, lambda total: total - pad, a, _WORDS, words, jnp.int32, interpret)


def _xnor_popcount(a: Array, words: Array, k: int, interpret: bool) -> Array:
    (m, length), n = a.shape, words.shape[1]
    rows = pl.next_power_of_2(min(m, _FEW))

    def kernel(a: Any, words: Any, out: Any) -> None:
        here = _below(m, pl.program_id(0), rows), _below(n, pl.program_id(1), _FEW_COLUMNS)

        def step(i: Array, count: Array) -> Array:
            piece, there = pl.ds(i * _COUNTED_WORDS, _COUNTED_WORDS), _below(length, i, _COUNTED_WORDS)
            left = plgpu.load(a.at[:, piece], mask=here[0][:, None] & there, other=0)
            right = plgpu.load(words.at[piece, :], mask=there[:, None] & here[1], other=0)
            return count + _population_count(left[:, :, None] ^ right[None])

        count = jnp.zeros((rows, _COUNTED_WORDS, _FEW_COLUMNS), jnp.int32)
        count = lax.fori_loop(0, pl.cdiv(length, _COUNTED_WORDS), step, count)
        plgpu.store(out, k - 2 * count.sum(axis=1), mask=here[0][:, None] & here[1])

    return _call("xnor_popcount", kernel, a, words, (rows, _FEW_COLUMNS), jnp.int32, interpret)


def bit_product(
    x: Float32[Array, "m k"] | BFloat16[Array, "m k"],
    words: UInt32[Array, "w n"],
    *,
    interpret: bool = False,
) -> Float32[Array, "m n"]:
    """`reference.code_product` of one bit, summed in float32.

    A float32 x is cut into three bfloat16 numbers that add up to it exactly; their products with bits are exact too.

    Args:
        x: activations.
        words: b's words, down its columns, see `columns.pack_columns`; zero bits beyond k.
        interpret: emulate on any platform.

    Raises:
        ValueError: words that do not hold k bits, another dtype.

    Example:
        >>> words = jnp.array([[0b101, 0b010]], jnp.uint32)
        >>> bit_product(jnp.array([[1.0, 2.0, 4.0]]), words, interpret=True)
        Array([[5., 2.]], dtype=float32)
    """
    check_bits(x, words)

    def step(x: Array, words: Array, total: Array) -> Array:
        ones = (_bits(words, 0) * 0x3F80).astype(jnp.uint16)  # as bfloat16, 1
        ones = lax.bitcast_convert_type(ones, jnp.bfloat16)
        for part in _bfloat16_parts(x):
            total += _dot(part, ones, jnp.float32)
        return total

    return _product("bit_product", step, lambda total: total, x, 32 * _WORDS, words, jnp.float32, interpret)


def _product(
    name: str, step: Any, end: Any, x: Array, width: int, words: Array, dtype: DTypeLike, interpret: bool
) -> Array:
    """Sums `step` over pieces of x, `width` of its columns, and the words of as many elements of K."""
    (m, length), (height, n) = x.shape, words.shape
    rows = min(max(pl.next_power_of_2(m), 16), _ROWS)
    columns = _COLUMNS if m > _ROWS else _FEW_COLUMNS

    def kernel(x: Any, words: Any, out: Any) -> None:
        here = _below(m, pl.program_id(0), rows), _below(n, pl.program_id(1), columns)

        def body(i: Array, total: Array) -> Array:
            piece, there = x.at[:, pl.ds(i * width, width)], _below(length, i, width)
            left = plgpu.load(piece, mask=here[0][:, None] & there, other=0)
            piece, there = words.at[pl.ds(i * _WORDS, _WORDS), :], _below(height, i, _WORDS)
            return step(left, plgpu.load(piece, mask=there[:, None] & here[1], other=0), total)

        total = lax.fori_loop(0, pl.cdiv(height, _WORDS), body, jnp.zeros((rows, columns), dtype))
        plgpu.store(out, end(total), mask=here[0][:, None] & here[1])

    return _call(name, kernel, x, words, (rows, columns), dtype, interpret)


def _call(
    name: str, kernel: Any, x: Array, words: Array, block: tuple[int, int], dtype: DTypeLike, interpret: bool
) -> Array:
    """Runs a kernel on every block of rows of x and of columns of words; each goes along all of K."""
    (m, length), (height, n), (rows, columns) = x.shape, words.shape, block
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, rows), pl.cdiv(n, columns)),
        in_specs=[
            pl.BlockSpec((rows, length), lambda i, j: (i, 0)),
            pl.BlockSpec((height, columns), lambda i, j: (0, j)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=struct_varied(jax.ShapeDtypeStruct((m, n), dtype), x, words),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        name=name,
        interpret=interpret,
    )(x, words)


def _below(size: int, i: Array | int, block: int) -> Array:
    """Which places of block i are inside an axis of `size`."""
    return i * block + jnp.arange(block) < size


def _dot(x: Array, bits: Array, dtype: DTypeLike) -> Array:
    """x times bits, exact but for the sum; a higher precision that a user may have chosen adds nothing."""
    return jnp.dot(x, bits, precision=lax.Precision.DEFAULT, preferred_element_type=dtype)


def _population_count(words: Array) -> Array:
    """Ones in each word, in the form that LLVM knows for its instruction; Triton has no `lax.population_count`."""
    pairs = words - (words >> 1 & 0x55555555)
    fours = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    eights = fours + (fours >> 4) & 0x0F0F0F0F
    return (eights * 0x01010101 >> 24).astype(jnp.int32)


def _bits(words: Array, axis: int) -> Array:
    """The bits of words[R, N] or [M, R] one after another along `axis`, 32 times as long."""
    shape = [1, 1, 1]
    shape[axis + 1] = 32
    shifts = lax.broadcasted_iota(jnp.uint32, shape, axis + 1)
    bits = lax.expand_dims(words, (axis + 1,)) >> shifts & 1
    return bits.reshape([size * (32 if i == axis else 1) for i, size in enumerate(words.shape)])


def _bfloat16_parts(x: Array) -> list[Array]:
    """bfloat16 numbers that add up to x: itself, or the 8 leading bits of a float32 three times."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        bits = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        head = lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(head.astype(jnp.bfloat16))
        x = x - head
    return parts
