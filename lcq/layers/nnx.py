"""Binary layers for flax nnx. They train on their parameters; `freeze` packs those of a net, or of one layer.

A batch norm between two of them is best given to the first, as its `norm`. It trains as ever; frozen, its running
averages and the sign of the next layer are one threshold, and nothing but bits passes between the layers.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from lcq.forms.validate import named
from lcq.layers import binary, frozen
from lcq.layers.binary import Padding, Window
from lcq.layers.frozen import Bits

_KERNEL, _BIAS = nnx.initializers.lecun_normal(), nnx.initializers.zeros_init()


class Packed(nnx.Variable):
    """Holds the `lcq.layers.frozen.Frozen` of a layer, in place of its parameters."""


class BinaryLayer(nnx.Module):
    """What `BinaryDense` and `BinaryConv` are: a kernel, perhaps a bias and a window; or packed weights.

    Attributes:
        kernel: `nnx.Param` [c, n] or [*window.size, c, n]; None if frozen.
        bias: `nnx.Param` [n], or None.
        packed: `Packed` if frozen, else None.
        window: of a convolution, None for a dense layer.
        scale: whether there is an alpha, the mean of |W| for each output.
        binarize_kernel: false takes the kernel as it is, one that `lcq.smooth_binary` or LC makes binary.
        norm: `nnx.BatchNorm` behind it, or None; None if frozen.
    """

    def __init__(
        self,
        kernel: Shaped[Array, "... c n"],
        bias: Shaped[Array, " n"] | None,
        window: Window | None,
        scale: bool,
        binarize_kernel: bool,
        norm: nnx.BatchNorm | None,
    ) -> None:
        if norm is not None and not (isinstance(norm, nnx.BatchNorm) and norm.axis == -1):
            raise ValueError(
                f"norm: expected a BatchNorm of the last axis, got {type(norm).__name__}; call others behind the layer"
            )
        self.kernel: nnx.Param | None = nnx.data(nnx.Param(kernel))
        self.bias: nnx.Param | None = nnx.data(None if bias is None else nnx.Param(bias))
        self.packed: Packed | None = nnx.data(None)
        self.norm: nnx.BatchNorm | None = nnx.data(norm)
        self.window = window
        self.scale = scale
        self.binarize_kernel = binarize_kernel

    def __call__(self, x: Shaped[Array, "..."] | Bits) -> Shaped[Array, "..."] | Bits:
        if self.packed is not None:
            return frozen.apply(self.packed.get_value(), x)
        kernel, bias = self._parameters()
        y = binary.forward(x, kernel, bias, self.window, scale=self.scale, binarize_kernel=self.binarize_kernel)
        return y if self.norm is None else self.norm(y)

    def freeze(self) -> None:
        """Packs the parameters of this layer, in place; `lcq.layers.nnx.freeze` leaves a net as it is.

        Raises:
            ValueError: a kernel that is taken as it is, and not binary.
        """
        if self.packed is None:
            kernel, bias = self._parameters()
            if not self.binarize_kernel:
                binary.check_binary(binary.spread(kernel))
            scale = self.scale or not self.binarize_kernel
            norm = None if self.norm is None else _numbers(self.norm)
            self.packed = Packed(frozen.freeze(kernel, bias, window=self.window, scale=scale, norm=norm))
            self.kernel = self.bias = self.norm = None

    def _parameters(self) -> tuple[Array, Array | None]:
        assert self.kernel is not None
        return self.kernel.get_value(), None if self.bias is None else self.bias.get_value()


def _numbers(norm: nnx.BatchNorm) -> dict[str, Any]:
    """Of a batch norm, for its threshold."""
    variables = {"mean": norm.mean, "var": norm.var, "scale": norm.scale, "bias": norm.bias}
    given = {name: variable.get_value() for name, variable in variables.items() if variable is not None}
    return {**given, "epsilon": norm.epsilon}


class BinaryDense(BinaryLayer):
    """A dense layer with binary activations and weights, y = alpha (sign(x) sign(W)) + bias, in x's dtype.

    Args:
        in_features: c, channels of x.
        out_features: n, outputs.
        use_bias: whether there is a bias.
        scale: whether there is an alpha, the mean of |W| for each output.
        binarize_kernel: false takes the kernel as it is, one that `lcq.smooth_binary` or LC makes binary.
        param_dtype: of kernel and bias.
        kernel_init: an initializer of flax.
        bias_init: likewise.
        norm: a batch norm of y, if the layer behind it is binary too: frozen, its signs are all that is left of it.
        rngs: keys.

    Raises:
        ValueError: a `norm` that is no batch norm of the last axis.

    Example:
        >>> layer = BinaryDense(40, 3, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((2, 40))).shape
        (2, 3)

    Source: Rastegari et al., arXiv 1603.05279.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        scale: bool = True,
        binarize_kernel: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = _KERNEL,
        bias_init: Callable[..., Any] = _BIAS,
        norm: nnx.BatchNorm | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        super().__init__(kernel, bias, None, scale, binarize_kernel, norm)


