"""SPFQ: path following with stochastic rounding."""

import dataclasses

import jax
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.ptq.rounding.base import ROUNDING_METHODS, Rounding
from lcq.ptq.rounding.codebook import draw
from lcq.ptq.rounding.gpfq import follow_path
from lcq.ptq.rounding.sequential import Recursion, recurse
from lcq.ptq.statistics import Statistics


@ROUNDING_METHODS.register("spfq")
@dataclasses.dataclass(frozen=True)
class SPFQ(Rounding):
    """GPFQ with stochastic rounding: q_t one of the two levels around z_t, with mean z_t inside the codebook.

    Attributes:
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first, instead of as they come.
        seed: Of what `lcq.quantize` draws, anew for each product; `codes` takes a key instead.

    Raises:
        ValueError: neither a seed nor a key.

    Source: Zhang & Saab, arXiv 2309.10975.
    """

    act_order: bool = False
    seed: int | None = None

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Recursion:
        return follow_path(w, statistics, self.act_order)

    def solve(self, prepared: Recursion, form: Codes, key: Array | None = None) -> Codes:
        if key is None:
            raise ValueError("SPFQ draws at random: expected a key, got none; pass SPFQ(seed=0), or key= to codes")
        noise = jax.random.uniform(key, prepared.target.shape, prepared.target.dtype)
        return recurse(prepared, form, draw, noise)

    def random_key(self, number: int) -> Array | None:
        return None if self.seed is None else jax.random.fold_in(jax.random.key(self.seed), number)
