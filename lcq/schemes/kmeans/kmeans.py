"""Learned codebooks: one-dimensional k-means."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms import Codes
from lcq.forms.base import Form
from lcq.forms.blocks import Per, blocks, explicit_sharding
from lcq.forms.meshes import by_compiler, explicit_mesh, is_shared, placed_on, spec_of
from lcq.schemes.base import SCHEMES, Earlier, Importance, Quantizer, Scalar
from lcq.schemes.grouped import Cut, cut
from lcq.schemes.kmeans.columns import by_columns, column_pass, is_large
from lcq.schemes.kmeans.ecvq import (
    MOST,
    Coded,
    Price,
    code_bits,
    coded_pass,
    conclude,
    descend_coded,
    even_levels,
    merged_levels,
    objective,
)
from lcq.schemes.kmeans.exact import best_levels
from lcq.schemes.kmeans.init import EXACT, Fixed, explore, few_levels, summarise
from lcq.schemes.kmeans.lloyd import Centres, assign, cell_counts, descend, lloyd_pass
from lcq.schemes.kmeans.short import fit_short, is_short
from lcq.schemes.scales import power_of_two

_COLD = 150
"""Passes over a histogram, or over data that are no longer than one; a fifth of them over many short blocks."""

_SHORT = 1 << 18
"""Numbers up to which all of these passes are affordable."""

_WIDEST = 512
"""Levels, at most, that are merged at a cold start with a rate."""

_WARM = 3
"""Passes over the data, at most, before the one that gives the codes; few, because a C step has a warm start."""

_WARM_COLUMNS = 2
"""The same where many numbers are in many blocks."""

_COLD_COLUMNS = 5
"""The same there at a cold start: further ones take off less than a thousandth of the error."""


@SCHEMES.register("KMeans")
@dataclasses.dataclass(frozen=True)
class KMeans(Quantizer):
    """Projection on a codebook of K learned values: Pi(x) = argmin_{c, z} sum_i h_i (x_i - c_{z_i})^2, h = 1 or given.

    By default Lloyd's algorithm, sort-free, jit-able and vmap-able: a good local minimum, and x itself if x has at
    most K distinct values. Cold, it starts from the best partition of a histogram's bins (above 64 learned levels from
    density^(1/3) quantiles) and converges on a histogram before it sees the data; warm, from the previous codebook: a
    few passes over the data, none of which raises the error. A million numbers in hundreds of blocks, without fixed
    levels, get a few passes cold too, from a coarser partition. On CPUs many blocks of at most 64 numbers, without
    fixed levels, get the best partition of these numbers, cold and warm, on meshes too. Sums of |x| must be finite in
    float32.

    With a `rate` the codes are made to be entropy-coded, at most K of them:

        Pi(x) = argmin_{c, z} sum_i h_i (x_i - c_{z_i})^2 + rate sum_i len(z_i),    len(k) = -log2 p_k,

    p_k the share of the numbers under the codebook that have code k. No pass raises this sum. A level that loses all of
    its numbers stays unused. Cold, the best of three starts: the codebook without a rate, one of equal steps, and twice
    as many levels of which neighbours are merged.

    Attributes:
        k: Number of levels, 1 to 65,536.
        fixed: Levels among the k that are given and do not move: (0.0,) prunes and quantizes at once.
        exact: Whether to find the global minimum in float64 by dynamic programming, on the host; any warm start is
            ignored.
        per: What shares one codebook, see `lcq.forms.blocks.block_counts`.
        rate: Squared distance that one bit is worth, times the importance where there is one, so that not only ratios
            matter. One rate for several leaves allocates the bits between them at the least distance.

    Raises:
        ValueError: k out of range; fixed levels that are not finite and distinct, or more than k; a rate that is
            negative, not finite, or together with `exact`.

    Example:
        >>> KMeans(2).project(jnp.array([1.0, 2.0, 3.0, 9.0])).dense()
        Array([2., 2., 2., 9.], dtype=float32)
        >>> KMeans(2, fixed=(0,)).project(jnp.array([1.0, 2.0, 3.0, 9.0])).dense()
        Array([0., 0., 0., 9.], dtype=float32)
        >>> KMeans(3, rate=0.5).project(jnp.array([1.0, 1.0, 1.0, 1.0, 2.0, 9.0, 9.0, 9.0])).dense()
        Array([1.2, 1.2, 1.2, 1.2, 1.2, 9. , 9. , 9. ], dtype=float32)

    Source: Lloyd 1982; Carreira-Perpinan & Idelbayev, arXiv 1707.04319, section 4.1; exact: Wu & Rokne 1989;
    rate: Chou, Lookabaugh & Gray 1989.
    """

    k: int
    fixed: tuple[float, ...] = ()
    exact: bool = False
    per: Per = None
    rate: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or not 1 <= self.k <= 65536:
            raise ValueError(f"expected 1 to 65,536 levels, got k={self.k!r}; pass an int in that range")
        fixed = tuple(sorted(float(np.float32(v)) for v in self.fixed))
        if not all(map(math.isfinite, fixed)) or len(set(fixed)) < len(fixed) or len(fixed) > self.k:
            raise ValueError(
                f"expected at most k={self.k} distinct finite fixed levels, got {self.fixed!r}; drop some or raise k"
            )
        object.__setattr__(self, "fixed", fixed)
        if isinstance(self.per, list):
            object.__setattr__(self, "per", tuple(self.per))
        if not isinstance(self.rate, int | float | np.number) or not 0 <= self.rate <= np.finfo(np.float32).max:
            raise ValueError(f"expected a rate >= 0, finite in float32, got {self.rate!r}")
        object.__setattr__(self, "rate", float(self.rate))
        if self.exact and self.rate:
            raise ValueError(
                f"expected exact=True or a rate, got both, rate={self.rate!r}: with one there is no exact solver"
            )

    @property
    def host(self) -> bool:
        return self.exact

    def solve(
        self, xs: tuple[Array, ...], previous: Earlier, mu: Scalar | None, importance: Importance = None
    ) -> tuple[Form, ...]:
        del mu
        whole = cut(xs, self.per, importance)
        if self.rate:
            price = Price(_rate(self.rate, whole, xs, importance), each=importance is not None)
            codes, levels = _fit_coded(self, whole, price, _coded(previous))
        else:
            codes, levels = self.fit(whole, None if previous is None else _coded(previous)[0].levels)
        leaves = zip(xs, codes, whole.counts, strict=True)
        return tuple(
            Codes(c.reshape(x.shape), levels=levels.reshape(*count, self.k), dtype=str(x.dtype))
            for x, c, count in leaves
        )

    def charge(self, forms: tuple[Form, ...], mu: Scalar | None) -> Scalar:
        """rate sum_i len(z_i)."""
        del mu
        pairs = [(form.codes, form.levels) for form in _coded(forms)]
        return self.rate * code_bits([c for c, _ in pairs], pairs[0][1], self.per) if self.rate else 0.0

    def fit(self, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
        """Codes of every leaf, cut into blocks, and the levels they share; `warm` are those of an earlier fit."""
        if self.rate:
            raise ValueError(f"{self}: expected no rate where a codebook is for a part of the weights; drop rate=")
        return _solve_exactly(self, whole) if self.exact else _fit(self, whole, warm)


def _coded(forms: Earlier) -> tuple[Codes, ...]:
    return tuple(form for form in forms or () if isinstance(form, Codes))


def _fit(scheme: KMeans, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
    """Codes of every leaf in blocks, and the levels they share; which algorithm, does not depend on where they lie."""
    if not scheme.fixed and scheme.k <= EXACT and is_short(whole):
        return _fit_short(scheme, whole, warm)
    if not scheme.fixed and is_large(whole, scheme.k):
        return _fit_large(scheme, whole, warm)
    return _fit_by_passes(scheme, whole, warm)


def _on_columns(fast: Callable[..., Any], other: Callable[..., Any], whole: Cut) -> Callable[..., Any]:
    """A function of the leaves of a cut, their importance, and levels: on a CPU, where columns are fast, fast(cut,
    levels), and other(cut, levels) elsewhere."""

    def on(fit: Callable[..., Any]) -> Callable[..., Any]:
        return lambda leaves, importance, levels: fit(whole._replace(leaves=leaves, importance=importance), levels)

    return functools.partial(jax.lax.platform_dependent, cpu=on(fast), default=on(other))


def _fit_short(scheme: KMeans, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
    """The best partition of every block."""
    warm = None if warm is None else warm.reshape(*whole.blocks[0].stat, scheme.k)
    best, mesh = functools.partial(fit_short, k=scheme.k), explicit_mesh(whole.leaves)
    fit, onto = _on_columns(best, functools.partial(_fit_by_passes, scheme), whole), None
    if mesh is not None:  # codes lie as the leaves do, levels as their blocks
        first = zip(whole.blocks[0].stat, spec_of(whole.leaves[0]), strict=True)
        of_blocks = [None if n == 1 else name for n, name in first]
        onto = [placed_on(mesh, spec) for spec in (*map(spec_of, whole.leaves), (*of_blocks, None))]
    return by_compiler(fit, onto, whole.leaves, whole.importance, warm)


def _fit_large(scheme: KMeans, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
    """A few passes; where a level has lost all of its numbers, those that find it others."""
    levels = None if warm is None else warm.reshape(*whole.blocks[0].stat, scheme.k)
    by_sums = functools.partial(_few_passes, k=scheme.k)
    if is_shared(whole.leaves) or explicit_mesh(whole.leaves):  # which may cut a block: each device adds what it has
        codes, levels, mass = by_sums(whole, levels)
    else:
        over_columns = functools.partial(by_columns, solve=functools.partial(_few_column_passes, k=scheme.k))
        codes, levels, mass = _on_columns(over_columns, by_sums, whole)(whole.leaves, whole.importance, levels)

    def find_others(now: tuple[Any, ...]) -> tuple[Any, ...]:
        return *_fit_by_passes(scheme, whole, now[1]), jnp.bool_(False)

    # A loop of at most one turn: under vmap a cond would be computed whether it is needed or not.
    return jax.lax.while_loop(lambda now: now[2], find_others, (codes, levels, jnp.any(mass <= 0)))[:2]


def _few_column_passes(x: Array, h: Array | None, levels: Array | None, k: int) -> tuple[Array, Array, Array]:
    """Codes, levels and masses of columns [n, lanes]."""
    if levels is not None:
        return column_pass(x, h, levels, _WARM_COLUMNS)
    counts = (1, *x.shape[1:])
    columns = Cut((x,), (blocks(x.shape, counts),), (counts,), None if h is None else (h,))
    start = few_levels(columns, k).reshape(*x.shape[1:], k)
    return column_pass(x, h, jnp.moveaxis(start, -1, 0), _COLD_COLUMNS)


def _few_passes(whole: Cut, levels: Array | None, k: int) -> tuple[tuple[Array, ...], Array, Array]:
    """What passes over columns give, by sums over whole axes."""
    passes = _COLD_COLUMNS if levels is None else _WARM_COLUMNS
    levels = few_levels(whole, k) if levels is None else levels
    centres = Centres(levels, jnp.ones_like(levels, bool))
    for _ in range(passes):
        centres = lloyd_pass(whole, centres)[1]
    codes, centres, mass = lloyd_pass(whole, centres)
    return codes, centres.levels, mass.astype(levels.dtype)


def _fit_by_passes(scheme: KMeans, whole: Cut, warm: Array | None) -> tuple[tuple[Array, ...], Array]:
    """Lloyd's algorithm, wherever leaves lie."""
    passes, learned = _WARM, scheme.k - len(scheme.fixed)
    if warm is not None:
        centres = Centres(*_freeze(warm.reshape(*whole.blocks[0].stat, scheme.k), scheme.fixed))
    else:
        short, centres, many = _explore(whole, learned, scheme.fixed, twice=True)
        if short is whole:
            passes = many if learned > EXACT else 0  # these were taken
    if learned and passes:
        centres = descend(whole, centres, passes)
    codes, centres, _ = lloyd_pass(whole, centres)
    return codes, centres.levels


