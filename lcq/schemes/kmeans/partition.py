"""The optimal codebook of numbers that were put into bins, by dynamic programming in a trace.

Cells of an optimal codebook are runs of the sorted numbers. With N_b and S_b the sums of h and of h x over the first b
bins, and all cells' boundaries between bins,

    F_i(b) = min_{a < b} F_{i-1}(a) - (S_b - S_a)^2 / (N_b - N_a)

is the least error of the first b bins in i cells, but for sum h x^2. With frozen levels c_j a run of bins may be left
to these, at the price R_b - R_a of R_b = sum over the first b bins of h (min_j (x - c_j)^2 - x^2).

All i are advanced at once, a from left to right: as many steps as there are bins, elementwise in the blocks, so that a
sharded leaf's blocks stay where they are. Sums are float32, which is enough for a start that Lloyd's algorithm polishes
on the numbers themselves; the exact solver is `exact_kmeans`.

Source: Wu 1991, as in `exact_kmeans`; for a histogram, Bruce 1965.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_MANY = 128
"""Bins from which four loops are worth their compilation."""

Blocks = Float[Array, "*stat bins"]


def best_partition(
    mass: Float[Array, "*stat bins"],
    total: Float[Array, "*stat bins"],
    k: int,
    fixed: Float[Array, "*stat j"] | None = None,
) -> Float[Array, "*stat k"]:
    """k levels of least squared error among those whose cells are runs of bins.

    Args:
        mass: how much the numbers of every bin weigh; bins ascend.
        total: the weighted sum of these numbers, about an origin near their mean and in units near their spread.
        k: how many levels are learned, at most as many as there are bins.
        fixed: frozen levels beside these, about the same origin, in the same units.

    Returns:
        The means of the cells, ascending; a cell without weight repeats the level before.
    """
    number, sums = (_running(a) for a in (mass, total))
    bins = mass.shape[-1]
    price = None if fixed is None else _running(_held(mass, total, fixed))
    place = jnp.arange(bins + 1, dtype=jnp.int32)
    cells = jnp.arange(k + 1, dtype=jnp.int32)[:, None]
    least = jnp.where(place + cells > 0, jnp.inf, 0) + 0 * number[..., None, :]  # where the blocks are on a mesh

    def advance(a: Array, state: tuple[Array, Array], first: int) -> tuple[Array, Array]:
        """The cells that start at a, which every i is through with; `least` is from `first` on."""
        least, credit = state
        here = lax.dynamic_index_in_dim(least, a - first, -1)
        if price is not None:
            paid = lax.dynamic_index_in_dim(price, a, -1)[..., None, :]
            credit = jnp.minimum(credit, here - paid)
            here = credit + paid
        before = jnp.concatenate([jnp.full_like(here[..., :1, :], jnp.inf), here[..., :-1, :]], -2)
        error = _error(number[..., first:], sums[..., first:], a - first)
        onward = jnp.where(place[first:] > a, error, jnp.inf)
        return jnp.minimum(least, before + onward[..., None, :]), credit

    done, credit, first = [], jnp.full_like(least[..., :1], jnp.inf), 0
    for last in _quarters(bins):
        step = functools.partial(advance, first=first)
        least, credit = lax.fori_loop(first, last, step, (least, credit))
        done.append(least[..., : last - first])
        least, first = least[..., last - first :], last
    return _means(jnp.concatenate([*done, least], -1), number, sums, price, k)


def _quarters(bins: int) -> list[int]:
    """Where loops over bins end: each leaves out what the ones before are through with, so all do 5/8 of the work."""
    return [bins] if bins < _MANY else [bins * i // 4 for i in (1, 2, 3, 4)]


def _means(least: Array, number: Array, sums: Array, price: Array | None, k: int) -> Float[Array, "*stat k"]:
    """Follows the best choices back from the last bin."""
    bins = number.shape[-1] - 1
    place = jnp.arange(bins + 1, dtype=jnp.int32)

    def at(a: Array, where: Array) -> Array:
        return jnp.take_along_axis(a, where, -1)

    def back(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        stop, levels = state
        i = k - step
        before, now = (lax.dynamic_index_in_dim(least, j, -2, keepdims=False) for j in (i - 1, i))
        if price is not None:  # the frozen levels' run before the cell, and that which ends here
            stop = jnp.argmin(jnp.where(place <= stop, now - price, jnp.inf), -1, keepdims=True).astype(jnp.int32)
            before = price + lax.cummin(before - price, axis=before.ndim - 1)
        gain = (at(sums, stop) - sums) ** 2
        weight = at(number, stop) - number
        error = jnp.where(weight > 0, -gain / jnp.where(weight > 0, weight, 1), 0)
        start = jnp.argmin(jnp.where(place < stop, before + error, jnp.inf), -1, keepdims=True).astype(jnp.int32)
        weight = at(weight, start)
        mean = (at(sums, stop) - at(sums, start)) / jnp.where(weight > 0, weight, 1)
        mean = jnp.where(weight > 0, mean, -jnp.inf)
        return start, jnp.where(jnp.arange(k, dtype=jnp.int32) == i - 1, mean, levels)

    stop = jnp.full_like(number[..., :1], bins, jnp.int32)
    levels = jnp.zeros_like(number, shape=(*number.shape[:-1], k)) + 0 * number[..., :1]
    levels = lax.fori_loop(0, k, back, (stop, levels))[1]
    lowest = jnp.min(jnp.where(jnp.isfinite(levels), levels, jnp.inf), -1, keepdims=True)
    return lax.cummax(jnp.maximum(levels, jnp.where(jnp.isfinite(lowest), lowest, 0)), axis=levels.ndim - 1)


def _error(number: Array, sums: Array, a: Array) -> Array:
    """-(S_b - S_a)^2 / (N_b - N_a) for all b."""
    weight = number - lax.dynamic_index_in_dim(number, a, -1)
    total = sums - lax.dynamic_index_in_dim(sums, a, -1)
    return jnp.where(weight > 0, -(total**2) / jnp.where(weight > 0, weight, 1), 0)


def _held(mass: Array, total: Array, fixed: Array) -> Array:
    """What every bin costs at the nearest frozen level, but for h x^2: min_j h c_j^2 - 2 c_j h x."""
    costs = mass[..., None] * fixed[..., None, :] ** 2 - 2 * fixed[..., None, :] * total[..., None]
    return jnp.min(costs, -1)


def _running(a: Blocks) -> Float[Array, "*stat edges"]:
    """0, a_0, a_0 + a_1, .."""
    return jnp.concatenate([jnp.zeros_like(a[..., :1]), jnp.cumsum(a, -1)], -1)
