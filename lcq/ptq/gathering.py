"""The inputs of a product's uses: sums over parts of them, the folds, or the inputs themselves as matrices.

    H = sum over uses and batches of Y'Y, over the rows that count; D and K alike, see `lcq.ptq.statistics`

Rows that follow each other are in one fold, so that those of one example are; what is left over of a batch, all of it
where it has less rows than there are folds, is in another fold each time.

A `ragged_dot` is a product for each expert: group g has the rows that the quantized net gives it. Its X is paired with
Y where that expert has the same rows in both nets, by their numbers; elsewhere X is taken to be Y.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from lcq.forms.blocks import compute_dtype, explicit_sharding
from lcq.forms.dtypes import own_promotion, wider
from lcq.ptq.pieces import Structure
from lcq.ptq.rounding.sequential import dot
from lcq.ptq.shrinkage import Folds
from lcq.ptq.statistics import Moments, about, counted, mean
from lcq.ptq.two_stream import Use
from lcq.tracing.contraction import Operand, Product

_ROWS = 4096
"""Rows of a convolution's inputs that are made at a time."""

_FOLDS, _FEWER, _WIDE = 4, 2, 2048
"""Parts that rows are cut into, and of more than so many inputs, whose sums need much memory."""


def fold_count(inputs: int) -> int:
    """K, in how many folds the rows of so many inputs are cut."""
    return _FOLDS if inputs <= _WIDE else _FEWER


@own_promotion()
def folded(uses: Sequence[Use], w: Float[np.ndarray, "G N n"] | None = None, moments: bool = True) -> Folds:
    """Sums over the rows of each fold, of all uses and batches.

    Args:
        uses: of the same weights in the same layout.
        w: the weights, or some neurons of them; None for no differences.
        moments: whether there are to be moments.

    Returns:
        Folds with leading axes [G, K], None in place of what is not asked for.
    """
    pairs = [pair for use in uses for pair in use.inputs]
    same = all(one is two for one, two in pairs)
    alone = all(len(a.sharding.device_set) == 1 for a in jax.tree.leaves(pairs) if isinstance(a, jax.Array))
    given: Any = None if same else w
    kind = wider(jnp.float32, pairs[0][1].x.dtype)
    groups, _, many, _ = uses[0].product.shape
    nothing = functools.partial(_nothing, np, groups, many, kind, given, moments=moments, drift=not same)
    sums: Any = jax.device_put(nothing()) if alone else None
    number = 0
    for use in uses if moments or given is not None else ():
        alike = given is None and all(operand.counts is None for pair in use.inputs for operand in pair)
        key = Structure(use.product.reading if alike else use.product.structure, use.product)
        parts = use.product.parts(_ROWS) if alone else 1
        add = _gather(key, parts, fold_count(use.product.shape[2]), alone, moments)
        for x, y in use.inputs:
            sums = add(y, None if same else x, given, sums, number)
            number += parts
    sums = Folds(None, None) if sums is None else sums
    if same and w is not None:
        sums = sums._replace(differences=jax.device_put(np.zeros((groups, fold_count(many), w.shape[2]), kind)))
    return sums


def _nothing(numpy: Any, groups: int, many: int, kind: Any, w: Any, *, moments: bool, drift: bool) -> Folds:
    """Sums of no rows, by numpy, for which nothing is compiled, or in a program by jax's."""
    folds = fold_count(many)

    def zeros(*shape: int) -> Any:
        return numpy.zeros((groups, folds, *shape), kind)

    found = None
    if moments:
        square, count = zeros(many, many) if drift else None, numpy.zeros((groups, folds), np.int32)
        found = Moments(count, zeros(many), zeros(many), zeros(many), zeros(many, many), square)
    return Folds(found, None if w is None else zeros(w.shape[2]))


