"""What few rows can carry: sums over parts of the rows say how much is noise, rows held back how far to believe them.

H of m rows differs from that of all rows there could be, most where m is not far above N: a method that trusts it finds
codes that are good on these m rows alone. So what is between two inputs is made smaller, and what each has stays,

    C_s = C - p off(C)          p = v / (1 + v)    C = H - m ybar ybar', off(C) is C without its diagonal
    M_s = M - p' off(M)         M = m ybar ybar'   H_s = C_s + M_s, and the same of D

with v = c u and v' = 8 c u', where u/(1 + u) is the part of off(C) that is noise, u'/(1 + u') that of off(M). The rows
are cut into K folds with sums C_k about the common mean, m_k rows each; in units of the diagonal of C,

    u / (1 + u) = K/(K - 1) sum_k ||off(C_k - (m_k/m) C)||^2 / ||off(C)||^2

or, if that is more, what independent rows would leave, N (N - 1)/m over the same: with few rows the first is uncertain.
For c = 1 this is the shrinkage of least expected square error (Ledoit & Wolf), where rows may depend on each other.
Which c is best depends on the method: it is tried on the rows held back. Codes chosen on all folds but one, with
u K/(K - 1) for their fewer rows, are judged on that one; c = 0 is the method as its paper has it. On statistics as many
folds judge as have 512 rows, two at least, and c is tried from the one that is preferred until the error rises.

Of one thing folds cannot tell. If all rows are of one example, they agree on a mean that other rows do not have. So a
mean is taken to have eight times the noise that is found, as if eight rows were one: in v', and where a bias follows
it, which takes up 1/(1 + 8 u) of a mean change with a part u/(1 + u) of noise. A mean that is large against what rows
vary by is taken up all the same, and so is one of many rows.

Source: the target and the intensity as in Ledoit & Wolf, J. Multivariate Analysis 88 (2004), and Schaefer & Strimmer,
Stat. Appl. Genet. Mol. Biol. 4 (2005); from folds, for products with a mean and with a drift, and the choice: lcq's.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from lcq.ptq.rounding.base import correction, residual
from lcq.ptq.rounding.coded import Coded
from lcq.ptq.rounding.sequential import dot
from lcq.ptq.statistics import Moments, Statistics, finish

PARTS = (0.0, 0.1, 0.3, 1.0, 3.0)
"""c that are tried: at most three or four of them, the larger ones where there is more noise."""

_NOISY, _LOUD = 0.5, 0.75
"""From this part of noise on c = 0 is not tried, and the largest c is kept unless another is better; below, c = 0 is.
From the second on 0.1 gives way to 3."""
_BETTER = 0.02
"""By how much the error on rows held back must fall for that."""
_OVERSTATED = 0.25
"""Where c = 0 is tried, by this times the noise: of fewer rows, by 1 - 1/K, codes for c = 0 lose most by it."""
_NOTHING = 0.01
"""Up to this part of noise c = 0 is taken as it is."""
_LARGEST = 0.999
_ALIKE = 8.0
"""How much more noise a mean may have than folds and independent rows say, as so many rows may be of one example."""
_ENOUGH = 512
"""Rows that judge what codes of others are worth; more say the same."""
_SAME = 8.0
"""A variation of that many rounding errors of the mean is none."""


class Folds(NamedTuple):
    """Sums over each of K parts of the rows, of one group.

    Attributes:
        moments: The sums of each fold, with a leading axis [K], all shifted alike; None where they are not asked for.
        differences: The sum of ((X - Y) w)^2 in each fold, [K, n].
    """

    moments: Any
    differences: Any


def together(moments: Moments, use: Bool[Array, "K"] | None = None) -> Moments:
    """The sums over all folds, or over those in use, added one by one: a reduction by XLA takes many times longer."""

    def summed(a: Array) -> Array:
        return functools.reduce(jnp.add, a if use is None else [jnp.where(use[k], a[k], 0) for k in range(len(a))])

    return jax.tree.map(summed, moments)._replace(shift=moments.shift[0])


def noise(moments: Moments) -> Float[Array, "2"]:
    """Which part of off(C) and of off(M) is noise: 0 to .999.

    Args:
        moments: of folds [K, ...].
    """
    total, counts = together(moments), moments.count.astype(moments.shift.dtype)
    if len(total.shift) == 1:
        return jnp.zeros(2, counts.dtype)
    share = counts / jnp.maximum(counts.sum(), 1)
    mean = total.sum_y / jnp.maximum(counts.sum(), 1)
    unit = _unit(total)

    def about(sums: Array, gram: Array, count: Array) -> Array:
        cross = sums[:, None] * mean
        return (gram - cross - cross.T + count * mean[:, None] * mean) * unit[:, None] * unit

    whole = about(total.sum_y, total.gram, counts.sum())
    middle = (total.sum_y + counts.sum() * total.shift) * unit

    def apart(fold: tuple[Array, ...]) -> Array:
        sums, gram, count, part = fold
        away = (sums - part * total.sum_y) * unit
        return jnp.stack([_square(about(sums, gram, count) - part * whole), (away**2).sum()])

    spread = jax.lax.map(apart, (moments.sum_y, moments.gram, counts, share)).sum(0)
    return part_of_noise(spread, jnp.stack([_square(whole), (middle**2).sum()]), counts, (unit > 0).sum())


def part_of_noise(spread: Array, size: Array, counts: Array, inputs: Array) -> Array:
    """K/(K - 1) spread / size between 0 and .999, K the number of folds with rows; .999 of less than two.

    Args:
        spread: of off(C) and of the mean between folds, in units of the diagonal of C.
        size: of them, in the same units.
        counts: rows of each fold.
        inputs: that vary.
    """
    filled, inputs = (counts > 0).sum(), inputs.astype(size.dtype)
    least = jnp.stack([inputs * (inputs - 1) / jnp.maximum(counts.sum(), 1), inputs])
    found = jnp.maximum(spread * filled / jnp.maximum(filled - 1, 1), least)
    sure = (filled > 1) & (size > 0)
    return jnp.where(sure, jnp.clip(found / jnp.where(sure, size, 1), 0, _LARGEST), _LARGEST)


def shares(noise: Shaped[Any, "*groups 2"], c: Any, folds: Any = 1.0) -> Any:
    """p and p' for c; `folds` is K/(K - 1) where a fold is held back."""
    v = c * folds * noise / (1 - noise) * np.array([1, _ALIKE], np.float32)
    return v / (1 + v)