def _explore(whole: Cut, learned: int, fixed: Fixed, *, twice: bool = False) -> tuple[Cut, Centres, int]:
    """What stands in for the data at a cold start, the best levels found there, and how many passes it may take.

    `twice` takes twice as many where nothing stands in for them: then no others need follow.
    """
    stat, k = whole.blocks[0].stat, learned + len(fixed)
    if learned == 0:
        return whole, _merge(jnp.zeros((*stat, 0), whole.leaves[0].dtype), fixed), _WARM
    short, levels = summarise(whole, learned, fixed)
    many = _COLD if sum(x.size for x in short.leaves) <= _SHORT else _COLD // 5
    start = _merge(levels, fixed)
    if learned <= EXACT:
        centres = descend(short, start, 2 * many if twice and short is whole else many)
    else:
        centres = explore(short, start, many)
    return short, Centres(*(a.reshape(*stat, k) for a in centres)), many


def _solve_exactly(scheme: KMeans, whole: Cut) -> tuple[tuple[Array, ...], Array]:
    """The same by dynamic programming over every block, on the host."""
    rows, importance = whole.rows()
    each = [None] * len(rows) if importance is None else importance
    levels = np.stack([best_levels(x, scheme.k, scheme.fixed, h) for x, h in zip(rows, each, strict=True)])
    levels = levels.astype(whole.leaves[0].dtype).reshape(*whole.blocks[0].stat, scheme.k)
    shaped = [jnp.asarray(levels.reshape(*b.stat, scheme.k)) for b in whole.blocks]
    return tuple(assign(x, level) for x, level in zip(whole.leaves, shaped, strict=True)), shaped[0]


