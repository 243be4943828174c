"""The codebook of a rounding method: the levels of a `Codes` form, and the choice of a level for a number.

A form of weights [N, n] has B blocks of inputs along N, and one or n along the neurons: levels [B, 1|n, K], scale and
zero [B, 1|n]. A method works on rows of one block, whose form `row_block` takes out.

    Q(z) = nearest level, ties as the form's own scheme has them
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt

from lcq.forms import Codes, Trellis
from lcq.forms.blocks import compute_dtype
from lcq.ptq.rounding.coded import Coded, has_scale, tables
from lcq.schemes.kmeans.lloyd import assign
from lcq.schemes.nearest import code_dtype, is_grid, nearest, thresholds
from lcq.schemes.scales import as_scale

_COMPARE = 32
"""Integer grids with more levels are rounded instead of compared with thresholds, as in `Levels`."""


def block_count(form: Coded) -> int:
    """B, the number of blocks along the inputs."""
    return next((a.shape[0] for a in tables(form).values()), 1)


def row_block(form: Codes, block: int | Int[Array, ""]) -> Codes:
    """The form of rows of one block, for any number of rows."""

    def take(a: Array | None) -> Array | None:
        return a if a is None or a.shape[0] == 1 else jax.lax.dynamic_index_in_dim(a, block, keepdims=True)

    return dataclasses.replace(form, levels=take(form.levels), scale=take(form.scale), zero=take(form.zero))


def value(codes: UInt[Array, "r n"], form: Codes, wide: DTypeLike) -> Float[Array, "r n"]:
    """Exactly what `dense()` gives for codes of one block, in the dtype `wide`."""
    return dataclasses.replace(form, codes=codes).dense().astype(wide)


def choose(z: Float[Array, "r n"], form: Codes) -> UInt[Array, "r n"]:
    """Codes of the nearest levels; `form` has one block along the rows."""
    whole = form.zero is None or jnp.issubdtype(form.zero.dtype, jnp.integer)
    z, form = _upright(z, form)
    values, scale, zero = form.values, form.scale, form.zero
    if values is None:
        return assign(z, _table(form, z.dtype))
    if scale is None and zero is None:
        return nearest(z, values)
    a = jnp.ones((1, 1), z.dtype) if scale is None else scale
    if is_grid(values) and (zero is not None or len(values) > _COMPARE):
        q, shift = z / jnp.where(a > 0, a, 1), 0 if zero is None else zero
        q = jnp.round(q) + shift if whole else jnp.round(q + shift)
        return (jnp.clip(q, values[0], values[-1]) - values[0]).astype(code_dtype(len(values)))
    if zero is not None:
        z = z + a * zero
    codes = jnp.zeros(z.shape, code_dtype(len(values)))
    for t in thresholds(values):
        codes += (z >= a * jnp.asarray(t, z.dtype)).astype(codes.dtype)
    return codes


def draw(z: Float[Array, "r n"], form: Codes, u: Float[Array, "r n"]) -> UInt[Array, "r n"]:
    """Codes of one of the two neighbouring levels, at random so that z is the mean; the outer levels beyond them.

    Args:
        z: numbers.
        form: with one block along the rows.
        u: uniform in [0, 1).
    """
    z, form = _upright(z, form)
    last = form.size_of_table - 1
    if form.values is not None and is_grid(form.values):
        a = 1 if form.scale is None else jnp.where(form.scale > 0, form.scale, 1)
        place = z / a + (0 if form.zero is None else form.zero) - form.values[0]
        low = jnp.floor(place)
        return jnp.clip(low + (u < place - low), 0, last).astype(code_dtype(last + 1))
    table = _table(form, z.dtype)
    low = jnp.clip((z[..., None] >= table).sum(-1) - 1, 0, max(last - 1, 0)).astype(code_dtype(last + 1))
    high = jnp.minimum(low + 1, last).astype(low.dtype)
    below, above = value(low, form, z.dtype), value(high, form, z.dtype)
    return jnp.where(u * (above - below) < z - below, high, low)


def choose_all(w: Float[Array, "N n"], form: Codes) -> UInt[Array, "N n"]:
    """Codes of the nearest levels in the blocks of the form."""
    blocks = block_count(form)
    parts = w.reshape(blocks, -1, w.shape[1])
    return jax.lax.map(lambda b: choose(parts[b], row_block(form, b)), jnp.arange(blocks)).reshape(w.shape)


def scaled(form: Coded, factor: float | Float[Array, ""] | Float[Array, "n"]) -> Coded:
    """The form with its scale times a factor, in the format that it has; learned levels are scaled themselves.

    Args:
        form: in the working layout.
        factor: one number, or one for every neuron; then so has the scale.

    Raises:
        ValueError: a fixed table without a scale, which cannot change.
    """
    if not has_scale(form):
        raise ValueError("expected a form with a scale or with learned levels, got a fixed table: pass scale=True")
    factor = jnp.asarray(factor)

    def times(a: Array) -> Array:
        wide = compute_dtype(a.dtype)
        return as_scale(a.astype(wide) * factor.astype(wide), str(a.dtype))

    def spread(a: Array) -> Array:
        return jnp.broadcast_to(a, (a.shape[0], max(a.shape[1], factor.size), *a.shape[2:]))

    if isinstance(form, Trellis):
        return dataclasses.replace(form, scale=times(spread(form.scale)))
    form = dataclasses.replace(
        form,
        levels=None if form.levels is None else spread(form.levels),
        scale=None if form.scale is None else times(form.scale),
        zero=None if form.zero is None else spread(form.zero),
    )
    if form.scale is not None:
        return form.in_steps()
    levels = jnp.moveaxis(form.levels, -1, 0)
    return dataclasses.replace(form, levels=jnp.moveaxis(times(levels), 0, -1))


def with_data(lives: Bool[Array, "N"], found: Coded, given: Coded) -> Coded:
    """`found` with the scales and levels of `given` in blocks of inputs without data."""
    blocks = block_count(given)
    known = lives.reshape(blocks, -1).any(1)

    def one(new: Array | None, old: Array | None) -> Array | None:
        if new is None or old is None:
            return new
        here = known if len(new) == blocks else known.any(keepdims=True)
        return jnp.where(here.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    scale = one(found.scale, given.scale)
    if isinstance(found, Trellis) or isinstance(given, Trellis):
        return dataclasses.replace(found, scale=scale)
    return dataclasses.replace(found, levels=one(found.levels, given.levels), scale=scale).in_steps()


def spaced(form: Codes, threshold: float) -> Codes:
    """The form with levels 0, +-(threshold + k), k = 0, 1, ..: of an integer grid every level v but 0 moves by
    threshold - 1 away from 0, so that there are as many as before.

    Raises:
        ValueError: not an integer grid around 0, or one with a zero point.
    """
    values = form.values
    if values is None or not is_grid(values) or not values[0] <= 0 <= values[-1] or form.zero is not None:
        raise ValueError(
            "a hard threshold needs an integer grid around 0 without a zero point, such as Ternary() or Uniform(4), "
            f"got {'learned levels' if values is None else values}; take kind='soft'"
        )
    moved = (v and float(np.float32(np.sign(v) * (abs(v) - 1 + threshold))) for v in values)
    return dataclasses.replace(form, values=tuple(moved))


def _upright(z: Array, form: Codes) -> tuple[Array, Codes]:
    """The same choice with a scale >= 0: of -z where the scale is negative, as levels then go down."""
    if form.zero is not None:
        form = dataclasses.replace(form, zero=form.zero.astype(z.dtype))
    if form.scale is None:
        return z, form
    scale = form.scale.astype(z.dtype)
    return jnp.where(scale < 0, -z, z), dataclasses.replace(form, scale=jnp.abs(scale))


def _table(form: Codes, wide: DTypeLike) -> Array:
    """All levels of one block, [1, 1|n, K]."""
    values = form.levels if form.levels is not None else jnp.asarray(form.values, wide).reshape(1, 1, -1)
    table = values.astype(wide)
    if form.zero is not None:
        table = table - form.zero[..., None]
    return table if form.scale is None else table * form.scale[..., None]
