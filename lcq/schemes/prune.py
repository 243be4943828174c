"""Pruning to a given number: of weights, of groups such as filters, or of every m weights in a row.

    Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2   s.t.  at most kappa groups of Theta are not zero

Those with the largest sqrt(sum_{i in g} h_i x_i^2) are kept as they are, ties by position.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcq.forms.axes import inputs_axis
from lcq.forms.blocks import Per
from lcq.schemes.base import SCHEMES, Importance, Scalar, Scheme
from lcq.schemes.counts import at_least, count_marks, count_of
from lcq.schemes.kmeans.kmeans import KMeans
from lcq.schemes.sparsity import Masks, Sparsifier, group_norms, scaled_norms, spread
from lcq.schemes.topk import largest, largest_in_runs

_LONGEST = 1024
"""Weights of a run at most."""


@SCHEMES.register("Prune")
@dataclasses.dataclass(frozen=True)
class Prune(Sparsifier):
    """Keeps the largest weights, so many or that part of all.

        Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2   s.t.  ||Theta||_0 <= kappa

    For leaves of any shape; those of a joint task compete for one budget.

    Attributes:
        count: kappa, the number of weights that are kept.
        fraction: The part of all weights that is kept, from 0 to 1, instead of their number.
        values: Format of kept values: None as they are, the name of a shorter dtype such as "bfloat16", or KMeans(16)
            and the like for a codebook, fitted to the weights that are kept; one for each task.

    Raises:
        ValueError: neither or both of count and fraction, or one out of range.

    Example:
        >>> Prune(count=2).project(jnp.array([0.5, -3.0, 1.0, 2.0])).dense()
        Array([ 0., -3.,  0.,  2.], dtype=float32)

    Source: Carreira-Perpinan & Idelbayev, "Learning-compression algorithms for neural net pruning", CVPR 2018.
    """

    count: int | None = None
    fraction: float | None = None
    values: str | KMeans | None = None
    group: Per = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number(self.count, self.fraction)

    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        del mu
        sizes = scaled_norms(xs, roots, None)
        return xs, largest(sizes, _number(self.count, self.fraction, sizes))

    def allows(self, masks: Masks) -> Bool[Array, ""]:
        return at_least(count_of(_number(self.count, self.fraction, masks)), count_marks(masks))

    def share(self, groups: int) -> float:
        return _share(self.count, self.fraction, groups)


@SCHEMES.register("PruneGroups")
@dataclasses.dataclass(frozen=True)
class PruneGroups(Sparsifier):
    """Keeps the groups of weights with the largest norms, so many or that part of all: filters, rows, blocks.

        Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2   s.t.  #{g: Theta_g != 0} <= kappa

    For leaves of any shape that groups divide; those of a joint task compete for one budget of groups.

    Attributes:
        group: What is kept or dropped together: "channel" for all weights of an index of the last axis, an output unit
            or filter; an int for as many inputs of one output; lengths along each axis as a tuple, 0 for the whole
            axis; see `lcq.forms.blocks.block_counts`.
        count: kappa, the number of groups that are kept.
        fraction: The part of all groups that is kept, from 0 to 1, instead of their number.
        values: Format of kept values, as in `Prune`.

    Raises:
        ValueError: no group, neither or both of count and fraction, or one out of range; of a leaf that groups do not
            divide.

    Example:
        >>> PruneGroups("channel", count=1).project(jnp.array([[1.0, 2.0], [2.0, 2.0]])).dense()
        Array([[0., 2.],
               [0., 2.]], dtype=float32)

    Source: Wen et al., "Learning structured sparsity in deep neural networks", arXiv 1608.03665; the C step as in
    `Prune`.
    """

    group: Per
    count: int | None = None
    fraction: float | None = None
    values: str | KMeans | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is None:
            raise ValueError(
                "expected group= 'channel', a number of inputs or lengths as a tuple, got None; "
                "Prune keeps single weights"
            )
        _check_number(self.count, self.fraction)

    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        del mu
        norms = scaled_norms(xs, roots, self.group)
        return xs, spread(xs, largest(norms, _number(self.count, self.fraction, norms)), self.group)

    def allows(self, masks: Masks) -> Bool[Array, ""]:
        groups = [group_norms(mask.astype(jnp.float32), self.group) > 0 for mask in masks]
        return at_least(count_of(_number(self.count, self.fraction, groups)), count_marks(groups))

    def share(self, groups: int) -> float:
        return _share(self.count, self.fraction, groups)


@SCHEMES.register("NofM")
@dataclasses.dataclass(frozen=True)
class NofM(Sparsifier):
    """Keeps the n largest of every m consecutive weights along the axis of inputs, such as 2 of 4.

        Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2   s.t.  at most n of every m weights are not zero

    For leaves of two axes or more, (..., inputs, outputs), whose inputs m divides.

    Attributes:
        n: Weights of a run that are kept.
        m: Length of a run, at most 1,024.
        values: Format of kept values, as in `Prune`.
        axis: Axis of inputs, counted from the end.

    Raises:
        ValueError: not 1 <= n <= m <= 1,024; of a leaf whose inputs m does not divide.

    Example:
        >>> NofM(1, 2).project(jnp.array([[0.5], [-3.0], [1.0], [2.0]])).dense().T
        Array([[ 0., -3.,  0.,  2.]], dtype=float32)

    Source: Mishra et al., "Accelerating sparse deep neural networks", arXiv 2104.08378.
    """

    n: int
    m: int
    values: str | KMeans | None = None
    axis: int = -2
    group: Per = dataclasses.field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in (self.n, self.m))
        if not whole or not 1 <= self.n <= self.m <= _LONGEST:
            raise ValueError(f"expected ints 1 <= n <= m <= {_LONGEST}, got n={self.n!r} and m={self.m!r}")
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis >= 0:
            raise ValueError(f"expected axis= a number below 0, counted from the last axis, got {self.axis!r}")

    def check(self, shape: tuple[int, ...]) -> None:
        enough = len(shape) >= max(2, -self.axis)
        if not enough or shape[self.axis] % self.m:
            which = "the last but one" if self.axis == -2 else f"number {self.axis}"
            some = [m for m in range(self.n + 1, 9) if enough and shape[self.axis] % m == 0]
            fitting = f", such as NofM({self.n}, {some[-1]})" if some else ""
            raise ValueError(
                f"NofM({self.n}, {self.m}) wants an input axis, {which}, that {self.m} divides, got {shape}; "
                f"choose an m that does{fitting}, or a part of all weights, such as Prune(fraction=0.5)"
            )

    def oriented(self, layout: str, rank: int) -> Scheme:
        return dataclasses.replace(self, axis=inputs_axis(layout, rank))

    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        del mu
        return xs, [self._select(abs(s)) for s in scaled_norms(xs, roots, None)]

    def allows(self, masks: Masks) -> Bool[Array, ""]:
        most = [jnp.max(jnp.sum(self._runs(mask), -2, dtype=jnp.int32)) for mask in masks]
        return functools.reduce(jnp.maximum, most) <= self.n

    def share(self, groups: int) -> float:
        del groups
        return self.n / self.m

    def _select(self, sizes: Float[Array, "..."]) -> Bool[Array, "..."]:
        chosen = largest_in_runs(self._runs(sizes), self.n)
        return jnp.moveaxis(chosen.reshape(jnp.moveaxis(sizes, self.axis, -2).shape), -2, self.axis)

    def _runs(self, a: Array) -> Array:
        """(..., runs, m, outputs)."""
        turned = jnp.moveaxis(a, self.axis, -2)
        *stacked, inputs, outputs = turned.shape
        return turned.reshape(*stacked, inputs // self.m, self.m, outputs)


def _check_number(count: int | None, fraction: float | None) -> None:
    if (count is None) == (fraction is None):
        raise ValueError(f"expected either count= or fraction=, got {count!r} and {fraction!r}")
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 0):
        raise ValueError(f"expected count= an int >= 0, got {count!r}; a part of all is fraction=")
    if fraction is not None and (
        isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 <= fraction <= 1
    ):
        raise ValueError(f"expected fraction= a part of all from 0 to 1, got {fraction!r}; a number of them is count=")


def _number(count: int | None, fraction: float | None, sizes: list[Array]) -> int:
    """How many of all groups are kept."""
    groups = sum(s.size for s in sizes)
    return min(count or 0, groups) if fraction is None else round(fraction * groups)


def _share(count: int | None, fraction: float | None, groups: int) -> float:
    """Which part of all groups is kept."""
    return min((count or 0) / groups, 1.0) if fraction is None else float(fraction)
