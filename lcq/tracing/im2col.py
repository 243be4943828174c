"""Images, kernels and their products as matrices: every product with a weight is Y[g] = X[g] W[g] over groups g.

Canonical layouts: inputs X [G, M, N], weights W [G, N, n], outputs Y [G, M, n]. A dot has one group for each index of
its batch axes, a convolution one for each of its feature groups. N runs over the window first, then over channels: an
HWIO kernel is reshaped as it is.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

Pairs = Sequence[tuple[int, int]]


def flatten_axes(a: Shaped[Any, "..."], *groups: Sequence[int]) -> Shaped[Any, "..."]:
    """Brings the axes into the order of `groups` and makes one axis of each group; an empty group has length 1.

    Example:
        >>> flatten_axes(jnp.zeros((2, 3, 4, 5)), (), (3, 0), (1, 2)).shape
        (1, 10, 12)
    """
    order = [axis for group in groups for axis in group]
    return a.transpose(order).reshape([math.prod(a.shape[axis] for axis in group) for group in groups])


def patches(
    x: Shaped[Array, "..."],
    spec: Sequence[int],
    *,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Pairs,
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    groups: int = 1,
) -> Shaped[Array, "G M N"]:
    """The inputs that a convolution multiplies with its kernel, one row for each place of the window.

    Padding is zeros, as in the convolution. Made of strided slices, so values are exact in any dtype.

    Args:
        x: images, in any layout.
        spec: where x has its batch, feature and spatial axes, in that order.
        window: spatial extent of the kernel.
        strides: of the window.
        padding: zeros before and after each spatial axis; negative ones crop.
        lhs_dilation: the images' pixels are that far apart (transposed convolution).
        rhs_dilation: the kernel's pixels are that far apart.
        groups: feature groups.

    Returns:
        M = batch x places, N = window x channels of a group.

    Example:
        >>> image = jnp.arange(4.0).reshape(1, 1, 4, 1)
        >>> one = {"window": (1, 2), "strides": (1, 2), "padding": [(0, 0), (0, 0)]}
        >>> patches(image, (0, 3, 1, 2), **one, lhs_dilation=(1, 1), rhs_dilation=(1, 1))[0]
        Array([[0., 1.],
               [2., 3.]], dtype=float32)
    """
    x = x.transpose(spec[0], *spec[2:], spec[1])  # batch, spatial, channels
    pads = [(low, high, dilation - 1) for (low, high), dilation in zip(padding, lhs_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    spans = [(k - 1) * d + 1 for k, d in zip(window, rhs_dilation, strict=True)]
    places = [(n - span) // s + 1 for n, span, s in zip(x.shape[1:-1], spans, strides, strict=True)]
    seen = []
    for offset in itertools.product(*map(range, window)):
        start = [o * d for o, d in zip(offset, rhs_dilation, strict=True)]
        stop = [a + (p - 1) * s + 1 for a, p, s in zip(start, places, strides, strict=True)]
        seen.append(jax.lax.slice(x, [0, *start, 0], [x.shape[0], *stop, x.shape[-1]], [1, *strides, 1]))
    rows = x.shape[0] * math.prod(places)
    stacked = jnp.stack(seen, -2).reshape(rows, len(seen), groups, x.shape[-1] // groups)
    return stacked.transpose(2, 0, 1, 3).reshape(groups, rows, len(seen) * (x.shape[-1] // groups))


def kernel_matrix(w: Shaped[Any, "..."], spec: Sequence[int], groups: int = 1) -> Shaped[Any, "G N n"]:
    """A convolution's kernel, its outputs cut into groups.

    Args:
        w: the kernel, in any layout.
        spec: where w has its output, input and spatial axes, in that order.
        groups: feature groups.
    """
    matrix = flatten_axes(w, [*spec[2:], spec[1]], [spec[0]])
    return matrix.reshape(matrix.shape[0], groups, matrix.shape[1] // groups).swapaxes(0, 1)


def output_matrix(y: Shaped[Array, "..."], spec: Sequence[int], groups: int = 1) -> Shaped[Array, "G M n"]:
    """A convolution's outputs; `spec` says where y has its batch, feature and spatial axes."""
    matrix = flatten_axes(y, [spec[0], *spec[2:]], [spec[1]])
    return matrix.reshape(matrix.shape[0], groups, matrix.shape[1] // groups).swapaxes(0, 1)
