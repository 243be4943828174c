"""Which positions of an array count: a mask of the batch, followed through the equations of a function.

A mask is boolean and broadcasts against its array: of length 1 along axes on which it does not depend (the features).

    elementwise, normalisation    a position counts where it does in all operands
    moved, sorted, looked up      the mask is moved with it, by the same numbers
    reduced, contracted           what is left counts where anything did
    carried by a scan             in each step where the step's inputs do, afterwards where any step did
    convolved, pooled             the position under the middle of the window decides; any, where windows do not overlap

What is joined to masked positions and has no mask of its own (a class token) counts; what is padded does not.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lcq.tracing.compact import reshaped
from lcq.tracing.equation import Content, Equation
from lcq.tree.aliases import Batch

Masks = Sequence[Content]

ELEMENTWISE = set(
    """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh cumlogsumexp cummax cummin cumprod cumsum digamma div eq eq_to erf erf_inv
    erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt
    lt_to max min mul name ne neg nextafter not or polygamma population_count pow pvary real reduce_precision
    regularized_incomplete_beta rem reshard round rsqrt select_n sharding_constraint shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
    """.split()
)
"""Primitives whose result counts where their operands do; running sums among them."""

_EACH = {"optimization_barrier", "device_put"}
_REDUCTIONS = {f"reduce_{kind}" for kind in ("sum", "max", "min", "prod", "and", "or", "xor")} | {"argmax", "argmin"}


def follow(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content] | None:
    """The masks of an equation's results; None if they cannot be known.

    Args:
        eqn: the equation.
        arrays: its operands.
        masks: of these, None where all positions count.
        data: which operands follow from the batch.

    Returns:
        For every result a mask, or None if all of it counts.
    """
    name = eqn.primitive.name
    if all(mask is None for mask in masks):
        return [None] * len(eqn.outvars)
    if name in _EACH:
        return list(masks)
    if name in ELEMENTWISE:
        return [both(*masks)] * len(eqn.outvars)
    if name in _REDUCTIONS:
        return [reduced(masks[0], eqn.params["axes"])]
    if name.startswith("reduce_window"):
        return None if len(arrays) > 2 else [_pooled(eqn, masks[0])]
    rule = _RULES.get(name)
    return None if rule is None else rule(eqn, arrays, masks, data)


def both(*masks: Content) -> Content:
    """Where all of them count."""
    found = [mask for mask in masks if mask is not None]
    return functools.reduce(jnp.logical_and, found) if found else None


def reduced(mask: Content, axes: Sequence[int]) -> Content:
    """Without these axes: what is left counts where anything did."""
    return None if mask is None else mask.any(tuple(axes))


def varies(mask: Content, axes: Sequence[int | np.integer]) -> bool:
    """Whether it depends on one of these axes."""
    return mask is not None and any(mask.shape[axis] > 1 for axis in axes)


def leading(mask: Content, shape: Sequence[int]) -> Content:
    """A mask of the leading axes of an array of this shape."""
    return mask.reshape(mask.shape + (1,) * (len(shape) - mask.ndim))


def _whole(mask: Content, shape: Sequence[int], axes: Sequence[int] | None = None) -> Content:
    """Of full length along these axes, or along all; all True for None."""
    axes = range(len(shape)) if axes is None else axes
    if mask is None:
        mask = jnp.ones((1,) * len(shape), bool)
    target = [shape[axis] if axis in axes else mask.shape[axis] for axis in range(len(shape))]
    return jax.lax.broadcast_in_dim(mask, target, range(len(shape)))


def _broadcast(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    onto = eqn.params["broadcast_dimensions"]
    shape = [1] * len(eqn.params["shape"])
    for axis, length in zip(onto, masks[0].shape, strict=True):
        shape[axis] = length
    return [jax.lax.broadcast_in_dim(masks[0], shape, onto)]


def _transposed(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    return [masks[0].transpose(eqn.params["permutation"])]


def _reversed(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    return [jax.lax.rev(masks[0], eqn.params["dimensions"])]


def _squeezed(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    return [jax.lax.squeeze(masks[0], eqn.params["dimensions"])]


def _reshaped(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content] | None:
    """Axes are merged and split in blocks of equal size; only blocks on which the mask depends get their length."""
    if eqn.params.get("dimensions") is not None:
        return None
    before = np.shape(arrays[0])
    axes, shape = reshaped(masks[0].shape, before, tuple(eqn.params["new_sizes"]))
    return [_whole(masks[0], before, axes).reshape(shape)]


def _sliced(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or [1] * len(start)
    parts = zip(masks[0].shape, start, limit, strides, strict=True)
    return [masks[0][tuple(slice(None) if length == 1 else slice(a, b, s) for length, a, b, s in parts)]]


def _split(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    if not varies(masks[0], [axis]):
        return [masks[0]] * len(sizes)
    return list(jax.lax.split(masks[0], sizes, axis))


def _joined(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    """A mask that does not depend on the axis of a concatenation holds for all of it."""
    axis, shapes = eqn.params["dimension"], [np.shape(a) for a in arrays]
    if not any(varies(mask, [axis]) for mask in masks):
        return [both(*masks)]
    axes = {a for a in range(len(shapes[0])) if a == axis or any(varies(mask, [a]) for mask in masks)}
    parts = [_whole(mask, shape, list(axes)) for mask, shape in zip(masks, shapes, strict=True)]
    return [jax.lax.concatenate(parts, axis)]


def _stacked(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    """As a concatenation: the new axis has no mask of its own."""
    mask = both(*masks)
    return [jnp.expand_dims(mask, eqn.params["axis"])]


def _unstacked(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    axis, many = eqn.params["axis"], len(eqn.outvars)
    slices = jnp.unstack(masks[0], axis=axis)
    return list(slices) if len(slices) == many else [slices[0]] * many


def _padded(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    still = (0, 0, 0)
    config = [c if n > 1 else still for c, n in zip(eqn.params["padding_config"], masks[0].shape, strict=True)]
    return [jax.lax.pad(masks[0], jnp.asarray(False), config)]


def _dynamic_slice(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    lengths = masks[0].shape
    sizes = [size if n > 1 else 1 for n, size in zip(lengths, eqn.params["slice_sizes"], strict=True)]
    starts = [a if n > 1 else jnp.zeros_like(a) for n, a in zip(lengths, arrays[1:], strict=True)]
    return [jax.lax.dynamic_slice(masks[0], starts, sizes)]


def _dynamic_update(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    """What is written over brings its mask; a buffer that does not follow from the batch does not count."""
    shape, part = np.shape(arrays[0]), np.shape(arrays[1])
    axes = [a for a in range(len(shape)) if shape[a] != part[a] or varies(masks[0], [a]) or varies(masks[1], [a])]
    base, new = _whole(masks[0], shape, axes), _whole(masks[1], part, axes)
    if masks[0] is None and not data[0]:
        base = jnp.zeros_like(base)
    starts = [a if i in axes else jnp.zeros_like(a) for i, a in enumerate(arrays[2:])]
    return [jax.lax.dynamic_update_slice(base, new, starts)]


def _sorted(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    """Masks take part in the sort, behind its keys."""
    if not varies(both(*masks), [eqn.params["dimension"]]):
        return [both(*masks)] * len(arrays)
    shape = np.shape(arrays[0])
    extra = [_whole(mask, shape).astype(jnp.int8) for mask in masks]
    outs = eqn.primitive.bind(*arrays, *extra, **eqn.params)
    return [out > 0 for out in outs[len(arrays) :]]


def _top(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content] | None:
    axis = eqn.params.get("axis", -1)
    return None if varies(masks[0], [axis]) else [masks[0]] * len(eqn.outvars)


def _gathered(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    """The mask is looked up by the same numbers; a number that does not count brings what does not."""
    numbers, found = eqn.params["dimension_numbers"], []
    rank = len(eqn.outvars[0].aval.shape)
    if masks[0] is not None:
        shape = np.shape(arrays[0])
        indexed = {*numbers.start_index_map, *numbers.operand_batching_dims}
        axes = [a for a in range(len(shape)) if a in indexed or varies(masks[0], [a])]
        sizes = tuple(size if a in axes else 1 for a, size in enumerate(eqn.params["slice_sizes"]))
        params = {**eqn.params, "slice_sizes": sizes, "fill_value": False}
        found.append(eqn.primitive.bind(_whole(masks[0], shape, axes), arrays[1], **params))
    if masks[1] is not None:
        onto = [axis for axis in range(rank) if axis not in numbers.offset_dims]
        found.append(_placed(masks[1].any(-1), rank, onto))
    return [both(*found)]


def _scattered(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    """What is written brings its mask; a buffer that does not follow from the batch does not count."""
    numbers = eqn.params["dimension_numbers"]
    shape, part = np.shape(arrays[0]), np.shape(arrays[2])
    onto = [axis for axis in range(len(part)) if axis not in numbers.update_window_dims]
    new = both(masks[2], None if masks[1] is None else _placed(masks[1].any(-1), len(part), onto))
    fixed = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    window = [axis for axis in range(len(shape)) if axis not in fixed]
    compact = {
        axis: at
        for axis, at in zip(window, numbers.update_window_dims, strict=True)
        if axis not in numbers.scatter_dims_to_operand_dims and not varies(masks[0], [axis]) and not varies(new, [at])
    }
    base = _whole(masks[0], shape, [a for a in range(len(shape)) if a not in compact])
    if masks[0] is None and not data[0]:
        base = jnp.zeros_like(base)
    written = _whole(new, part, [a for a in range(len(part)) if a not in compact.values()])
    made = jax.lax.scatter_max(
        base.astype(jnp.int8),
        arrays[1],
        written.astype(jnp.int8),
        numbers,
        indices_are_sorted=eqn.params["indices_are_sorted"],
        unique_indices=eqn.params["unique_indices"],
        mode=eqn.params["mode"],
    )
    return [made > 0]


def _placed(mask: Content, rank: int, onto: Sequence[int]) -> Content:
    """With its axes at these places among `rank`."""
    shape = [1] * rank
    for axis, length in zip(onto, mask.shape, strict=True):
        shape[axis] = length
    return jax.lax.broadcast_in_dim(mask, shape, onto)


def _dot(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content]:
    return [_product(masks[:2], [np.shape(a) for a in arrays[:2]], *eqn.params["dimension_numbers"])]


def _ragged_dot(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content] | None:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    contract, batch = numbers.dot_dimension_numbers
    if masks[0] is None or masks[1] is not None or set(numbers.lhs_ragged_dimensions) & {*contract[0], *batch[0]}:
        return None
    groups = tuple(numbers.rhs_group_dimensions)
    shapes = [np.shape(a) for a in arrays[:2]]
    return [_product(masks[:2], shapes, (contract[0], (*contract[1], *groups)), batch)]


def _product(
    masks: Masks, shapes: Sequence[tuple[int, ...]], contract: Sequence[Sequence[int]], batch: Batch
) -> Content:
    """Of [batch, rows, columns]: rows and columns that count, in batches that do."""
    free = [
        [axis for axis in range(len(shape)) if axis not in (*contract[side], *batch[side])]
        for side, shape in enumerate(shapes)
    ]
    many = len(batch[0])
    rank = many + len(free[0]) + len(free[1])
    found = []
    for side, mask in enumerate(masks):
        if mask is None:
            continue
        order = [*batch[side], *free[side], *contract[side]]
        start = many + (len(free[0]) if side else 0)
        onto = [*range(many), *range(start, start + len(free[side]))]
        found.append(_placed(mask.transpose(order).any(tuple(range(len(onto), len(order)))), rank, onto))
    return both(*found)


def _convolved(eqn: Equation, arrays: Sequence[Content], masks: Masks, data: Sequence[bool]) -> list[Content] | None:
    params, (image, kernel) = eqn.params, arrays
    x, w, out = params["dimension_numbers"]
    if masks[1] is not None or (params["batch_group_count"] > 1 and varies(masks[0], [x[0]])):
        return None
    mask = masks[0].transpose(x).any(1, keepdims=True)
    for axis in range(2, len(x)):
        mask = _slid(
            mask,
            axis,
            np.shape(image)[x[axis]],
            eqn.outvars[0].aval.shape[out[axis]],
            np.shape(kernel)[w[axis]],
            params["window_strides"][axis - 2],
            params["padding"][axis - 2],
            params["lhs_dilation"][axis - 2],
            params["rhs_dilation"][axis - 2],
        )
    return [mask.transpose(np.argsort(out))]


def _pooled(eqn: Equation, mask: Content) -> Content:
    params, before, after = eqn.params, eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    names = "window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation"
    for axis in range(len(before)):
        mask = _slid(mask, axis, before[axis], after[axis], *(params[name][axis] for name in names))
    return mask


def _slid(
    mask: Content,
    axis: int,
    before: int,
    after: int,
    window: int,
    stride: int,
    padding: tuple[int, int],
    base_dilation: int,
    window_dilation: int,
) -> Content:
    """Under a window that slides along one axis."""
    if not varies(mask, [axis]):
        return mask
    span, (low, high) = (window - 1) * window_dilation + 1, padding
    first = np.arange(after) * stride
    if stride >= span and base_dilation == 1:
        seen = first[:, None] - low + np.arange(window) * window_dilation
        shape = [after if i == axis else 1 for i in range(mask.ndim)]
        there = ((seen >= 0) & (seen < before)).reshape([*shape, window])
        taken = jnp.take(mask, np.clip(seen, 0, before - 1), axis)
        return (jnp.moveaxis(taken, axis + 1, -1) & there).any(-1)
    twice = 2 * first + span - 1 - low - high  # the middle, in pixels of the dilated image
    nearest = twice // 2 if base_dilation == 1 else (twice + base_dilation) // (2 * base_dilation)
    middle = np.clip(nearest, 0, before - 1)
    return mask if np.array_equal(middle, np.arange(before)) else jnp.take(mask, middle, axis)


_RULES: dict[str, Callable[..., list[Content] | None]] = {
    "broadcast_in_dim": _broadcast,
    "transpose": _transposed,
    "rev": _reversed,
    "squeeze": _squeezed,
    "reshape": _reshaped,
    "slice": _sliced,
    "split": _split,
    "concatenate": _joined,
    "stack": _stacked,
    "unstack": _unstacked,
    "pad": _padded,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "sort": _sorted,
    "top_k": _top,
    "gather": _gathered,
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter-max", "scatter-min", "scatter-mul"), _scattered),
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolved,
}
