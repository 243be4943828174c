"""Products of binary activations with binary weights, in the form that trains.

    y = alpha (sign(x) * sign(W)) + bias,    alpha[n] = mean over all inputs of |W[.., n]|

The sums are of +1 and -1 in float32, whatever x is: whole numbers, exact up to 2^24 inputs of an output in any order.
(A convolution that a library transforms first, as Winograd's does, rounds.) The inputs' own scales, K in the paper, are
left out.

A kernel that comes binary, or on its way there, from `lcq.smooth_binary` or `lcq.lc`, is taken as it is where
`binarize_kernel` is false: y = sign(x) * W + bias, with the gradient of that.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num, Shaped

from lcq.forms.dtypes import own_promotion, wider

_ROUNDING = 0.01
"""Of binary weights in bfloat16."""

Padding = str | Sequence[tuple[int, int]]
"""Before and after each spatial axis: "SAME", "VALID", or how many."""


@jax.custom_jvp
@own_promotion()
def sign(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """+1 where x >= 0, else -1, never 0; the gradient passes straight through where |x| <= 1 and is 0 elsewhere.

    Example:
        >>> x = jnp.array([-2.0, -0.5, 0.0, 3.0])
        >>> sign(x), jax.grad(lambda x: sign(x).sum())(x)
        (Array([-1., -1.,  1.,  1.], dtype=float32), Array([0., 1., 1., 0.], dtype=float32))

    Source: Courbariaux et al., arXiv 1602.02830, equation 4.
    """
    return jnp.where(x >= 0, 1, -1).astype(x.dtype)


@sign.defjvp
def _sign_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (t,) = primals, tangents
    return sign(x), jnp.where(jnp.abs(x) <= 1, t, jnp.zeros_like(t))


class Binarized(NamedTuple):
    """W ~ alpha signs: float32 signs of W's shape, and a float32 alpha for each output; None is 1."""

    signs: Array
    alpha: Array | None


@own_promotion()
def binarize(w: Float[Array, "*inputs n"], scale: bool = True) -> Binarized:
    """The nearest alpha[n] signs[.., n] to each output's weights.

        min over s in {-1, 1}^m and alpha of ||W[n] - alpha s||^2:    s = sign(W[n]),  alpha = mean |W[n]|

    With V = alpha s and m inputs of an output, the gradient that W is given is the paper's,

        dL/dW = dL/dV (1/m + alpha 1[|W| <= 1]),    and without a scale    dL/dW = dL/dV 1[|W| <= 1].

    All of it comes by way of the signs; an output whose weights are all 0 gets none. Weights +-c give alpha = c to the
    last bit.

    Args:
        w: weights, the outputs last.
        scale: whether there is an alpha.

    Example:
        >>> binarize(jnp.array([[3.0, -0.5], [-1.0, 0.5]]))
        Binarized(signs=Array([[ 1., -1.], [-1.,  1.]], dtype=float32), alpha=Array([2. , 0.5], dtype=float32))

    Source: Rastegari et al., arXiv 1603.05279, equations 4 to 6 and section 3.1.
    """
    w = w.astype(jnp.float32)
    if not scale:
        return Binarized(sign(w), None)
    inputs = tuple(range(w.ndim - 1))
    size = lax.stop_gradient(jnp.abs(w))
    near = size.mean(inputs)
    # What rounding left out of a long sum is added; so the mean of equal numbers is that number.
    alpha = near + (size - near).mean(inputs)
    total = jnp.maximum(math.prod(w.shape[:-1]) * alpha, jnp.finfo(jnp.float32).tiny)
    return Binarized(sign(w) + (w - lax.stop_gradient(w)) / total, alpha)


