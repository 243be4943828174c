"""The scales of codes that are fixed, by least squares.

argmin over a of ||X w - sum_b a_b Y_b c_b||^2,    q_b = a_b c_b in each block b of inputs
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.ptq.rounding.coded import Coded, unscaled
from lcq.ptq.rounding.sequential import dot
from lcq.ptq.statistics import column_sums
from lcq.schemes.scales import as_scale, rounded_scale

_SAME = 1e-6
"""Of <X w, Y q>, by how much the residual must fall for new scales."""


def refitted(form: Coded, gram: Float[Array, "N N"], pull: Float[Array, "N n"]) -> Coded:
    """The form with the scales a of each neuron that make ||X w - Y q||^2 least, codes fixed.

    With A_bd = c_b' H_bd c_d and r_b = c_b' ((H + D) w)_b over the blocks b, d of inputs, a solves A a = r. A block
    that has nothing to say, A_bb = 0, keeps its scale.

    Args:
        form: with scales [B, n].
        gram: H.
        pull: (H + D) w.

    Scales in steps are rounded to these first, and what the grid is shifted by with them.

    Returns:
        The form; neurons whose new scales change a sign, or are no better beyond rounding errors, keep the old ones.
    """
    blocks, neurons = form.scale.shape
    part = (blocks, -1, neurons)
    c = unscaled(form, gram.dtype).reshape(part)

    def moved(b: Array) -> Array:
        columns = jax.lax.dynamic_slice_in_dim(gram, b * c.shape[1], c.shape[1], 1)
        return column_sums(dot(columns, c[b]).reshape(part) * c)

    a = jnp.moveaxis(jax.lax.map(moved, jnp.arange(blocks)), -1, 0)
    r = column_sums(pull.reshape(part) * c).T
    size = jnp.trace(a, axis1=1, axis2=2) / blocks
    ridge = jnp.where(size > 0, 1e-6 * size, 1)
    old = form.scale.astype(a.dtype).T
    mute = jnp.diagonal(a, axis1=1, axis2=2) <= 0
    extra = (ridge[:, None] + mute)[..., None] * jnp.eye(blocks, dtype=a.dtype)
    new = rounded_scale(jnp.linalg.solve(a + extra, r[..., None])[..., 0], str(form.scale.dtype))
    new = jnp.where(mute, old, new)

    def loss(s: Array) -> Array:
        return (s * ((a * s[:, None]).sum(2) - 2 * r)).sum(1)

    kept = ((new * old > 0) | (old == 0)).all(1)
    if isinstance(form, Codes) and form.scale_bits is not None:
        return _better_in_steps(form, jnp.where(kept[:, None], new, old).T, gram, pull)
    better = kept & (loss(new) < loss(old) - _SAME * jnp.abs(old * r).sum(1))
    return dataclasses.replace(form, scale=as_scale(jnp.where(better[:, None], new, old).T, str(form.scale.dtype)))


def _better_in_steps(form: Codes, scale: Float[Array, "B n"], gram: Array, pull: Array) -> Codes:
    new = dataclasses.replace(form, scale=scale.astype(form.scale.dtype)).in_steps()

    def loss(form: Codes) -> tuple[Array, Array]:
        q = dataclasses.replace(form, dtype=str(gram.dtype)).dense()
        return column_sums(q * (dot(gram, q) - 2 * pull)), column_sums(jnp.abs(q * pull))

    (least, size), (found, _) = loss(form), loss(new)
    better = found < least - _SAME * size
    scale, zero = (jnp.where(better, one, other) for one, other in ((new.scale, form.scale), (new.zero, form.zero)))
    return dataclasses.replace(form, scale=scale, zero=zero)
