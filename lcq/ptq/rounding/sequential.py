"""Rounding inputs one after another, each with regard to the errors before it: in blocks, or by the literal definition.

    on statistics    z_t = b_t + (1/F_tt) sum_{s<t} F_ts (v_s - q_s),    q_t = Q(z_t)
    on inputs        z_t = <Y_t, u_{t-1} + w_t X_t> / ||Y_t||^2,    u_t = u_{t-1} + w_t X_t - q_t Y_t

Both give GPFQ's codes (F = H); see `lcq.ptq.rounding.base` for the other methods. A column with ||Y_t||^2 <= 1e-10 of
the largest is dead: its weights go to the nearest level.

Source: Lybrand & Saab, arXiv 2010.15979; the blocked recursion is lcq's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lcq.forms import Codes
from lcq.forms.blocks import compute_dtype
from lcq.forms.dtypes import wider
from lcq.ptq.rounding.codebook import block_count, choose, choose_all, row_block, value

Pick = Callable[[Array, Codes, Any], Array]
"""(z [1, n], the form of its row, noise [1, n] or None) -> codes [1, n]."""

_BLOCK, _ROWS = 128, 8
_CHUNK = 4
"""Blocks of errors, at most, that one product takes."""
DEAD = 1e-10
"""The part of the largest up to which an input's ||Y_t||^2 counts as none."""
_WAITING = 4
"""How much longer an operation of `follow` takes than one of a matrix product, about: measured 5 on two cores."""

dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)


class Recursion(NamedTuple):
    """What a method makes of weights and statistics; inputs in the order in which they are rounded.

    Attributes:
        order: the input that comes t-th, [N]; None for t itself.
        start: b, [N, n].
        target: v, [N, n].
        feedback: F, [N, N]; only what is below its diagonal counts.
        inverse: 1/F_tt, and 0 for dead columns, [N].
        damping: delta of H + delta I behind F, in units of the mean of diag(H); infinite if there was no F, and z is w.
    """

    order: Array | None
    start: Array
    target: Array
    feedback: Array
    inverse: Array
    damping: Array | float = 0.0


