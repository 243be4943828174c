"""Products with weights on a trellis, in XLA for any backend; made for CPUs.

Few rows: a loop over the words of all columns. Every state of a word is a part of it and the one before, by two shifts;
of a computed code two shifts, three additions and a product make its value, of a table a gather does. What is added up
is the sum of bytes as it is; its mean and size are seen to once a word:

    y += scale (sum_j x_j bytes_j - 510 sum_j x_j) / 147.8

Many rows: a loop over the places of a word. Of all weights at one place, every 32/k-th, the dense matrix is made and
multiplied by these numbers of x.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from lcq.forms.base import Form
from lcq.forms.meshes import varied
from lcq.forms.state_values import byte_sum, from_byte_sum, state_values
from lcq.forms.trellis_columns import TrellisColumns, codes_of_word, state_at
from lcq.kernels.base import KERNELS, Kernel
from lcq.kernels.words_xla import FEW
from lcq.tracing import jaxpr

_WORDS = 4
"""Words, at most, that one step of the loop sums up."""


@KERNELS.register("trellis")
class TrellisProduct(Kernel):
    """Codes of a trellis: few rows by words, where no word holds codes of two scales; else by places."""

    def suits(self, form: Form) -> bool:
        return isinstance(form, TrellisColumns)

    def check(self, form: Form) -> None:
        if not isinstance(form, TrellisColumns):
            raise ValueError(
                f"the kernel 'trellis' multiplies weights on a trellis, prepacked, got {type(form).__name__}; leave "
                "kernel= out"
            )

    def product(self, x: Array, form: Any) -> Array:
        if jaxpr.at_most(x.shape[0], FEW) and _whole_words(form):
            return word_by_word(x, form)
        return by_places(x, form)


def word_by_word(x: Float[Array, "m k"], form: TrellisColumns) -> Float[Array, "m n"]:
    """y = x Delta(form) in float32, a word of each column at a time."""
    pieces, rows, n = form.words.shape
    count, each, m = rows - 1, codes_of_word(form.width), x.shape[0]
    x = _in_words(x.astype(jnp.float32), form)
    words, total, group = form.words.reshape(-1, n), x.sum(2), form.rows // form.scale.shape[0]
    scale = form.scale.astype(jnp.float32)
    some = next(c for c in range(_WORDS, 0, -1) if count % c == 0)

    def values(before: Array, here: Array, place: int) -> Array:
        state = state_at(before, here, place, form.width, form.memory)
        computed = form.code == "computed"
        return byte_sum(state) if computed else state_values(state, form.memory, form.code, form.table)

    def step(i: Array, sums: list[Array]) -> list[Array]:
        for k in (some * i + j for j in range(some)):
            piece = k // count
            before, here = (jax.lax.dynamic_slice_in_dim(words, k + piece + j, 1) for j in (0, 1))
            size = jax.lax.dynamic_slice_in_dim(scale, (piece * form.length + k % count * each) // group, 1)
            each_value = [values(before, here, place) for place in range(each)]
            for row in range(m):
                y = sum((v * x[row, k, j] for j, v in enumerate(each_value)), jnp.zeros_like(sums[row]))
                y = from_byte_sum(y, total[row, k]) if form.code == "computed" else y
                sums = [*sums[:row], sums[row] + size * y, *sums[row + 1 :]]
        return sums

    nothing = varied([jnp.zeros((1, n), jnp.float32)] * m, x)
    return jnp.concatenate(jax.lax.fori_loop(0, pieces * count // some, step, nothing))


def by_places(x: Float[Array, "m k"], form: TrellisColumns) -> Float[Array, "m n"]:
    """y = x Delta(form) in float32, all weights at one place of a word after those at another; for a gradient they are
    made again, not kept."""
    n, each, groups = form.columns, codes_of_word(form.width), form.scale.shape[0]
    scale = form.scale.astype(jnp.float32)
    rows = jnp.arange(form.rows, dtype=jnp.int32)[None]
    its, numbers = (jnp.moveaxis(_in_words(a, form), 2, 0) for a in (x.astype(jnp.float32), rows))

    @jax.checkpoint
    def add(y: Array, part: tuple[Array, Array, Array]) -> tuple[Array, None]:
        place, x, row = part
        state = state_at(form.words[:, :-1], form.words[:, 1:], place, form.width, form.memory)
        values = state_values(state, form.memory, form.code, form.table).reshape(-1, n)
        if groups > 1:
            values *= scale[row[0] // (form.rows // groups)]
        return y + x @ values, None

    nothing = varied(jnp.zeros((x.shape[0], n), jnp.float32), x)
    y = jax.lax.scan(add, nothing, (jnp.arange(each), its, numbers))[0]
    return y if groups > 1 else y * scale


def _in_words(a: Shaped[Array, "m k"], form: TrellisColumns) -> Shaped[Array, "m words each"]:
    """Numbers along the rows of a matrix as its codes lie in words; zeros where these are filled."""
    m, (pieces, rows, _), each = a.shape[0], form.words.shape, codes_of_word(form.width)
    a = a.reshape(m, pieces, form.length)
    filled = jnp.pad(a, ((0, 0), (0, 0), (0, each * (rows - 1) - form.length)))
    return filled.reshape(m, pieces * (rows - 1), each)


def _whole_words(form: TrellisColumns) -> bool:
    """Whether the codes of each word have one scale."""
    group, length = form.rows // form.scale.shape[0], form.length
    return group % length == 0 or (length % group == 0 and group % codes_of_word(form.width) == 0)