def _merge(levels: Array, fixed: Fixed) -> Centres:
    """Free levels together with the fixed ones, in order."""
    frozen = jnp.zeros_like(levels.sum(-1, keepdims=True)) + jnp.asarray(fixed, levels.dtype)  # sharded like levels
    free = jnp.concatenate([jnp.ones_like(levels, bool), jnp.zeros_like(frozen, bool)], -1)
    return Centres(*jax.lax.sort((jnp.concatenate([levels, frozen], -1), free), num_keys=2))


def _freeze(levels: Array, fixed: Fixed, *others: Array) -> Sequence[Array]:
    """Levels of an earlier solution, the nearest one to each fixed level being frozen there; which are free; `others`
    in the same order."""
    free = jnp.ones_like(levels, bool)
    for value in fixed:
        distance = jnp.where(free, jnp.abs(levels - value), jnp.inf)
        here = jnp.arange(levels.shape[-1]) == jnp.argmin(distance, -1)[..., None]
        levels, free = jnp.where(here, value, levels), free & ~here
    return jax.lax.sort((levels, free, *others), num_keys=2) if fixed else (levels, free, *others)


def _rate(rate: float, whole: Cut, xs: tuple[Array, ...], importance: Importance) -> Array:
    """What a bit is worth in every block, in units of the weights of the cut: their mean is one there."""
    stat, kind = whole.blocks[0].stat, whole.leaves[0].dtype
    if importance is None:
        return jnp.full((*stat, 1), rate, kind)
    plain, size = whole._replace(importance=None), sum(b.size for b in whole.blocks)
    same = [
        jnp.broadcast_to(h, x.shape, out_sharding=explicit_sharding(x)) for h, x in zip(importance, xs, strict=True)
    ]
    same = [h.reshape(b.split) for h, b in zip(same, whole.blocks, strict=True)]
    mean = plain.sum([h / size for h in same])
    return (rate / jnp.where(plain.max(same) >= jnp.finfo(kind).tiny, mean, 1))[..., None]


