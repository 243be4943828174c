"""Methods on triangular roots of H + delta I, and how large delta is.

Where rounding errors leave no root, delta grows tenfold until there is one; codes are never made of a factorisation
that failed.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcq.ptq.rounding.base import Rounding
from lcq.ptq.rounding.codebook import choose
from lcq.ptq.rounding.sequential import recurse

triangular = jax.scipy.linalg.solve_triangular


@dataclasses.dataclass(frozen=True)
class Damped(Rounding):
    """A method on triangular roots of H + delta I, and how large delta is.

    Attributes:
        damping: Damping delta in units of the mean of diag(H); above 0, for H may be singular.
        act_order: Whether inputs are rounded by decreasing H_tt, the largest first, instead of as they come.
        max_damping: Bound up to which damping may grow, tenfold each time, where H + delta I has no root in the
            precision at hand; `damping` itself, or less, allows no growth.

    Raises:
        ValueError: damping not above 0.
    """

    damping: float = 0.01
    act_order: bool = False
    max_damping: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise ValueError(
                f"expected damping > 0, in units of the mean of diag(H), which may be singular, got {self.damping}"
            )

    def solve(self, prepared: Any, form: Any, key: Array | None = None) -> Any:
        del key
        return recurse(prepared, form, lambda z, row, _: choose(z, row))

    @property
    def settings(self) -> dict[str, Any]:
        """Those that all methods of this kind have."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(Damped)}

    def damped(self, prepared: Any) -> Array:
        return jnp.asarray(prepared.damping)


def damped_root(gram: Array, mean: Array, lives: Array, damping: float, max_damping: float) -> tuple[Array, Array]:
    """R', where R is upper triangular and R R' = H + delta mean I, and the delta that it took.

    A pivot R_tt^2 is what input t has of its own; one within rounding errors of 0 is none, and delta grows tenfold. Up
    to `max_damping` without success delta is infinite and R is I, of no meaning.
    """
    size = len(gram)
    unit = jnp.where(mean > 0, mean, 1)
    least = 4 * size**0.5 * jnp.finfo(gram.dtype).eps * jnp.diagonal(gram)

    def attempt(damping: Array) -> Array:
        damped = gram + damping * unit * jnp.eye(size, dtype=gram.dtype)
        return jax.lax.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1].T

    def fails(root: Array) -> Array:
        pivots = jnp.diagonal(root)
        return ~(jnp.isfinite(root).all() & ((pivots**2 > least) | ~lives).all())

    def more(state: tuple[Array, Array]) -> Array:
        return fails(state[1]) & (10 * state[0] <= max_damping * (1 + 1e-6))

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        return 10 * state[0], attempt(10 * state[0])

    first = jnp.asarray(damping, gram.dtype)
    used, root = jax.lax.while_loop(more, again, (first, attempt(first)))
    failed = fails(root)
    return jnp.where(failed, jnp.eye(size, dtype=gram.dtype), root), jnp.where(failed, jnp.inf, used)
