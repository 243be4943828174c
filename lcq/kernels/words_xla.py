"""Products of few rows with codes, in XLA for any backend; made for CPUs: a loop over the words of all columns.

Each word holds codes of one block of rows, with numbers of its own, and adds to y what all of its codes give:

    equal steps:  y += step (2^width sum_j x_j (v_j - 1) + lowest sum_j x_j),   v_j = 1 + code_j / 2^width
    levels:       y += sum_j x_j level[code_j]

A code is shifted into the mantissa of 1.0, so that two instructions make v of it; a level is chosen by a tree of
selects on the bits of its code, K - 1 of them for K levels. Neither needs a gather, which XLA does one by one.

What XLA fuses is delicate. All numbers of columns are rows [1, n] here, each row of x has a sum of its own: with [n] or
[m, n] in one place the word is written to memory first, the bits of codes are tested by three instructions in place of
one, and it takes up to 1.6 times as long. `tests/kernels/test_vectors.py` notices.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from lcq.forms.columns import Columns, by_bits
from lcq.forms.meshes import varied

FEW = 2
"""Rows up to which codes are summed word by word."""

_WORDS = 4
"""Words, at most, that one step of the loop sums up, of levels with equal steps. With several cores XLA shares out each
step, and they meet after it: with 1 word two cores are slower than one. With 8 one core is slower."""

_CHAINS = 4
"""Sums of a word that do not wait for each other."""

_Add = Callable[[int, Any, Any, Array], Any]
"""(row of x, which word, which block, codes) -> what the codes of a word add to y of that row."""


def word_by_word(x: Float[Array, "m k"], form: Columns) -> Float[Array, "m n"]:
    """y = x Delta(form) in float32, of equal steps or few levels.

    Relative to sum_k |x[m, k]| times the largest of |first| and 2^width |step| the error is a few units of rounding.
    """
    blocks, count, n = form.words.shape
    each, m = 32 // form.width, x.shape[0]
    x = x.astype(jnp.float32).reshape(m, blocks, form.block)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, each * count - form.block))).reshape(m, blocks * count, each)
    words, add = form.words.reshape(-1, n), _equal_steps(x, form) if form.levels is None else _levels(x, form)
    some = 1 if form.levels is not None else next(c for c in range(_WORDS, 0, -1) if count % c == 0)

    def step(i: Array, sums: list[Array]) -> list[Array]:
        block = some * i // count if blocks > 1 else 0
        for k in (some * i + j for j in range(some)):
            word = _row(words, k)
            sums = [y + add(row, k, block, word) for row, y in enumerate(sums)]
        return sums

    nothing = varied([jnp.zeros((1, n), jnp.float32)] * m, x)
    return jnp.concatenate(jax.lax.fori_loop(0, blocks * count // some, step, nothing))


def _equal_steps(x: Float[Array, "m w each"], form: Columns) -> _Add:
    total, numbers = x.sum(2), {name: getattr(form, name) for name in ("first", "step", "zero")}

    def add(row: int, k: Array, block: Array | int, word: UInt32[Array, "1 n"]) -> Float[Array, "1 n"]:
        its: dict[str, Any] = {name: None if a is None else _row(a, block) for name, a in numbers.items()}
        first, step = dataclasses.replace(form, **its).lines()
        terms = [_in_mantissa(word, j, form.width) * x[row, k, j] for j in range(x.shape[2])]
        summed = sum(sum(terms[chain::_CHAINS]) for chain in range(min(_CHAINS, len(terms))))
        return step * 2.0**form.width * (summed - total[row, k]) + first * total[row, k]

    return add


def _levels(x: Float[Array, "m w each"], form: Columns) -> _Add:
    blocks, count, _ = form.levels.shape
    levels = jnp.broadcast_to(form.levels.astype(jnp.float32), (blocks, count, form.columns)).reshape(-1, form.columns)

    def add(row: int, k: Array, block: Array | int, word: UInt32[Array, "1 n"]) -> Float[Array, "1 n"]:
        table = [_row(levels, block * count + level) for level in range(count)]
        chosen = [by_bits(word >> jnp.uint32(form.width * j), table) for j in range(x.shape[2])]
        return functools.reduce(operator.add, [value * x[row, k, j] for j, value in enumerate(chosen)])

    return add


def _row(a: Array, i: Array | int) -> Array:
    """a[i] as a row [1, n]."""
    return jax.lax.dynamic_slice_in_dim(a, i, 1)


def _in_mantissa(word: UInt32[Array, "1 n"], j: int, width: int) -> Float[Array, "1 n"]:
    """1 + code/2^width of the codes at place j."""
    up = 23 - width * (j + 1)
    moved = word << jnp.uint32(up) if up >= 0 else word >> jnp.uint32(-up)
    bits = moved & jnp.uint32(((1 << width) - 1) << (23 - width)) | jnp.uint32(0x3F800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
