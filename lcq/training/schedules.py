"""Penalty weights mu of `lc`, one for each L step.

Small at first, so that the loss decides, large in the end, so that w arrives at Delta(Theta).
"""

import dataclasses
import math
import types
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array
from typing_extensions import TypeAliasType

_L_STEPS = 40
"""How many L steps a long run has."""
_FULL = 100
"""Updates in which Adam at its usual rates takes w to where an L step pulls it."""
_FEW = 6
"""L steps that a short run has at least."""
_SHORT = 300
"""Updates below which w may not arrive."""
_GROWING = 0.6
"""The share of C steps in which mu grows; in the others w arrives."""


@dataclasses.dataclass(frozen=True)
class Geometric:
    """The penalty weights mu_k = start * factor^min(max(k - wait, 0), steps). See `geometric`."""

    start: float
    factor: float
    steps: int
    wait: int = 0

    def at(self, k: ArrayLike) -> Array:
        """mu_k as float32; k counts the C steps made."""
        k = jnp.clip(k - self.wait, 0, self.steps).astype(jnp.float32)
        return jnp.float32(self.start) * jnp.exp(k * jnp.float32(math.log(self.factor)))


def geometric(start: float, factor: float, *, steps: int, wait: int = 0) -> Geometric:
    """A penalty schedule mu_k = start * factor^min(max(k - wait, 0), steps), k counting C steps.

    A value, not a function, so that wrappers which trace callables (`optax.inject_hyperparams`) leave it
    alone; constant after `steps`, because a factor above 1 overflows float32 in the end.

    Args:
        start: mu of the first L step, > 0; 1e-4 to 1e-3 is usual. Too large and w sticks at direct compression.
        factor: > 0; 1.1 to 1.4 is usual.
        steps: C steps in which mu grows; then it stays as it is.
        wait: C steps before it begins to.

    Raises:
        ValueError: not positive and finite, or a mu outside of 1e-30 .. 1e30.

    Example:
        >>> float(geometric(0.5, 2.0, steps=3).at(10))
        4.0
    """
    if not (0 < start < math.inf and 0 < factor < math.inf and steps >= 0 and wait >= 0):
        raise ValueError(
            f"expected start > 0, factor > 0, steps >= 0, wait >= 0, got {start}, {factor}, {steps}, {wait}"
        )
    for exponent in (math.log10(start), math.log10(start) + steps * math.log10(factor)):
        if abs(exponent) > 30:
            raise ValueError(
                f"mu = {start} * {factor}^{steps} leaves 1e-30 .. 1e30, where float32 is safe; "
                "take fewer steps or a factor nearer to 1"
            )
    return Geometric(float(start), float(factor), int(steps), int(wait))


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """Penalty weights by a schedule of optax's kind, a function of the number of C steps made.

    Two are equal if their function is the same one.

    Attributes:
        schedule: number of C steps -> mu > 0.
    """

    schedule: optax.Schedule

    def at(self, k: ArrayLike) -> Array:
        """mu_k as float32; k counts the C steps made."""
        return jnp.asarray(self.schedule(k), jnp.float32)


class PenaltySchedule(NamedTuple):
    """What `lc` wants to know of a run of a given length.

    Attributes:
        mu: the penalty weights.
        every: updates per L step.
    """

    mu: Geometric
    every: int


