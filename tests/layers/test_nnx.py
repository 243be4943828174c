import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lcq
from lcq.layers import binary
from lcq.layers.nnx import BinaryConv, BinaryDense, Packed, freeze


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 20, (3, 3), rngs=rngs)
        self.binary = nnx.List(
            [
                BinaryConv(20, 12, (2, 3), strides=(1, 2), pad_value=1, rngs=rngs),
                BinaryConv(12, 12, (3, 3), padding="VALID", kernel_dilation=2, use_bias=False, rngs=rngs),
            ]
        )
        self.dense = BinaryDense(24, 3, scale=False, rngs=rngs)

    def __call__(self, x):
        x = self.conv(x)
        for layer in self.binary:
            x = layer(x)
        return self.dense(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def net():
    """Parameters from numpy: what initializers compile takes longer than the tests."""
    rng = np.random.default_rng(0)
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(rng.uniform(-1, 1, a.shape), a.dtype), shapes))


X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 6, 10, 2)), jnp.float32)


def test_a_frozen_net_is_the_net(net):
    packed = freeze(net)
    assert net.dense.packed is None and packed.dense.kernel is None and packed.dense.bias is None
    paths = {path[:-1] for path, _ in nnx.to_flat_state(nnx.state(packed, Packed))}
    assert paths == {("binary", 0), ("binary", 1), ("dense",)}
    assert {path[0] for path, _ in nnx.to_flat_state(nnx.state(packed, nnx.Param))} == {"conv"}
    call = nnx.jit(lambda net, x: net(x))
    y = call(net, X)
    np.testing.assert_allclose(call(packed, X), y, rtol=1e-6)
    graph, state = nnx.split(freeze(packed))
    np.testing.assert_allclose(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X), y, rtol=1e-6)


def uniform(key, shape, dtype):
    return jnp.asarray(np.random.default_rng(2).uniform(-1, 1, shape), dtype)


SETTING = {"strides": (1, 2), "padding": [(2, 0), (0, 1)], "pad_value": 1}


def test_a_layer_alone_is_the_function_on_arrays():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 6, 40)), jnp.float32)
    window = binary.window((3, 2), dilation=(2, 1), **SETTING)
    given = {"scale": False, "kernel_init": uniform, "bias_init": uniform, "rngs": nnx.Rngs(0)}
    layers = BinaryDense(40, 5, **given), BinaryConv(40, 5, (3, 2), kernel_dilation=(2, 1), **SETTING, **given)
    for layer, function in zip(layers, (binary.dense, functools.partial(binary.conv, window=window)), strict=True):
        y = jax.jit(functools.partial(function, scale=False))(x, layer.kernel[...], layer.bias[...])
        call = nnx.jit(lambda layer, x: layer(x))
        np.testing.assert_allclose(call(layer, x), y, rtol=1e-6, atol=1e-6)
        layer.freeze()
        assert layer.kernel is None and layer.bias is None
        np.testing.assert_allclose(call(layer, x), y, rtol=1e-6, atol=1e-6)


