import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import lcq
from lcq.layers import binary
from lcq.layers.frozen import Frozen
from lcq.layers.linen import BinaryConv, BinaryDense, freeze


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train, name="bn1")(nn.Conv(20, (3, 3), name="conv1")(x))
        x = BinaryConv(12, (2, 3), strides=(1, 2), pad_value=1, name="conv2")(x)
        x = nn.BatchNorm(use_running_average=not train, name="bn2")(x)
        x = BinaryConv(12, (3, 3), padding="VALID", kernel_dilation=2, use_bias=False, name="conv3")(x)
        return BinaryDense(3, scale=False, name="dense")(x.reshape(x.shape[0], -1))


def drawn(net, x):
    """Variables from numpy: what `init` compiles takes longer than the tests."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(-1, 1, a.shape) + (a.ndim == 1), a.dtype), shapes)


@pytest.fixture(scope="module")
def trained():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 10, 2)), jnp.float32)
    variables = drawn(Net(), x)
    assert set(variables) == {"params", "batch_stats"}
    return Net(), variables, x


def test_a_frozen_net_is_the_net(trained):
    net, variables, x = trained
    packed = freeze(net, variables, x, train=False)
    assert set(packed["params"]) == {"conv1", "bn1", "bn2"} and set(packed["frozen"]) == {"conv2", "conv3", "dense"}
    assert isinstance(packed["frozen"]["conv2"]["layer"], Frozen)
    chex.assert_trees_all_equal(packed["batch_stats"], variables["batch_stats"])
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(packed, x), apply(variables, x), rtol=1e-6)


SETTING = {"strides": (1, 2), "padding": [(2, 0), (0, 1)], "pad_value": 1}


def test_a_layer_alone_is_the_function_on_arrays():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6, 40)), jnp.float32)
    window = binary.window((3, 2), dilation=(2, 1), **SETTING)
    layers = BinaryDense(5, scale=False), BinaryConv(5, (3, 2), kernel_dilation=(2, 1), scale=False, **SETTING)
    for layer, function in zip(layers, (binary.dense, functools.partial(binary.conv, window=window)), strict=True):
        variables = drawn(layer, x)
        packed = freeze(layer, variables, x)
        assert packed["params"] == {} and list(packed["frozen"]) == ["layer"]
        y = jax.jit(functools.partial(function, scale=False))(x, **variables["params"])
        apply = jax.jit(layer.apply)
        np.testing.assert_allclose(apply(variables, x), y, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(apply(packed, x), y, rtol=1e-6, atol=1e-6)


def test_weights_compressed_by_lcq_run_frozen(trained):
    net, variables, x = trained
    rules = [lcq.Rule("(conv2|conv3)/kernel", lcq.Binary(scale=True, per="channel"))]
    params = lcq.decompress(lcq.compress(variables["params"], rules))
    given = {**variables, "params": params}
    packed = freeze(net, given, x)
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(packed, x), apply(given, x), rtol=1e-6)
    alpha = packed["frozen"]["conv3"]["layer"].alpha
    np.testing.assert_array_equal(alpha, jnp.abs(params["conv3"]["kernel"][0, 0, 0]))


class Folded(nn.Module):
    """Two convolutions and a dense layer, with a batch norm behind the first two; in them, or between."""

    inside: bool

    @nn.compact
    def __call__(self, x):
        for i, (n, size, strides) in enumerate([(33, (3, 3), 1), (7, (2, 3), 2)]):
            norm = nn.BatchNorm(use_running_average=True, epsilon=0.0, name=f"norm{i}")
            layer = BinaryConv(n, size, strides, norm=norm if self.inside else None, name=f"conv{i}")
            x = layer(x) if self.inside else norm(layer(x))
        return BinaryDense(5, use_bias=False, name="dense")(x.reshape(*x.shape[:-3], -1))


def test_batch_norm_and_sign_are_folded_where_the_layer_has_the_norm():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 5, 6, 9)), jnp.float32)

    def short(path, a):
        """Few digits, so that nothing is rounded and ties are ties."""
        of = {"kernel": (-0.5, 0.5), "scale": (-2, -0.5, 0, 1), "var": (0.25, 1, 4), "mean": (-2, 0.5, 1)}
        return jnp.asarray(rng.choice(of.get(path[-1].key, (-1, 0, 0.5, 2)), a.shape), a.dtype)

    shapes = jax.eval_shape(Folded(False).init, jax.random.key(0), x)
    variables = jax.tree_util.tree_map_with_path(short, shapes)
    chex.assert_trees_all_equal_shapes(jax.eval_shape(Folded(True).init, jax.random.key(0), x), variables)
    net = Folded(True)
    packed = freeze(net, variables, x)
    assert packed["frozen"]["conv0"]["layer"].threshold is not None

    @jax.jit
    def all_of_it(variables, packed, x):
        return Folded(False).apply(variables, x), net.apply(variables, x), net.apply(packed, x)

    plain, trained, frozen = all_of_it(variables, packed, x)
    np.testing.assert_array_equal(trained, plain)
    np.testing.assert_array_equal(frozen, plain)


def test_a_norm_that_belongs_to_its_layer_moves_with_it():
    norm = nn.BatchNorm(use_running_average=True, use_scale=False)
    net, x = nn.Sequential([BinaryDense(40, norm=norm), BinaryDense(3)]), jnp.ones((2, 9))
    variables = drawn(net, x)
    assert set(variables["params"]["layers_0"]) == {"kernel", "bias", "norm"}
    packed = freeze(net, variables, x)
    assert packed["params"] == {}
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(packed, x), apply(variables, x), rtol=1e-6)


def test_another_norm_is_refused():
    net, x = BinaryDense(3, norm=nn.BatchNorm(use_running_average=True, axis=0)), jnp.ones((3, 3))
    with pytest.raises(ValueError, match="norm: expected a BatchNorm of the last axis, got BatchNorm"):
        freeze(net, drawn(net, x), x)


class Binarized(nn.Module):
    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        x = BinaryConv(12, (3, 3), binarize_kernel=False, scale=False, norm=norm, name="conv")(x)
        return BinaryDense(3, binarize_kernel=False, name="dense")(x.reshape(x.shape[0], -1))


def test_smooth_binary_weights_are_trained_as_they_are_and_packed_in_the_end():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 5, 7)), jnp.float32)
    net, transform = Binarized(), lcq.smooth_binary([lcq.Rule(".*kernel", lcq.Binary(per="channel"))])
    variables = drawn(net, x)

    def plain(params, x):
        """The same in terms of jax alone."""
        y = jax.lax.conv_general_dilated(
            binary.sign(x), params["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = y + params["conv"]["bias"] - variables["batch_stats"]["norm"]["mean"]
        y = y / jnp.sqrt(variables["batch_stats"]["norm"]["var"] + 1e-5) * params["norm"]["scale"]
        y = (y + params["norm"]["bias"]).reshape(len(x), -1)
        return binary.sign(y) @ params["dense"]["kernel"] + params["dense"]["bias"]

    def slopes(call):
        loss = lambda params: jnp.sum(jnp.sin(call(transform(params, 0.5))))  # noqa: E731
        return jax.jit(jax.grad(loss))(variables["params"])

    got = slopes(lambda params: net.apply({**variables, "params": params}, x))
    chex.assert_trees_all_close(got, slopes(lambda params: plain(params, x)), rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(got["conv"]["kernel"]).min()) > 0
    deployed = {**variables, "params": lcq.decompress(transform.compress(variables["params"]))}
    packed = freeze(net, deployed, x)
    assert isinstance(packed["frozen"]["conv"]["layer"], Frozen) and list(packed["frozen"]["conv"]) == ["layer"]
    apply = jax.jit(net.apply)
    np.testing.assert_allclose(apply(packed, x), apply(deployed, x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="conv/kernel: expected weights of"):
        freeze(net, variables, x)


def test_training_lowers_the_loss():
    x = jax.random.normal(jax.random.key(0), (64, 16))
    labels = (x[:, :8].sum(1) > x[:, 8:].sum(1)).astype(jnp.int32)
    net = nn.Sequential([BinaryDense(48), nn.LayerNorm(), BinaryDense(2)])
    variables = jax.jit(net.init)(jax.random.key(1), x)
    tx = optax.adam(0.01)

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(net.apply({"params": params}, x), labels).mean()

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    carry = (variables["params"], tx.init(variables["params"]))
    _, values = jax.jit(lambda carry: jax.lax.scan(step, carry, length=150))(carry)
    assert values[-1] < 0.3 * values[0]


def test_a_net_without_binary_layers_is_refused():
    net, x = nn.Dense(3), jnp.ones((1, 2))
    with pytest.raises(ValueError, match="expected a net that calls BinaryDense or BinaryConv, got Dense"):
        freeze(net, drawn(net, x), x)


def test_settings_and_shapes_are_checked():
    with pytest.raises(ValueError, match="padding: expected 'SAME'"):
        BinaryConv(3, (3, 3), padding="CIRCULAR").init(jax.random.key(0), jnp.ones((1, 5, 5, 2)))
    with pytest.raises(ValueError, match=r"expected floating-point x.*got int32\[1, 5\]"):
        BinaryDense(3).init(jax.random.key(0), jnp.ones((1, 5), jnp.int32))
