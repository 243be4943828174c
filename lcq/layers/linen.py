"""Binary layers for flax linen. They train on the collection "params", and run packed where there is one "frozen".

A batch norm between two of them is best given to the first, as its `norm`. It trains as ever; frozen, its running
averages and the sign of the next layer are one threshold, and nothing but bits passes between the layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Shaped

from lcq.forms.validate import named
from lcq.layers import binary, frozen
from lcq.layers.binary import Padding, Window
from lcq.layers.frozen import Bits

_NAME = "layer"
"""Of a layer's variable in the collection "frozen"."""

_SPREAD = "spread"
"""Beside it until `freeze` has looked at it: how far from binary a kernel is that was taken as it is."""


class BinaryDense(nn.Module):
    """A dense layer with binary activations and weights, y = alpha (sign(x) sign(W)) + bias, in x's dtype.

    Variables: `kernel` [c, n] and `bias` [n] in "params", or all of it in "frozen", see `freeze`.

    Attributes:
        features: n, outputs.
        use_bias: whether there is a bias.
        scale: whether there is an alpha, the mean of |W| for each output.
        binarize_kernel: false takes the kernel as it is, one that `lcq.smooth_binary` or LC makes binary.
        param_dtype: of kernel and bias.
        kernel_init: an initializer of flax.
        bias_init: likewise.
        norm: a batch norm of y, if the layer behind it is binary too: frozen, its signs are all that is left of it.

    Example:
        >>> import jax.numpy as jnp
        >>> variables = jax.eval_shape(BinaryDense(3).init, jax.random.key(0), jnp.ones((2, 40)))
        >>> jax.tree.map(jnp.shape, variables["params"])
        {'bias': (3,), 'kernel': (40, 3)}

    Source: Rastegari et al., arXiv 1603.05279.
    """

    features: int
    use_bias: bool = True
    scale: bool = True
    binarize_kernel: bool = True
    param_dtype: Any = "float32"
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    norm: nn.BatchNorm | None = None

    @nn.compact
    def __call__(self, x: Shaped[Array, "..."] | Bits) -> Shaped[Array, "..."] | Bits:
        return _layer(self, x, None)


