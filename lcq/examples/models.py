"""Small flax nets for the demo, the notebooks and the benchmarks. All take images and return logits."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float


class MLP(nn.Module):
    """Dense layers `dense0`, `dense1`, ... on the flattened input, an activation between them.

    Attributes:
        widths: outputs of each layer; the last are the logits.
        activation: function of an array.
    """

    widths: Sequence[int]
    activation: Callable[..., Any] = nn.tanh

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n ..."]) -> Float[Array, "n classes"]:
        x = jnp.reshape(x, (x.shape[0], -1))
        for i, width in enumerate(self.widths):
            x = nn.Dense(width, name=f"dense{i}")(x if i == 0 else self.activation(x))
        return x


def lenet300(activation: Callable[..., Any] = nn.tanh) -> MLP:
    """LeNet300 (784-300-100-10): 266,200 weights and 410 biases, for MNIST.

    Example:
        >>> import jax
        >>> variables = lenet300().init(jax.random.key(0), jnp.zeros((1, 28, 28)))
        >>> jax.tree.map(jnp.shape, variables["params"]["dense2"])
        {'bias': (10,), 'kernel': (100, 10)}
    """
    return MLP((300, 100, 10), activation)


def small_digits_net(activation: Callable[..., Any] = nn.relu) -> MLP:
    """A 64-100-50-10 net for the bundled digits: 11,900 weights, 98 to 99 % right after 30 epochs of Adam.

    Example:
        >>> small_digits_net().widths
        (100, 50, 10)
    """
    return MLP((100, 50, 10), activation)


class ResNetBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut without parameters (option A of He et al.).

    Attributes:
        width: channels out.
        stride: of the first convolution; the shortcut takes every stride-th pixel and adds channels of zeros.
    """

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"], train: bool = False) -> Float[Array, "n h2 w2 width"]:
        y = nn.relu(_norm("bn1", train)(_conv(self.width, "conv1", self.stride)(x)))
        y = _norm("bn2", train)(_conv(self.width, "conv2")(y))
        extra = self.width - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2))))


class ResNet(nn.Module):
    """The residual nets for small RGB images: three stages of (depth - 2) / 6 blocks of two convolutions each.

    Depths of 20, 32, 44, 56 and 110 at width 16 have .27, .46, .66, .85 and 1.7 million parameters. Call it with
    `train=True` and `mutable=["batch_stats"]` to train; else it uses its running statistics.

    Attributes:
        depth: layers with weights on the longest way: 6 n + 2, n >= 1.
        width: channels of the first stage; the second has twice as many, the third four times.
        classes: logits.

    Raises:
        ValueError: when it is called, a depth that is not 6 n + 2.

    Source: He, Zhang, Ren, Sun, "Deep residual learning for image recognition", CVPR 2016, section 4.2.

    Example:
        >>> import jax
        >>> shapes = jax.eval_shape(ResNet(32).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
        464154
    """

    depth: int = 20
    width: int = 16
    classes: int = 10

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n h w 3"], train: bool = False) -> Float[Array, "n classes"]:
        blocks, rest = divmod(self.depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"expected a depth of 6 n + 2, such as 20, 32, 44, 56 or 110, got {self.depth}")
        x = nn.relu(_norm("bn1", train)(_conv(self.width, "conv1")(x)))
        for stage in (1, 2, 3):
            for i in range(blocks):
                stride = 2 if stage > 1 and i == 0 else 1
                x = ResNetBlock(self.width << (stage - 1), stride, name=f"stage{stage}_block{i}")(x, train)
        return nn.Dense(self.classes, name="dense")(x.mean((1, 2)))


