"""The inputs of a product's uses: their statistics summed over uses and batches, or the inputs themselves as matrices.

    H = sum over uses and batches of Y'Y, over the rows that count; D and K alike, see `lcq.methods.moments`

A `ragged_dot` is a product for each expert: group g has the rows that the quantized net gives it. Its X is paired with
Y where that expert has the same rows in both nets, by their numbers; elsewhere X is taken to be Y.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from lcq.blocks import compute_dtype, explicit_sharding
from lcq.dtypes import wider
from lcq.methods.moments import Moments, Statistics, counted, finish, gather
from lcq.methods.pieces import Structure
from lcq.methods.walk import Use
from lcq.products import Operand, Product

_ROWS = 4096
"""Rows of a convolution's inputs that are made at a time."""


def statistics(uses: Sequence[Use], centred: bool) -> Statistics:
    """Sums over all uses and batches, with a leading axis of groups.

    Args:
        uses: of the same weights in the same layout.
        centred: see `lcq.methods.moments.finish`.
    """
    moments: Any = None
    pairs = [pair for use in uses for pair in use.inputs]
    same = all(one is two for one, two in pairs)
    alone = all(len(a.sharding.device_set) == 1 for a in jax.tree.leaves(pairs) if isinstance(a, jax.Array))
    for use in uses:
        key = Structure(use.product.structure, use.product)
        add = _gather(key, use.product.parts(_ROWS) if alone else 1)
        for x, y in use.inputs:
            moments = add(y, None if same else x, moments)
    return jax.vmap(functools.partial(finish, centred=centred))(moments)


def squares(use: Use) -> tuple[Array, Array]:
    """Of the inputs in the original net: sums of X^2 [G, N] over the rows that count, and how many these are [G]."""
    sums: Any = 0.0
    many: Any = 0
    for x, _ in use.inputs:
        rows, _, counts = _grouped(use.product, jax.tree.map(lambda a: jnp.asarray(everywhere(a)), x), None)
        rows = jax.vmap(counted)(rows.astype(compute_dtype(rows.dtype)), counts)
        sums = sums + (rows**2).sum(1)
        many = many + (jnp.full(len(rows), rows.shape[1]) if counts is None else counts.sum(1))
    return sums, many


def matrices(uses: Sequence[Use]) -> tuple[Array, Array, Array | None]:
    """X and Y [G, M, N] of all uses and batches, and which of their rows count [G, M], None for all."""
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
    return xs.astype(wide), ys.astype(wide), rows


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
def _gather(key: Structure, parts: int) -> Callable[..., Moments]:
    """Adds one batch of a product's inputs to its moments, compiled once for all products of this kind.

    A convolution's inputs become matrices part by part, which stay in the cache and need less memory; the experts of a
    ragged product take their rows one after another.
    """
    product: Product = key.thing

    def one(moments: Any, part: Any) -> tuple[Any, None]:
        y, x, counts = part
        return jax.vmap(_add)(product.inputs(y), None if x is None else product.inputs(x), counts, moments), None

    def experts(y: Operand, x: Operand | None, moments: Any) -> Any:
        ys, xs, counts = product.inputs(y.x), None if x is None else product.inputs(x.x), _counts(product, y, x)
        members, paired = _members(product, y, x)
        each = len(members) // len(ys)

        def expert(of: Any) -> Any:
            i, member, pair, before = of
            y_here, x_here, rows = jax.tree.map(lambda a: a[i // each], (ys, xs, counts))
            x_here = None if x_here is None else jnp.where(pair, x_here, y_here)
            return _add(y_here, x_here, member if rows is None else member & rows, before)

        return jax.lax.map(expert, (jnp.arange(len(members)), members, paired, moments))

    def sums(y: Operand, x: Operand | None, moments: Any) -> Any:
        if product.kind == "ragged":
            return experts(y, x, moments)
        counts = _counts(product, y, x)
        arrays = y.x, None if x is None else x.x
        if parts == 1:
            return one(moments, (*arrays, counts))[0]
        cut = jax.tree.map(lambda a: product.cut(a, parts), arrays)
        if counts is not None:
            counts = counts.reshape(len(counts), parts, -1).swapaxes(0, 1)
        if moments is None:
            first = jax.tree.map(lambda a: a[0], (*cut, counts))
            rows = product.inputs(first[0])
            moments = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(one, None, first)[0])
            if counts is None:
                moments = moments._replace(shift=rows.astype(compute_dtype(rows.dtype)).mean(1))
        return jax.lax.scan(one, moments, (*cut, counts))[0]

    @jax.jit
    def add(y: Any, x: Any, moments: Any) -> Any:
        spread = explicit_sharding(y.x)
        if spread is None:
            return sums(y, x, moments)
        whole, axes = NamedSharding(spread.mesh, P()), spread.mesh.axis_names
        return jax.sharding.auto_axes(sums, axes=axes, out_sharding=whole)(y, x, moments)

    return add


def _add(y: Array, x: Array | None, rows: Array | None, moments: Any) -> Moments:
    return gather(y, x, moments, rows=rows)


def everywhere(a: Any) -> Any:
    """The whole array on every device, if it is spread over a mesh with explicit axes, which cannot be reshaped."""
    if not isinstance(a, jax.Array) or explicit_sharding(a) is None:
        return a
    assert isinstance(a.sharding, NamedSharding)
    return jax.device_put(a, NamedSharding(a.sharding.mesh, P()))
