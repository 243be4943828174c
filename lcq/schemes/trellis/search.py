"""Paths, scales and values of states, which alternate: the best of each for the others.

    states <- argmin sum_i h_i (x_i - a t_{s_i})^2        by `viterbi`, a leaf and a piece of it at a time
    a      <- sum h x t / sum h t^2                       per block, in its format; the old one where that is better
    t_s    <- sum h a x / sum h a^2 over s_i = s          where the table is learned

No step raises the sum, so a warm start never does.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from lcq.forms.blocks import Per, cut_axes, join_axes
from lcq.forms.paths import as_paths, from_paths, states_of
from lcq.forms.state_values import table_of
from lcq.schemes.grouped import cut
from lcq.schemes.scale_search import keep_better, of_size_one
from lcq.schemes.scales import as_scale, rounded_scale
from lcq.schemes.trellis.viterbi import best_paths, better_paths, tail_biting

_COLD, _WARM, _LEARNED = 1, 1, 12
"""Turns at a cold start, at a warm one, and at a cold one of a learned table."""

_START = {1: 0.88}
"""The best scale for a Gaussian over the root of its mean square, by the bits of a code; 1 for more than one."""

_LONGER = (1.0, 1.2, 1.45, 1.75, 2.1)
"""Times that: where tails are long and codes have many bits, what few large weights miss is more."""

_SAMPLE = 16
"""Pieces of each leaf, at most, by which one of these is chosen."""


class Pieces(NamedTuple):
    """How a leaf is cut into pieces of paths: the axes along which they run, and how long they are."""

    along: tuple[int, ...]
    length: int


class Found(NamedTuple):
    """The states of each leaf, the pieces of paths side by side; the scale of each block; the value of each state."""

    states: tuple[UInt16[Array, "t p"], ...]
    scale: Float[Array, "*stat"]
    table: Float[Array, " s"]


def search(
    xs: Sequence[Array],
    importance: Sequence[Array] | None,
    per: Per,
    pieces: Sequence[Pieces],
    dtype: str | None,
    given: Sequence[dict[str, Array]] | None,
    *,
    width: int,
    memory: int,
    code: str,
) -> list[dict[str, Array | None]]:
    """The arrays of a `Trellis` form for each leaf.

    Args:
        xs: the leaves.
        importance: of their weights, as `check_importance` returns it.
        per: what shares a scale.
        pieces: how they are cut into pieces of paths.
        dtype: the format of scales, see `as_scale`.
        given: arrays of earlier forms, a warm start.
        width: bits of a code.
        memory: bits of a state.
        code: what states stand for.
    """
    whole, unit = of_size_one(cut(xs, per, importance))
    shapes = [x.shape for x in xs]
    hs = [None] * len(xs) if importance is None else importance
    points = [_points(x.astype(unit.dtype), h, piece) for x, h, piece in zip(xs, hs, pieces, strict=True)]

    def gains(scale: Array) -> list[Array]:
        """The scales of all weights, each times the root of its importance, in the units of their piece."""
        each = zip(whole.spread(scale * unit), whole.blocks, shapes, strict=True)
        spread = [join_axes(jnp.broadcast_to(a, block.split), shape) for a, block, shape in each]
        return [root * as_paths(a, *piece) for a, piece, (_, root, _) in zip(spread, pieces, points, strict=True)]

    def levels(states: Sequence[Array], table: Array) -> list[Array]:
        """The values of all states, in the blocks of the leaves."""
        each = zip(states, shapes, pieces, whole.counts, strict=True)
        return [cut_axes(from_paths(table[s], shape, piece.along), count) for s, shape, piece, count in each]

    def fit(found: Found) -> Found:
        """The best scales for these states, and then the best table."""
        states, scale, table = found
        near = levels(states, table)
        errors = whole.sum([(x - a * c) ** 2 for x, a, c in zip(whole.leaves, whole.spread(scale), near, strict=True)])
        scale = keep_better(whole, whole.leaves, near, (), (scale, errors), dtype)[0]
        if code != "learned":
            return Found(states, scale, table)
        top, below = jnp.zeros_like(table), jnp.zeros_like(table)
        most = functools.reduce(jnp.maximum, [size.max() for _, _, size in points])
        for s, g, (v, _, size) in zip(states, gains(scale), points, strict=True):
            h = (size / most) ** 2
            top, below = top.at[s].add(h * g * v), below.at[s].add(h * g * g)
        return Found(states, scale, jnp.where(below > 0, top / jnp.where(below > 0, below, 1), table))

    def turn(_: Array, found: Found) -> Found:
        each = zip(found.states, points, gains(found.scale), strict=True)
        return fit(found._replace(states=tuple(better_paths(s, v, g, found.table, width) for s, (v, _, _), g in each)))

    squares = [x * x for x in whole.leaves]
    mean = whole.sum(squares) / whole.sum([jnp.ones_like(x) for x in squares])
    scale = rounded_scale(jnp.sqrt(mean) * _START.get(width, 1.0), dtype)
    table = jnp.asarray(table_of(memory, code), scale.dtype)
    if given is None:
        sample = [_sample(v, g) for (v, _, _), g in zip(points, gains(scale), strict=True)]
        scale = rounded_scale(scale * _longer(sample, table, width), dtype)
        each = zip(points, gains(scale), strict=True)
        states = tuple(tail_biting(v, g, table, width) for (v, _, _), g in each)
        turns = _LEARNED if code == "learned" else _COLD
    else:
        first, turns = given[0], _WARM
        states = tuple(states_of(as_paths(f["steps"], *p), width, memory) for f, p in zip(given, pieces, strict=True))
        before = first["scale"].reshape(scale.shape).astype(scale.dtype) / unit
        scale = jnp.where(before == 0, scale, before)
        table = table if first["table"] is None else first["table"]
    states, scale, table = jax.lax.fori_loop(0, turns, turn, fit(Found(states, scale, table)))
    scales = whole.numbers(as_scale(scale * unit, dtype))
    kept = table if code == "learned" else None
    codes = (s.astype(jnp.uint8) & ((1 << width) - 1) for s in states)
    return [
        {"steps": from_paths(c, shape, piece.along), "scale": a, "table": kept}
        for c, shape, piece, a in zip(codes, shapes, pieces, scales, strict=True)
    ]


def _points(
    x: Array, h: Array | None, piece: Pieces
) -> tuple[Float[Array, "t p"], Float[Array, "t p"], Float[Array, " p"]]:
    """Of a leaf its weights times the roots of their importance, and these roots, in units of each piece, so that
    squares neither overflow nor vanish; and the units, zero for a piece without weight: it counts as unweighted."""
    points = as_paths(x, *piece)
    root, size = jnp.ones_like(points), jnp.ones_like(points[0])
    if h is not None:
        weights = as_paths(jnp.broadcast_to(h, x.shape), *piece)
        top = weights.max(0)
        root, size = jnp.where(top > 0, jnp.sqrt(weights / _or_one(top)), root), jnp.sqrt(top / _or_one(top.max()))
    unit = _or_one(jnp.abs(root * points).max(0))
    return root * points / unit, root / unit, size * unit


def _sample(v: Float[Array, "t p"], g: Float[Array, "t p"]) -> tuple[Float[Array, "t q"], Float[Array, "t q"]]:
    """A few pieces, evenly spaced, over the root of their sum of squares."""
    every = -(-v.shape[1] // _SAMPLE)
    v, g = v[:, ::every], g[:, ::every]
    size = _or_one(jnp.sqrt((v * v).sum(0)))
    return v / size, g / size


def _longer(sample: Sequence[tuple[Array, Array]], table: Array, width: int) -> Float[Array, ""]:
    """The factor of all scales with which free paths miss least."""

    def missed(factor: Array) -> Array:
        paths = [(v, factor * g, best_paths(v, factor * g, table, None, width)) for v, g in sample]
        return functools.reduce(jnp.add, [((v - g * table[s]) ** 2).sum() for v, g, s in paths])

    factors = jnp.asarray(_LONGER, table.dtype)
    return factors[jnp.argmin(jax.lax.map(missed, factors))]


def _or_one(a: Array) -> Array:
    return jnp.where(a > 0, a, 1)
