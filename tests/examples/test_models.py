import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lcq.examples import data, models

needs_data = pytest.mark.skipif(
    "LCQ_DATA" not in os.environ, reason="real data: set LCQ_DATA to the folder that holds it"
)


def shapes(tree):
    return {"/".join(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_lenet300_has_the_names_of_the_pretrained_file():
    params = jax.eval_shape(models.lenet300().init, jax.random.key(0), jnp.zeros((1, 28, 28)))["params"]
    assert shapes(params) == {
        "dense0/kernel": (784, 300),
        "dense0/bias": (300,),
        "dense1/kernel": (300, 100),
        "dense1/bias": (100,),
        "dense2/kernel": (100, 10),
        "dense2/bias": (10,),
    }


def test_lenet300_against_numpy():
    rng = np.random.default_rng(0)
    net = models.lenet300()
    params = jax.eval_shape(net.init, jax.random.key(1), jnp.zeros((1, 784)))["params"]
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(0, 0.1, a.shape), jnp.float32), params)
    x = rng.normal(size=(3, 28, 28)).astype(np.float32)
    y = x.reshape(3, -1).astype(np.float64)
    for i in range(3):
        layer = jax.tree.map(lambda a: np.asarray(a, np.float64), params[f"dense{i}"])
        y = (y if i == 0 else np.tanh(y)) @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(net.apply({"params": params}, x), y, atol=1e-4)


def test_small_digits_net_learns_the_digits():
    split, net = data.digits(), models.small_digits_net()
    params = net.init(jax.random.key(0), split.x_train[:1])
    tx = optax.adam(3e-3)
    state = tx.init(params)

    @jax.jit
    def step(params, state, x, y):
        def loss(p):
            return optax.softmax_cross_entropy_with_integer_labels(net.apply(p, x), y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    for epoch in range(15):
        for x, y in data.batches(split.x_train, split.y_train, 64, seed=0, epoch=epoch):
            params, state = step(params, state, x, y)
    right = np.argmax(net.apply(params, split.x_test), axis=1) == split.y_test
    assert right.mean() > 0.96


def torch_name(path):
    """PyTorch's name of a ResNet variable: stage1_block0/conv1/kernel -> layer1.0.conv1.weight."""
    path = re.sub(r"stage(\d)_block(\d)/", r"layer\1.\2.", path).replace("dense/", "linear/")
    names = {
        "kernel": "weight",
        "scale": "weight",
        "mean": "running_mean",
        "var": "running_var",
        "bias": "bias",
    }
    module, name = path.split("/")
    return f"{module}.{names[name]}"


def test_resnet_from_torch_fills_every_variable():
    net = models.ResNet(20)
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 269_722
    rng = np.random.default_rng(0)
    expected = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), variables)
    state = {"bn1.num_batches_tracked": np.array(7)}
    for collection in expected.values():
        for path, leaf in jax.tree_util.tree_leaves_with_path(collection):
            name = torch_name("/".join(key.key for key in path))
            state[name] = leaf.transpose({4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim])
    jax.tree.map(np.testing.assert_array_equal, models.resnet_from_torch(state), expected)


@pytest.mark.parametrize(
    ("depth", "width", "classes", "paper"),
    [
        (20, 16, 10, 0.27e6),
        (32, 16, 10, 0.46e6),
        (44, 16, 10, 0.66e6),
        (56, 16, 10, 0.85e6),
        (110, 16, 10, 1.7e6),
        (8, 4, 100, None),
    ],
)
def test_resnets_have_the_parameters_of_the_paper(depth, width, classes, paper):
    """9 c_in c_out of a convolution and 2 c_out of its norm, twice a block, and the dense layer."""
    net = models.ResNet(depth, width, classes)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    n, c = (depth - 2) // 6, np.array([width, 2 * width, 4 * width])
    before = np.array([width, width, 2 * width])
    expected = 27 * width + 2 * width + (9 * before * c + 9 * c * c * (2 * n - 1) + 4 * n * c).sum()
    expected += 4 * width * classes + classes
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected
    assert paper is None or expected == pytest.approx(paper, rel=0.02)