def _fit_coded(
    scheme: KMeans, whole: Cut, price: Price, previous: tuple[Codes, ...]
) -> tuple[tuple[Array, ...], Array]:
    """Codes of every leaf in blocks, and the levels they share, for a rate.

    Weights are in units of a power of two near the largest: squares neither overflow nor vanish.
    """
    unit = power_of_two(jnp.max(whole.max([jnp.abs(x) for x in whole.leaves])))
    leaves = [x / unit for x in whole.leaves]
    if whole.importance is not None:
        leaves = [jnp.clip(x, -2, 2) for x in leaves]  # what weighs nothing is of any size
    whole, fixed = whole._replace(leaves=tuple(leaves)), tuple(value / unit for value in scheme.fixed)
    price = price._replace(rate=jnp.minimum(price.rate / unit / unit, MOST))
    if not previous:
        start, passes = _begin(whole, scheme.k, fixed, price)
    else:
        levels, passes = previous[0].levels.reshape(*whole.blocks[0].stat, scheme.k) / unit, _WARM
        codes = [form.unpack().codes.reshape(b.split) for form, b in zip(previous, whole.blocks, strict=True)]
        number = cell_counts(whole._replace(importance=None), codes, levels).astype(levels.dtype)
        start = Coded(*_freeze(levels, fixed, number))
    found, levels = conclude(whole, descend_coded(whole, start, price, passes), price)
    return found, levels * unit


def _begin(whole: Cut, k: int, fixed: Fixed, price: Price) -> tuple[Coded, int]:
    """The best of three cold starts in every block, and how many passes over the data it needs."""
    learned = k - len(fixed)
    short, centres, many = _explore(whole, learned, fixed)
    stat = short.blocks[0].stat
    price = Price(price.rate.reshape(*stat, 1), price.each and short is whole)
    starts = [Centres(*(a.reshape(*stat, k) for a in centres))]
    if learned:
        starts.append(_merge(even_levels(short, learned, price.rate), fixed))
    if 0 < 2 * learned <= _WIDEST:
        _, wide, _ = _explore(whole, 2 * learned, ())
        few = merged_levels(short, wide.levels.reshape(*stat, -1), learned, price)
        starts.append(_merge(few, fixed))

    def settle(start: Centres) -> tuple[Coded, Array]:
        number = lloyd_pass(short, start)[2].astype(start.levels.dtype)
        codes, end = coded_pass(short, descend_coded(short, Coded(*start, number), price, many), price)
        return Coded(*jax.lax.sort(tuple(end), num_keys=2)), objective(short, codes, end, price)

    ends, costs = jax.lax.map(settle, jax.tree.map(lambda *each: jnp.stack(each), *starts))
    least = jnp.argmin(costs, 0)[None, ..., None]
    best = [jnp.take_along_axis(a, least, 0).reshape(*whole.blocks[0].stat, k) for a in ends]
    if short is whole:
        return Coded(*best), 0
    return Coded(*best), many if whole.importance is not None else _WARM
