"""Qronos: the first input corrects the past, the others follow as GPTQ's do."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.ptq.rounding.base import ROUNDING_METHODS, ordered
from lcq.ptq.rounding.block_ldl import BlockLDL
from lcq.ptq.rounding.damped import Damped, damped_root, triangular
from lcq.ptq.rounding.sequential import Recursion, dot
from lcq.ptq.statistics import Statistics


@ROUNDING_METHODS.register("qronos")
@dataclasses.dataclass(frozen=True)
class Qronos(Damped):
    """Corrects for X - Y at once: rounds the first weight, re-solves the others by least squares, goes on as GPTQ.

        q_1 = Q(argmin ||X w - Y_1 q_1 - Y_2 w_2||),    w_2 <- argmin ||X w - Y_1 q_1 - Y_2 v||^2 + delta ||v - w_2||^2

    Attributes:
        damping: Damping delta in units of the mean of diag(H); above 0, for H may be singular.
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first, instead of as they come.
        max_damping: Bound up to which damping may grow, tenfold each time, where H + delta I has no root in the
            precision at hand; `damping` itself, or less, allows no growth.

    Raises:
        ValueError: damping not above 0; no root up to `max_damping`.

    Source: Zhang et al., arXiv 2505.11695.
    """

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Recursion:
        w, gram, drift, order, lives = ordered(w, statistics, self.act_order)
        diagonal = jnp.diagonal(gram)
        inverse = jnp.where(lives, 1 / jnp.where(lives, diagonal, 1), 0)
        if len(w) == 1:
            start = w if drift is None else w + drift * inverse * w
            return Recursion(order, start, w, gram, inverse, jnp.asarray(self.damping, gram.dtype))
        rest = gram[1:, 1:]
        root, damping = damped_root(
            rest, diagonal.mean(), lives[1:], self.damping, self.max_damping
        )  # R' of H_22 + delta I
        found = lives[1:] & jnp.isfinite(damping)
        first = triangular(root, gram[1:, :1], lower=True, trans=1)
        feedback = jnp.pad(jnp.concatenate([first, root], 1), ((1, 0), (0, 0)))
        inverse = inverse.at[1:].set(jnp.where(found, 1 / jnp.diagonal(root), 0))
        if drift is None:
            return Recursion(order, w, w, feedback, inverse, damping)
        pull = dot(drift, w)
        rest = triangular(root, triangular(root, pull[1:], lower=True, trans=1), lower=True)
        target = w.at[1:].add(jnp.where(found[:, None], rest, 0))
        return Recursion(order, target.at[0].add(inverse[0] * pull[0]), target, feedback, inverse, damping)

    def on_paths(self) -> BlockLDL:
        return BlockLDL(**self.settings).on_paths()
