"""Paths, the scale and the lengths of codes, which alternate: the best of each for the others.

    J = sum_i h_i (x_i - a z_i)^2 + rate sum_i len(z_i),    len(z) = log2(n_q / n_z)

n_z is how often the integer z is taken in a leaf, n_q how often one of its parity: the bits of a coder that knows the
state.

    z   <- argmin J        by `cheapest_paths`
    a   <- sum h x z / sum h z^2, in its format
    len <- the counts, with a share for integers that are not taken, so that they may be

That share is not what a coder takes: so J may rise by a little, and of all turns the best is kept.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer

from lcq.forms.blocks import compute_dtype
from lcq.schemes.coded_trellis.viterbi import cheapest_paths
from lcq.schemes.scales import as_scale, rounded_scale

_COLD, _LAST, _WARM = 10, 2, 2
"""Turns on a sample at a cold start, on all weights after them, and at a warm start."""

_SAMPLE = 64
"""Paths of each leaf, at most, in that sample."""

_STEP = 1.4
"""The best scale over the root of the rate: 1.37 to 1.41 on a Gaussian at .8 to 3 bits."""

_SPREAD = 0.75
"""Lengths before anything is counted are those of a Laplace density, this times the root of the mean square wide."""

_SHARE = 1 / 64
"""What counts for an integer that is not taken: about what a table of frequencies takes for one more."""

_MOST = 1e30
"""What a bit may be worth in units of the largest square: all of them, without an overflow."""


class Points(NamedTuple):
    """A leaf's paths side by side, as they lie in it: its weights times the roots of their importance, and these."""

    v: Float[Array, "t p"]
    root: Float[Array, "t p"]


class Found(NamedTuple):
    """The integers of each leaf, the scale, how often each integer is taken, and J."""

    codes: tuple[Int[Array, "t p"], ...]
    scale: Float[Array, ""]
    counts: tuple[Float[Array, " k"], ...]
    cost: Float[Array, ""]