class BinaryConv(BinaryLayer):
    """A convolution with binary activations and weights, y = alpha (sign(x) * sign(W)) + bias, in x's dtype.

    Images are [*batch, *spatial, c], with as many spatial axes as `kernel_size` has numbers.

    Args:
        in_features: c, channels of x.
        out_features: n, outputs.
        kernel_size: extent of the kernel along each spatial axis.
        strides: one number, or one for each axis.
        padding: "SAME", "VALID", or pairs (before, after).
        kernel_dilation: one number, or one for each axis.
        pad_value: 0 or 1, what sign(x) is outside of the image.
        use_bias: whether there is a bias.
        scale: whether there is an alpha, the mean of |W| for each output.
        binarize_kernel: false takes the kernel as it is, one that `lcq.smooth_binary` or LC makes binary.
        param_dtype: of kernel and bias.
        kernel_init: an initializer of flax.
        bias_init: likewise.
        norm: a batch norm of y, if the layer behind it is binary too: frozen, its signs are all that is left of it.
        rngs: keys.

    Raises:
        ValueError: a `norm` that is no batch norm of the last axis.

    Example:
        >>> layer = BinaryConv(4, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 9, 9, 4))).shape
        (1, 5, 5, 8)

    Source: Rastegari et al., arXiv 1603.05279.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] = 1,
        pad_value: int = 0,
        use_bias: bool = True,
        scale: bool = True,
        binarize_kernel: bool = True,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Callable[..., Any] = _KERNEL,
        bias_init: Callable[..., Any] = _BIAS,
        norm: nnx.BatchNorm | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        window = binary.window(
            kernel_size, strides=strides, padding=padding, dilation=kernel_dilation, pad_value=pad_value
        )
        kernel = kernel_init(rngs.params(), (*window.size, in_features, out_features), param_dtype)
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        super().__init__(kernel, bias, window, scale, binarize_kernel, norm)


_Net = TypeVar("_Net", bound=nnx.Module)


def freeze(net: _Net) -> _Net:
    """A copy of a net whose binary layers are packed: a `Packed` variable in place of their parameters.

    Args:
        net: with binary layers in it, or one itself. Its other parameters are copied.

    Raises:
        ValueError: a net without binary layers; one that takes its kernel as it is, and that is not binary.

    Example:
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(BinaryDense(40, 50, rngs=rngs), nnx.LayerNorm(50, rngs=rngs))
        >>> packed = freeze(net)
        >>> x = rngs.normal((2, 40))
        >>> bool(jnp.allclose(packed(x), net(x))), len(nnx.to_flat_state(nnx.state(packed, Packed)))
        (True, 1)

        All of a net in whole numbers and bits, until the last layer gives floats:

        >>> net = nnx.Sequential(
        ...     BinaryConv(4, 40, (3, 3), norm=nnx.BatchNorm(40, rngs=rngs), rngs=rngs),
        ...     BinaryConv(40, 20, (3, 3), strides=2, norm=nnx.BatchNorm(20, rngs=rngs), rngs=rngs),
        ...     lambda x: x.reshape(x.shape[0], -1),
        ...     BinaryDense(80, 3, rngs=rngs),
        ... )
        >>> net.eval()
        >>> x = rngs.normal((2, 4, 4, 4))
        >>> bool(jnp.allclose(freeze(net)(x), net(x)))
        True
    """
    copy = nnx.clone(net)
    layers = {path: node for path, node in nnx.iter_modules(copy) if isinstance(node, BinaryLayer)}
    if not layers:
        raise ValueError(f"expected a net with BinaryDense or BinaryConv in it, got {type(net).__name__} without")
    for path, layer in layers.items():
        with named("/".join(map(str, (*path, "kernel")))):
            layer.freeze()
    return copy
