"""Whether a leaf has lost its weights: nearly all are on one level, or nearly all blocks of n codes are one block.

Both cost no bits, and an order n of the entropy finds both: a leaf whose codes repeat says as little as a constant one.
"""

import dataclasses
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer

from lcq.forms.blocks import blocks, cut_axes
from lcq.forms.serialization import register_empty
from lcq.training.block_entropy import Layout, rows_of

NEARLY_ALL = 0.99
"""A leaf with more of its weights on one level, or of its blocks alike, has lost them."""

_SOME = 1 << 12
"""About so many blocks say which codes are the most common: with 99 % of all it is those."""


@register_empty
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Reading:
    """How H_n reads a leaf: in blocks of `order` weights, which come as `layout` has them."""

    order: int
    layout: Layout


@jax.jit
def largest_share(
    ranks: Integer[Array, "*leaf"], levels: Float[Array, "*counts k"], reading: Reading
) -> Float[Array, ""]:
    """The share of a leaf's weights on its most common level, or of its blocks that are alike, whichever is larger.

    Args:
        ranks: of the level of each weight, from the lowest.
        levels: of the leaf, or of each of its blocks with a codebook.
        reading: how H_n reads the leaf.

    Example:
        >>> codes, levels = jnp.array([0, 1, 0, 1, 0, 1, 1, 1]), jnp.array([0.0, 1.0])
        >>> [float(largest_share(codes, levels, Reading(order, "jax"))) for order in (1, 2, 3)]
        [0.625, 0.75, 0.625]
    """
    return jnp.maximum(_of_levels(ranks, levels), _of_blocks(ranks, levels.shape[-1], reading))


def _of_levels(ranks: Integer[Array, "*leaf"], levels: Float[Array, "*counts k"]) -> Float[Array, ""]:
    """The share of a leaf's weights that have the most common level of their codebook: the mean over codebooks."""
    counts = levels.shape[:-1] or (1,) * ranks.ndim
    cut, within = cut_axes(ranks, counts), blocks(ranks.shape, counts)
    kind = jnp.int32 if within.size < 1 << 31 else jnp.float32

    def most(k: Int[Array, ""], most: Array) -> Array:
        return jnp.maximum(most, jnp.sum(cut == k, within.axes, keepdims=True, dtype=kind))

    largest = jax.lax.fori_loop(0, levels.shape[-1], most, jnp.zeros(within.stat, kind))
    return jnp.mean(largest.astype(jnp.float32)) / within.size


def _of_blocks(ranks: Integer[Array, "*leaf"], size: int, reading: Reading) -> Float[Array, ""]:
    """The share of blocks with the code most common at each place, as some of them have it; where it is well above half
    no other block has more."""
    rows = rows_of(ranks.astype(jnp.uint8 if size <= 256 else jnp.uint16), reading.order, reading.layout).T
    many = rows.shape[1]
    if reading.order == 1 or not many:
        return jnp.zeros([], jnp.float32)

    some = rows[:, :: max(1, many // _SOME)]

    def count(k: Int[Array, ""], found: tuple[Array, Array]) -> tuple[Array, Array]:
        most, which = found
        here = jnp.sum(some == k.astype(rows.dtype), 1, dtype=jnp.int32)
        return jnp.maximum(here, most), jnp.where(here > most, k.astype(rows.dtype), which)

    nothing = jnp.zeros(reading.order, jnp.int32), jnp.zeros(reading.order, rows.dtype)
    _, block = jax.lax.fori_loop(0, size, count, nothing)
    alike = (rows == block[:, None]).all(0)
    return jnp.sum(alike, dtype=jnp.int32).astype(jnp.float32) / many


def warn_of_lost(shares: Mapping[str, Array | np.ndarray], stacklevel: int) -> None:
    """Warns of leaves that have lost their weights; in a trace nothing can be looked at."""
    if any(isinstance(share, jax.core.Tracer) for share in shares.values()):
        return
    lost = {path: float(np.max(share)) for path, share in shares.items()}
    lost = {path: share for path, share in lost.items() if share > NEARLY_ALL}
    if lost:
        names = ", ".join(f"{path or 'the only leaf'} ({share:.1%})" for path, share in list(lost.items())[:8])
        more = f" and {len(lost) - 8} more leaves" if len(lost) > 8 else ""
        warnings.warn(
            f"nearly all weights are on one level, or in one repeating block of codes: {names}{more}; these leaves do "
            "nothing any more: lower entropy_weight=, or let it fall in time (docs/guides/entropy_weight.md)",
            stacklevel=stacklevel,
        )