@pytest.mark.parametrize("depth", [2, 7, 18, 52])
def test_a_resnet_of_no_such_depth_is_refused(depth):
    with pytest.raises(ValueError, match=rf"expected a depth of 6 n \+ 2.*got {depth}"):
        models.ResNet(depth).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_resnet_block_shortcut_is_option_a():
    block = models.ResNetBlock(8, stride=2)
    x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 6, 6, 4)))
    variables = block.init(jax.random.key(1), x)
    variables["params"]["bn2"]["scale"] = jnp.zeros(8)  # only the shortcut is left
    y = block.apply(variables, x)
    np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2])
    assert not y[..., :2].any() and not y[..., 6:].any()


def normed(y, variables, name):
    """Batch norm by running statistics, then ReLU, in float64."""
    stats, params = variables["batch_stats"][name], variables["params"][name]
    y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
    return np.maximum(y, 0)


def drawn(net, x, seed=0):
    """Variables of a net, drawn so that every one of them matters."""
    rng = np.random.default_rng(seed)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: rng.normal(0, 0.1, a.shape), variables)
    for stats in variables["batch_stats"].values():
        stats["var"] = 1 + np.abs(stats["var"])
    return variables


def test_norm_mlp_against_numpy():
    net, x = models.NormMLP((7, 5, 3)), np.random.default_rng(1).normal(size=(4, 2, 6))
    variables = drawn(net, x)
    y = x.reshape(4, -1)
    for i in range(3):
        layer = variables["params"][f"dense{i}"]
        y = y @ layer["kernel"] + layer["bias"]
        y = normed(y, variables, f"bn{i}") if i < 2 else y
    to32 = jax.tree.map(np.float32, variables)
    np.testing.assert_allclose(net.apply(to32, x.astype(np.float32)), y, atol=1e-5)


def test_conv_net_against_numpy():
    net, x = models.ConvNet(), np.random.default_rng(1).normal(size=(2, 32, 32, 3))
    variables = drawn(net, x)
    y = x
    for i in range(6):
        layer = variables["params"][f"conv{i}"]
        padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
        y = normed(np.einsum("nhwcij,ijcd->nhwd", windows, layer["kernel"]) + layer["bias"], variables, f"bn{i}")
        if i in (1, 3, 5):
            y = np.maximum(np.maximum(y[:, ::2, ::2], y[:, 1::2, ::2]), np.maximum(y[:, ::2, 1::2], y[:, 1::2, 1::2]))
    dense0, dense1 = variables["params"]["dense0"], variables["params"]["dense1"]
    y = normed(y.reshape(2, -1) @ dense0["kernel"] + dense0["bias"], variables, "bn6")
    y = y @ dense1["kernel"] + dense1["bias"]
    to32 = jax.tree.map(np.float32, variables)
    np.testing.assert_allclose(net.apply(to32, x.astype(np.float32)), y, rtol=1e-4, atol=1e-4)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 551_722


@pytest.mark.parametrize(("net", "shape"), [(models.NormMLP(), (8, 28, 28)), (models.ConvNet(), (8, 32, 32, 3))])
def test_training_moves_every_running_statistic(net, shape):
    x = jax.random.normal(jax.random.key(0), shape)
    variables = net.init(jax.random.key(1), x)
    _, updated = net.apply(variables, x, train=True, mutable=["batch_stats"])
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), updated["batch_stats"], variables["batch_stats"])
    assert all(jax.tree.leaves(moved))


@needs_data
def test_pretrained_lenet300_scores_as_published():
    split = data.mnist()
    mean = split.x_train.mean(0) / 255
    logits = models.lenet300().apply(
        {"params": data.pretrained("lenet300_tanh_mnist")}, data.normalize(split.x_test, mean)
    )
    assert (np.argmax(logits, 1) != split.y_test).mean() == pytest.approx(0.0213, abs=1e-9)


@needs_data
def test_pretrained_resnet20_is_right_nine_times_in_ten():
    x, y = data.cifar10("test")
    x = data.normalize(x[:500], data.CIFAR10_MEAN, data.CIFAR10_STD)
    variables = models.resnet_from_torch(data.pretrained("resnet20_cifar10"))
    logits = jax.jit(models.ResNet(20).apply)(variables, x)
    assert (np.argmax(logits, 1) == y[:500]).mean() > 0.89
