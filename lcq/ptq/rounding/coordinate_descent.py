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
from lcq.ptq.rounding.refit import refitted
from lcq.ptq.rounding.sequential import Recursion, alive, dot, recurse
from lcq.ptq.statistics import Statistics


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

    def on_paths(self) -> Rounding:
        return dataclasses.replace(self.before.on_paths(), search=self.search, shrink=self.shrink)
