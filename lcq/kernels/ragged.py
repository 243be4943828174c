"""Products of rows that are sorted by expert with a form of all experts' weights, the rows of each with its own.

Each expert multiplies its rows a few at a time, by the door of the kernels: one expert's codes are read, and no dense
array of all is made. Of E experts and M rows there are at most min(E, M) + M / b windows of b rows; those that no
expert needs are skipped.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Integer, Num

from lcq.forms.base import Form
from lcq.forms.meshes import varied
from lcq.tracing import jaxpr

ROWS = 64
"""Rows of one window: as many as make the decoding of a tile cost little beside its product."""


def ragged_product(
    x: Num[Array, "m k"],
    experts: Form,
    sizes: Integer[Array, " e"],
    multiply: Callable[[Array, Form], Array],
) -> Num[Array, "m n"]:
    """y[i] = x[i] Delta(experts)[e] for the rows i of expert e; rows behind those of the last expert are zero.

    Args:
        x: rows, those of the first expert first.
        experts: forms of matrices [k, n], their arrays stacked along a first axis of E.
        sizes: rows of each expert.
        multiply: (rows [b, k], a form (k, n)) -> [b, n].
    """
    sizes = jnp.asarray(sizes, jnp.int32)  # of 8 bits, or without a sign, their sums and differences would wrap
    (count,), rows = sizes.shape, x.shape[0]
    length = ROWS if not jaxpr.at_most(rows, ROWS - 1) else rows
    ends = jnp.cumsum(sizes)
    windows = -(-sizes // length)  # of each expert
    before = jnp.cumsum(windows) - windows
    most = (count if not jaxpr.at_most(rows, count) else rows) + rows // length
    x, experts, ends = varied((jnp.pad(x, ((0, length), (0, 0))), experts, ends), x, experts, sizes)
    one = jax.eval_shape(lambda x, form: multiply(x[:length], jax.tree.map(lambda a: a[0], form)), x, experts)

    def window(y: Array, number: Int[Array, ""]) -> tuple[Array, None]:
        expert = jnp.searchsorted(before + windows, number, side="right")
        expert = jnp.minimum(expert, count - 1)
        start = ends[expert] - sizes[expert] + (number - before[expert]) * length

        def add(y: Array) -> Array:
            form = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, expert, 0, keepdims=False), experts)
            product = multiply(jax.lax.dynamic_slice_in_dim(x, start, length), form)
            its = (start + jnp.arange(length) < ends[expert])[:, None]
            old = jax.lax.dynamic_slice_in_dim(y, start, length)
            return jax.lax.dynamic_update_slice_in_dim(y, jnp.where(its, product, old), start, 0)

        return jax.lax.cond(number < before[-1] + windows[-1], add, lambda y: y, y), None

    y = varied(jnp.zeros((rows + length, one.shape[-1]), one.dtype), x)
    return jax.lax.scan(window, y, jnp.arange(most))[0][:rows]
