"""GPTQ: after each level, the weights left over are solved again by least squares.

It is the recursion of `lcq.ptq.rounding.base`, as is Qronos in its own file, on triangular roots of H + delta I instead
of H.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.ptq.rounding.base import ROUNDING_METHODS, ordered
from lcq.ptq.rounding.block_ldl import BlockLDL
from lcq.ptq.rounding.damped import Damped, damped_root
from lcq.ptq.rounding.sequential import Recursion
from lcq.ptq.statistics import Statistics


@ROUNDING_METHODS.register("gptq")
@dataclasses.dataclass(frozen=True)
class GPTQ(Damped):
    """Rounds each weight as it stands, and lets those that follow make up for it; X is taken to be Y.

        q_t = Q(w_t),    w_{>t} <- argmin ||Y (w - q)||^2 + delta ||w - q||^2    for the weights not yet rounded

    Attributes:
        damping: Damping delta in units of the mean of diag(H); above 0, for H may be singular.
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first, instead of as they come.
        max_damping: Bound up to which damping may grow, tenfold each time, where H + delta I has no root in the
            precision at hand; `damping` itself, or less, allows no growth.

    Raises:
        ValueError: damping not above 0; no root up to `max_damping`.

    Source: Frantar et al., arXiv 2210.17323.
    """

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Recursion:
        w, gram, _, order, lives = ordered(w, statistics._replace(drift=None), self.act_order)
        root, damping = damped_root(gram, jnp.diagonal(gram).mean(), lives, self.damping, self.max_damping)
        return Recursion(
            order, w, w, root, jnp.where(lives & jnp.isfinite(damping), 1 / jnp.diagonal(root), 0), damping
        )

    def on_paths(self) -> BlockLDL:
        return BlockLDL(**self.settings, follows=False).on_paths()