@dataclasses.dataclass(frozen=True)
class Window:
    """How the window of a convolution moves; made by `window`. All fields are static.

    Attributes:
        size: extent of the kernel along each spatial axis.
        strides: of the window.
        padding: "SAME", "VALID", or pairs.
        dilation: how far the kernel's pixels are apart.
        pad_value: 0 or 1, what activations are outside of the image.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str | tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    pad_value: int

    @property
    def pads(self) -> bool:
        """Whether the window can reach over an edge."""
        return self.padding == "SAME" if isinstance(self.padding, str) else any(map(any, self.padding))

    def margins(self, spatial: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Padding before and after each axis of an image.

        Raises:
            ValueError: an image that the window does not fit into.
        """
        span = [(k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True)]
        margins = self.padding
        if isinstance(margins, str):
            margins = tuple(lax.padtype_to_pads(tuple(spatial), span, self.strides, margins))
        if any(low + n + high < s or not n for (low, high), n, s in zip(margins, spatial, span, strict=True)):
            raise ValueError(
                f"expected an image that a window of {span} fits into, got {list(spatial)} with padding "
                f"{self.padding!r}; pad more, or take a smaller kernel"
            )
        return margins


def window(
    size: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Any = "SAME",
    dilation: int | Sequence[int] = 1,
    pad_value: int = 0,
) -> Window:
    """Checks the settings of a convolution.

    Args:
        size: extent of the kernel along each spatial axis.
        strides: of the window; one number is for all axes.
        padding: "SAME", "VALID", or (before, after) for each axis.
        dilation: how far the kernel's pixels are apart; one number is for all axes.
        pad_value: 0 or 1, what activations are outside of the image.

    Raises:
        ValueError: lengths that differ, sizes below 1, an unknown padding or value of it.

    Example:
        >>> window((3, 3), strides=2)
        Window(size=(3, 3), strides=(2, 2), padding='SAME', dilation=(1, 1), pad_value=0)
    """
    each = {"kernel_size": size, "strides": strides, "dilation": dilation}
    tuples = {name: (n,) * len(size) if isinstance(n, int) else tuple(n) for name, n in each.items()}
    for name, numbers in tuples.items():
        if not size or len(numbers) != len(size) or min(numbers) < 1:
            raise ValueError(f"{name}: expected {len(size) or 'some'} whole numbers from 1, got {each[name]!r}")
    named = padding in ("SAME", "VALID")
    pairs = [] if isinstance(padding, str) or not isinstance(padding, Sequence) else padding
    fit = [isinstance(each, Sequence) and len(each) == 2 and min(each) >= 0 for each in pairs]
    if not named and not (len(fit) == len(size) and all(fit)):
        raise ValueError(f"padding: expected 'SAME', 'VALID' or {len(size)} pairs of numbers from 0, got {padding!r}")
    if pad_value not in (0, 1):
        raise ValueError(f"pad_value: expected 0 or 1, got {pad_value!r}")
    margins = padding if named else tuple((low, high) for low, high in pairs)
    return Window(tuples["kernel_size"], tuples["strides"], margins, tuples["dilation"], pad_value)


@own_promotion()
def dense(
    x: Shaped[Array, "..."],
    kernel: Float[Array, "c n"],
    bias: Float[Array, "..."] | None = None,
    *,
    scale: bool = True,
    binarize_kernel: bool = True,
) -> Float[Array, "*batch n"]:
    """y = alpha (sign(x) sign(W)) + bias, in x's dtype.

    Args:
        x: [*batch, c].
        kernel: W.
        bias: [n].
        scale: whether there is an alpha.
        binarize_kernel: false takes the kernel for alpha sign(W), as it is.

    Raises:
        ValueError: shapes that do not fit; x that are not floating-point.

    Example:
        >>> dense(jnp.array([[0.3, -2.0]]), jnp.array([[3.0, -0.5], [-1.0, 0.5]]))
        Array([[ 4., -1.]], dtype=float32)
    """
    check(x, kernel, bias, 1)
    weights = binarize(kernel, scale) if binarize_kernel else Binarized(kernel.astype(jnp.float32), None)
    return affine(jnp.matmul(sign(x).astype(jnp.float32), weights.signs), weights.alpha, bias, x.dtype)