def resnet_from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Variables of `ResNet` from the state_dict of the PyTorch net of the same shape.

    Args:
        state: arrays under PyTorch's names, "layer1.0.conv1.weight" and so on; convolutions OIHW.

    Returns:
        {"params": ..., "batch_stats": ...}, convolutions HWIO.
    """
    names = {"running_mean": "mean", "running_var": "var", "bias": "bias"}
    variables: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for key, value in state.items():
        *parents, module, name = key.split(".")
        if name == "num_batches_tracked":
            continue
        node = variables["batch_stats" if name.startswith("running") else "params"]
        if parents:  # layer1.0 -> stage1_block0
            node = node.setdefault(f"stage{parents[0].removeprefix('layer')}_block{parents[1]}", {})
        node = node.setdefault("dense" if module == "linear" else module, {})
        if value.ndim == 4:
            node["kernel"] = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            node["kernel"] = value.T
        else:
            node[names.get(name, "scale")] = value
    return variables


class NormMLP(nn.Module):
    """`MLP` with batch norm and ReLU between its layers: `dense0`, `bn0`, ReLU, `dense1`, ...

    Call it with `train=True` and `mutable=["batch_stats"]` to train; else it uses its running statistics.

    Attributes:
        widths: outputs of each dense layer; the last are the logits.

    Source: the MNIST net of Lybrand, Saab, "A greedy algorithm for quantizing neural networks", JMLR 2021, section 6.1.

    Example:
        >>> import jax
        >>> variables = NormMLP().init(jax.random.key(0), jnp.zeros((1, 28, 28)))
        >>> sorted(variables["params"]), jnp.shape(variables["batch_stats"]["bn1"]["mean"])
        (['bn0', 'bn1', 'dense0', 'dense1', 'dense2'], (300,))
    """

    widths: Sequence[int] = (500, 300, 10)

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n ..."], train: bool = False) -> Float[Array, "n classes"]:
        x = jnp.reshape(x, (x.shape[0], -1))
        for i, width in enumerate(self.widths[:-1]):
            x = nn.relu(_norm(f"bn{i}", train)(nn.Dense(width, name=f"dense{i}")(x)))
        return nn.Dense(self.widths[-1], name=f"dense{len(self.widths) - 1}")(x)


class ConvNet(nn.Module):
    """A plain net for 32x32 RGB images: 2x32C3-MP2-2x64C3-MP2-2x128C3-MP2-128-10, 551,722 parameters.

    Every layer but the last is followed by batch norm and ReLU: `conv0`, `bn0`, ... `conv5`, `bn5`, `dense0`, `bn6`,
    `dense1`. Convolutions have biases, as the dense layers do.

    Call it with `train=True` and `mutable=["batch_stats"]` to train; else it uses its running statistics.

    Source: the CIFAR-10 net of Lybrand, Saab, "A greedy algorithm for quantizing neural networks", JMLR 2021,
    section 6.2.

    Example:
        >>> import jax
        >>> variables = ConvNet().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
        >>> jax.tree.map(jnp.shape, variables["params"]["conv1"])
        {'bias': (32,), 'kernel': (3, 3, 32, 32)}
    """

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n h w 3"], train: bool = False) -> Float[Array, "n 10"]:
        for i, width in enumerate((32, 32, 64, 64, 128, 128)):
            x = nn.Conv(width, (3, 3), padding=1, name=f"conv{i}")(x)
            x = nn.relu(_norm(f"bn{i}", train)(x))
            if i % 2:  # the same as nn.max_pool(x, (2, 2), (2, 2)); its gradient is faster on CPUs
                n, h, w, c = x.shape
                x = x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))
        x = nn.Dense(128, name="dense0")(x.reshape(x.shape[0], -1))
        return nn.Dense(10, name="dense1")(nn.relu(_norm("bn6", train)(x)))


def _conv(width: int, name: str, stride: int = 1) -> nn.Conv:
    # Padding is stated: "SAME" with stride 2 would pad (0, 1), PyTorch's nets pad (1, 1).
    return nn.Conv(width, (3, 3), strides=stride, padding=1, use_bias=False, name=name)


def _norm(name: str, train: bool) -> Callable[..., Any]:
    return nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5, name=name)
