"""GPTQ: after each level, the weights left over are solved again by least squares.

It is the recursion of `lcq.ptq.rounding.base`, as is Qronos in its own file, on triangular roots of H + damp I instead
of H. Where rounding errors leave no root, damp grows tenfold until there is one; codes are never made of a
factorisation that failed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.ptq.rounding.base import Rounding, ordered
from lcq.ptq.rounding.codebook import choose
from lcq.ptq.rounding.sequential import Order, Recursion, recurse
from lcq.ptq.statistics import Statistics

triangular = jax.scipy.linalg.solve_triangular


@dataclasses.dataclass(frozen=True)
class GPTQ(Rounding):
    """Rounds each weight as it stands, and lets those that follow make up for it; X is taken to be Y.

        q_t = Q(w_t),    w_{>t} <- argmin ||Y (w - q)||^2 + damp ||w - q||^2    for the weights not yet rounded

    Attributes:
        damp: in units of the mean of diag(H); above 0, for H may be singular.
        order: of the inputs.
        most: how far damp may grow, tenfold each time, where H + damp I has no root in the precision at hand; `damp`
            itself, or less, allows none.

    Raises:
        ValueError: damp not above 0; no root up to `most`.

    Source: Frantar et al., arXiv 2210.17323.
    """

    damp: float = 0.01
    order: Order = "natural"
    most: float = 1.0

    def __post_init__(self) -> None:
        check_damp(self.damp)

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        w, gram, _, order, lives = ordered(w, statistics._replace(drift=None), self.order)
        root, damp = damped_root(gram, jnp.diagonal(gram).mean(), lives, self.damp, self.most)
        return Recursion(order, w, w, root, jnp.where(lives & jnp.isfinite(damp), 1 / jnp.diagonal(root), 0), damp)

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        del key
        return recurse(prepared, form, lambda z, row, _: choose(z, row))

    def damped(self, prepared: Any) -> Array:
        return prepared.damp


def check_damp(damp: float) -> None:
    if not damp > 0:
        raise ValueError(f"expected damp > 0, in units of the mean of diag(H), which may be singular, got {damp}")


def damped_root(gram: Array, mean: Array, lives: Array, damp: float, most: float) -> tuple[Array, Array]:
    """R', where R is upper triangular and R R' = H + damp mean I, and the damp that it took, in units of `mean`.

    A pivot R_tt^2 is what input t has of its own; one within rounding errors of 0 is none, and damp grows tenfold. Up
    to `most` without success damp is infinite and R is I, of no meaning.
    """
    size = len(gram)
    unit = jnp.where(mean > 0, mean, 1)
    least = 4 * size**0.5 * jnp.finfo(gram.dtype).eps * jnp.diagonal(gram)

    def attempt(damp: Array) -> Array:
        damped = gram + damp * unit * jnp.eye(size, dtype=gram.dtype)
        return jax.lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1].T

    def fails(root: Array) -> Array:
        pivots = jnp.diagonal(root)
        return ~(jnp.isfinite(root).all() & ((pivots**2 > least) | ~lives).all())

    def more(state: tuple[Array, Array]) -> Array:
        return fails(state[1]) & (10 * state[0] <= most * (1 + 1e-6))

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return 10 * state[0], attempt(10 * state[0])

    first = jnp.asarray(damp, gram.dtype)
    used, root = jax.lax.while_loop(more, again, (first, attempt(first)))
    failed = fails(root)
    return jnp.where(failed, jnp.eye(size, dtype=gram.dtype), root), jnp.where(failed, jnp.inf, used)