def shrunk(moments: Moments, share: Float[Array, "2"], centred: bool) -> Statistics:
    """The statistics with what is between inputs made smaller; of inputs that do not vary, nothing where centred.

    Args:
        moments: of all rows.
        share: p and p'.
        centred: as in `finish`.
    """
    plain, around = finish(moments, centred), finish(moments, True)
    count = moments.count.astype(moments.shift.dtype)

    def less(whole: Array | None, varied: Array | None, mean: Array) -> Array | None:
        if whole is None or varied is None:
            return None
        steady = 0 if centred else share[1] * count * plain.mean_y[:, None] * mean
        return whole - _off(share[0] * varied + steady)

    gram = less(plain.gram, around.gram, plain.mean_y)
    drift = less(plain.drift, around.drift, plain.mean_x - plain.mean_y)
    if centred:
        lives = _unit(moments) > 0
        both = lives[:, None] & lives
        gram, drift = (None if a is None else jnp.where(both, a, 0) for a in (gram, drift))
    assert gram is not None
    return plain._replace(gram=gram, drift=drift)


def steady(
    w: Array, form: Coded, moments: Moments, squares: Float[Array, "N"], use: Shaped[Array, "K"] | None = None
) -> Float[Array, "n"]:
    """What the bias is to take up, less by the part of it that may be noise, see `lcq.ptq.rounding.base.correction`.

    Args:
        w: weights.
        form: of them, rounded.
        moments: of folds.
        squares: diagonal of C, of the folds in use.
        use: 0 or 1 for each fold; all by default.
    """
    counts = moments.count.astype(moments.shift.dtype)
    moved = moments.sum_y + counts[:, None] * moments.shift
    w = w.astype(moved.dtype)
    errors = w - form.dense().astype(moved.dtype)
    sums = dot(moments.sum_difference, w) + dot(moved, errors)
    use = jnp.ones_like(counts) if use is None else use.astype(counts.dtype)
    return less_noise(use[:, None] * sums, use * counts, (squares[:, None] * errors**2).sum())


def less_noise(sums: Float[Array, "K n"], counts: Float[Array, "K"], squares: Float[Array, ""]) -> Float[Array, "n"]:
    """The mean of all folds, s/m, times 1/(1 + 8 u), where u/(1 + u) is the part of ||s||^2 that is noise.

    Args:
        sums: s_k of each fold.
        counts: m_k, their rows.
        squares: what s would vary by between sets of m independent rows, times (m - 1)/m.

    Returns:
        0 of a single row, which says nothing of noise.
    """
    total, many, filled = sums.sum(0), counts.sum(), (counts > 0).sum()
    spread = ((sums - (counts / jnp.maximum(many, 1))[:, None] * total) ** 2).sum()
    noise = jnp.maximum(spread * filled / jnp.maximum(filled - 1, 1), squares * many / jnp.maximum(many - 1, 1))
    sure = jnp.maximum((total**2).sum() - noise, 0)
    believed = sure / jnp.where(sure > 0, sure + _ALIKE * noise, 1)
    return jnp.where(many > 1, believed, 0) * total / jnp.maximum(many, 1)