def penalty_schedule(updates: int, *, start: float = 1e-3, end: float = 10.0) -> PenaltySchedule:
    """Penalty weights and the length of an L step from the number of updates that a run has.

        mu_k = start (end / start)^min(k / steps, 1),  steps = 60 % of the C steps

    L steps are 40, of `updates` / 40 updates each; where these would be fewer than 100, L steps are longer and fewer,
    down to 6: in a shorter L step w, which Adam moves by about its learning rate in an update, does not come to where
    the coupling pulls it, and the gap stays. At the end mu is constant, and w arrives.

    Args:
        updates: of the whole run, all epochs together; at least 60.
        start: mu of the first L step. The default suits a cross-entropy, the mean over a batch; of a loss that is c
            times as large take c times the start and the end.
        end: mu of the last ones. Plain SGD is stable up to 2 / (its learning rate), see `learning_rate` of `lc`.

    Returns:
        (mu, every), for `lc(..., mu=mu, every=every)`.

    Raises:
        ValueError: no whole number of updates, or fewer than 60; weights that are no positive numbers, or that do not
            grow.

    Warns:
        UserWarning: fewer than 300 updates, after which w may be far from Delta(Theta).

    Example:
        >>> mu, every = penalty_schedule(5000)
        >>> every, mu.steps, float(mu.at(0)), round(float(mu.at(100)), 3)
        (125, 23, 0.0010000000474974513, 10.0)

    Source: settings of lcq's own, see docs/guides/penalty_schedule.md.
    """
    if isinstance(updates, bool) or not isinstance(updates, int | np.integer):
        raise ValueError(
            f"expected updates= a whole number, got {updates!r}; divide by //: epochs * (len(x) // batch_size)"
        )
    updates = int(updates)
    if updates < 60:
        raise ValueError(
            f"expected at least 60 updates, got {updates}: so few do not bring weights to their codes; train longer, "
            "or compress without training by lcq.quantize"
        )
    if not 0 < start < end:
        raise ValueError(f"expected 0 < start < end, got {start} and {end}; mu has to grow")
    if updates < _SHORT:
        warnings.warn(
            f"{updates} updates may not bring weights to their codes: six L steps of {updates // _FEW} updates are "
            f"short for all but large learning rates; train for at least {_SHORT}, and see that the gap of "
            "lcq.metrics(state) ends below .01",
            stacklevel=2,
        )
    every = max(updates // _L_STEPS, min(_FULL, updates // _FEW))
    steps = max(1, round(_GROWING * (updates // every - 1)))
    return PenaltySchedule(geometric(start, (end / start) ** (1 / steps), steps=steps), every)


def same_schedule(a: Any, b: Any) -> bool:
    """Whether two schedules are the same, or made by the same code of the same numbers.

    Example:
        >>> make = lambda start: lambda k: start * 1.1**k
        >>> same_schedule(make(0.1), make(0.1)), same_schedule(make(0.1), make(0.2))
        (True, False)
    """
    if a is b or isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Scheduled) and isinstance(b, Scheduled):
        return same_schedule(a.schedule, b.schedule)
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
        return a.__code__ == b.__code__ and same_schedule(_bound(a), _bound(b))
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_schedule, a, b))
    return callable(a) or np.array_equal(a, b)  # other callables cannot be looked into


def _bound(f: types.FunctionType) -> tuple[object, ...]:
    """What a function is made of beside its code."""
    return (*(cell.cell_contents for cell in f.__closure__ or ()), *(f.__defaults__ or ()), f.__kwdefaults__)


Penalty = TypeAliasType("Penalty", Geometric | optax.ScalarOrSchedule)
"""Penalty weights: `geometric(...)`, a number, or a function of the number of C steps made."""


def as_schedule(mu: object) -> Geometric | Scheduled:
    """What `lc` was given as its penalty weights.

    Raises:
        ValueError: neither weights by `geometric`, nor a number, nor a schedule of positive numbers.
    """
    if isinstance(mu, Geometric | Scheduled):
        return mu
    if callable(mu):
        with jax.ensure_compile_time_eval():  # optax.inject_hyperparams makes `lc` again in every trace
            first = jnp.asarray(mu(0))
        if first.shape or not 0 < float(first) < math.inf:
            raise ValueError(f"expected mu= a schedule of positive numbers, got {first} at C step 0; see lcq.geometric")
        return Scheduled(mu)
    if isinstance(mu, PenaltySchedule):
        raise ValueError(
            f"expected mu= a schedule alone, got {mu!r}; take it apart: mu, every = lcq.penalty_schedule(updates)"
        )
    if isinstance(mu, int | float):
        if not 0 < mu < math.inf:
            raise ValueError(f"expected mu= a positive number, got {mu}; lcq.penalty_schedule gives weights that grow")
        return geometric(mu, 1.0, steps=0)
    raise ValueError(
        f"expected mu= a number, lcq.geometric(start, factor, steps=...) or a function of the number of C steps, "
        f"got {mu!r}; under optax.inject_hyperparams name it in static_args"
    )
