"""The level of every code: by selects, which stay where the codes lie, or by a gather where that is faster.

    level_of(table, codes)_i = table[block of i, codes_i]

A gather of single elements is fast on a CPU alone. Elsewhere, and where several devices share an array, it takes an
index for each element and brings the whole table to every device; a chain of selects is fused into what comes after it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Shaped, UInt

from lcq.forms.blocks import explicit_sharding
from lcq.forms.meshes import is_shared

_SELECT = 8
"""Up to this many levels selects are as fast as a gather on a CPU too, since they vectorise."""

_UNROLLED = 32
"""Levels, at most, in one chain of selects; more are taken in a loop of such chains."""

_MOST = 1024
"""Levels above which a gather is faster everywhere."""


def level_of(
    table: Shaped[Array, "*stat k"],
    codes: UInt[Array, "*split"],
    gather: Callable[[Array, Array], Array] | None = None,
) -> Shaped[Array, "*split"]:
    """The level of every code; `stat` broadcasts against the shape of the codes, axis by axis.

    Args:
        table: levels of every block.
        codes: below k.
        gather: another way to gather than along the last axis.
    """
    size, gather = table.shape[-1], gather or along_last_axis
    placed = explicit_sharding(codes) is not None
    if size <= _SELECT or placed or (is_shared() and size <= _MOST):
        return selected(table, codes)
    if size > _MOST:
        return gather(table, codes)
    return lax.platform_dependent(table, codes, cpu=gather, default=selected)


def along_last_axis(table: Shaped[Array, "*stat k"], codes: UInt[Array, "*split"]) -> Shaped[Array, "*split"]:
    """By a gather."""
    if all(n == 1 for n in table.shape[:-1]):
        return table.reshape(-1)[codes]
    return jnp.take_along_axis(table, codes[..., None].astype(jnp.int32), axis=-1)[..., 0]


def selected(table: Shaped[Array, "*stat k"], codes: UInt[Array, "*split"]) -> Shaped[Array, "*split"]:
    """By selects. A long loop keeps nothing of its turns for a gradient."""
    size = table.shape[-1]
    value = jnp.where(codes == 0, table[..., 0], jnp.zeros((), table.dtype))
    if size <= _UNROLLED:
        for k in range(1, size):
            value = jnp.where(codes == k, table[..., k], value)
        return value
    steps = -(-size // _UNROLLED)
    levels = jnp.moveaxis(table, -1, 0)
    levels = jnp.pad(levels, ((0, steps * _UNROLLED - size), *((0, 0),) * (levels.ndim - 1)))
    levels = levels.reshape(steps, _UNROLLED, *levels.shape[1:])

    @jax.checkpoint
    def step(value: Array, turn: tuple[Array, Array]) -> tuple[Array, None]:
        first, some = turn
        for k in range(_UNROLLED):
            value = jnp.where(codes == first + k, some[k], value)
        return value, None

    firsts = jnp.arange(0, steps * _UNROLLED, _UNROLLED, dtype=jnp.uint16).astype(codes.dtype)
    return lax.scan(step, value, (firsts, levels))[0]