def test_batch_norm_and_sign_are_folded_where_the_layer_has_the_norm():
    rng, rngs = np.random.default_rng(0), nnx.Rngs(0)
    of = {"kernel": (-0.5, 0.5), "scale": (-2, -0.5, 0, 1), "var": (0.25, 1, 4), "mean": (-2, 0.5, 1)}

    def short(name):
        """Few digits, so that nothing is rounded and ties are ties."""
        return lambda key, shape, dtype: jnp.asarray(rng.choice(of.get(name, (-1, 0, 0.5, 2)), shape), dtype)

    def norm_of(n):
        norm = nnx.BatchNorm(n, epsilon=0.0, scale_init=short("scale"), bias_init=short("bias"), rngs=rngs)
        norm.mean[...], norm.var[...] = (short(name)(None, (n,), jnp.float32) for name in ("mean", "var"))
        return norm

    given = {"kernel_init": short("kernel"), "bias_init": short("bias"), "rngs": rngs}
    net = nnx.Sequential(
        BinaryConv(9, 33, (3, 3), norm=norm_of(33), **given),
        BinaryConv(33, 7, (2, 3), strides=2, norm=norm_of(7), **given),
        lambda x: x.reshape(x.shape[0], -1),
        BinaryDense(63, 5, use_bias=False, **given),
    )
    net.eval()
    x = jnp.asarray(rng.normal(size=(3, 5, 6, 9)), jnp.float32)

    packed = freeze(net)
    assert not list(nnx.to_flat_state(nnx.state(packed, (nnx.Param, nnx.BatchStat))))

    @nnx.jit
    def all_of_it(net, packed, x):
        h = x
        for layer in net.layers[:2]:
            h = layer.norm(binary.conv(h, layer.kernel[...], layer.bias[...], window=layer.window))
        return binary.dense(h.reshape(3, -1), net.layers[3].kernel[...]), net(x), packed(x)

    plain, trained, frozen = all_of_it(net, packed, x)
    np.testing.assert_array_equal(trained, plain)
    np.testing.assert_array_equal(frozen, plain)


def test_another_norm_is_refused():
    norm, rngs = nnx.BatchNorm(3, axis=0, use_scale=False, use_bias=False, rngs=nnx.Rngs(0)), nnx.Rngs(0)
    with pytest.raises(ValueError, match="norm: expected a BatchNorm of the last axis, got BatchNorm"):
        BinaryDense(3, 3, norm=norm, kernel_init=uniform, bias_init=uniform, rngs=rngs)


def test_smooth_binary_weights_are_trained_as_they_are_and_packed_in_the_end():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 30)), jnp.float32)
    given = {"kernel_init": uniform, "bias_init": uniform, "binarize_kernel": False, "rngs": nnx.Rngs(0)}
    net = nnx.Sequential(BinaryDense(30, 20, **given), BinaryDense(20, 3, **given))
    graph, params = nnx.split(net, nnx.Param)
    transform = lcq.smooth_binary([lcq.Rule(".*kernel.*", lcq.Binary(per="channel"))])

    def plain(layers, x):
        for layer in layers:
            x = binary.sign(x) @ layer["kernel"] + layer["bias"]
        return x

    def slopes(call):
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(call(transform(params, 0.5))))))(params)

    def arrays(params):
        return [{name: params["layers"][i][name][...] for name in ("kernel", "bias")} for i in (0, 1)]

    got, wanted = (arrays(slopes(f)) for f in (lambda p: nnx.merge(graph, p)(x), lambda p: plain(arrays(p), x)))
    for mine, other in zip(got, wanted, strict=True):
        for name in ("kernel", "bias"):
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, atol=1e-5)
    deployed = nnx.merge(graph, lcq.decompress(transform.compress(params)))
    np.testing.assert_allclose(freeze(deployed)(x), deployed(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="layers/0/kernel: expected weights of"):
        freeze(net)


def test_training_lowers_the_loss():
    x = jax.random.normal(jax.random.key(0), (64, 16))
    labels = (x[:, :8].sum(1) > x[:, 8:].sum(1)).astype(jnp.int32)
    rngs = nnx.Rngs(1)
    net = nnx.Sequential(BinaryDense(16, 48, rngs=rngs), nnx.LayerNorm(48, rngs=rngs), BinaryDense(48, 2, rngs=rngs))
    optimizer = nnx.Optimizer(net, optax.adam(0.01), wrt=nnx.Param)

    @nnx.jit
    def step(net, optimizer):
        def loss(net):
            return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()

        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        return value

    values = [float(step(net, optimizer)) for _ in range(150)]
    assert values[-1] < 0.3 * values[0]


def test_settings_and_nets_are_checked():
    with pytest.raises(ValueError, match="strides: expected 2 whole numbers"):
        BinaryConv(3, 4, (3, 3), strides=(2,), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"expected floating-point x \[.., 5\]"):
        BinaryDense(5, 3, rngs=nnx.Rngs(0))(jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="BinaryDense or BinaryConv in it, got Linear"):
        freeze(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
