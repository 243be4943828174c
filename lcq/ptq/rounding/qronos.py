"""Qronos: the first input corrects the past, the others follow as GPTQ's do."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.ptq.rounding.base import Rounding, ordered
from lcq.ptq.rounding.codebook import choose
from lcq.ptq.rounding.gptq import check_damp, damped_root, triangular
from lcq.ptq.rounding.sequential import Order, Recursion, dot, recurse
from lcq.ptq.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Qronos(Rounding):
    """Corrects for X - Y at once: rounds the first weight, re-solves the others by least squares, goes on as GPTQ.

        q_1 = Q(argmin ||X w - Y_1 q_1 - Y_2 w_2||),    w_2 <- argmin ||X w - Y_1 q_1 - Y_2 v||^2 + damp ||v - w_2||^2

    Attributes:
        damp: in units of the mean of diag(H); above 0, for H may be singular.
        order: of the inputs.
        most: how far damp may grow, tenfold each time, where H + damp I has no root in the precision at hand; `damp`
            itself, or less, allows none.

    Raises:
        ValueError: damp not above 0; no root up to `most`.

    Source: Zhang et al., arXiv 2505.11695.
    """

    damp: float = 0.01
    order: Order = "natural"
    most: float = 1.0

    def __post_init__(self) -> None:
        check_damp(self.damp)

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        w, gram, drift, order, lives = ordered(w, statistics, self.order)
        diagonal = jnp.diagonal(gram)
        inverse = jnp.where(lives, 1 / jnp.where(lives, diagonal, 1), 0)
        if len(w) == 1:
            start = w if drift is None else w + drift * inverse * w
            return Recursion(order, start, w, gram, inverse, jnp.asarray(self.damp, gram.dtype))
        rest = gram[1:, 1:]
        root, damp = damped_root(rest, diagonal.mean(), lives[1:], self.damp, self.most)  # R' of H_22 + damp I
        found = lives[1:] & jnp.isfinite(damp)
        first = triangular(root, gram[1:, :1], lower=True, trans=1)
        feedback = jnp.pad(jnp.concatenate([first, root], 1), ((1, 0), (0, 0)))
        inverse = inverse.at[1:].set(jnp.where(found, 1 / jnp.diagonal(root), 0))
        if drift is None:
            return Recursion(order, w, w, feedback, inverse, damp)
        pull = dot(drift, w)
        rest = triangular(root, triangular(root, pull[1:], lower=True, trans=1), lower=True)
        target = w.at[1:].add(jnp.where(found[:, None], rest, 0))
        return Recursion(order, target.at[0].add(inverse[0] * pull[0]), target, feedback, inverse, damp)

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        del key
        return recurse(prepared, form, lambda z, row, _: choose(z, row))

    def damped(self, prepared: Any) -> Array:
        return prepared.damp