@own_promotion()
def conv(
    x: Shaped[Array, "..."],
    kernel: Float[Array, "... c n"],
    bias: Float[Array, "..."] | None = None,
    *,
    window: Window,
    scale: bool = True,
    binarize_kernel: bool = True,
) -> Float[Array, "..."]:
    """y = alpha (sign(x) * sign(W)) + bias, a convolution in x's dtype. Outside of the image x is 0, or +1.

    Args:
        x: images [*batch, *spatial, c].
        kernel: W [*window.size, c, n].
        bias: [n].
        window: how it moves.
        scale: whether there is an alpha.
        binarize_kernel: false takes the kernel for alpha sign(W), as it is.

    Raises:
        ValueError: shapes that do not fit; x that are not floating-point.

    Example:
        >>> image, kernel = jnp.ones((1, 4, 1)), jnp.full((3, 1, 1), 0.5)
        >>> conv(image, kernel, window=window((3,)))[0, :, 0]
        Array([1. , 1.5, 1.5, 1. ], dtype=float32)
    """
    check(x, kernel, bias, len(window.size) + 1)
    check_window(kernel, window)
    rank = len(window.size)
    margins = window.margins(x.shape[-rank - 1 : -1])
    s = sign(x).astype(jnp.float32).reshape(-1, *x.shape[-rank - 1 :])
    outside = jnp.float32(window.pad_value)
    s = lax.pad(s, outside, [(0, 0, 0), *((low, high, 0) for low, high in margins), (0, 0, 0)])
    weights = binarize(kernel, scale) if binarize_kernel else Binarized(kernel.astype(jnp.float32), None)
    batch_first, inputs_last = (0, rank + 1, *range(1, rank + 1)), (rank + 1, rank, *range(rank))
    y = lax.conv_general_dilated(
        s,
        weights.signs,
        window.strides,
        "VALID",
        rhs_dilation=window.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(batch_first, inputs_last, batch_first),
    )
    return affine(y.reshape(*x.shape[: -rank - 1], *y.shape[1:]), weights.alpha, bias, x.dtype)


def forward(x: Any, kernel: Array, bias: Array | None, window: Window | None, **how: bool) -> Array:
    """`conv`, or `dense` without a window."""
    return dense(x, kernel, bias, **how) if window is None else conv(x, kernel, bias, window=window, **how)


def check_binary(spread: Any) -> None:
    """Raises ValueError if weights that are taken for binary are not, by their `spread`."""
    if not float(spread) <= _ROUNDING:
        raise ValueError(
            "expected weights of +-alpha for each output, as binarize_kernel=False takes them, got |W| that differ "
            f"from their mean by {100 * float(spread):.2g} %; put in the dense forms of lcq.smooth_binary's compress, "
            "or of lcq.extract"
        )


def spread(kernel: Float[Array, "*inputs n"]) -> Float[Array, ""]:
    """How far |W| are from their mean over the inputs, relative to it, at most; 0 of binary weights."""
    size = jnp.abs(kernel.astype(jnp.float32))
    mean = size.mean(tuple(range(kernel.ndim - 1)))
    return (jnp.abs(size - mean) / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)).max()


def affine(
    y: Num[Array, "*batch n"], alpha: Float[Array, " n"] | None, bias: Float[Array, " n"] | None, dtype: DTypeLike
) -> Float[Array, "*batch n"]:
    """alpha y + bias in float32 or wider, then in `dtype`; None is 1, and 0."""
    z = y.astype(wider(dtype, jnp.float32))
    z = z if alpha is None else z * alpha
    return (z if bias is None else z + bias).astype(dtype)


def check(x: Shaped[Array, "..."], kernel: Shaped[Array, "..."], bias: Shaped[Array, "..."] | None, axes: int) -> None:
    """Raises ValueError unless x and the parameters of a layer fit; `axes` of x are not batch axes."""
    if not (jnp.issubdtype(x.dtype, jnp.floating) and x.ndim >= axes and x.shape[-1:] == kernel.shape[-2:-1]):
        images = "" if axes == 1 else f"{axes - 1} spatial axes, "
        raise ValueError(
            f"expected floating-point x [.., {images}{kernel.shape[-2]}] for a kernel {list(kernel.shape)}, "
            f"got {x.dtype}{list(x.shape)}; channels are last"
        )
    if bias is not None and bias.shape != kernel.shape[-1:]:
        raise ValueError(
            f"expected a bias [{kernel.shape[-1]}] for a kernel {list(kernel.shape)}, got {list(bias.shape)}"
        )


def check_window(kernel: Shaped[Array, "..."], window: Window) -> None:
    """Raises ValueError unless the kernel is of the window's size."""
    if kernel.shape[:-2] != window.size:
        raise ValueError(f"expected a kernel {[*window.size, 'c', 'n']}, got {list(kernel.shape)}")
