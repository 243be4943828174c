"""Products with one-bit weights on TPU, in Pallas: bits are unpacked in the kernel and go to the matrix unit.

A word in a vector register is also four int8 or two bfloat16 rows, so one shift and one mask of a tile of words give a
plane of numbers: byte i of word r, shifted by j, is row 4 r + i of plane j, and half h is row 2 r + h of plane p:

    int8      (w >> j) & 0x01010101                   0 or 1, eight planes
    bfloat16  (w shifted from bit p to 14) & 0x4000   0 or 2 in each half, sixteen planes; the result is halved

The planes of eight words are stacked. Words run down the columns, so that output columns lie along lanes; zeros fill
them up to a multiple of eight. `xnor` unpacks both operands in one order, and a sum has none; for `bit_product`
activations take the order of the planes: within groups of 256, row 2 r + h of plane p is element 32 r + 16 h + p.

Blocks: all of an axis, at most 256 rows, 1,024 columns (512 beside float32, whose three parts take room) and 2,048
elements of K, the largest multiple of 256 that divides the padded K. So compiled, no kernel takes more than 11 MiB of
vector memory; 16 are granted unless more is asked for.

Compiled for TPU v5e, v6e and v5p by tests/aot; not run on any of them yet.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float32, Int32, UInt32

from lcq.forms.meshes import struct_varied
from lcq.kernels.reference import check_bits, check_signs

_GROUP = 8
"""Words in a group: the rows of a register."""

_ROWS, _COLUMNS, _WORDS, _COUNTED_WORDS = 256, 1024, 64, 128
"""Largest blocks: rows of the result, its columns, words of K, and words of K when counting."""


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
        unit: "matrix" multiplies int8 in the matrix unit, 2 a.b - sum(a) with a in {-1, 1} and b in {0, 1};
            "popcount" counts bits in the vector unit; None is "popcount" up to 8 rows.
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
        unit = "popcount" if a.shape[0] <= _GROUP else "matrix"
    words = _filled(words)
    a = jnp.pad(a, ((0, 0), (0, words.shape[0] - a.shape[1])))
    return (_xnor_popcount if unit == "popcount" else _xnor_matrix)(a, words, k, interpret)


def _xnor_matrix(a: Array, tiles: Array, k: int, interpret: bool) -> Array:
    m, rows = a.shape[0], min(a.shape[0], _ROWS)
    words = _block(tiles.shape[0], _WORDS)
    total = 2 * lax.population_count(a).astype(jnp.int32).sum(axis=1, keepdims=True) - k

    def kernel(a: Any, total: Any, tiles: Any, out: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            out[...] = jnp.broadcast_to(-total[...], out.shape)

        out[...] += 2 * _dot(_signs(a[...]), _int8(tiles[...]), jnp.int32, axis=0)

    return _call(
        "xnor_matrix",
        kernel,
        (a.T, pl.BlockSpec((words, rows), lambda i, j, s: (s, i))),
        (total, pl.BlockSpec((rows, 1), lambda i, j, s: (i, 0))),
        tiles=tiles,
        block=(rows, _COLUMNS, words),
        out=jax.ShapeDtypeStruct((m, tiles.shape[1]), jnp.int32),
        interpret=interpret,
    )


def _xnor_popcount(a: Array, tiles: Array, k: int, interpret: bool) -> Array:
    m, length = a.shape
    words = _block(length, _COUNTED_WORDS)
    slabs = jnp.pad(a, ((0, -m % _GROUP), (0, 0))).reshape(-1, _GROUP, length).swapaxes(1, 2)

    def kernel(slab: Any, tiles: Any, out: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            out[...] = jnp.full(out.shape, k, jnp.int32)

        for i in range(_GROUP):
            differ = lax.population_count(slab[:, i : i + 1] ^ tiles[...])
            out[i : i + 1] -= 2 * lax.bitcast_convert_type(differ, jnp.int32).sum(axis=0, keepdims=True)

    return _call(
        "xnor_popcount",
        kernel,
        (slabs, pl.BlockSpec((None, words, _GROUP), lambda i, j, s: (i, s, 0))),
        tiles=tiles,
        block=(_GROUP, _COLUMNS, words),
        out=jax.ShapeDtypeStruct((slabs.shape[0] * _GROUP, tiles.shape[1]), jnp.int32),
        interpret=interpret,
    )[:m]


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
    tiles = _filled(words)
    rows, length = min(x.shape[0], _ROWS), _block(tiles.shape[0], _WORDS)

    def kernel(x: Any, tiles: Any, out: Any) -> None:
        @pl.when(pl.program_id(2) == 0)
        def _() -> None:
            out[...] = jnp.zeros(out.shape, jnp.float32)

        twos = _bfloat16(tiles[...])
        for part in _bfloat16_parts(x[...]):
            out[...] += 0.5 * _dot(part, twos, jnp.float32, axis=1)

    return _call(
        "bit_product",
        kernel,
        (_in_planes(x, 32 * tiles.shape[0]), pl.BlockSpec((rows, 32 * length), lambda i, j, s: (i, s))),
        tiles=tiles,
        block=(rows, _COLUMNS if x.dtype == jnp.bfloat16 else _COLUMNS // 2, length),
        out=jax.ShapeDtypeStruct((x.shape[0], tiles.shape[1]), jnp.float32),
        interpret=interpret,
    )


def _filled(words: Array) -> Array:
    """With zero words up to a whole group."""
    return jnp.pad(words, ((0, -words.shape[0] % _GROUP), (0, 0)))


def _in_planes(x: Array, length: int) -> Array:
    """Activations [M, K], zeros up to a length, in the order of `_bfloat16`'s rows."""
    x = jnp.pad(x, ((0, 0), (0, length - x.shape[1]))).reshape(x.shape[0], -1, _GROUP, 2, 16)
    return x.transpose(0, 1, 4, 2, 3).reshape(x.shape[0], length)