def recurse(recursion: Recursion, form: Codes, pick: Pick, noise: Float[Array, "N n"] | None = None) -> Codes:
    """The form with the codes of the recursion.

    Blocks of 128 inputs start with a product of their rows of F with all errors so far, sub-blocks of 8 with one of
    theirs with the errors of the block; what the last 8 add is summed row by row. All loops are `fori_loop`s, so the
    time to compile does not depend on N. Codes are read off q = v - e at the end, so they are those of the errors.

    Args:
        recursion: of one method.
        form: the codebook.
        pick: how z becomes codes.
        noise: numbers for `pick`, by the order of rounding.
    """
    order, start, target, feedback, inverse, _ = recursion
    size = len(target)
    block = min(_BLOCK, -(-size // _ROWS) * _ROWS)
    more = -size % block
    chunk = block * math.gcd((size + more) // block, _CHUNK)
    group = jnp.arange(size) // (size // block_count(form))
    group, inverse = (jnp.pad(a, (0, more)) for a in (group if order is None else group[order], inverse))
    start, target = (jnp.pad(a, ((0, more), (0, 0))) for a in (start, target))
    noise = None if noise is None else jnp.pad(noise, ((0, more), (0, 0)))
    feedback = jnp.pad(feedback, ((0, more), (0, more)))

    def rows(a: Array, first: Array | int, many: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, first, many)

    def columns(a: Array, first: Array | int, many: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(a, first, many, 1)

    def put(a: Array, part: Array, first: Array | int) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(a, part, first, 0)

    def one_row(t: Array | int, first: Array | int, sums: Array, corner: Array, errors: Array) -> Array:
        here = first + t
        sum_here = rows(sums, t, 1) + (rows(corner, t, 1).T * errors).sum(0, keepdims=True)
        z = rows(start, here, 1) + inverse[here] * sum_here
        row = row_block(form, group[here])
        q = value(pick(z, row, None if noise is None else rows(noise, here, 1)), row, target.dtype)
        return put(errors, rows(target, here, 1) - q, t)

    def one_part(i: Array | int, first: Array | int, sums: Array, square: Array, errors: Array) -> Array:
        across = rows(square, i, _ROWS)
        sums = rows(sums, i, _ROWS) + dot(across, errors)
        body = functools.partial(one_row, first=first + i, sums=sums, corner=columns(across, i, _ROWS))
        new = jax.lax.fori_loop(0, _ROWS, lambda t, e: body(t, errors=e), jnp.zeros_like(sums))
        return put(errors, new, i)

    def one_block(first: Array | int, errors: Array) -> Array:
        across, sums = rows(feedback, first, block), jnp.zeros_like(target[:block])
        sums = jax.lax.fori_loop(
            0,
            -(-first // chunk),
            lambda j, s: s + dot(columns(across, j * chunk, chunk), rows(errors, j * chunk, chunk)),
            sums,
        )
        body = functools.partial(one_part, first=first, sums=sums, square=columns(across, first, block))
        new = jax.lax.fori_loop(0, block // _ROWS, lambda i, e: body(i * _ROWS, errors=e), jnp.zeros_like(sums))
        return put(errors, new, first)

    blocks = (size + more) // block
    errors = jax.lax.fori_loop(0, blocks, lambda i, e: one_block(i * block, e), jnp.zeros_like(target))
    q = (target - errors)[:size]
    if order is not None:
        q = jnp.zeros_like(q).at[order].set(q, unique_indices=True)
    return dataclasses.replace(form, codes=choose_all(q, form))


def by_norm(diagonal: Float[Array, "N"]) -> Int[Array, "N"]:
    """Inputs by decreasing ||Y_t||^2, equal ones as they are."""
    return jnp.argsort(-diagonal, stable=True)


def alive(diagonal: Float[Array, "N"]) -> Bool[Array, "N"]:
    """Which columns are not dead."""
    return diagonal > DEAD * diagonal.max()


@functools.partial(jax.jit, static_argnames="act_order")
def follow(
    w: Float[Array, "N n"],
    x: Float[Array, "m N"],
    y: Float[Array, "m N"],
    form: Codes,
    act_order: bool = False,
    shares: Float[Array, "2"] | None = None,
    use: Bool[Array, "m"] | None = None,
) -> tuple[Codes, Float[Array, "n"]]:
    """GPFQ by its definition, on inputs instead of statistics: the reference, and cheaper where n is small, `cheaper`.

    With shares p and p' it is GPFQ on shrunk statistics, see `lcq.ptq.shrinkage`: what inputs before have left,
    u = u_{t-1}, counts as (1 - p) (u - ubar) + (1 - p') ubar, ubar its mean over the rows.

    Args:
        w: weights, a column for each neuron.
        x: inputs in the original net.
        y: inputs in the already quantized net; x itself if they are the same.
        form: of w, in the working layout: its levels and scales are the codebook.
        act_order: whether inputs are rounded by decreasing ||Y_t||^2 instead of as they come.
        shares: p and p'; None for 0 and 0.
        use: which rows count, for their mean; the others are zeros. None for all.

    Returns:
        The form with new codes; ||X w - Y q||^2 per neuron, on shrunk statistics where there are shares.
    """
    wide = wider(x.dtype, y.dtype, compute_dtype(w.dtype))
    w, x, y = w.astype(wide), x.T.astype(wide), y.T.astype(wide)
    group = jnp.arange(len(w)) // (len(w) // block_count(form))
    norms = (y * y).sum(1)
    lives = alive(norms)
    means = _Means(w, x, y, shares, use)
    steps: tuple[Array, ...] = (w, x, y, jnp.where(lives, norms, 1), lives, group, means.own, means.y)
    by_size = by_norm(norms)
    if act_order:
        steps = tuple(a[by_size] for a in steps)

    def step(carry: tuple[Array, ...], now: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        u, q, y_before = carry  # u_{t-1} + y q: q is applied here, or its choice would be fused into the loop over m
        w_t, x_t, y_t, norm, live, block, own, mean = now
        u = u - y_before[:, None] * q + x_t[:, None] * w_t
        z = jnp.where(live, means.less(dot(y_t, u), u, mean, own * w_t) / norm, w_t)[None]
        row = row_block(form, block)
        codes = choose(z, row)
        return (u, value(codes, row, wide)[0], y_t), codes[0]

    nothing: tuple[Array, ...] = (jnp.zeros((x.shape[1], w.shape[1]), wide), jnp.zeros_like(w[0]), jnp.zeros_like(y[0]))
    (u, q, y_last), codes = jax.lax.scan(step, nothing, steps)
    u = u - y_last[:, None] * q
    if act_order:
        codes = jnp.zeros_like(codes).at[by_size].set(codes, unique_indices=True)
    form = dataclasses.replace(form, codes=codes)
    return form, means.error(u, w, w - form.dense().astype(wide))


class _Means:
    """What shrinking takes from products with u, and gives back of what each input has by itself; nothing by default.

    Attributes:
        own: what <Y_t, X_t> counts for beside the rest, [N].
        y: means of Y, [N].
    """

    def __init__(self, w: Array, x: Array, y: Array, shares: Array | None, use: Array | None) -> None:
        self.shares, self.many = shares, jnp.asarray(x.shape[1] if use is None else jnp.maximum(use.sum(), 1), w.dtype)
        self.x, self.y, away = x.sum(1) / self.many, y.sum(1) / self.many, x - y
        self.own = jnp.zeros_like(self.y)
        if shares is not None:
            pairs = (away, away), (away, y), (y, y)
            self.flat = [self.many * a.sum(1) / self.many * b.sum(1) / self.many for a, b in pairs]
            self.varied = [(a * b).sum(1) - flat for (a, b), flat in zip(pairs, self.flat, strict=True)]
            self.own = self._of([self.varied[1] + self.varied[2], self.flat[1] + self.flat[2]])

    def less(self, product: Array, u: Array, mean: Array, own: Array) -> Array:
        """<Y_t, u> of u_{t-1} + X_t w_t, shrunk: of the former less, of the latter all of it."""
        if self.shares is None:
            return product
        return (1 - self.shares[0]) * product + (self.shares[0] - self.shares[1]) * mean * u.sum(0) + own

    def error(self, u: Array, w: Array, e: Array) -> Array:
        """||u||^2 shrunk, with all of the squares of each input's part, (X_t - Y_t) w_t + Y_t e_t."""
        if self.shares is None:
            return (u * u).sum(0)
        flat = u.sum(0) ** 2 / self.many
        rest = (1 - self.shares[0]) * ((u * u).sum(0) - flat) + (1 - self.shares[1]) * flat
        squares = ((w * w, 2 * w * e, e * e), (self.varied, self.flat))
        parts = [sum((a * b[:, None]).sum(0) for a, b in zip(squares[0], sums, strict=True)) for sums in squares[1]]
        return rest + self._of(parts)

    def _of(self, parts: Sequence[Array | int]) -> Array:
        assert self.shares is not None
        return self.shares[0] * parts[0] + self.shares[1] * parts[1]


def cheaper(
    samples: int, inputs: int, neurons: int, runs: int = 1, limit: int = 1 << 30
) -> Literal["blocked", "follow"]:
    """Which way to GPFQ's codes takes less time, by its operations.

        blocked    4 m N^2 + runs 4 N^2 n    statistics once; the recursion and a residual for each codebook
        follow     4 runs 6 m n N            codes and residual; it waits for memory, 4 times as long on CPUs

    Args:
        samples: m, rows of the inputs.
        inputs: N.
        neurons: n.
        runs: codebooks (scales) that are tried.
        limit: bytes that H and D may take in float32; above, the answer is "follow".

    Example:
        >>> cheaper(4096, 1024, 1024), cheaper(4096, 9, 1), cheaper(4096, 32_768, 1024)
        ('blocked', 'follow', 'follow')
    """
    if 8 * inputs**2 > limit:
        return "follow"
    blocked = 4 * samples * inputs**2 + runs * 4 * inputs**2 * neurons
    return "blocked" if blocked <= _WAITING * runs * 6 * samples * neurons * inputs else "follow"
