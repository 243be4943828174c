"""Descent on the exact residual, codes and scales by turns, from the codes of another method."""

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding, wide
from lcq.ptq.rounding.codebook import choose
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.sequential import Recursion, alive, dot, recurse
from lcq.ptq.statistics import Statistics, column_sums
from lcq.schemes.scales import as_scale, rounded_scale

_SAME = 1e-6
"""Of <X w, Y q>, by how much the residual must fall for new scales."""


class _Prepared(NamedTuple):
    before: object
    recursion: Recursion
    later: Array
    pull: Array


@ROUNDING_METHODS.register("descent")
@dataclasses.dataclass(frozen=True)
class Descent(Rounding):
    """Goes over the inputs again and again: ||X w - Y q||^2 never rises, in its codes and in its scales.

        codes     q_t = Q(w_t + ((D w)_t + sum_{s != t} H_ts e_s) / H_tt),    e = w - q
        scales    argmin over a of ||X w - sum_b a_b Y_b c_b||^2              q_b = a_b c_b in each block b of inputs

    GPFQ, GPTQ and Qronos round an input with regard to those before it; here those after it count too: a sweep is
    their recursion once more, started from what the later errors ask for. The scales of a neuron are re-fitted after
    each sweep but the last where every neuron has its own; a neuron keeps those it has unless the new ones are of the
    same signs and better.

    Attributes:
        before: The method that gives the first codes, on the same statistics; `search` and `shrink` are this one's.
        sweeps: Number of sweeps over all inputs.
        refit: Whether to re-fit the scales after each sweep but the last.

    Raises:
        ValueError: no sweep; a method before with a search, shrinkage or recursion of its own.

    Source: coordinate descent as in QuantEase (arXiv 2309.01885), there for X = Y and with fixed scales.
    """

    before: Rounding = dataclasses.field(default_factory=Qronos)
    sweeps: int = 4
    refit: bool = True
    tries: ClassVar[int] = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sweeps < 1:
            raise ValueError(f"expected at least one sweep, got {self.sweeps}; without any, take {self.before}")
        if not self.before.search or self.before.shrink is not None:
            raise ValueError(f"expected before= without search= and shrink=, got {self.before}; pass them to Descent")
        if isinstance(self.before, GPFQ) and self.before.recursion == "follow":
            raise ValueError(f"expected before= on statistics, got {self.before}; only GPFQ alone follows inputs")

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> _Prepared:
        before = self.before.prepare(w, statistics)
        w, gram = wide(w, statistics), statistics.gram
        diagonal = jnp.diagonal(gram)
        lives = alive(diagonal)
        inverse = jnp.where(lives, 1 / jnp.where(lives, diagonal, 1), 0)
        drift = 0 if statistics.drift is None else dot(statistics.drift, w)
        recursion = Recursion(None, w + inverse[:, None] * drift, w, gram, inverse)
        return _Prepared(before, recursion, jnp.triu(gram, 1) * inverse[:, None], dot(gram, w) + drift)

    def solve(self, prepared: _Prepared, form: Codes, key: Array | None = None) -> Codes:
        first, recursion, later, pull = prepared
        own = self.refit and form.scale is not None and form.scale.shape[1] == form.codes.shape[1]

        def sweep(i: Array, form: Codes) -> Codes:
            if own:
                refit = functools.partial(refitted, gram=recursion.feedback, pull=pull)
                form = jax.lax.cond(i > 0, refit, lambda form: form, form)
            errors = recursion.target - form.dense().astype(later.dtype)
            now = recursion._replace(start=recursion.start + dot(later, errors))
            return recurse(now, form, lambda z, row, _: choose(z, row))

        return jax.lax.fori_loop(0, self.sweeps, sweep, self.before.solve(first, form, key))

    def random_key(self, number: int) -> Array | None:
        return self.before.random_key(number)

    def damped(self, prepared: _Prepared) -> Array | None:
        return self.before.damped(prepared.before)


def refitted(form: Codes, gram: Float[Array, "N N"], pull: Float[Array, "N n"]) -> Codes:
    """The form with the scales a of each neuron that make ||X w - Y q||^2 least, codes fixed.

    With A_bd = c_b' H_bd c_d and r_b = c_b' ((H + D) w)_b over the blocks b, d of inputs, a solves A a = r. A block
    that has nothing to say, A_bb = 0, keeps its scale.

    Args:
        form: with scales [B, n].
        gram: H.
        pull: (H + D) w.

    Returns:
        The form; neurons whose new scales change a sign, or are no better beyond rounding errors, keep the old ones.
    """
    blocks, neurons = form.scale.shape
    part = (blocks, -1, neurons)
    c = dataclasses.replace(form, scale=None, dtype=str(gram.dtype)).dense().reshape(part)

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

    better = ((new * old > 0) | (old == 0)).all(1) & (loss(new) < loss(old) - _SAME * jnp.abs(old * r).sum(1))
    return dataclasses.replace(form, scale=as_scale(jnp.where(better[:, None], new, old).T, str(form.scale.dtype)))
