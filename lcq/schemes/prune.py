"""Pruning: sparse arrays, by weights, groups or filters; their number, norm or penalty is given.

    kept      Pi(x) = argmin sum_i h_i (x_i - Theta_i)^2   s.t.  at most kappa groups are not zero
    radius    Pi(x) = argmin sum_i h_i (x_i - Theta_i)^2   s.t.  sum_g ||Theta_g||_2 <= radius
    penalty   Pi(x) = argmin sum_i h_i (x_i - Theta_i)^2 + (2/mu) alpha C(Theta),   C their number, or the sum of norms

A group is a single weight unless `group` says otherwise; then sum_g ||Theta_g|| is the l1 norm.

Source: Carreira-Perpinan & Idelbayev, "Learning-compression algorithms for neural net pruning", CVPR 2018; groups:
Yuan & Lin, J. R. Statist. Soc. B 68, 2006.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool

from lcq.forms import Sparse
from lcq.forms.axes import block_lengths, inputs_axis
from lcq.forms.base import Form
from lcq.forms.blocks import Per, block_counts, blocks, compute_dtype, cut_axes, explicit_sharding, join_axes
from lcq.forms.dtypes import format_name, nearest_number
from lcq.schemes.base import SCHEMES, Scheme
from lcq.schemes.grouped import cut
from lcq.schemes.kmeans.kmeans import KMeans
from lcq.schemes.topk import largest, largest_in_runs, shrinkage

_PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


@SCHEMES.register("Prune")
@dataclasses.dataclass(frozen=True)
class Prune(Scheme):
    """Projection on sparse arrays. One of `kept`, `radius` and `penalty` sets the sparsity.

    Several leaves of a joint task compete for one budget.

    Attributes:
        kept: Largest number of groups that are kept: a part of all (a float up to 1), a number (an int), or "n:m", n of
            every m consecutive weights along the input axis. The largest are kept, ties by position.
        radius: Bound of the l1 norm, of the sum of norms if there are groups: what is beyond is shrunk towards zero.
        penalty: Price alpha of a group; then `mu` is needed. Keeps groups with ||x_g||^2 > 2 alpha/mu (l0), or shrinks
            norms by alpha/mu (l1).
        norm: Norm of a penalty: "l0", the number of groups, or "l1", the sum of their norms.
        group: What is kept or dropped together: None for single weights; "channel" for all weights of an index of the
            last axis, an output unit or filter; an int or a tuple for blocks, see `lcq.forms.blocks.block_counts`.
        values: Format of kept values: None as they are, the name of a shorter dtype such as "bfloat16", or KMeans(16)
            and the like for a codebook, fitted to the weights that are kept; one for each task.
        axis: Axis of inputs, for "n:m", counted from the end.

    Raises:
        ValueError: none or several of kept, radius and penalty, or one out of range.

    Example:
        >>> Prune(kept=2).project(jnp.array([0.5, -3.0, 1.0, 2.0])).dense()
        Array([ 0., -3.,  0.,  2.], dtype=float32)
        >>> Prune(radius=3.0).project(jnp.array([0.5, -3.0, 1.0, 2.0])).dense().round(3)
        Array([ 0., -2.,  0.,  1.], dtype=float32)
        >>> Prune(penalty=1.0).project(jnp.array([0.5, -3.0, 1.0, 2.0]), mu=1.0).dense()
        Array([ 0., -3.,  0.,  2.], dtype=float32)
    """

    kept: int | float | str | None = None
    radius: float | None = None
    penalty: float | None = None
    norm: str = "l0"
    group: Per = None
    values: str | KMeans | None = None
    axis: int = -2
    _is_part: bool = dataclasses.field(init=False, repr=False, default=False)  # 1.0 == 1, but all is not one

    def __post_init__(self) -> None:
        given = [name for name in ("kept", "radius", "penalty") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of kept=, radius=, penalty=, got {' and '.join(given) or 'none'}")
        if isinstance(self.group, list):
            object.__setattr__(self, "group", tuple(self.group))
        if self.radius is not None:
            object.__setattr__(self, "norm", "l1")
        if self.norm not in ("l0", "l1") or (self.kept is not None and self.norm != "l0"):
            raise ValueError(
                f"expected norm='l0', or 'l1' with radius= or penalty=, got {self.norm!r} with {given[0]}="
            )
        self._check_amount()
        object.__setattr__(self, "_is_part", isinstance(self.kept, float))
        if isinstance(self.values, KMeans) and self.values.per is not None:
            raise ValueError(
                f"values: expected a floating-point format or KMeans(...) without per=, got {self.values!r}"
            )
        if self.values is not None and not isinstance(self.values, KMeans):
            object.__setattr__(self, "values", format_name(self.values, "values", "KMeans(...)"))

    def _check_amount(self) -> None:
        kept = self.kept
        if isinstance(kept, str):
            found = _PATTERN.fullmatch(kept)
            if not found or not int(found[1]) <= int(found[2]) <= 1024 or self.group is not None:
                raise ValueError(f"expected kept='n:m' with n <= m <= 1024, without group=, got {kept!r}")
        elif isinstance(kept, bool) or not isinstance(kept, int | float | None) or (isinstance(kept, int) and kept < 0):
            raise ValueError(f"expected kept= a number >= 0, or a part of all as a float up to 1.0, got {kept!r}")
        elif isinstance(kept, float) and not 0 <= kept <= 1:
            raise ValueError(f"expected kept= a part of all between 0.0 and 1.0, or a number as an int, got {kept!r}")
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis >= 0:
            raise ValueError(f"expected axis= a number below 0, counted from the last axis, got {self.axis!r}")
        for name in ("radius", "penalty"):
            if (amount := getattr(self, name)) is not None and not 0 <= amount < math.inf:
                raise ValueError(f"expected {name} >= 0 and finite, got {amount!r}")

    @property
    def leaf_arrays(self) -> int:
        return 2

    @property
    def host(self) -> bool:
        return isinstance(self.values, KMeans) and self.values.host

    @property
    def costly(self) -> bool:
        return self.penalty is not None

    @property
    def _runs(self) -> tuple[int, int] | None:
        """(n, m) of kept="n:m"."""
        if not isinstance(self.kept, str):
            return None
        n, m = self.kept.split(":")
        return int(n), int(m)

    def check(self, shape: tuple[int, ...]) -> None:
        if self._runs is None:
            self._counts(shape)
        elif len(shape) < max(2, -self.axis) or shape[self.axis] % self._runs[1]:
            which = "the last but one" if self.axis == -2 else f"number {self.axis}"
            some = [m for m in range(2, 9) if len(shape) >= max(2, -self.axis) and shape[self.axis] % m == 0]
            fitting = f", such as 'n:{some[-1]}'" if some else ""
            raise ValueError(
                f"kept={self.kept!r} wants an input axis, {which}, that {self._runs[1]} divides, "
                f"got {shape}; choose an m that does{fitting}, or a part of all such as kept=0.5"
            )

    @property
    def cuts(self) -> tuple[Per, ...]:
        return (self.group,)

    def oriented(self, layout: str, rank: int) -> Scheme:
        group = block_lengths(self.group, layout, rank)
        return dataclasses.replace(self, group=group, axis=inputs_axis(layout, rank) if self._runs else self.axis)

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any, importance: Any = None) -> tuple[Form, ...]:
        wide = tuple(x.astype(compute_dtype(x.dtype)) for x in xs)
        roots = None if importance is None else tuple(map(jnp.sqrt, importance))
        scaled = wide if roots is None else tuple(x * r for x, r in zip(wide, roots, strict=True))
        if self.norm == "l1":
            wide, masks = self._shrink(wide, roots, mu)
        elif self._runs is not None:
            masks = [self._select_in_runs(abs(s)) for s in scaled]
        else:
            masks = self._select(scaled, mu)
        share = self._share(sum(math.prod(self._counts(x.shape)) for x in xs))
        return tuple(
            Sparse(
                mask,
                values if self.values else nearest_number(values, x.dtype),
                levels,
                group=self._lengths(x.shape),
                share=share,
                dtype=str(x.dtype),
            )
            for x, mask, (values, levels) in zip(
                xs, masks, self._values(wide, masks, previous, importance), strict=True
            )
        )

    def cost(self, forms: tuple[Form, ...]) -> Any:
        """alpha times the number of groups that are not zero, or the sum of their norms."""
        if self.penalty is None:
            return 0.0
        dense = [form.dense() for form in forms]
        norms = [self._norms(x.astype(compute_dtype(x.dtype))) for x in dense]
        if self.norm == "l1":
            return self.penalty * sum(jnp.sum(n) for n in norms)
        return self.penalty * sum(jnp.sum(n > 0, dtype=n.dtype) for n in norms)

    def _select(self, scaled: Sequence[Array], mu: Any) -> list[Bool[Array, "..."]]:
        """Masks of the groups with the largest norms, or with norms above the penalty's threshold."""
        sizes = scaled if self.group is None else [self._norms(s) for s in scaled]
        if self.penalty is not None:
            chosen = [abs(s) > jnp.sqrt(2 * self.penalty / mu) for s in sizes]
        else:
            groups = sum(s.size for s in sizes)
            count = round(self.kept * groups) if isinstance(self.kept, float) else min(int(self.kept or 0), groups)
            chosen = largest(sizes, count)
        return [self._each(s, c) for s, c in zip(scaled, chosen, strict=True)]

    def _select_in_runs(self, sizes: Array) -> Bool[Array, "..."]:
        """The mask of the n largest of every m along the input axis."""
        assert self._runs is not None
        n, m = self._runs
        turned = jnp.moveaxis(sizes, self.axis, -2)
        *stacked, inputs, outputs = turned.shape
        mask = largest_in_runs(turned.reshape(*stacked, inputs // m, m, outputs), n).reshape(turned.shape)
        return jnp.moveaxis(mask, -2, self.axis)

    def _shrink(
        self, xs: tuple[Array, ...], roots: tuple[Array, ...] | None, mu: Any
    ) -> tuple[tuple[Array, ...], list[Bool[Array, "..."]]]:
        """x_g (1 - tau/(h_g ||x_g||))+ with the tau of the radius, or alpha/mu; masks of what is left."""
        norms = [self._norms(x) for x in xs]
        slack = [jnp.ones_like(n) for n in norms]
        if roots is not None:
            if self.group is not None:
                raise ValueError(
                    f"{self}: groups shrink by one factor: expected no importance, got one; drop one of them"
                )
            inverse = [jnp.where(r > 0, 1 / jnp.where(r > 0, r, 1) ** 2, 0) for r in roots]
            slack = [one * i for one, i in zip(slack, inverse, strict=True)]
            norms = [jnp.where(s > 0, n, 0) for n, s in zip(norms, slack, strict=True)]
        tau = shrinkage(norms, self.radius, slack) if self.penalty is None else self.penalty / mu
        factors = [
            jnp.where(n > tau * s, 1 - tau * s / jnp.where(n > 0, n, 1), 0) for n, s in zip(norms, slack, strict=True)
        ]
        if self.radius == 0:
            factors = [jnp.zeros_like(f) for f in factors]
        spread = [self._each(x, f) for x, f in zip(xs, factors, strict=True)]
        return tuple(x * f for x, f in zip(xs, spread, strict=True)), [f > 0 for f in spread]

    def _norms(self, x: Array) -> Array:
        """||x_g|| of every group, one number for each block."""
        counts = self._counts(x.shape)
        each, parts = blocks(x.shape, counts), abs(cut_axes(x, counts))
        if each.size == 1:
            return parts
        top = jnp.max(parts, each.axes, keepdims=True)
        safe = jnp.clip(top, (tiny := jnp.finfo(x.dtype).tiny), 1 / tiny)  # squares neither overflow nor vanish
        return safe * jnp.sqrt(jnp.sum((parts / safe) ** 2, each.axes, keepdims=True))

    def _each(self, x: Array, numbers: Array) -> Array:
        """One number for each group, for each of its weights; laid out as x is."""
        parts = cut_axes(x, self._counts(x.shape))
        return join_axes(jnp.broadcast_to(numbers, parts.shape, out_sharding=explicit_sharding(parts)), x.shape)

    def _counts(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Groups along each axis."""
        return shape if self.group is None else block_counts(self.group, shape)

    def _lengths(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Lengths of a group along the axes of a leaf; () for single weights."""
        return () if self.group is None else tuple(n // c for n, c in zip(shape, self._counts(shape), strict=True))

    def _share(self, groups: int) -> float:
        """The part of the weights that is kept, as far as the settings say; what a form estimates sizes from."""
        if self._runs is not None:
            return self._runs[0] / self._runs[1]
        if isinstance(self.kept, int):
            return min(self.kept / groups, 1.0)
        return self.kept if isinstance(self.kept, float) else 1.0

    def _values(
        self, xs: tuple[Array, ...], masks: Sequence[Array], previous: Any, importance: Any
    ) -> list[tuple[Array, Array | None]]:
        """Kept values, or their codes and the codebook; zero where nothing is kept."""
        if not isinstance(self.values, KMeans):
            kept = (jnp.where(mask, x, 0) for x, mask in zip(xs, masks, strict=True))
            return [(nearest_number(k, self.values or k.dtype), None) for k in kept]
        if importance is None:
            some = functools.reduce(jnp.logical_or, map(jnp.any, masks))
            whole = cut(xs, None)._replace(importance=tuple(mask | ~some for mask in masks))  # a bool takes a byte
        else:
            whole = cut(xs, None, [jnp.where(mask, h, 0) for mask, h in zip(masks, importance, strict=True)])
        codes, levels = self.values.fit(whole, None if previous is None else previous[0].levels)
        return [
            (jnp.where(mask, c, 0).astype(c.dtype), levels.reshape(*(1,) * c.ndim, -1))
            for mask, c in zip(masks, codes, strict=True)
        ]
