"""Fixed codebooks, with or without a free scale: binary, ternary, powers of two, any list of values.

    Pi(x) = argmin_{k, a} sum_i h_i (x_i - a c_{k_i})^2      a = 1, or a free per block; h = 1, or given

For given codes the best scale is a = A/B with A = sum h x c, B = sum h c^2, and leaves the error sum h x^2 - A^2/B; so
the best pair maximises A^2/B. As a falls from infinity, codes change only where x_i/a crosses a midpoint of the
codebook. A negative scale stands for the mirrored codebook: -8 .. 7 serves a block whose largest weight is positive as
well as one whose is negative, at no cost. For a codebook that is its own mirror image a >= 0.

Source: Carreira-Perpinan & Idelbayev, arXiv 1707.04319, section 4.2; free scale: Idelbayev et al., CVPR 2021.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lcq.forms import Codes
from lcq.forms.base import Form
from lcq.forms.blocks import Per
from lcq.schemes.base import SCHEMES, Quantizer
from lcq.schemes.grid_search import SHORTEST, Grid, search_grid
from lcq.schemes.grouped import Cut, cut
from lcq.schemes.scales import as_scale, check_float16, check_scale_dtype, rounded_scale, scale_format

_CANDIDATES = 64
_ZOOM = 16
_LONG = 512
"""Numbers of a block from which enough of them are not zero for the fast search of a grid."""

_SAMPLE = 1 << 15
"""Weights of a block, evenly spaced, that the first search looks at."""


@SCHEMES.register("Levels")
@dataclasses.dataclass(frozen=True)
class Levels(Quantizer):
    """Projection on a fixed codebook, Delta = a c_k with c in `values`.

    A tie between two levels goes to the one nearer to zero, but away from zero itself, and at zero to the positive one:
    so sign(0) = +1, and |x| = 1/2 is not zero in {-1, 0, 1}.

    Attributes:
        values: The codebook c, at most 65,536 distinct finite numbers.
        scale: Whether codes are scaled: False for a = 1; True for the scale a that minimises the error, by a search
            over 64 scales of either sign (on at most 32,768 of a block's elements, on all if they have an importance)
            and twice 16 around the best of them, each judged after its codes have got their best scale: sort-free,
            jit-able, and global up to the resolution of the search. Negative only if that is better, and never where
            the values are symmetric around 0.
        per: What shares one scale, see `lcq.forms.blocks.block_counts`.
        scale_dtype: Format of scales, in which they are chosen: "float32", "bfloat16" or "float16". None for bfloat16
            in groups (per=32), as 32 bits for each group are a bit a weight, and float32 elsewhere. bfloat16 has the
            range of float32, and the codes make up for its 8 bits. float16 holds 6.1e-5 to 65,504 in full: leaves that
            need other scales are refused, and smaller scales of single blocks lose bits.
        exact: Whether to find the globally optimal scale by a sweep over all breakpoints in float64, O(N K log(N K)),
            on the host.

    Raises:
        ValueError: no values, too many, or values that are not finite; `per` or `exact` without `scale`.

    Example:
        >>> form = Levels((-1, 0, 1), scale=True).project(jnp.array([0.1, -2.0, 4.0, 0.0, 3.0]))
        >>> form.dense()
        Array([ 0., -3.,  3.,  0.,  3.], dtype=float32)
    """

    values: tuple[float, ...]
    scale: bool = False
    per: Per = None
    exact: bool = False
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        values = tuple(sorted({float(np.float32(v)) for v in self.values}))
        if not 1 <= len(values) <= 65536 or not all(math.isfinite(v) for v in values):
            raise ValueError(f"expected 1 to 65,536 finite levels, got {self.values!r}")
        if not self.scale and (self.exact or self.per is not None or self.scale_dtype is not None):
            raise ValueError("per=, exact= and scale_dtype= choose a scale: pass scale=True with them")
        check_scale_dtype(self.scale_dtype)
        if self.scale and not any(values):
            raise ValueError("expected a level other than zero to scale, got zeros")
        object.__setattr__(self, "values", values)

    @property
    def host(self) -> bool:
        return self.exact

    def check_numbers(self, x: Array) -> None:
        if self.scale and self.scale_dtype == "float16":
            check_float16(x, max(map(abs, self.values)))

    def solve(self, xs: tuple[Array, ...], previous: Any, mu: Any, importance: Any = None) -> tuple[Form, ...]:
        del mu
        whole = cut(xs, self.per, importance)
        if not self.scale:
            return tuple(self._form(x, nearest(w, self.values), None) for x, w in zip(xs, whole.leaves, strict=True))
        dtype = scale_format(self.per, self.scale_dtype)
        if self.exact:
            a = _exact_scales(whole, self.values, dtype)
        else:
            a = search_scale(whole, self.values, None if previous is None else previous[0].scale, dtype)
        leaves = zip(xs, whole.leaves, whole.spread(a), whole.numbers(as_scale(a, dtype)), strict=True)
        return tuple(self._form(x, _nearest_scaled(w, self.values, here), scale) for x, w, here, scale in leaves)

    def _form(self, x: Array, codes: Array, scale: Array | None) -> Codes:
        return Codes(codes.reshape(x.shape), scale=scale, values=self.values, dtype=str(x.dtype))


@SCHEMES.register("Binary")
@dataclasses.dataclass(frozen=True)
class Binary(Levels):
    """{-a, a} with a = mean |x|, or {-1, 1}: Delta = a sign(x), sign(0) = +1.

    Attributes:
        values: -1 and 1.
        scale: whether a is free; else it is 1.
        per: what shares one scale, as in `Levels`; likewise `scale_dtype`.

    Source: Rastegari et al., arXiv 1603.05279; arXiv 1707.04319, section 4.2.

    Example:
        >>> Binary().project(jnp.array([-1.0, 2.0, 3.0])).dense()
        Array([-2.,  2.,  2.], dtype=float32)
    """

    values: tuple[float, ...] = dataclasses.field(default=(-1.0, 1.0), init=False, repr=False)
    scale: bool = True
    exact: bool = dataclasses.field(default=False, init=False, repr=False)


@SCHEMES.register("Ternary")
@dataclasses.dataclass(frozen=True)
class Ternary(Levels):
    """{-a, 0, a} with the best a: the mean of the j largest |x|, j = argmax (their sum)/sqrt(j); or {-1, 0, 1}.

    Attributes:
        values: -1, 0 and 1.
        scale: whether a is free; else it is 1.
        per: what shares one scale, as in `Levels`; likewise `scale_dtype`.

    Source: arXiv 1707.04319, section 4.2 and theorem A.3.

    Example:
        >>> Ternary().project(jnp.array([0.1, -2.0, 4.0])).dense()
        Array([ 0., -3.,  3.], dtype=float32)
    """

    values: tuple[float, ...] = dataclasses.field(default=(-1.0, 0.0, 1.0), init=False, repr=False)
    scale: bool = True
    exact: bool = dataclasses.field(default=False, init=False, repr=False)


@SCHEMES.register("PowersOfTwo")
@dataclasses.dataclass(frozen=True, init=False)
class PowersOfTwo(Levels):
    """{0, +-1, +-1/2, .., +-2^-c}: products become shifts.

    Attributes:
        c: the smallest power, 0 to 126.
        scale: whether a common factor is free.
        per: what shares the factor.
        scale_dtype: its format, see `Levels`.

    Raises:
        ValueError: another smallest power.

    Source: arXiv 1707.04319, section 4.2 and theorem A.1.

    Example:
        >>> PowersOfTwo(1).project(jnp.array([0.1, -0.6, 4.0])).dense()
        Array([ 0. , -0.5,  1. ], dtype=float32)
    """

    values: tuple[float, ...] = dataclasses.field(init=False, repr=False)
    exact: bool = dataclasses.field(default=False, init=False, repr=False)
    c: int = dataclasses.field(kw_only=True)

    def __init__(self, c: int, scale: bool = False, per: Per = None, scale_dtype: str | None = None) -> None:
        if not 0 <= c <= 126:
            raise ValueError(f"expected 0 <= c <= 126, got {c}")
        object.__setattr__(self, "c", c)
        powers = [2.0**-i for i in range(c + 1)]
        super().__init__((*(-p for p in powers), 0.0, *powers), scale=scale, per=per, scale_dtype=scale_dtype)


def thresholds(values: tuple[float, ...]) -> np.ndarray:
    """t_1 < .. < t_{K-1} in float32 with code(x) = #{k: x >= t_k} for every float32 x, ties as `Levels` says.

    x >= m and x > m for an exact midpoint m, which may fall between two float32 numbers, both become x >= t with t the
    least float32 that satisfies them.
    """
    c = np.asarray(values, np.float64)
    cuts = []
    for low, high in itertools.pairwise(c):
        middle = (low + high) / 2
        t = np.float32(middle)
        if np.float64(t) < middle:
            t = np.nextafter(t, np.float32(np.inf))
        upwards = low == 0 if middle > 0 else high != 0
        if np.float64(t) == middle and not (upwards or middle == 0):
            t = np.nextafter(t, np.float32(np.inf))
        cuts.append(t)
    return np.asarray(cuts, np.float32)


def nearest(x: Float[Array, "..."], values: tuple[float, ...]) -> Array:
    """Codes of the nearest levels, uint8 or uint16."""
    return _count(x, [jnp.asarray(t, x.dtype) for t in thresholds(values)], len(values))


def _nearest_scaled(x: Array, values: tuple[float, ...], a: Array) -> Array:
    """Codes of the nearest of a * values, for a of either sign; a broadcasts against x."""
    if not mirrored(values):
        x, a = jnp.where(a < 0, -x, x), jnp.abs(a)
    if is_grid(values) and values[0] <= 0 <= values[-1]:  # round instead of comparing
        u = x / jnp.where(a > 0, a, 1)
        size = jnp.abs(u)
        whole = jnp.where(size == 0.5, 1, jnp.ceil(size - 0.5))
        codes = jnp.clip(jnp.where(u < 0, -whole, whole), values[0], values[-1]) - values[0]
        return codes.astype(jnp.int32).astype(code_dtype(len(values)))
    return _count(x, [a * jnp.asarray(t, x.dtype) for t in thresholds(values)], len(values))


def _level_near(x: Array, values: tuple[float, ...], a: Array) -> Array:
    """The level c for which a c is nearest to x; of two as near either."""
    if is_grid(values):
        return jnp.clip(jnp.round(x * (1 / jnp.where(a == 0, 1, a))), values[0], values[-1])
    return Codes(_nearest_scaled(x, values, a), values=values).dense()


def is_grid(values: tuple[float, ...]) -> bool:
    """Whether a codebook is consecutive whole numbers."""
    return values == tuple(range(int(values[0]), int(values[0]) + len(values)))


def _has_fast_search(values: tuple[float, ...]) -> bool:
    """Whether `search_grid` finds the scales of long blocks; those of three levels are exact as they are."""
    return len(values) > 3 and is_grid(values) and values[0] < 0 < values[-1]


def mirrored(values: tuple[float, ...]) -> bool:
    """Whether a codebook is its own mirror image, so that the sign of its scale does not matter."""
    return values == tuple(-v for v in reversed(values))


def _count(x: Array, cuts: list[Array], k: int) -> Array:
    if k > 64 and all(t.size == 1 for t in cuts):
        t = jnp.stack([t.reshape(()) for t in cuts])
        return jnp.searchsorted(t, x, side="right").astype(code_dtype(k))
    codes = jnp.zeros(x.shape, code_dtype(k))
    for t in cuts:
        codes += (x >= t).astype(codes.dtype)
    return codes


def code_dtype(k: int) -> Any:
    return jnp.uint8 if k <= 256 else jnp.uint16


def of_size_one(whole: Cut) -> tuple[Cut, Array]:
    """The leaves over a power of two per block, and that: the largest magnitude that counts is then from 1 to 2.

    So sums of squares neither overflow nor vanish, whatever the size of the weights.
    """
    high = whole.max([jnp.abs(x) for x in whole.leaves])
    unit = jnp.ldexp(jnp.ones_like(high), jnp.frexp(high)[1] - 1)
    return whole._replace(leaves=tuple(x / u for x, u in zip(whole.leaves, whole.spread(unit), strict=True))), unit


def search_scale(whole: Cut, values: tuple[float, ...], warm: Array | None = None, dtype: str | None = None) -> Array:
    """The scale a per block that minimises sum h (x - a c)^2, without a sort.

    What weighs nothing does not bound the range of scales; what weighs more counts as if it were there more often.

    Args:
        whole: leaves cut into the blocks that share a scale.
        values: the codebook.
        warm: scales to start from; the result is at least as good.
        dtype: the format of scales, see `as_scale`; only its numbers are tried.

    Returns:
        One number per block.
    """
    size, start = sum(b.size for b in whole.blocks), None
    if warm is not None:
        start = warm.reshape(whole.blocks[0].stat).astype(whole.leaves[0].dtype)

    def thoroughly(leaves: tuple[Array, ...], start: Array | None) -> Array:
        return _search_thoroughly(whole._replace(leaves=leaves), values, start, dtype)

    def fast(leaves: tuple[Array, ...], start: Array | None) -> Array:
        return search_grid(whole._replace(leaves=leaves), Grid(values[0], values[-1], dtype), start)

    if not _has_fast_search(values) or whole.importance is not None or size < SHORTEST:
        return thoroughly(whole.leaves, start)
    if size >= _LONG:
        return fast(whole.leaves, start)
    count = whole.sum([(x != 0).astype(x.dtype) for x in whole.leaves])
    few = jnp.any((count > 0) & (count < SHORTEST * 3 // 4))
    return jax.lax.cond(few, thoroughly, fast, whole.leaves, start)


def _search_thoroughly(whole: Cut, values: tuple[float, ...], warm: Array | None, dtype: str | None) -> Array:
    """The search for any codebook and block: each candidate gets its best scale before it is judged."""
    whole, unit = of_size_one(whole)
    many = _CANDIDATES if thresholds(values).any() else 1  # the codes of {-1, 1} do not depend on a
    ranges = [_range(whole, values, sign) for sign in ((1.0,) if mirrored(values) else (1.0, -1.0))]
    lows, ratios = (jnp.stack(numbers) for numbers in zip(*ranges, strict=True))
    part, around = jnp.linspace(0, 1, many, dtype=unit.dtype), jnp.linspace(-1, 1, _ZOOM, dtype=unit.dtype)

    def better(leaves: Sequence[Array], a: Array, best: tuple[Array, ...]) -> tuple[Array, ...]:
        """The best scale for the codes at a, kept if its error is the least so far."""
        near = [_level_near(x, values, here) for x, here in zip(leaves, whole.spread(a), strict=True)]
        return keep_better(whole, leaves, near, (), best, dtype)

    def scan(leaves: Sequence[Array], a: Array, ratio: Array, powers: Array, best: Any) -> tuple[Array, ...]:
        """The best of a[j] ratio[j]^powers, made one by one: for small blocks all would be larger than the leaf."""

        def tried(i: Any, best: Any) -> tuple[Array, ...]:
            j, k = i // len(powers), i % len(powers)
            return better(leaves, a[j] * ratio[j] ** powers[k], best)

        return jax.lax.fori_loop(0, len(a) * len(powers), tried, best)

    nothing = (jnp.zeros_like(unit), jnp.full_like(unit, jnp.inf))
    found = scan(whole.thin(_SAMPLE).leaves, lows, ratios, part, nothing)[0]
    best = better(whole.leaves, found, nothing)
    if warm is not None:
        best = better(whole.leaves, warm.reshape(unit.shape).astype(unit.dtype) / unit, best)
    for zoom in (1, _ZOOM) if many > 1 else ():  # between the neighbours of the best, then between those
        ratio = jnp.where(best[0] < 0, ranges[-1][1], ranges[0][1])
        best = scan(whole.leaves, best[0][None], ratio[None] ** (1 / many / zoom), around, best)
    return best[0] * unit


def _range(whole: Cut, values: tuple[float, ...], sign: float) -> tuple[Array, Array]:
    """The least scale of a sign that can be best, and how many times larger the largest is, per block.

    What is summed is made anew for each sum: XLA keeps an array that two sums share, one as large as the leaf.
    """
    two_sided = values[0] < 0 < values[-1]
    side = sign if values[-1] > 0 else -sign
    sides = (1.0, -1.0) if two_sided else (side,)
    total = whole.sum([jnp.abs(x) if two_sided else jnp.maximum(side * x, 0) for x in whole.leaves])
    count = whole.sum([(x != 0 if two_sided else side * x > 0).astype(x.dtype) for x in whole.leaves])
    high = functools.reduce(jnp.maximum, [whole.max([s * x for x in whole.leaves]) for s in sides])
    sizes = [abs(v) for v in values if v]
    low, high = total / jnp.maximum(count, 1) / max(sizes), jnp.maximum(high, 0) / min(sizes)
    return sign * low, jnp.where(low > 0, high / jnp.where(low > 0, low, 1), 1)


def keep_better(
    whole: Cut,
    xs: Sequence[Array],
    cs: Sequence[Array],
    others: tuple[Array, ...],
    best: Any,
    dtype: str | None = None,
) -> tuple[Array, ...]:
    """(a, *others, error) per block, or `best` if its error is less:

        a = sum h x c / sum h c^2, rounded to a format,    error = sum h (x - a c)^2

    The error is summed as it is, not as sum h x^2 - a sum h x c: float32 could not tell fine grids apart.
    """
    numerator = whole.sum([x * c for x, c in zip(xs, cs, strict=True)])
    denominator = whole.sum([c * c for c in cs])
    a = jnp.where(denominator > 0, numerator / jnp.where(denominator > 0, denominator, 1), 0)
    a = rounded_scale(a, dtype)
    error = whole.sum([(x - here * c) ** 2 for x, here, c in zip(xs, whole.spread(a), cs, strict=True)])
    win = error < best[-1]
    return tuple(jnp.where(win, n, b) for n, b in zip((a, *others, error), best, strict=True))


def _exact_scales(whole: Cut, values: tuple[float, ...], dtype: str | None) -> Array:
    """`exact_scale` of every block, on the host; of the numbers of a format beside it the best."""
    rows, importance = whole.rows()
    scales = []
    for i, row in enumerate(rows):
        h = None if importance is None else importance[i]
        near = exact_scale(row, values, h) * np.array([1, 1 - 2.0**-8, 1 + 2.0**-8][: 1 if dtype is None else 3])
        near = near.astype(jnp.dtype(dtype or np.float64)).astype(np.float64)
        scales.append(near[np.argmin([_error(row, values, a, h) for a in near])])
    return jnp.asarray(np.array(scales).reshape(whole.blocks[0].stat), whole.leaves[0].dtype)


def _error(x: np.ndarray, values: tuple[float, ...], a: float, importance: np.ndarray | None) -> float:
    """sum_i h_i min_k (x_i - a c_k)^2."""
    levels = np.sort(a * np.asarray(values, np.float64))
    near = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, x)]
    return float(((x - near) ** 2 * (1 if importance is None else importance)).sum())


def exact_scale(x: np.ndarray, values: tuple[float, ...], importance: np.ndarray | None = None) -> float:
    """The a that minimises sum_i h_i min_k (x_i - a c_k)^2, in float64; h = 1 without an importance.

    Positive unless a negative one is better: that is the best for -x, negated.
    """
    h = np.ones_like(x) if importance is None else importance
    (a, gain), (b, other) = _sweep(x, values, h), (0.0, 0.0) if mirrored(values) else _sweep(-x, values, h)
    return a if gain >= other else -b


def _sweep(x: np.ndarray, values: tuple[float, ...], h: np.ndarray) -> tuple[float, float]:
    """The best a >= 0, and the gain A^2/B that is to be maximised.

    Sweeps a from infinity down: every x_i starts at the level nearest to zero and moves outward where a passes x_i/m,
    m a midpoint of the sign of x_i; A and B then only grow. Source: Idelbayev et al., CVPR 2021; the sweep is lcq's.
    """
    c = np.asarray(values, np.float64)
    middles, gains, gains2 = (c[1:] + c[:-1]) / 2, np.diff(c), np.diff(c**2)
    raise_at, da, db = [], [], []
    up, down = ((x[side], h[side]) for side in (x > 0, x < 0))
    for m, g, g2 in zip(middles, gains, gains2, strict=True):
        if m != 0:
            (side, often), sign = (up, 1.0) if m > 0 else (down, -1.0)
            raise_at.append(side / m)
            da.append(sign * side * often * g)
            db.append(sign * often * g2)
    start_up = c[np.searchsorted(middles, 0, side="right")]
    start_down = c[np.searchsorted(middles, 0, side="left")]
    a0 = start_up * (up[0] * up[1]).sum() + start_down * (down[0] * down[1]).sum()
    b0 = start_up**2 * up[1].sum() + start_down**2 * down[1].sum()
    if raise_at:
        order = np.argsort(-np.concatenate(raise_at), kind="stable")
        a0 = np.concatenate([[a0], a0 + np.cumsum(np.concatenate(da)[order])])
        b0 = np.concatenate([[b0], b0 + np.cumsum(np.concatenate(db)[order])])
    numerator, denominator = np.atleast_1d(a0), np.atleast_1d(b0)
    fine = (numerator > 0) & (denominator > 0)
    gain = np.where(fine, numerator**2 / np.where(fine, denominator, 1), 0)
    best = int(np.argmax(gain))
    return (float(numerator[best] / denominator[best]) if gain[best] > 0 else 0.0), float(gain[best])