def judged(
    w: Float[Array, "N n"], folds: Folds, form: Coded, fold: Array | int, centred: bool
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The error on the rows of one fold of codes that all others chose, summed over neurons.

    Returns:
        ||X w - Y q||^2, or that after the bias has followed, and ||X w||^2; 0 where that fold, or all others, have no
        rows.
    """
    moments = folds.moments
    here, others = jax.tree.map(lambda a: a[fold], moments), jnp.arange(len(moments.count)) != fold
    w = w.astype(moments.shift.dtype)
    judge, plain = finish(here, centred), finish(here)
    error = residual(w, judge, form) + folds.differences[fold]
    pull = dot(plain.gram, w) + (0 if plain.drift is None else 2 * dot(plain.drift, w))
    whole = (w * pull).sum(0) + folds.differences[fold]
    if centred:
        own = correction(w, judge.mean_x, judge.mean_y, form)
        squares = jnp.diagonal(finish(together(moments, others), True).gram)
        taken, away = steady(w, form, moments, squares, others), judge.mean_x - judge.mean_y
        error += here.count.astype(w.dtype) * ((own - taken) ** 2 - dot(away, w) ** 2)
    sees = (here.count > 0) & (moments.count.sum() > here.count)
    return jnp.where(sees, error, 0).sum(), jnp.where(sees, whole, 0).sum()


def chosen(
    noise: Shaped[np.ndarray, "G 2"], held: Callable[[Float[np.ndarray, "G"]], Float[np.ndarray, "G"]]
) -> tuple[Float[np.ndarray, "G"], Float[np.ndarray, "G"]]:
    """c of each group and its error, whatever the other groups are.

    Args:
        noise: which parts of off(C) and of off(M) are noise.
        held: of a c for each group, the errors on rows held back.
    """
    tried = [parts(float(much)) for much in noise[:, 0]]
    errors: list[list[float]] = [[] for _ in tried]

    def goes_on(c: tuple[float, ...], found: list[float]) -> bool:
        return len(found) < len(c) and not (len(found) > 1 and found[-1] > found[-2])

    while going := [g for g, each in enumerate(zip(tried, errors, strict=True)) if goes_on(*each)]:
        next_ones = [c[min(len(found), len(c) - 1)] for c, found in zip(tried, errors, strict=True)]
        here = held(np.asarray(next_ones, np.float64))
        for g in going:
            errors[g].append(float(here[g]))
    places = [pick(float(much), found) for much, found in zip(noise[:, 0], errors, strict=True)]
    best = zip(tried, errors, places, strict=True)
    c, least = zip(*((each[i], found[i]) for each, found, i in best), strict=True)
    return np.asarray(c), np.asarray(least)


def parts(noise: float) -> tuple[float, ...]:
    """Which c are worth a trial, as they are preferred: in noise from the largest down, without 0, else from 0 up."""
    if noise <= _NOTHING:
        return PARTS[:1]
    return PARTS[:1:-1] if noise >= _LOUD else PARTS[3:0:-1] if noise >= _NOISY else PARTS[:4]


def pick(noise: float, errors: Sequence[float]) -> int:
    """Place of the first error that is near the least."""
    enough = (1 + (_BETTER if noise >= _NOISY else _OVERSTATED * noise)) * min(errors)
    return next((i for i, error in enumerate(errors) if error <= enough), 0)


def judges(counts: Int[np.ndarray, "G K"]) -> Int[np.ndarray, "G"]:
    """How many folds of each group are held back in turn: all of them, or the first that have enough rows.

    Example:
        >>> judges(np.array([[500, 500, 500, 500], [16, 16, 16, 16]]))
        array([2, 4])
    """
    enough = counts.cumsum(1) >= _ENOUGH
    return np.where(enough.any(1), np.maximum(2, enough.argmax(1) + 1), counts.shape[1])


def varies(squares: Float[Array, "N"], mean: Float[Array, "N"], count: Array | int) -> Array:
    """Which inputs vary by more than rounding errors, of their sums of squares about the mean."""
    least = (_SAME * jnp.finfo(squares.dtype).eps * mean) ** 2
    return squares > least * count


def _unit(moments: Moments) -> Array:
    """1 over the root of the diagonal of C; 0 where an input does not vary."""
    around = finish(moments, True)
    varied = jnp.diagonal(around.gram)
    lives = varies(varied, around.mean_y, moments.count.astype(varied.dtype))
    return jnp.where(lives, jax.lax.rsqrt(jnp.where(lives, varied, 1)), 0)


def _off(a: Float[Array, "N N"]) -> Float[Array, "N N"]:
    return jnp.where(jnp.eye(len(a), dtype=bool), 0, a)


def _square(a: Float[Array, "N N"]) -> Float[Array, ""]:
    return (_off(a) ** 2).sum()
