"""What rounding needs to know about the inputs of a product: sums of products, gathered batch by batch.

    H = Y'Y    D = Y'(X - Y)    K = (X - Y)'(X - Y)

X [m, N] are the inputs in the original net, Y [m, N] those in the already quantized net. D is summed from X - Y, never
as Y'X - H, and Y is shifted by the mean of its first batch: float32 would lose both small differences of large numbers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lcq.forms.blocks import explicit_sharding
from lcq.forms.dtypes import wider

_HALVES = 512
"""From this many inputs on, and from as many rows, H is computed in quadrants, one of which is a transpose."""


class Moments(NamedTuple):
    """Running sums over batches, m rows in all, N inputs. A pytree; vmapped over groups it has a leading axis.

    Attributes:
        count: m, int32: the rows that count, of this group.
        shift: s [N], the mean of the first batch of Y that has a row.
        sum_y: sum of Y - s, [N].
        sum_difference: sum of X - Y, [N].
        gram: (Y - s)'(Y - s), [N, N].
        drift: (Y - s)'(X - Y), [N, N]; None where X is Y.
        difference: (X - Y)'(X - Y), [N, N]; None if not asked for, or where X is Y.
    """

    count: Any
    shift: Array
    sum_y: Array
    sum_difference: Array
    gram: Any
    drift: Array | None = None
    difference: Array | None = None


class Statistics(NamedTuple):
    """What rounding uses, plain or centred, see `finish`.

    Attributes:
        gram: H = Y'Y, [N, N].
        drift: D = Y'(X - Y), [N, N]; None for 0.
        difference: K = (X - Y)'(X - Y), [N, N]; None if it is 0 or not known.
        mean_x: [N]; 0 where no row counts.
        mean_y: [N].
        count: m, the rows that count; 0 for an expert without any.
    """

    gram: Array
    drift: Array | None
    difference: Array | None
    mean_x: Array
    mean_y: Array
    count: Any


def gather(
    y: Float[Array, "m N"],
    x: Float[Array, "m N"] | None = None,
    moments: Moments | None = None,
    *,
    difference: bool = False,
    rows: Bool[Array, "m"] | None = None,
) -> Moments:
    """Adds one batch: H += Y'Y, D += Y'(X - Y), K += (X - Y)'(X - Y), with Y shifted.

    Args:
        y: inputs in the already quantized net, a row for each sample (and pixel).
        x: the same in the original net; None if X is Y, which saves half of the work.
        moments: of the batches before; None for the first.
        difference: whether to sum K, which only the value of the residual needs, not its minimum.
        rows: which of the rows count; the others may be anything, NaN too. None for all.

    Returns:
        Sums in float32 or wider.

    Raises:
        ValueError: x or difference where the batches before had none, or the other way round.

    Example:
        >>> moments = gather(jnp.array([[1.0], [3.0]]))
        >>> finish(gather(jnp.array([[5.0], [7.0]]), moments=moments)).gram
        Array([[84.]], dtype=float32)
    """
    before = None if moments is None else (moments.drift is not None, moments.difference is not None)
    if before not in (None, (x is not None, difference and x is not None)):
        raise ValueError(
            f"expected the same x= and difference= for every batch; those before had (x, difference) = {before}"
        )
    wide = wider(jnp.float32, *(a.dtype for a in (x, y) if a is not None))
    if moments is None:
        shift = mean(y.astype(wide), rows)
    elif rows is None:
        shift = moments.shift
    else:  # without rows so far all sums are zero, and any shift fits them
        shift = jnp.where(moments.count > 0, moments.shift, mean(y.astype(wide), rows))
    batch = about(shift, y, x, difference=difference, rows=rows)
    return batch if moments is None else jax.tree.map(jnp.add, moments, batch)._replace(shift=shift)


def about(
    shift: Float[Array, "N"],
    y: Float[Array, "m N"],
    x: Float[Array, "m N"] | None = None,
    *,
    difference: bool = False,
    rows: Bool[Array, "m"] | None = None,
) -> Moments:
    """The sums of one batch, as `gather` has them, about a given shift."""
    moved = counted(y.astype(shift.dtype) - shift, rows)
    away = None if x is None else counted(x.astype(shift.dtype) - y.astype(shift.dtype), rows)
    return Moments(
        count=jnp.int32(len(y)) if rows is None else rows.sum(dtype=jnp.int32),
        shift=shift,
        sum_y=column_sums(moved),
        sum_difference=jnp.zeros_like(shift) if away is None else column_sums(away),
        gram=_square(moved),
        drift=None if away is None else _product(moved, away),
        difference=_square(away) if difference and away is not None else None,
    )


def finish(moments: Moments, centred: bool = False) -> Statistics:
    """The statistics of Y and X - Y, or of both with their means subtracted.

        Hc = H - m ybar ybar'    Dc = D - m ybar (xbar - ybar)'    Kc = K - m (xbar - ybar)(xbar - ybar)'

    Centred statistics are those of a product with a bias that is free to follow: b += xbar W - ybar Q, see
    `lcq.ptq.rounding.base.correction`.

    Args:
        moments: of all batches.
        centred: whether to subtract the means.

    Returns:
        Both kinds are made from the shifted sums, with no product of large means to cancel.
    """
    count = moments.count.astype(moments.shift.dtype)
    share = 1 / jnp.maximum(count, 1)
    moved, away = moments.sum_y * share, moments.sum_difference * share  # the means of Y - s and of X - Y
    if centred:
        gram = moments.gram - count * _outer(moved, moved)
        drift = None if moments.drift is None else moments.drift - count * _outer(moved, away)
        difference = None if moments.difference is None else moments.difference - count * _outer(away, away)
    else:
        shift, difference = moments.shift, moments.difference
        cross = _outer(shift, moved)
        gram = moments.gram + count * (cross + cross.T + _outer(shift, shift))
        drift = None if moments.drift is None else moments.drift + count * _outer(shift, away)
    mean_y = moments.shift + moved
    return Statistics(gram, drift, difference, mean_y + away, mean_y, moments.count)


def counted(a: Float[Array, "m N"], rows: Bool[Array, "m"] | None) -> Float[Array, "m N"]:
    """a with zeros in the rows that do not count."""
    return a if rows is None else jnp.where(rows[:, None], a, jnp.zeros((), a.dtype))


def mean(a: Float[Array, "m N"], rows: Bool[Array, "m"] | None) -> Float[Array, "N"]:
    """The mean of the rows that count; 0 without any."""
    return a.mean(0) if rows is None else counted(a, rows).sum(0) / jnp.maximum(rows.sum(), 1).astype(a.dtype)


def column_sums(a: Float[Array, "*k m N"]) -> Float[Array, "*k N"]:
    """The sum of the rows, as a product: on CPUs a reduction along such an axis takes three times as long."""
    return jnp.dot(jnp.ones(a.shape[-2], a.dtype), a, precision=jax.lax.Precision.HIGHEST)


def _outer(a: Array, b: Array) -> Array:
    return a[:, None] * b


def _product(a: Array, b: Array) -> Array:
    """a'b, on every device of a mesh over which the rows are spread."""
    here = explicit_sharding(a)
    everywhere = None if here is None else jax.sharding.NamedSharding(here.mesh, jax.sharding.PartitionSpec(None, None))
    return jnp.dot(a.T, b, precision=jax.lax.Precision.HIGHEST, out_sharding=everywhere)


def _square(a: Array) -> Array:
    """a'a; of a large one the upper right quadrant is the transpose of the lower left."""
    rows, size = a.shape
    if size < _HALVES or rows < _HALVES:
        return _product(a, a)
    first, last = a[:, : size // 2], a[:, size // 2 :]
    corner = _product(last, first)
    return jnp.block([[_product(first, first), corner.T], [corner, _product(last, last)]])