def search(
    xs: Sequence[Array],
    importance: Sequence[Array] | None,
    rate: float,
    paths: Sequence[int],
    dtype: str | None,
    given: Sequence[dict[str, Array]] | None,
    *,
    width: int,
    memory: int,
) -> list[dict[str, Array]]:
    """The arrays of a `CodedTrellis` form for each leaf.

    Args:
        xs: the leaves.
        importance: of their weights, as `check_importance` returns it.
        rate: squared distance that a bit is worth.
        paths: weights of a path, of each leaf.
        dtype: the format of the scale, see `as_scale`.
        given: arrays of earlier forms, a warm start.
        width: bits of an integer.
        memory: bits of a state.
    """
    size, half = 1 << width, 1 << (width - 1)
    points, unit, high, price = _points(xs, importance, rate, paths)

    def judged(points: Sequence[Points], codes: tuple[Array, ...], before: Array) -> Found:
        """The best scale for integers, or the one before if that is better, their counts and J."""
        near = [(point.v, point.root * (c - half)) for point, c in zip(points, codes, strict=True)]
        top, below = (
            functools.reduce(jnp.add, a) for a in zip(*[((v * z).sum(), (z * z).sum()) for v, z in near], strict=True)
        )
        best = rounded_scale(jnp.where(below > 0, top / jnp.where(below > 0, below, 1), before), dtype)
        scales = jnp.stack([before, jnp.where(best > 0, best, before)])
        errors = jnp.stack([functools.reduce(jnp.add, [((v - a * z) ** 2).sum() for v, z in near]) for a in scales])
        counts = tuple(counted(c, size).astype(unit.dtype) for c in codes)
        cost = errors.min() + price * functools.reduce(jnp.add, map(entropy_bits, counts))
        return Found(codes, scales[jnp.argmin(errors)], counts, cost)

    def turn(points: Sequence[Points], found: Found) -> Found:
        """Better paths, then all else for them."""
        each = zip(points, found.counts, strict=True)
        paths = (cheapest_paths(p.v, found.scale * p.root, price * _lengths(n), memory) for p, n in each)
        return judged(points, tuple(paths), found.scale)

    def better(_: Array, state: tuple[Found, Found]) -> tuple[Found, Found]:
        """The last turn, and the best of all."""
        last = turn(points, state[0])
        return last, jax.tree.map(lambda a, b: jnp.where(last.cost < state[1].cost, a, b), last, state[1])

    def begun(points: Sequence[Points], scale: Array, counts: tuple[Array, ...]) -> Found:
        """Before the first turn: zeros, which anything is better than."""
        return Found(
            tuple(jnp.full(p.v.shape, half, jnp.int32) for p in points), scale, counts, jnp.full_like(unit, jnp.inf)
        )

    if given is not None:
        codes = tuple(f["codes"].reshape(n, -1).astype(jnp.int32) for f, n in zip(given, paths, strict=True))
        start, turns = judged(points, codes, given[0]["scale"].reshape(()).astype(unit.dtype) / unit), _WARM
    else:
        scale = rounded_scale(jnp.clip(_STEP * jnp.sqrt(price), high / unit / (half - 2), 1), dtype)
        start, turns = begun(points, scale, tuple(_expected(point, scale, half) for point in points)), _COLD + _LAST
        if any(point.v.shape[1] > _SAMPLE for point in points):
            sample = [Points(*(a[:, :: -(-a.shape[1] // _SAMPLE)] for a in point)) for point in points]
            few = jax.lax.fori_loop(0, _COLD, lambda _, last: turn(sample, last), begun(sample, *start[1:3]))
            start, turns = begun(points, few.scale, few.counts), _LAST
    best = jax.lax.fori_loop(0, turns, better, (start, start))[1]
    scale, kind = as_scale(best.scale * unit, dtype), jnp.uint8 if width <= 8 else jnp.uint16
    return [
        {"codes": c.astype(kind).reshape(x.shape), "scale": scale.reshape((1,) * x.ndim)}
        for x, c in zip(xs, best.codes, strict=True)
    ]


def counted(codes: Integer[Array, "..."], size: int) -> Int[Array, " k"]:
    """How often each integer below `size` is taken; ones added up in float32 would stop at 2^24."""
    return jnp.zeros(size, jnp.int32).at[codes].add(1)


def entropy_bits(counts: Float[Array, " k"]) -> Float[Array, ""]:
    """Bits of all counted integers, each coded among those of its parity."""
    kinds = counts.reshape(-1, 2)
    return jnp.sum(kinds * jnp.log2(jnp.where(kinds > 0, kinds.sum(0) / jnp.where(kinds > 0, kinds, 1), 1)))


def _lengths(counts: Float[Array, " k"]) -> Float[Array, " k"]:
    """Bits of each integer, also of those that are not taken."""
    kinds = counts.reshape(-1, 2) + _SHARE
    return jnp.log2(kinds.sum(0) / kinds).reshape(-1)


def _points(
    xs: Sequence[Array], importance: Sequence[Array] | None, rate: float, paths: Sequence[int]
) -> tuple[list[Points], Array, Array, Array]:
    """The paths of all leaves, over a power of two near their largest weight, so that squares neither overflow nor
    vanish, and over the root of the largest importance; this unit, that weight; what a bit is worth in such squares."""
    kind = functools.reduce(jnp.promote_types, [compute_dtype(x.dtype) for x in xs])
    hs = [jnp.ones((), kind)] * len(xs) if importance is None else importance
    flat = [x.astype(kind).reshape(n, -1) for x, n in zip(xs, paths, strict=True)]
    spread = [jnp.broadcast_to(h.astype(kind), x.shape).reshape(n, -1) for h, x, n in zip(hs, xs, paths, strict=True)]
    top = functools.reduce(jnp.maximum, [h.max() for h in spread])
    high = functools.reduce(
        jnp.maximum, [jnp.where(h > 0, jnp.abs(x), 0).max() for x, h in zip(flat, spread, strict=True)]
    )
    unit = jnp.ldexp(jnp.ones_like(high), jnp.frexp(high)[1] - 1)
    roots = [jnp.sqrt(h / top) for h in spread]
    points = [Points(jnp.where(r > 0, r * (x / unit), 0), r) for x, r in zip(flat, roots, strict=True)]
    return points, unit, high, jnp.minimum(rate / unit / unit / top, _MOST)


def _expected(point: Points, scale: Array, half: int) -> Float[Array, " k"]:
    """Counts of a Laplace density as wide as the numbers."""
    number = jnp.maximum((point.root**2).sum(), 1e-9)
    width = _SPREAD * jnp.sqrt((point.v**2).sum() / number) + 1e-9
    density = jnp.exp(-scale * jnp.abs(jnp.arange(2 * half) - half) / width)
    return density * (float(point.v.size) / density.sum())
