"""The n-th order entropy of quantized weights, differentiable.

Between sorted centres c_{b-1} <= w < c_b a weight belongs to both: P_w[b] = tau, P_w[b-1] = 1 - tau with
tau = (w - c_{b-1})/(c_b - c_{b-1}). Over non-overlapping blocks of n consecutive weights

    p(k_1..k_n) = (1/#blocks) sum over blocks of prod_i P_{w_i}[k_i],    H_n = -(1/n) sum_k p log2 p

is what a static coder of such blocks needs per weight, once every weight is one of its centres; 0 log 0 = 0. It is
piecewise smooth in w:

    dH_n/dtau_i = -(1/(n #blocks)) sum over the 2^(n-1) corners of the others of their P (log2 p[b_i] - log2 p[b_i - 1])

A block touches 2^n of the K^n numbers p, those of its cell of the grid of centres: these are added to a table of cells,
and looked up there for the gradient.

Source: Tartaglione, Lathuiliere, Fiandrotti, Cagnazzo & Grangetto, arXiv 2107.05298. Their code replaces a part of the
gradient of order 2 by a constant and clips it; here it is exact.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, PyTree

from lcq.forms import Codes
from lcq.forms.base import Form, is_form
from lcq.forms.blocks import blocks, compute_dtype, cut_axes, explicit_sharding, join_axes
from lcq.forms.dtypes import wider
from lcq.tree.aliases import Forms, Params
from lcq.tree.paths import flatten

Layout = Literal["jax", "torch"]

_LARGEST = 1 << 26
"""Numbers in the table of cells, 2^n (K - 1)^n: 256 MiB."""

_SELECT = 16
"""Up to this many centres the two around a weight are found by a chain of selects, which vectorises."""

_LANES = 16
"""Tables that the blocks of a tensor are dealt out to: their float32 sums are that much shorter."""


def block_entropy(
    params: Params, centres: PyTree, order: int, *, pooled: bool = True, layout: Layout = "jax"
) -> Float[Array, ""]:
    """The n-th order entropy of quantized weights, in bits per weight, as a differentiable function of both.

        H_n = -(1/n) sum_k p(k) log2 p(k),    p(k_1..k_n) = mean over blocks of prod_i P_{w_i}[k_i]

    see the module's docstring. Value and gradient are exact, also with respect to the centres, with two exceptions. H_n
    has a kink where a weight equals a centre: the slope is that from above there, and from below at the last centre.
    And the slope beside an empty bin is unbounded: a p below eps/#blocks, eps of the dtype (float32: 2^-23), counts
    as that, which bounds |dH_n/dtau| by log2(#blocks/eps)/(n #blocks); a membership below eps is a rounding error of
    tau. Work is 2^n/n operations a weight, memory 2^n/n copies of the weights and 2^n (K - 1)^n numbers.

    Args:
        params: a tree of weights.
        centres: a tree like it, or a part of it: ascending arrays [K], or [*blocks, K] with blocks as in
            `lcq.forms.Codes`; None, or no leaf, where weights do not count. `entropy_centres` makes it. A weight
            outside of the centres counts as the outermost one, with slope 0.
        order: n >= 1. Blocks run through a leaf in row-major order; what is left of it (size mod n) does not count.
        pooled: one histogram over ranks of centres for all leaves together; False for one each, and the mean of their
            entropies by numbers of blocks.
        layout: in which order the weights of a leaf come: "jax" as they are, HWIO for convolutions, as an entropy
            coder meets them; "torch" with the last two axes in front and swapped, (out, in) and OIHW, as the authors.

    Returns:
        Bits per weight, float32 or wider.

    Raises:
        ValueError: an order below 1; centres without weights, not fit for them, or (of concrete ones) not ascending
            and finite; no block at all; too many bins.

    Example:
        >>> w, c = {"kernel": jnp.array([0.0, 1.0, 0.0, 1.0])}, {"kernel": jnp.array([0.0, 1.0])}
        >>> float(block_entropy(w, c, 1)), float(block_entropy(w, c, 2))
        (1.0, 0.0)

    Source: arXiv 2107.05298, section 3; the exact gradient in N 2^n/n operations is lcq's.
    """
    order = check_order(order)
    if layout not in ("jax", "torch"):
        raise ValueError(f"expected layout='jax' or 'torch', got {layout!r}")
    leaves, codebooks = flatten(params)[0], flatten(centres)[0]
    pairs = []
    for path, table in codebooks.items():
        if path not in leaves:
            raise ValueError(f"{path}: expected centres of a leaf of params, got none there; drop these centres")
        _check_centres(path, leaves[path], table)
        if leaves[path].size >= order:
            pairs.append((leaves[path], table))
    if not pairs:
        raise ValueError(f"expected a leaf of at least order = {order} weights with centres, got none")
    check_bins(max(table.shape[-1] for _, table in pairs), order)
    return _entropy(pairs, order, pooled, layout)


def entropy_centres(params: Params, forms: Forms) -> PyTree:
    """The centres of `block_entropy`: the levels of every form, and an empty centre on either side.

    With N levels c_1..c_N the outer two are min - .01 - |c_2 - c_1| and max + .01 + |c_N - c_{N-1}|, of the least and
    the largest of all weights and levels: so every weight lies between two centres. No gradient passes.

    Args:
        params: a tree of weights.
        forms: the tree compressed, as by `lcq.compress(params, rules)`.

    Returns:
        The tree with [*blocks, N + 2] where a form is, None where none is.

    Raises:
        ValueError: a form without a codebook.

    Example:
        >>> import lcq
        >>> w = {"bias": jnp.zeros(2), "kernel": jnp.array([0.0, 1.0, 2.0, 5.0])}
        >>> entropy_centres(w, lcq.compress(w, [lcq.Rule("kernel", lcq.KMeans(2))]))
        {'bias': None, 'kernel': Array([-4.01,  1.  ,  5.  ,  9.01], dtype=float32)}

    Source: the authors' code of arXiv 2107.05298.
    """
    leaves, structure = flatten(params)
    found = {path: form for path, form in flatten(forms)[0].items() if is_form(form)}
    centres = [
        _surrounded(jnp.asarray(w), levels_of(path, found[path])) if path in found else None
        for path, w in leaves.items()
    ]
    return jax.tree.unflatten(structure, centres)


@functools.partial(jax.jit, static_argnames=("order", "pooled", "layout"))
def _entropy(pairs: Sequence[tuple[Array, Array]], order: int, pooled: bool, layout: Layout) -> Float[Array, ""]:
    """H_n of leaves and their centres."""
    size = max(centres.shape[-1] for _, centres in pairs)
    taus, cells = zip(*(_in_blocks(w, centres, order, size, layout) for w, centres in pairs), strict=True)
    if pooled:
        return _bits(taus, cells, size)
    parts = [len(cell) * _bits((tau,), (cell,), size) for tau, cell in zip(taus, cells, strict=True)]
    return functools.reduce(jnp.add, parts) / sum(map(len, cells))


def _in_blocks(
    w: Float[Array, "*leaf"], centres: Float[Array, "*counts k"], order: int, size: int, layout: Layout
) -> tuple[Float[Array, "b n"], Int[Array, " b"]]:
    """tau of every weight in whole blocks, and the cell of every block in a grid of `size` centres."""
    index, lower, upper = bracket(w, centres)
    width = upper - lower
    tau = jnp.where(width > 0, (w.astype(width.dtype) - lower) / jnp.where(width > 0, width, 1), 0)
    tau = jnp.where(tau < 0, 0, jnp.where(tau > 1, 1, tau))  # clip would have no slope at the centres themselves
    tau, index = (rows_of(a, order, layout) for a in (tau, index))
    cell = functools.reduce(lambda cell, i: cell * (size - 1) + i, index.T)
    return tau, cell


def rows_of(a: Array, order: int, layout: Layout) -> Array:
    """The whole blocks of a leaf, one a row; a leaf on a mesh with explicit axes is gathered."""
    if (sharding := explicit_sharding(a)) is not None:
        a = jax.sharding.reshard(a, jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec()))
    if layout == "torch" and a.ndim > 1:
        a = jnp.moveaxis(a, (-1, -2), (0, 1))
    many = a.size // order
    return a.reshape(-1)[: many * order].reshape(many, order)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _bits(taus: tuple[Array, ...], cells: tuple[Array, ...], size: int) -> Float[Array, ""]:
    """H_n of one histogram over all given blocks."""
    return _bits_of(_histogram(taus, cells, size))


def _bits_of(p: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sum(p * jnp.log2(1 / jnp.where(p > 0, p, 1))) / p.ndim


@_bits.defjvp
def _bits_slope(size: int, primals: PyTree, tangents: PyTree) -> tuple[Array, Array]:
    """Moving weight i of a block moves mass between the corners with b_i - 1 and those with b_i; sum p stays."""
    taus, cells = primals
    p, order = _histogram(taus, cells, size), taus[0].shape[1]
    value = _bits_of(p)
    many = sum(map(len, cells))
    prices = -jnp.log2(jnp.maximum(p, jnp.finfo(p.dtype).eps / many)) / (order * many)
    of_cells = jnp.stack([prices[part] for part in _corners(order, size)], -1).reshape(-1, 2**order)
    change = jnp.zeros_like(value)
    for tau, cell, moved in zip(taus, cells, tangents[0], strict=True):
        rows = of_cells.at[cell].get(mode="promise_in_bounds").reshape(-1, *(2,) * order)
        for i in range(order):
            change += jnp.sum(_expected(rows, tau, i) * moved[:, i])
    return value, change


def _expected(rows: Float[Array, "b ..."], tau: Float[Array, "b n"], i: int) -> Float[Array, " b"]:
    """What moving weight i from its lower to its upper centre costs each block, the mean over the others' corners."""
    for j in reversed(range(tau.shape[1])):
        low, high = rows[..., 0], rows[..., 1]
        t = tau[:, j].reshape(-1, *(1,) * (low.ndim - 1))
        rows = high - low if j == i else low * (1 - t) + high * t
    return rows


def _histogram(taus: tuple[Array, ...], cells: tuple[Array, ...], size: int) -> Float[Array, "..."]:
    """p, an array of n axes of length K: what the corners of every cell hold, added up and then put in its place."""
    order = taus[0].shape[1]
    many, wide = (size - 1) ** order, wider(*(tau.dtype for tau in taus))
    lanes = max(min(_LANES, (1 << 16) // (many * 2**order)), 1)
    table = jnp.zeros((lanes * many, 2**order), wide)
    for tau, cell in zip(taus, cells, strict=True):
        mass = jnp.ones((len(cell), 1), wide)
        for t in tau.T:
            mass = jnp.stack([mass * (1 - t[:, None]), mass * t[:, None]], -1).reshape(len(cell), -1)
        lane = jnp.arange(len(cell), dtype=jnp.int32) % lanes
        table = table.at[cell + many * lane].add(mass, mode="promise_in_bounds")
    table = table.reshape(lanes, *(size - 1,) * order, 2**order).sum(0) / sum(map(len, cells))
    p = jnp.zeros((size,) * order, wide)
    for i, part in enumerate(_corners(order, size)):
        p = p.at[part].add(table[..., i])
    return p


def _corners(order: int, size: int) -> list[tuple[slice, ...]]:
    """Where in p the corners of all cells are, the last weight's varying fastest."""
    return [tuple(slice(b, size - 1 + b) for b in corner) for corner in itertools.product((0, 1), repeat=order)]


def bracket(w: Float[Array, "*leaf"], centres: Float[Array, "*counts k"]) -> tuple[Array, Array, Array]:
    """Rank of the centre below every weight, that centre and the next one; the last two centres for w >= the last."""
    size, (counts, stat) = centres.shape[-1], blocks_of(w, centres)
    x, c = cut_axes(w.astype(compute_dtype(w.dtype)), counts), centres.reshape(*stat, size)
    if size <= _SELECT:
        index = jnp.zeros_like(x, jnp.int32)
        lower, upper = (jnp.broadcast_to(c[..., k], x.shape) for k in (0, 1))
        for k in range(1, size - 1):
            above = x >= c[..., k]
            index += above.astype(jnp.int32)
            lower, upper = jnp.where(above, c[..., k], lower), jnp.where(above, c[..., k + 1], upper)
    else:
        first = jnp.moveaxis(c, -1, 0)

        def count(k: Array, index: Array) -> Array:
            return index + (x >= first[k]).astype(jnp.int32)

        index = jax.lax.fori_loop(1, size - 1, count, jnp.zeros_like(x, jnp.int32))
        lower, upper = (jnp.take_along_axis(c, index[..., None] + i, -1)[..., 0] for i in (0, 1))
    index, lower, upper = (join_axes(a, w.shape) for a in (index, lower, upper))
    return index, lower, upper


def blocks_of(w: Float[Array, "*leaf"], centres: Float[Array, "*counts k"]) -> tuple[Sequence[int], tuple[int, ...]]:
    """Blocks with centres of their own along each axis of the leaf, and the shape of one number per block."""
    counts = centres.shape[:-1] or (1,) * w.ndim
    return counts, blocks(w.shape, counts).stat


@jax.jit
def _surrounded(w: Float[Array, "*leaf"], levels: Float[Array, "*counts n"]) -> Float[Array, "*counts k"]:
    """Levels with an empty centre on either side."""
    w, levels = jax.lax.stop_gradient((w.astype(compute_dtype(w.dtype)), levels))
    counts, _ = blocks_of(w, levels)
    x, axes = cut_axes(w, counts), blocks(w.shape, counts).axes
    one = levels[..., 0].shape
    steps = jnp.abs(jnp.diff(levels)) if levels.shape[-1] > 1 else jnp.zeros_like(levels)
    low = jnp.minimum(jnp.min(x, axes).reshape(one), levels[..., 0]) - 0.01 - steps[..., 0]
    high = jnp.maximum(jnp.max(x, axes).reshape(one), levels[..., -1]) + 0.01 + steps[..., -1]
    return jnp.concatenate([low[..., None], levels, high[..., None]], -1)


def levels_of(path: str, form: Form) -> Float[Array, "*counts n"]:
    """The numbers that the codes of a form stand for, ascending: [N], or those of each block."""
    if not isinstance(form, Codes):
        raise ValueError(f"{path}: expected a form with a codebook, such as of lcq.KMeans, got {type(form).__name__}")
    table = jnp.asarray(np.asarray(form.values, np.float32) if form.levels is None else form.levels)
    table = table.astype(compute_dtype(table.dtype))
    form = form.plain()
    numbers = [a for a in (form.zero, form.scale) if a is not None]
    table = table.reshape((1,) * (max((a.ndim for a in numbers), default=0) + 1 - table.ndim) + table.shape)
    if form.zero is not None:
        table = table - jnp.asarray(form.zero).astype(table.dtype)[..., None]
    if form.scale is not None:
        scale = jnp.asarray(form.scale).astype(table.dtype)[..., None]
        table = jnp.where(scale < 0, (table * scale)[..., ::-1], table * scale)
    return table.reshape(-1) if math.prod(table.shape[:-1]) == 1 else table


def codes_of(form: Codes, ranks: Integer[Array, "*leaf"]) -> Integer[Array, "*leaf"]:
    """The codes of the levels with these ranks, from the lowest; where a scale is negative they count downwards.
    Its own inverse: ranks of codes."""
    if form.scale is None:
        return ranks
    scale = jnp.asarray(form.scale)
    counts = scale.shape
    negative = (scale < 0).reshape(blocks(ranks.shape, counts).stat)
    cut = cut_axes(ranks, counts)
    return join_axes(jnp.where(negative, form.size_of_table - 1 - cut, cut), ranks.shape)


def nearest(w: Float[Array, "*leaf"], levels: Float[Array, "*counts k"]) -> tuple[Array, Array]:
    """The rank of the nearest level, from the lowest, and Q(w), that level; the lower one on ties."""
    index, lower, upper = bracket(w, levels)
    above = w.astype(lower.dtype) > 0.5 * lower + 0.5 * upper
    return index + above.astype(index.dtype), jnp.where(above, upper, lower)


def check_order(order: object) -> int:
    """An order, if it is a whole number from 1."""
    if isinstance(order, bool) or not isinstance(order, int | np.integer) or order < 1:
        raise ValueError(f"expected order= an int >= 1, got {order!r}")
    return int(order)


def check_bins(size: int, order: int) -> None:
    """Raises ValueError unless the table of cells of K = `size` centres is of a size that can be."""
    if order * math.log2(2 * (size - 1)) > math.log2(_LARGEST):
        raise ValueError(
            f"expected 2^n (K - 1)^n <= 2^26 bins, got K = {size} centres at order n = {order}; lower one of them"
        )


def _check_centres(path: str, w: PyTree, centres: PyTree) -> None:
    if is_form(w) or not hasattr(w, "dtype") or not jnp.issubdtype(w.dtype, jnp.floating):
        got = type(w).__name__ if is_form(w) else getattr(w, "dtype", type(w).__name__)
        raise ValueError(f"{path}: expected a floating-point array of weights, got {got}")
    if is_form(centres) or not hasattr(centres, "dtype") or not jnp.issubdtype(centres.dtype, jnp.floating):
        got = type(centres).__name__ if is_form(centres) else getattr(centres, "dtype", type(centres).__name__)
        raise ValueError(f"{path}: expected floating-point centres, an array, got {got}")
    *counts, size = centres.shape or (0,)
    fits = not counts or (len(counts) == w.ndim and all(d % c == 0 for d, c in zip(w.shape, counts, strict=True)))
    if size < 2 or not fits:
        raise ValueError(
            f"{path}: expected two or more ascending centres, [K] or [*blocks, K] with blocks that divide "
            f"{list(w.shape)}, got {centres.dtype}{list(centres.shape)}; make them by lcq.training.entropy_centres"
        )
    if not isinstance(centres, jax.core.Tracer):
        c = np.asarray(centres, np.float64)
        if not (np.isfinite(c).all() and (np.diff(c) >= 0).all()):
            raise ValueError(f"{path}: expected finite, ascending centres, got {np.array2string(c, threshold=9)}")
