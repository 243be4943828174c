"""What all schemes of sparse arrays share: groups of weights are kept or become zero, and kept values are stored.

A group g is a single weight, or a block of a leaf, and has the norm ||x_g||. A scheme says which groups it keeps and by
which factor it shrinks them; here are the norms of groups, and the values that are stored of what is kept.

Source: Carreira-Perpinan & Idelbayev, "Learning-compression algorithms for neural net pruning", CVPR 2018; groups:
Yuan & Lin, J. R. Statist. Soc. B 68, 2006.
"""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcq.forms import Sparse
from lcq.forms.axes import block_lengths
from lcq.forms.base import Form
from lcq.forms.blocks import Per, block_counts, blocks, compute_dtype, cut_axes, explicit_sharding, join_axes
from lcq.forms.dtypes import format_name, nearest_number
from lcq.schemes.base import Earlier, Importance, Scalar, Scheme
from lcq.schemes.grouped import cut
from lcq.schemes.kmeans.kmeans import KMeans

Masks = list[Bool[Array, "..."]]


class Sparsifier(Scheme):
    """A scheme whose forms are `Sparse`.

    Attributes:
        group: What is kept or dropped together: None for single weights; "channel" for all weights of an index of the
            last axis, an output unit or filter; an int or a tuple for blocks, see `lcq.forms.blocks.block_counts`.
        values: Format of kept values: None as they are, the name of a shorter dtype such as "bfloat16", or KMeans(16)
            and the like for a codebook, fitted to the weights that are kept; one for each task.
    """

    group: Per
    values: str | KMeans | None

    def __post_init__(self) -> None:
        if isinstance(self.group, list):
            object.__setattr__(self, "group", tuple(self.group))
        if isinstance(self.values, KMeans):
            if self.values.per is not None:
                raise ValueError(
                    f"values: expected a floating-point format or KMeans(...) without per=, got {self.values!r}"
                )
        elif self.values is not None:
            object.__setattr__(self, "values", format_name(self.values, "values", "KMeans(...)"))

    @abc.abstractmethod
    def keep(self, xs: tuple[Array, ...], roots: Importance, mu: Scalar | None) -> tuple[tuple[Array, ...], Masks]:
        """The weights, shrunk where the scheme shrinks, and the masks of those that are kept.

        Args:
            xs: in float32 or wider.
            roots: of the importance of each weight, if there is one.
            mu: the penalty weight, for schemes with a cost.
        """

    def allows(self, masks: Masks) -> Bool[Array, ""] | bool:
        """Whether so much may be kept; a form of an earlier run may have had other settings."""
        del masks
        return True

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        """(2/mu) C(Theta), infinite beyond the constraint."""
        allowed = self.allows([form.mask for form in forms if isinstance(form, Sparse)])
        return super().charge(forms, mu) + jnp.where(allowed, 0.0, jnp.inf)

    def share(self, groups: int) -> float:
        """The part of so many groups that is kept, as far as the settings say; what a form estimates sizes from."""
        del groups
        return 1.0

    @property
    def leaf_arrays(self) -> int:
        return 2

    @property
    def host(self) -> bool:
        return isinstance(self.values, KMeans) and self.values.host

    @property
    def cuts(self) -> tuple[Per, ...]:
        return (self.group,)

    def check(self, shape: tuple[int, ...]) -> None:
        group_counts(self.group, shape)

    def oriented(self, layout: str, rank: int) -> Scheme:
        same: Any = self  # a dataclass, as all schemes are
        return self if self.group is None else dataclasses.replace(same, group=block_lengths(self.group, layout, rank))

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        roots = None if importance is None else tuple(map(jnp.sqrt, importance))
        kept, masks = self.keep(tuple(x.astype(compute_dtype(x.dtype)) for x in xs), roots, mu)
        share = self.share(sum(math.prod(group_counts(self.group, x.shape)) for x in xs))
        stored = self._stored(kept, masks, previous, importance)
        return tuple(
            Sparse(
                mask,
                values if self.values else nearest_number(values, x.dtype),
                levels,
                group=_lengths(self.group, x.shape),
                share=share,
                dtype=str(x.dtype),
            )
            for x, mask, (values, levels) in zip(xs, masks, stored, strict=True)
        )

    def _stored(
        self, xs: tuple[Array, ...], masks: Masks, previous: Earlier, importance: Importance
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
        warm = previous[0].levels if previous and isinstance(previous[0], Sparse) else None
        codes, levels = self.values.fit(whole, warm)
        return [
            (jnp.where(mask, c, 0).astype(c.dtype), levels.reshape(*(1,) * c.ndim, -1))
            for mask, c in zip(masks, codes, strict=True)
        ]


def group_counts(group: Per, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Groups along each axis."""
    return shape if group is None else block_counts(group, shape)


def group_norms(x: Float[Array, "..."], group: Per) -> Float[Array, "..."]:
    """||x_g|| of every group, one number for each block."""
    counts = group_counts(group, x.shape)
    each, parts = blocks(x.shape, counts), abs(cut_axes(x, counts))
    if each.size == 1:
        return parts
    top = jnp.max(parts, each.axes, keepdims=True)
    safe = jnp.clip(top, (tiny := jnp.finfo(x.dtype).tiny), 1 / tiny)  # squares neither overflow nor vanish
    return safe * jnp.sqrt(jnp.sum((parts / safe) ** 2, each.axes, keepdims=True))


def scaled_norms(
    xs: Sequence[Float[Array, "..."]], roots: Sequence[Float[Array, "..."]] | None, group: Per
) -> list[Float[Array, "..."]]:
    """Norms of the groups of sqrt(h) x; of single weights these themselves, of either sign: |x| would be a copy."""
    scaled = list(xs) if roots is None else [x * r for x, r in zip(xs, roots, strict=True)]
    return scaled if group is None else [group_norms(s, group) for s in scaled]


def spread(xs: Sequence[Array], numbers: Sequence[Array], group: Per) -> list[Array]:
    """One number for each group, for each of its weights; laid out as the weights are."""

    def each(x: Array, number: Array) -> Array:
        parts = cut_axes(x, group_counts(group, x.shape))
        return join_axes(jnp.broadcast_to(number, parts.shape, out_sharding=explicit_sharding(parts)), x.shape)

    return [each(x, number) for x, number in zip(xs, numbers, strict=True)]


def norms_of(forms: Sequence[Form], group: Per) -> list[Float[Array, "..."]]:
    """Norms of the groups of what forms stand for."""
    dense = [form.dense() for form in forms]
    return [group_norms(x.astype(compute_dtype(x.dtype)), group) for x in dense]


def check_amount(name: str, amount: float) -> None:
    """Raises ValueError if a price or radius is no number >= 0."""
    if not 0 <= amount < math.inf:
        raise ValueError(f"expected {name} >= 0 and finite, got {amount!r}")


def _lengths(group: Per, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Lengths of a group along the axes of a leaf; () for single weights."""
    return () if group is None else tuple(n // c for n, c in zip(shape, group_counts(group, shape), strict=True))
