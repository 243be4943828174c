"""Products of binary activations with binary weights, frozen: signs as packed bits, sums by XNOR and popcount.

    y = alpha (sign(x) * sign(W)) + bias

The sums are the same whole numbers as in `binary`, so what follows them gives the same results. No gradient passes
to x. Batch norm and a sign behind the sums are a comparison of whole numbers, and nothing but bits leaves the layer.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, Shaped, UInt32

from lcq.forms.column_words import fields, pack_columns, pack_signs
from lcq.forms.dtypes import own_promotion
from lcq.forms.meshes import by_compiler, explicit_mesh, placed_on, spec_of
from lcq.forms.serialization import register_node
from lcq.kernels.api import binary_matmul
from lcq.kernels.signs import Platform, Signs, signs
from lcq.layers.binary import Window, affine, binarize, check_window
from lcq.tracing.im2col import patches


@functools.partial(register_node, static=("inputs", "window"), made={"window": lambda fields: Window(**fields)})
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "taps", "alpha", "bias", "threshold"],
    meta_fields=["inputs", "window"],
)
@dataclasses.dataclass(frozen=True)
class Frozen:
    """A layer with packed weights. Made by `freeze`.

    Attributes:
        weights: signs of the kernel as a matrix; of a convolution, every pixel's channels fill whole words.
        taps: int32 [*window.size, n], the sum of a pixel's signs; None if the window stays inside of the image.
        alpha: float32 [n], None is 1.
        bias: [n], None is 0.
        inputs: c, channels of x.
        window: None for a dense layer.
        threshold: of the sums, where their signs leave the layer; then alpha and bias are in it, and None.
    """

    weights: Signs
    taps: Any
    alpha: Any
    bias: Any
    inputs: int
    window: Window | None
    threshold: "Threshold | None" = None


@functools.partial(register_node, static=("channels",))
@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["channels"])
@dataclasses.dataclass(frozen=True)
class Bits:
    """Signs of activations on their way from one frozen layer to the next.

    Attributes:
        words: uint32 [.., w], see `pack_signs`.
        channels: c, how many signs there are.
    """

    words: Any
    channels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """As of the activations."""
        return (*self.words.shape[:-1], self.channels)

    @property
    def dtype(self) -> np.dtype:
        """Of what is held."""
        return np.dtype(bool)

    def reshape(self, *shape: int) -> "Bits":
        """The same signs in another shape, as where images become vectors.

        Example:
            >>> Bits(pack_signs(jnp.array([[[1.0, -1.0], [-1.0, 1.0]]])), 2).reshape(1, -1)
            Bits(words=Array([[9]], dtype=uint32), channels=4)
        """
        bits = fields(self.words[..., None], 1)[..., : self.channels, 0].reshape(*shape)
        return Bits(pack_columns(bits[..., None], 1)[..., 0], bits.shape[-1])


@own_promotion()
def freeze(
    kernel: Float[Array, "... c n"],
    bias: Float[Array, " n"] | None = None,
    *,
    window: Window | None = None,
    scale: bool = True,
    norm: Mapping[str, Any] | None = None,
    platform: Platform | None = None,
) -> Frozen:
    """Packs the signs of a layer's weights, once.

    Args:
        kernel: [c, n], or [*window.size, c, n].
        bias: [n].
        window: of a convolution.
        scale: whether there is an alpha.
        norm: numbers of a batch norm behind the layer, as `fold_threshold` names them; then the layer gives `Bits`, the
            signs of what batch norm would give, to the next one.
        platform: that the signs are for; None is the one that JAX runs on.

    Raises:
        ValueError: a kernel that is not of the window's size; a batch norm of another number of channels.

    Example:
        >>> kernel, x = jnp.array([[3.0, -0.5], [-1.0, 0.5]]), jnp.array([[0.3, -2.0]])
        >>> apply(freeze(kernel), x)
        Array([[ 4., -1.]], dtype=float32)
        >>> apply(freeze(kernel, norm={"mean": jnp.array([5.0, -2.0]), "var": jnp.ones(2)}), x)
        Bits(words=Array([[2]], dtype=uint32), channels=2)
    """
    if window is None and kernel.ndim != 2:
        raise ValueError(f"expected a kernel [c, n], or a window, got {list(kernel.shape)}")
    weights = binarize(kernel, scale)
    *_, c, n = kernel.shape
    rows, taps = weights.signs, None
    if window is not None:
        check_window(kernel, window)
        filled = jnp.pad(rows.reshape(-1, c, n), ((0, 0), (0, -c % 32), (0, 0)), constant_values=-1)
        taps = rows.sum(-2).astype(jnp.int32) if window.pads else None
        rows = filled.reshape(-1, n)
    layer = Frozen(signs(rows, platform), taps, weights.alpha, bias, c, window)
    if norm is None:
        return layer
    return dataclasses.replace(layer, threshold=fold_threshold(layer, **norm), alpha=None, bias=None)


@own_promotion()
def apply(layer: Frozen, x: Shaped[Array, "..."] | Bits) -> Float[Array, "..."] | Bits:
    """y = alpha (sign(x) * sign(W)) + bias, as `binary.dense` and `binary.conv` have it.

    The sums are equal, and from there on it is the same computation: float32 results differ by one rounding at most,
    where a compiler contracts alpha y + bias; others by one unit of their last place, where that lies between two.

    Args:
        layer: the weights.
        x: [*batch, c], or [*batch, *spatial, c]; or its signs, of the layer before.

    Returns:
        y in x's dtype, in float32 of signs; of a layer with a threshold the signs of y behind its batch norm.

    Raises:
        ValueError: x that do not fit or are neither floating-point nor `Bits`.

    Example:
        >>> from lcq.layers.binary import window
        >>> layer = freeze(jnp.full((3, 1, 1), 0.5), window=window((3,)))
        >>> apply(layer, jnp.ones((1, 4, 1)))[0, :, 0]
        Array([1. , 1.5, 1.5, 1. ], dtype=float32)
    """
    if not (isinstance(x, Bits) or jnp.issubdtype(x.dtype, jnp.floating)) or x.shape[-1:] != (layer.inputs,):
        raise ValueError(
            f"expected floating-point x [.., {layer.inputs}], got {x.dtype}{list(x.shape)}; channels are last"
        )
    if (mesh := explicit_mesh(x)) is not None:
        return by_compiler(
            apply, placed_on(mesh, (*spec_of(x.words if isinstance(x, Bits) else x)[:-1], None)), layer, x
        )
    words, dtype = (x.words, "float32") if isinstance(x, Bits) else (pack_signs(x), x.dtype)
    y = product(layer, words)
    if layer.threshold is not None:
        return Bits(threshold_signs(layer.threshold, y), layer.weights.count)
    return affine(y, layer.alpha, layer.bias, dtype)


@own_promotion()
def product(layer: Frozen, words: UInt32[Array, "..."]) -> Int32[Array, "..."]:
    """sign(x) * sign(W) as whole numbers, of signs that are packed.

    A convolution takes its patches from packed words. Their padding is -1, and so are the bits that fill a pixel's last
    word, in x and in W, where each pair adds 1 to the sum. Constants put that right: with t = sum_c sign(W)[tap, c, n]

        y(padding p) = y(padding -1) + (1 + p) sum over taps outside of the image of t

    Args:
        layer: the weights.
        words: `pack_signs` of x [*batch, c], or of x [*batch, *spatial, c].

    Returns:
        [*batch, n], or [*batch, *places, n].

    Raises:
        ValueError: words that do not fit.

    Example:
        >>> layer = freeze(jnp.array([[3.0, -0.5], [-1.0, 0.5]]))
        >>> product(layer, pack_signs(jnp.array([[0.3, -2.0]])))
        Array([[ 2, -2]], dtype=int32)
    """
    window, axes = layer.window, 1 if layer.window is None else len(layer.window.size) + 1
    if words.ndim < axes or words.shape[-1] != -(-layer.inputs // 32):
        raise ValueError(
            f"expected words of {layer.inputs} channels, [.., {'spatial, ' * (axes > 1)}{-(-layer.inputs // 32)}], "
            f"got {list(words.shape)}"
        )
    if window is None:
        return binary_matmul(words, layer.weights)
    *spatial, w = words.shape[-axes:]
    margins, batch = window.margins(spatial), words.shape[:-axes]
    inside = list(map(_inside, spatial, window.size, window.strides, window.dilation, margins))
    rows = patches(
        words.reshape(-1, *spatial, w),
        (0, axes, *range(1, axes)),
        window=window.size,
        strides=window.strides,
        padding=margins,
        lhs_dilation=(1,) * len(spatial),
        rhs_dilation=window.dilation,
    )[0]
    filling = math.prod(window.size) * (32 * w - layer.inputs)
    y = binary_matmul(rows, layer.weights).reshape(*batch, *map(len, inside), layer.weights.count) - filling
    return y if layer.taps is None else y + (1 + window.pad_value) * _outside(layer.taps, inside)


def _inside(n: int, size: int, stride: int, dilation: int, margin: tuple[int, int]) -> np.ndarray:
    """bool [places, size]: whether a tap of the window lies inside of an axis of n pixels."""
    places = (sum(margin) + n - (size - 1) * dilation - 1) // stride + 1
    at = np.arange(places)[:, None] * stride + np.arange(size) * dilation - margin[0]
    return (0 <= at) & (at < n)


def _outside(taps: Int32[Array, "*size n"], inside: list[np.ndarray]) -> Int32[Array, "*places n"]:
    """The sum of the taps outside of the image, for each place; worked out once for places that are alike."""
    kinds, where = zip(*(np.unique(each, axis=0, return_inverse=True) for each in inside), strict=True)
    within = functools.reduce(np.multiply.outer, kinds)  # [kinds, size, kinds, size, ..]
    rank = len(inside)
    outside = ~within.transpose(*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))
    return jnp.tensordot(jnp.asarray(outside, jnp.int32), taps, rank)[np.ix_(*(w.reshape(-1) for w in where))]


class Threshold(NamedTuple):
    """A sign of whole numbers: +1 where direction[n] y >= least[n]. Made by `fold_threshold`; both int32 [n]."""

    least: Array
    direction: Array


jax.export.register_namedtuple_serialization(Threshold, serialized_name="lcq.layers.frozen.Threshold")


@own_promotion()
def fold_threshold(
    layer: Frozen,
    *,
    mean: Float[Array, "..."],
    var: Float[Array, "..."],
    scale: Float[Array, "..."] | None = None,
    bias: Float[Array, "..."] | None = None,
    epsilon: float = 1e-5,
) -> Threshold:
    """Batch norm and the sign after a layer, as one comparison of whole numbers for each channel.

        gamma (alpha y + b - mean) / sqrt(var + epsilon) + beta >= 0    <=>    direction y >= least

    Of real numbers, y >= or <= (mean - b - beta sqrt(var + epsilon) / gamma) / alpha, as gamma alpha is positive or
    negative, and the sign of beta alone if it is 0. Rounded to float32, the left side is still monotone in y, as every
    step of it is; so a bisection of just that computation finds the whole number at which it turns, ties included, and
    the bits are those of the float32 layers. They may differ where a compiler contracts or reorders those, and the
    left side is 0 to rounding.

    Args:
        layer: the weights.
        mean: of batch norm, [n].
        var: of batch norm, [n].
        scale: gamma [n]; None is 1.
        bias: beta [n]; None is 0.
        epsilon: of batch norm.

    Raises:
        ValueError: numbers that are not one for each channel.

    Example:
        >>> layer = freeze(jnp.array([[3.0, -0.5], [-1.0, 0.5]]))
        >>> fold_threshold(layer, mean=jnp.array([1.0, 0.0]), var=jnp.ones(2), scale=jnp.array([1.0, -2.0]))
        Threshold(least=Array([1, 0], dtype=int32), direction=Array([ 1, -1], dtype=int32))
    """
    channels = layer.weights.count
    given = {"mean": mean, "var": var, "scale": scale, "bias": bias}
    for name, numbers in given.items():
        if numbers is not None and numbers.shape != (channels,):
            raise ValueError(f"{name}: expected [{channels}], a number for each channel, got {list(numbers.shape)}")
    factor = jax.lax.rsqrt(var.astype(jnp.float32) + epsilon)
    factor = factor if scale is None else factor * scale
    falls = factor < 0 if layer.alpha is None else (factor < 0) != (layer.alpha < 0)  # their product may underflow
    direction = jnp.where(falls, jnp.int32(-1), jnp.int32(1))

    def fires(y: Array) -> Array:
        z = (affine(direction * y, layer.alpha, layer.bias, jnp.float32) - mean) * factor
        return (z if bias is None else z + bias) >= 0

    most = layer.inputs * (1 if layer.window is None else math.prod(layer.window.size))
    low, high = jnp.full(channels, -most, jnp.int32), jnp.full(channels, most + 1, jnp.int32)
    for _ in range((2 * most + 1).bit_length()):
        middle = (low + high) >> 1
        turned = fires(middle) | (low == high)
        low, high = jnp.where(turned, low, middle + 1), jnp.where(turned, middle, high)
    return Threshold(low, direction)


@own_promotion()
def threshold_signs(threshold: Threshold, y: Int32[Array, "*batch n"]) -> UInt32[Array, "*batch w"]:
    """The signs of whole numbers under a threshold, packed for the `product` of the next layer.

    Example:
        >>> layer = freeze(jnp.array([[3.0, -0.5], [-1.0, 0.5]]))
        >>> threshold = fold_threshold(layer, mean=jnp.array([1.0, 0.0]), var=jnp.ones(2))
        >>> threshold_signs(threshold, jnp.array([[2, -2], [0, 0]]))
        Array([[1], [2]], dtype=uint32)
    """
    return pack_signs(threshold.direction * y - threshold.least)
