"""Sparsity by a norm: the price of a group of weights, the price of its norm, or a bound on the sum of norms.

    L0Penalty   argmin_Theta sum_i h_i (x_i - Theta_i)^2 + (2/mu) alpha #{g: Theta_g != 0}
    L1Penalty   argmin_Theta sum_i h_i (x_i - Theta_i)^2 + (2/mu) alpha sum_g ||Theta_g||
    L1Ball      argmin_Theta sum_i h_i (x_i - Theta_i)^2   s.t.  sum_g ||Theta_g|| <= radius

A group is a single weight unless `group` says otherwise; sum_g ||Theta_g|| is then the l1 norm.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from lcq.forms.base import Form
from lcq.forms.blocks import Per
from lcq.schemes.base import SCHEMES, Importance, Scalar
from lcq.schemes.kmeans.kmeans import KMeans
from lcq.schemes.sparsity import Masks, Sparsifier, check_amount, group_norms, norms_of, scaled_norms, spread
from lcq.schemes.topk import shrinkage

_SLACK = 0.01
"""The part by which rounded values may leave the l1 ball."""


@dataclasses.dataclass(frozen=True)
class Penalty(Sparsifier):
    """A price alpha of each group: for being there, or for the size of its norm.

    Attributes:
        alpha: The price, >= 0.
        group: What is kept or dropped together, as in `Sparsifier`.
        values: Format of kept values, as in `Sparsifier`.

    Raises:
        ValueError: a price that is negative or not finite.
    """

    alpha: float
    group: Per = None
    values: str | KMeans | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount("alpha", self.alpha)

    @property
    def costly(self) -> bool:
        return True


@SCHEMES.register("L0Penalty")
@dataclasses.dataclass(frozen=True)
class L0Penalty(Penalty):
    """Keeps what is worth its price: the groups with sum_{i in g} h_i x_i^2 > 2 alpha/mu.

        Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2 + (2/mu) alpha #{g: Theta_g != 0}

    For leaves of any shape that groups divide; `mu` is needed.

    Attributes:
        alpha: Price of a group that is not zero, >= 0.
        group: What is kept or dropped together: None for single weights; otherwise as in `PruneGroups`.
        values: Format of kept values, as in `Prune`.

    Raises:
        ValueError: a price that is negative or not finite; of a leaf that groups do not divide.

    Example:
        >>> L0Penalty(1.0).project(jnp.array([0.5, -3.0, 1.0, 2.0]), mu=1.0).dense()
        Array([ 0., -3.,  0.,  2.], dtype=float32)

    Source: Carreira-Perpinan & Idelbayev, "Learning-compression algorithms for neural net pruning", CVPR 2018.
    """

    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        assert mu is not None
        worth = [abs(s) > jnp.sqrt(2 * self.alpha / mu) for s in scaled_norms(xs, roots, self.group)]
        return xs, spread(xs, worth, self.group)

    def cost(self, forms: tuple[Form, ...]) -> Scalar:
        """alpha times the number of groups that are not zero."""
        return self.alpha * sum(jnp.sum(n > 0, dtype=n.dtype) for n in norms_of(forms, self.group))


@SCHEMES.register("L1Penalty")
@dataclasses.dataclass(frozen=True)
class L1Penalty(Penalty):
    """Shrinks norms towards zero by alpha/mu: soft thresholding; with groups, as the group lasso does.

        Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2 + (2/mu) alpha sum_g ||Theta_g||
              = x_g max(1 - alpha/(mu h_g ||x_g||), 0) for every g

    For leaves of any shape that groups divide; `mu` is needed. Groups of several weights take no importance h.

    Attributes:
        alpha: Price of a norm of one, >= 0.
        group: What is shrunk together: None for single weights; otherwise as in `PruneGroups`.
        values: Format of kept values, as in `Prune`.

    Raises:
        ValueError: a price that is negative or not finite; of a leaf that groups do not divide; an importance of
            weights in groups.

    Example:
        >>> L1Penalty(1.0).project(jnp.array([0.5, -3.0, 1.0, 2.0]), mu=1.0).dense().round(3)
        Array([ 0., -2.,  0.,  1.], dtype=float32)

    Source: Carreira-Perpinan & Idelbayev, CVPR 2018; groups: Yuan & Lin, J. R. Statist. Soc. B 68, 2006.
    """

    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        assert mu is not None
        norms, slack = _norms_and_slack(self, xs, roots)
        return _shrunk(xs, _factors(norms, slack, self.alpha / mu), self.group)

    def cost(self, forms: tuple[Form, ...]) -> Scalar:
        """alpha times the sum of norms."""
        return self.alpha * sum(jnp.sum(n) for n in norms_of(forms, self.group))


@SCHEMES.register("L1Ball")
@dataclasses.dataclass(frozen=True)
class L1Ball(Sparsifier):
    """Projection on the l1 ball: what is beyond is shrunk towards zero, all norms by the same tau.

        Pi(x) = argmin_Theta sum_i h_i (x_i - Theta_i)^2   s.t.  sum_g ||Theta_g|| <= radius
              = x_g max(1 - tau/(h_g ||x_g||), 0) for every g

    For leaves of any shape that groups divide; those of a joint task share one radius. Groups of several weights take
    no importance h.

    Attributes:
        radius: Bound of the l1 norm, of the sum of norms if there are groups, >= 0.
        group: What is shrunk together: None for single weights; otherwise as in `PruneGroups`.
        values: Format of kept values, as in `Prune`.

    Raises:
        ValueError: a radius that is negative or not finite; of a leaf that groups do not divide; an importance of
            weights in groups.

    Example:
        >>> L1Ball(3.0).project(jnp.array([0.5, -3.0, 1.0, 2.0])).dense().round(3)
        Array([ 0., -2.,  0.,  1.], dtype=float32)

    Source: Carreira-Perpinan & Idelbayev, CVPR 2018; groups: Yuan & Lin, J. R. Statist. Soc. B 68, 2006.
    """

    radius: float
    group: Per = None
    values: str | KMeans | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount("radius", self.radius)

    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        del mu
        norms, slack = _norms_and_slack(self, xs, roots)
        factors = _factors(norms, slack, shrinkage(norms, self.radius, slack))
        return _shrunk(xs, factors if self.radius else [jnp.zeros_like(f) for f in factors], self.group)

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        del mu
        size = sum(jnp.sum(n) for n in norms_of(forms, self.group))
        return jnp.where(size <= self.radius * (1 + _SLACK), 0.0, jnp.inf)


def _norms_and_slack(
    scheme: L1Penalty | L1Ball, xs: tuple[Array, ...], roots: tuple[Array, ...] | None
) -> tuple[list[Float[Array, "..."]], list[Float[Array, "..."]]]:
    """||x_g|| and 1/h_g; both zero where h_g is."""
    norms = [group_norms(x, scheme.group) for x in xs]
    if roots is None:
        return norms, [jnp.ones_like(n) for n in norms]
    if scheme.group is not None:
        raise ValueError(f"{scheme}: groups shrink by one factor: expected no importance, got one; drop one of them")
    inverse = [jnp.where(r > 0, 1 / jnp.where(r > 0, r, 1) ** 2, 0) for r in roots]
    slack = [jnp.ones_like(n) * i for n, i in zip(norms, inverse, strict=True)]
    return [jnp.where(s > 0, n, 0) for n, s in zip(norms, slack, strict=True)], slack


def _factors(norms: list[Array], slack: list[Array], tau: Scalar) -> list[Float[Array, "..."]]:
    """max(1 - tau/(h_g ||x_g||), 0)."""
    return [jnp.where(n > tau * s, 1 - tau * s / jnp.where(n > 0, n, 1), 0) for n, s in zip(norms, slack, strict=True)]


def _shrunk(xs: tuple[Array, ...], factors: list[Array], group: Per) -> tuple[tuple[Array, ...], Masks]:
    """The weights times the factor of their group, and masks of what is left."""
    each = spread(xs, factors, group)
    return tuple(x * f for x, f in zip(xs, each, strict=True)), [f > 0 for f in each]
