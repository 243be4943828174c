"""Coordinate descent on the exact residual, from the codes of another method."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.methods.alphabet import choose
from lcq.methods.following import Recursion, alive, dot, recurse
from lcq.methods.moments import Statistics
from lcq.methods.rounding import Qronos, Rounding, _wide as wide


class _Prepared(NamedTuple):
    before: Any
    recursion: Recursion
    later: Array


@dataclasses.dataclass(frozen=True)
class Descent(Rounding):
    """Goes over the inputs again, each weight to its best level while all others stay: ||X w - Y q||^2 never rises.

        q_t = Q(w_t + ((D w)_t + sum_{s != t} H_ts e_s) / H_tt),    e = w - q

    GPFQ, GPTQ and Qronos round an input with regard to those before it; here those after it count too. A sweep is
    their recursion, once more, started from what the later errors ask for.

    Attributes:
        before: gives the first codes.
        sweeps: over all inputs.

    Raises:
        ValueError: no sweep.

    Source: coordinate descent as in QuantEase (arXiv 2309.01885), there for X = Y; with D it is lcq's.
    """

    before: Rounding = Qronos()
    sweeps: int = 4

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"wanted at least one sweep; got {self.sweeps}; without any, take {self.before}")

    def prepare(self, w: Float[Array, "N n"], statistics: Statistics) -> Any:
        before = self.before.prepare(w, statistics)
        w, gram = wide(w, statistics), statistics.gram
        diagonal = jnp.diagonal(gram)
        lives = alive(diagonal)
        inverse = jnp.where(lives, 1 / jnp.where(lives, diagonal, 1), 0)
        pull = 0 if statistics.drift is None else inverse[:, None] * dot(statistics.drift, w)
        return _Prepared(before, Recursion(None, w + pull, w, gram, inverse), jnp.triu(gram, 1) * inverse[:, None])

    def solve(self, prepared: Any, form: Codes, key: Any = None) -> Codes:
        first, recursion, later = prepared

        def again(_: Any, form: Codes) -> Codes:
            errors = recursion.target - form.dense().astype(later.dtype)
            now = recursion._replace(start=recursion.start + dot(later, errors))
            return recurse(now, form, lambda z, row, _: choose(z, row))

        return jax.lax.fori_loop(0, self.sweeps, again, self.before.solve(first, form, key))
