"""Sums of forms: quantized and a few corrections, low rank and sparse, quantized and low rank.

    Pi(x) = argmin ||x - sum_j Delta_j(Theta_j)||^2 + (2/mu) sum_j C_j(Theta_j)

by block coordinate descent: each scheme in turn projects what the others leave of x, from its own last form. No step
raises the objective; it ends in a local minimum, so this is the one constraint whose projection is not idempotent.

Source: Idelbayev & Carreira-Perpinan, "More general and effective model compression via an additive combination of
compressions", arXiv 2107.04380.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lcq.forms import Sum
from lcq.forms.base import Form, share
from lcq.forms.blocks import Per, compute_dtype
from lcq.schemes.base import SCHEMES, Earlier, Importance, Scalar, Scheme

_COLD, _WARM = 30, 4
"""Sweeps at most, over all schemes; a C step has a warm start."""
_ENOUGH = 1e-3
"""A sweep that lowers the objective by less than this part of it is the last."""

_Each = tuple[tuple[Form, ...], ...]
"""Of every scheme the forms, one for each leaf."""
_State = tuple[Array, Array, Array, _Each]
"""Sweeps so far, the objective before the last of them and after it, and the forms."""


@SCHEMES.register("Additive")
@dataclasses.dataclass(frozen=True, init=False)
class Additive(Scheme):
    """Projection on sums: Delta = sum_j Delta_j, a form of each scheme added together.

    The first sweep fits the schemes in their order, each to what those before leave, and where it ends depends on it:
    name the one that carries most first, a codebook before its corrections. Leaves of a joint task share what each
    scheme lets them share.

    Attributes:
        parts: The schemes whose forms are summed, at least two.

    Raises:
        ValueError: fewer than two schemes.

    Example:
        >>> import lcq
        >>> x = jnp.array([1.0, 1.0, -1.0, 7.0, -1.0])
        >>> Additive(lcq.Binary(), lcq.Prune(count=1)).project(x).dense()
        Array([ 1.,  1., -1.,  7., -1.], dtype=float32)
    """

    parts: tuple[Scheme, ...]

    def __init__(self, *parts: Scheme) -> None:
        if len(parts) < 2 or not all(isinstance(part, Scheme) for part in parts):
            raise ValueError(f"expected two or more schemes, such as KMeans(2), Prune(fraction=0.01), got {parts!r}")
        object.__setattr__(self, "parts", parts)

    @property
    def leaf_arrays(self) -> int:
        return sum(part.leaf_arrays for part in self.parts)

    @property
    def host(self) -> bool:
        return any(part.host for part in self.parts)

    @property
    def costly(self) -> bool:
        return any(part.costly for part in self.parts)

    def check(self, shape: tuple[int, ...]) -> None:
        for part in self.parts:
            part.check(shape)

    @property
    def cuts(self) -> tuple[Per, ...]:
        return tuple(per for part in self.parts for per in part.cuts)

    def oriented(self, layout: str, rank: int) -> Scheme:
        return Additive(*(part.oriented(layout, rank) for part in self.parts))

    def cost(self, forms: tuple[Form, ...]) -> Scalar:
        """The sum of the schemes' costs."""
        return sum(part.cost(of_part) for part, of_part in zip(self.parts, _by_part(forms), strict=True))

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        """The sum of what the schemes charge."""
        return sum(part.charge(of_part, mu) for part, of_part in zip(self.parts, _by_part(forms), strict=True))

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        wide = tuple(x.astype(compute_dtype(x.dtype)) for x in xs)

        def objective(each: _Each, lefts: tuple[Array, ...]) -> Array:
            """Of all forms; `lefts` is what those before the last leave. x - Delta would be made beside it."""
            priced = [(part, of) for part, of in zip(self.parts, each, strict=True) if part.costly or _rate(part)]
            charges = sum(part.charge(forms, mu) for part, forms in priced)  # new forms keep to all constraints
            total = jnp.zeros([], wide[0].dtype) + charges
            for i, (left, form) in enumerate(zip(lefts, each[-1], strict=True)):
                squares = (left - form.dense()) ** 2
                total += jnp.sum(
                    squares if importance is None else jnp.where(importance[i] > 0, importance[i] * squares, 0)
                )
            return total

        def sweep(each: Sequence[Earlier]) -> tuple[_Each, tuple[Array, ...]]:
            now, lefts = list(each), wide
            for j, part in enumerate(self.parts):
                lefts = _left(wide, (*now[:j], *now[j + 1 :]))
                now[j] = part.project(lefts, now[j], mu=mu, importance=importance)
            return tuple(forms for forms in now if forms is not None), lefts

        def goes_on(state: _State) -> Array:
            sweeps, before, now, _ = state
            falls = (now < (1 - _ENOUGH) * before) | (sweeps == 0)  # what an earlier run left may be infinitely dear
            return (sweeps < (_COLD if previous is None else _WARM)) & falls

        def step(state: _State) -> _State:
            sweeps, _, before, each = state
            each, lefts = sweep(each)
            return sweeps + 1, before, objective(each, lefts), each

        if previous is None:
            each, lefts = sweep((None,) * len(self.parts))
        else:
            each = _by_part(share(form, None) for form in previous)
            lefts = _left(wide, each[:-1])
        now = objective(each, lefts)
        state = (jnp.int32(0), jnp.full_like(now, jnp.inf), now, each)
        if self.host:
            while goes_on(state):
                state = step(state)
        else:
            state = jax.lax.while_loop(goes_on, step, state)
        return tuple(Sum(parts, dtype=str(x.dtype)) for x, parts in zip(xs, zip(*state[3], strict=True), strict=True))


def _rate(scheme: Scheme) -> float:
    """The price of a bit, of schemes that have one."""
    rate: float = getattr(scheme, "rate", 0.0)
    return rate


def _by_part(sums: Iterable[Form]) -> tuple[tuple[Form, ...], ...]:
    """The forms of every scheme, one for each leaf, from the sums of every leaf."""
    return tuple(zip(*(form.parts for form in sums if isinstance(form, Sum)), strict=True))


def _left(xs: tuple[Array, ...], each: Sequence[tuple[Form, ...] | None]) -> tuple[Array, ...]:
    """What forms leave of every leaf."""
    return tuple(x - sum(forms[i].dense() for forms in each if forms is not None) for i, x in enumerate(xs))