class BinaryConv(nn.Module):
    """A convolution with binary activations and weights, y = alpha (sign(x) * sign(W)) + bias, in x's dtype.

    Images are [*batch, *spatial, c], with as many spatial axes as `kernel_size` has numbers. Variables: `kernel`
    [*kernel_size, c, n] and `bias` [n] in "params", or all of it in "frozen", see `freeze`.

    Attributes:
        features: n, outputs.
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

    Example:
        >>> import jax.numpy as jnp
        >>> init = BinaryConv(8, (3, 3), strides=2).init_with_output
        >>> y, variables = jax.eval_shape(init, jax.random.key(0), jnp.ones((1, 9, 9, 4)))
        >>> y.shape, variables["params"]["kernel"].shape
        ((1, 5, 5, 8), (3, 3, 4, 8))

    Source: Rastegari et al., arXiv 1603.05279.
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    kernel_dilation: int | Sequence[int] = 1
    pad_value: int = 0
    use_bias: bool = True
    scale: bool = True
    binarize_kernel: bool = True
    param_dtype: Any = "float32"
    kernel_init: Callable[..., Any] = nn.initializers.lecun_normal()
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    norm: nn.BatchNorm | None = None

    @nn.compact
    def __call__(self, x: Shaped[Array, "..."] | Bits) -> Shaped[Array, "..."] | Bits:
        window = binary.window(
            self.kernel_size,
            strides=self.strides,
            padding=self.padding,
            dilation=self.kernel_dilation,
            pad_value=self.pad_value,
        )
        return _layer(self, x, window)


def _layer(module: Any, x: Any, window: Window | None) -> Any:
    """Both layers; a dense one has no window."""
    if module.has_variable("frozen", _NAME):
        return frozen.apply(module.get_variable("frozen", _NAME), x)
    shape = (*(window.size if window else ()), x.shape[-1], module.features)
    kernel = module.param("kernel", module.kernel_init, shape, module.param_dtype)
    bias = module.param("bias", module.bias_init, shape[-1:], module.param_dtype) if module.use_bias else None
    y = binary.forward(x, kernel, bias, window, scale=module.scale, binarize_kernel=module.binarize_kernel)
    y = y if module.norm is None else module.norm(y)
    if module.is_mutable_collection("frozen") and not module.is_initializing():
        numbers = None if module.norm is None else _numbers(module.norm)
        scale = module.scale or not module.binarize_kernel
        packed = frozen.freeze(kernel, bias, window=window, scale=scale, norm=numbers)
        module.put_variable("frozen", _NAME, packed)
        if not module.binarize_kernel:
            module.put_variable("frozen", _SPREAD, binary.spread(kernel))
    return y


def _numbers(norm: Any) -> dict[str, Any]:
    """Of a batch norm that was called, for its threshold."""
    if not isinstance(norm, nn.BatchNorm) or norm.axis != -1:
        raise ValueError(f"norm: expected a BatchNorm of the last axis, got {norm!r}; call others behind the layer")
    params = norm.variables.get("params", {})
    return {**norm.variables["batch_stats"], **params, "epsilon": norm.epsilon}


def freeze(net: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables of a net with its binary layers packed: their "params" move, packed, to the collection "frozen".

    `net.apply` takes them like those it was trained with, and runs the packed layers. Nothing else changes.

    Args:
        net: with binary layers in it, or one itself.
        variables: as trained.
        *args: of a call of the net, which is traced to find the layers.
        **kwargs: likewise; static, as `train=False`.

    Returns:
        Variables for `net.apply`, with one `lcq.layers.frozen.Frozen` for each layer.

    Raises:
        ValueError: a net in which the call meets no binary layer; a `norm` that is no batch norm of the last axis; a
            layer that takes its kernel as it is, and that is not binary.

    Example:
        >>> import jax.numpy as jnp
        >>> net = nn.Sequential([BinaryDense(50), nn.BatchNorm(use_running_average=True), BinaryDense(3)])
        >>> x = jnp.sin(jnp.arange(80.0)).reshape(2, 40)
        >>> variables = jax.jit(net.init)(jax.random.key(1), x)
        >>> packed = freeze(net, variables, x)
        >>> {name: list(tree) for name, tree in packed.items()}
        {'batch_stats': ['layers_1'], 'params': ['layers_1'], 'frozen': ['layers_0', 'layers_2']}
        >>> bool(jnp.allclose(net.apply(packed, x), net.apply(variables, x)))
        True

        All of a net in whole numbers and bits, until the last layer gives floats:

        >>> class Net(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x, train=False):
        ...         norm = lambda: nn.BatchNorm(use_running_average=not train)
        ...         x = BinaryConv(40, (3, 3), norm=norm())(x)
        ...         x = BinaryConv(20, (3, 3), strides=2, norm=norm())(x)
        ...         return BinaryDense(3)(x.reshape(x.shape[0], -1))
        >>> x = jnp.sin(jnp.arange(64.0)).reshape(1, 4, 4, 4)
        >>> variables = jax.jit(Net().init)(jax.random.key(1), x)
        >>> packed = freeze(Net(), variables, x)
        >>> bool(jnp.allclose(Net().apply(packed, x), Net().apply(variables, x)))
        True
    """

    def found(variables: Any, args: Any) -> Any:
        return net.apply(variables, *args, **kwargs, mutable=["frozen"])[1]

    packed = _checked(jax.jit(found)(variables, args).get("frozen", {}))
    if not packed:
        raise ValueError(
            f"expected a net that calls BinaryDense or BinaryConv, got {type(net).__name__}, whose call met none; "
            "pass the arguments of a call that does"
        )
    return {**variables, "params": _without(variables["params"], packed), "frozen": packed}


def _checked(packed: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """Packed layers, those whose kernels were taken as they are being binary."""
    if _SPREAD in packed and isinstance(packed.get(_NAME), frozen.Frozen):
        with named("/".join((*path, "kernel"))):
            binary.check_binary(packed[_SPREAD])
        return {_NAME: packed[_NAME]}
    return {key: _checked(a, *path, key) if isinstance(a, Mapping) else a for key, a in packed.items()}


def _without(params: Mapping[str, Any], packed: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of all but the packed layers."""
    if _NAME in packed and isinstance(packed[_NAME], frozen.Frozen):
        return {}
    kept = {name: _without(value, packed[name]) if name in packed else value for name, value in params.items()}
    return {name: value for name, value in kept.items() if value is params[name] or value}