class LastMoments:
    """`folded` of the inputs that were asked for last: products of the same inputs share them.

    Queries, keys and values multiply one array; so do the gate of a GLU and what it gates.

    Attributes:
        wanted: whether those of the next call may be asked for again.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._uses: list[Use] = []
        self._moments: Moments | None = None

    def of(self, uses: Sequence[Use], w: Float[np.ndarray, "G N n"] | None = None) -> Folds:
        """The sums over folds."""
        known = self._moments if _have_same_inputs(self._uses, uses) else None
        if known is None:
            self.forget()  # before there are two of them
        sums = folded(uses, w, known is None)
        sums = sums if known is None else sums._replace(moments=known)
        self._uses, self._moments = (list(uses), sums.moments) if self.wanted else ([], None)
        return sums

    def forget(self) -> None:
        """Drops what is held, the inputs too."""
        self._uses, self._moments = [], None


def _have_same_inputs(one: Sequence[Use], two: Sequence[Use]) -> bool:
    """Whether uses read the same arrays in the same way; masks, which each product has of its own, are compared."""
    if len(one) != len(two):
        return False
    for a, b in zip(one, two, strict=True):
        if len(a.inputs) != len(b.inputs) or Structure(a.product.reading, None) != Structure(b.product.reading, None):
            return False
        pairs = zip(a.inputs, b.inputs, strict=True)
        if not all(_is_same(p, q) for first, second in pairs for p, q in zip(first, second, strict=True)):
            return False
    return True


def _is_same(one: Operand, two: Operand) -> bool:
    if one.x is not two.x or one.sizes is not two.sizes:
        return False
    return one.counts is two.counts or (
        one.counts is not None and two.counts is not None and np.array_equal(one.counts, two.counts)
    )


@own_promotion()
def squares(use: Use) -> tuple[Array, Array]:
    """Of the inputs in the original net: sums of X^2 [G, N] over the rows that count, and how many these are [G]."""
    return _summed(use, jnp.square)


@own_promotion()
def sizes(use: Use) -> tuple[Array, Array]:
    """Of the inputs in the original net: sums of |X| [G, N] over the rows that count, and how many these are [G]."""
    return _summed(use, jnp.abs)


def _summed(use: Use, function: Callable[[Array], Array]) -> tuple[Array, Array]:
    sums: Any = 0.0
    many: Any = 0
    for x, _ in use.inputs:
        rows, _, counts = _grouped(use.product, jax.tree.map(lambda a: jnp.asarray(everywhere(a)), x), None)
        rows = jax.vmap(counted)(rows.astype(compute_dtype(rows.dtype)), counts)
        sums = sums + function(rows).sum(1)
        many = many + (jnp.full(len(rows), rows.shape[1]) if counts is None else counts.sum(1))
    return sums, many


@own_promotion()
def matrices(uses: Sequence[Use], folds: int) -> tuple[Array, Array, Array | None, np.ndarray]:
    """X and Y [G, M, N] of all uses and batches, which of their rows count [G, M] (None for all), their folds [M]."""
    parts = []
    for use in uses:
        for pair in use.inputs:
            x, y = (jax.tree.map(lambda a: jnp.asarray(everywhere(a)), operand) for operand in pair)
            parts.append(_grouped(use.product, y, None if pair[0] is pair[1] else x))
    rows = None
    if any(counts is not None for _, _, counts in parts):
        every = [jnp.ones(y.shape[:2], bool) if counts is None else counts for y, _, counts in parts]
        rows = jnp.concatenate(every, 1)
    xs, ys = (jnp.concatenate(each, 1) for each in zip(*((y if x is None else x, y) for y, x, _ in parts), strict=True))
    wide = wider(jnp.float32, xs.dtype, ys.dtype)
    ragged = uses[0].product.kind == "ragged"
    fold = [fold_of(y.shape[1], folds, number, ragged) for number, (y, _, _) in enumerate(parts)]
    return xs.astype(wide), ys.astype(wide), rows, np.concatenate(fold)


def fold_of(rows: int, folds: int, number: int, ragged: bool = False) -> np.ndarray:
    """The fold of each row of a batch; of a ragged product they go round, as the rows of one expert are neighbours.

    Example:
        >>> fold_of(10, 4, number=2)
        array([0, 0, 1, 1, 2, 2, 3, 3, 2, 2])
    """
    each = rows // folds
    most = np.tile(np.arange(folds), each) if ragged else np.repeat(np.arange(folds), each)
    return np.concatenate([most, np.full(rows - each * folds, number % folds)])


def _grouped(product: Product, y: Operand, x: Operand | None) -> tuple[Array, Array | None, Array | None]:
    """Y and X [G, M, N], and the rows that count [G, M]; of a ragged product all rows for each expert."""
    ys, xs, counts = product.inputs(y.x), None if x is None else product.inputs(x.x), _counts(product, y, x)
    if product.kind != "ragged":
        return ys, xs, counts
    members, paired = _members(product, y, x)
    each = members.shape[0] // ys.shape[0]
    ys = jnp.repeat(ys, each, 0)
    xs = None if xs is None else jnp.where(paired[:, None, None], jnp.repeat(xs, each, 0), ys)
    return ys, xs, members if counts is None else members & jnp.repeat(counts, each, 0)


def _counts(product: Product, y: Operand, x: Operand | None) -> Array | None:
    """Rows of the canonical inputs that count in both nets, which give a position different rows only by routing."""
    both = [product.counted(each) for each in (y, x) if each is not None and each.counts is not None]
    return functools.reduce(jnp.logical_and, both) if both else None


def _members(product: Product, y: Operand, x: Operand | None) -> tuple[Array, Array]:
    """Which rows an expert has, and whether they have the same numbers in both nets."""
    members = product.members(y)
    if x is None:
        return members, jnp.ones(len(members), bool)
    return members, (members == product.members(x)).all(1)


@functools.lru_cache(maxsize=256)
def _gather(key: Structure, parts: int, folds: int, alone: bool, moments: bool) -> Callable[..., Any]:
    """Adds one batch of a product's inputs to the sums of its folds, compiled once for all products of this kind.

    A convolution's inputs become matrices part by part, which stay in the cache and need less memory; the experts of a
    ragged product take their rows one after another. On several devices, which have rows of several folds each, the
    folds are summed together: rows stay where they are, and the sums cross.
    """
    product: Product = key.thing

    def experts(y: Operand, x: Operand | None, w: Array | None, sums: Any, number: Any) -> Any:
        ys, xs, counts = product.inputs(y.x), None if x is None else product.inputs(x.x), _counts(product, y, x)
        members, paired = _members(product, y, x)
        each = len(members) // len(ys)

        def expert(of: Any) -> Any:
            i, member, pair, v, before = of
            y_here, x_here, rows = jax.tree.map(lambda a: a[i // each], (ys, xs, counts))
            x_here = None if x_here is None else jnp.where(pair, x_here, y_here)
            rows = member if rows is None else member & rows
            return _add(y_here, x_here, rows, v, before, number, folds=folds, ragged=True)

        return jax.lax.map(expert, (jnp.arange(len(members)), members, paired, w, sums))

    def add_part(sums: Any, number: Any, part: Any, w: Any) -> Any:
        y, x, counts = part
        one = functools.partial(_add, number=number, folds=folds, alone=alone)
        return jax.vmap(one)(product.inputs(y), None if x is None else product.inputs(x), counts, w, sums)

    def sums(y: Operand, x: Operand | None, w: Any, before: Any, number: Any) -> Any:
        if before is None:  # where they lie is the compiler's to say
            groups, _, many = jax.eval_shape(product.inputs, y.x).shape
            if product.kind == "ragged":
                groups = jax.eval_shape(product.members, y).shape[0]
            kind = wider(jnp.float32, y.x.dtype)
            before = _nothing(jnp, groups, many, kind, w, moments=moments, drift=x is not None)
        if product.kind == "ragged":
            return experts(y, x, w, before, number)
        counts = _counts(product, y, x)
        arrays = y.x, None if x is None else x.x
        if parts == 1:
            return add_part(before, number, (*arrays, counts), w)
        cut = jax.tree.map(lambda a: product.cut(a, parts), arrays)
        if counts is not None:
            counts = counts.reshape(len(counts), parts, -1).swapaxes(0, 1)

        def step(carry: Any, part: Any) -> tuple[Any, None]:
            return (add_part(carry[0], carry[1], part, w), carry[1] + 1), None

        return jax.lax.scan(step, (before, number), (*cut, counts))[0][0]

    @functools.partial(jax.jit, donate_argnames="before")  # or there would be twice the sums
    def add(y: Any, x: Any, w: Any, before: Any, number: Any) -> Any:
        spread = explicit_sharding(y.x)
        if spread is None:
            return sums(y, x, w, before, number)
        whole, axes = NamedSharding(spread.mesh, P()), spread.mesh.axis_names
        return jax.sharding.auto_axes(sums, axes=axes, out_sharding=whole)(y, x, w, before, number)

    return add


def _add(
    y: Array,
    x: Array | None,
    rows: Array | None,
    w: Any,
    sums: Any,
    number: Any,
    folds: int,
    ragged: bool = False,
    alone: bool = True,
) -> Any:
    """Adds the rows of one group to the sums of its folds [K, ...]; the first rows that count say what moments are
    shifted by."""
    each = len(y) // folds
    if sums.moments is not None:
        before = sums.moments
        shift = jnp.where(before.count.any(), before.shift[0], mean(y.astype(before.shift.dtype), rows))
        sums = sums._replace(moments=before._replace(shift=jnp.broadcast_to(shift, before.shift.shape)))

    def fold(before: Any, y: Any, x: Any, rows: Any) -> Any:
        moments, differences = before
        if differences is not None:
            wide = differences.dtype
            away = counted(x.astype(wide) - y.astype(wide), rows)
            differences += (dot(away, w.astype(wide)) ** 2).sum(0)
        if moments is None:
            return Folds(None, differences)
        batch = about(moments.shift, y, x, rows=rows)
        return Folds(jax.tree.map(jnp.add, moments, batch)._replace(shift=moments.shift), differences)

    def cut(a: Any) -> Any:
        return None if a is None else a[: each * folds].reshape(folds, each, *a.shape[1:])

    def added(sums: Any, k: Any, *part: Any) -> Any:
        """The sums with those of fold k in their place."""
        here = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, k, keepdims=False), sums)
        new = fold(here, *part)
        return jax.tree.map(lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, k, 0), sums, new)

    def one(k: Any, sums: Any) -> Any:
        rows_of = [None if a is None else jax.lax.dynamic_slice_in_dim(a, k * each, each) for a in (y, x, rows)]
        return added(sums, k, *rows_of)

    if ragged:
        places, rows = _by_rank(rows, folds, number)
        return jax.lax.map(lambda part: fold(*part), (sums, y[places], None if x is None else x[places], rows))
    if each and alone:  # in place, or there would be twice the sums
        sums = jax.lax.fori_loop(0, folds, one, sums)
    elif each:
        sums = jax.vmap(fold)(sums, cut(y), cut(x), cut(rows))
    if len(y) > each * folds:
        sums = added(sums, number % folds, *(None if a is None else a[each * folds :] for a in (y, x, rows)))
    return sums


def _by_rank(rows: Any, folds: int, number: Any) -> tuple[Array, Array]:
    """Places [K, .] of the rows that count, cut into folds as if there were no others, and which of them are meant."""
    most, many = len(rows) // folds, rows.sum()
    each = many // folds
    order = jnp.argsort(~rows, stable=True)
    k, i, j = jnp.arange(folds)[:, None], jnp.arange(most), jnp.arange(folds - 1)
    rest = each * folds + j
    places = jnp.concatenate([k * each + i, jnp.broadcast_to(rest, (folds, folds - 1))], 1)
    meant = jnp.concatenate([jnp.broadcast_to(i < each, (folds, most)), (k == number % folds) & (rest < many)], 1)
    return order[jnp.minimum(places, len(rows) - 1)], meant


def everywhere(a: Any) -> Any:
    """The whole array on every device, if it is spread over a mesh with explicit axes, which cannot be reshaped."""
    if not isinstance(a, jax.Array) or explicit_sharding(a) is None:
        return a
    assert isinstance(a.sharding, NamedSharding)
    return jax.device_put(a, NamedSharding(a.sharding.mesh, P()))