def _call(
    name: str,
    kernel: Any,
    *left: tuple[Array, pl.BlockSpec],
    tiles: Array,
    block: tuple[int, int, int],
    out: jax.ShapeDtypeStruct,
    interpret: bool,
) -> Array:
    """Runs a kernel over blocks of rows, columns, and words of K, the last in sequence; tiles come after `left`."""
    (m, n), (rows, columns, words) = out.shape, block
    columns = min(columns, n)
    operands = *(array for array, _ in left), tiles
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(m, rows), pl.cdiv(n, columns), tiles.shape[0] // words),
        in_specs=[*(spec for _, spec in left), pl.BlockSpec((words, columns), lambda i, j, s: (s, j))],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, s: (i, j)),
        out_shape=struct_varied(out, operands),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(  # of the dense product, and every byte once: for XLA's scheduler
            flops=64 * m * tiles.size, transcendentals=0, bytes_accessed=4 * m * n + sum(x.nbytes for x in operands)
        ),
        name=name,
        interpret=interpret,
    )(*operands)


def _block(words: int, limit: int) -> int:
    """The largest multiple of a group that divides `words`, up to `limit`."""
    return max(size for size in range(_GROUP, min(words, limit) + 1, _GROUP) if words % size == 0)


def _dot(x: Array, bits: Array, dtype: DTypeLike, axis: int) -> Array:
    """Sums over an axis of x and the rows of bits; of these dtypes Mosaic refuses any precision but the default."""
    along = ((axis,), (0,)), ((), ())
    return lax.dot_general(x, bits, along, precision=lax.Precision.DEFAULT, preferred_element_type=dtype)


def _int8(words: Array) -> Array:
    """Bits of words[R, N] as int8[32 R, N], planes of a group after one another."""
    return _stack([words >> j & 0x01010101 for j in range(8)], jnp.int8)


def _signs(words: Array) -> Array:
    """Signs of words[R, N] as int8[32 R, N]: a byte of 1 stays, a byte of 0 becomes 255."""
    ones = [words >> j & 0x01010101 for j in range(8)]
    return _stack([plane | (plane ^ 0x01010101) * 255 for plane in ones], jnp.int8)


def _bfloat16(words: Array) -> Array:
    """Twice the bits of words[R, N] as bfloat16[32 R, N], planes of a group after one another."""
    return _stack([(words << 14 - p if p < 15 else words >> 1) & 0x40004000 for p in range(16)], jnp.bfloat16)


def _stack(planes: list[Array], dtype: DTypeLike) -> Array:
    rows, n = planes[0].shape
    parts = [pltpu.bitcast(plane, dtype).reshape(rows // _GROUP, 1, -1, n) for plane in planes]
    return jnp.concatenate(parts, axis=1).reshape(32 * rows, n)


def _bfloat16_parts(x: Array) -> list[Array]:
    """bfloat16 numbers that add up to x: itself, or the 8 leading bits of a float32 three times."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        head = pltpu.bitcast(pltpu.bitcast(x, jnp.uint32) & jnp.uint32(0xFFFF0000), jnp.float32)
        parts.append(head.astype(jnp.bfloat16))
        x = x - head
    return parts
