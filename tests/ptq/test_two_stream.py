"""The walk against the function itself: with weights replaced, its last results are those of two direct runs."""

import functools
import re
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from lcq.ptq.two_stream import walk
from lcq.tracing.param_flow import trace
from lcq.tree.paths import flatten


class Case(NamedTuple):
    """A function, its parameters, two batches, which leaves are followed, what can be shifted, and how exact it is."""

    fn: Any
    params: Any
    batches: Any
    pattern: str = r"(.*/)?kernel"
    shifts: Any = ()
    tolerance: float = 1e-5


def draw(*shape, seed=0, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).normal(size=shape) * scale, jnp.float32)


def data(*shape):
    return [draw(*shape, seed=100 + i) for i in range(2)]


def filled(init, *args):
    """Parameters of the shapes that an init has, without running it."""
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda a: 0.5 + abs(draw(*a.shape, scale=0.3)), shapes)


class ConvNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        def norm():
            return nn.BatchNorm(use_running_average=True)

        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = nn.relu(nn.Conv(6, (3, 3), strides=2)(x))
        return nn.Dense(3)(x.mean((1, 2)))


def linen_conv():
    net, batches = ConvNorm(), data(2, 6, 6, 2)
    shifts = [f"params/{name}/kernel + params/{name}/bias" for name in ("Conv_1", "Dense_0")]
    shifts = ["params/Conv_0/kernel - batch_stats/BatchNorm_0/mean", *shifts]
    return Case(net.apply, filled(net.init, batches[0]), batches, shifts=shifts)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3,), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.dense = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(jnp.tanh(self.dropout(self.conv(x))).mean(1))


def nnx_net():
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    shifts = [f"{name}/kernel + {name}/bias" for name in ("conv", "dense")]
    return Case(lambda state, x: nnx.merge(graph, state, copy=True)(x), state, data(2, 5, 2), shifts=shifts)


def weights_on_the_left():
    def one(params, x):
        return params["w2"] @ jnp.tanh(params["w1"] @ x + params["b"])

    params = {"w1": draw(5, 4), "w2": draw(3, 5), "b": draw(5)}
    return Case(lambda p, x: jax.vmap(functools.partial(one, p))(x), params, data(6, 4), "w.", ["w1 + b"])


def transformer():
    def norm(x, scale):
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

    def fn(p, tokens):
        x = p["embed"][tokens]
        q, k, v = jnp.einsum("btd,dchn->cbhtn", norm(x, p["norm"]), p["qkv"])
        a = jax.nn.softmax(jnp.einsum("bhtn,bhsn->bhts", q, k))
        x = x + jnp.einsum("bhts,bhsn,hnd->btd", a, v, p["out"])
        x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        return jnp.einsum("btd,vd->btv", x, p["embed"])

    params = {"embed": draw(7, 4), "norm": jnp.ones(4), "qkv": draw(4, 3, 2, 2), "out": draw(2, 2, 4)}
    params |= {"up": draw(4, 6), "down": draw(6, 4)}
    tokens = [jnp.asarray(np.random.default_rng(i).integers(7, size=(2, 3))) for i in range(2)]
    return Case(fn, params, tokens, "qkv|out|up|down")


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + jnp.tanh(nn.Dense(4)(x)), None


def linen_scan():
    scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    net, batches = scan(), data(5, 4)
    shifts = ["params/Dense_0/kernel + params/Dense_0/bias"] * 3
    return Case(lambda p, x: net.apply(p, x, None)[0], filled(net.init, batches[0], None), batches, shifts=shifts)


def reversed_scan_of_slices():
    """The weights are transposed before the scan, which gives its steps out, too."""

    def fn(p, x):
        def step(x, layer):
            w, b = layer
            x = jnp.tanh(x @ w + b)
            return x, x.sum(-1)

        x, sums = lax.scan(step, x, (p["w"].transpose(0, 2, 1), p["b"]), reverse=True)
        return jnp.concatenate([x, sums.T], 1)

    return Case(fn, {"w": draw(3, 4, 4), "b": draw(3, 4)}, data(5, 4), "w", ["w + b"] * 3)


def fori_loop():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i] + p["b"][i]), x)

    return Case(fn, {"w": draw(3, 4, 4), "b": draw(3, 4)}, data(5, 4), "w", ["w + b"] * 3)


def convolutions():
    """Depthwise, grouped with strides, dilated with unequal padding, transposed."""

    def fn(p, x):
        conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jnp.tanh(conv(x, p["depthwise"], (1, 1), "SAME", feature_group_count=4))
        x = jnp.tanh(conv(x, p["grouped"], (2, 1), "SAME", feature_group_count=2))
        x = jnp.tanh(conv(x, p["dilated"], (1, 2), [(2, 1), (0, 3)], rhs_dilation=(2, 3)))
        return lax.conv_transpose(x, p["transposed"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    params = {"depthwise": draw(3, 2, 1, 8), "grouped": draw(2, 3, 4, 6)}
    params |= {"dilated": draw(2, 3, 6, 5), "transposed": draw(3, 2, 5, 3)}
    return Case(fn, params, data(2, 7, 8, 4), ".*")


def channels_first():
    """NCHW with OIHW, then 1-D with the batch last and a kernel that is flipped on its way."""

    def fn(p, x):
        x = lax.conv_general_dilated(x, p["image"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = x + p["bias"][None, :, None, None]
        x = jnp.tanh(x).reshape(2, 4, -1).transpose(2, 1, 0)
        kernel = jnp.flip(p["line"], 0)
        return lax.conv_general_dilated(x, kernel, (2,), [(1, 0)], dimension_numbers=("WCN", "WIO", "NWC"))

    params = {"image": draw(4, 3, 2, 2), "bias": draw(4), "line": draw(3, 4, 5)}
    return Case(fn, params, data(2, 3, 4, 5), "image|line", ["image + bias"])


def short_floats():
    net = nn.Sequential([nn.Dense(5, dtype=jnp.bfloat16), nn.relu, nn.Dense(3, dtype=jnp.bfloat16)])
    batches = data(6, 4)
    params = filled(net.init, batches[0])
    shifts = [f"params/layers_{i}/kernel + params/layers_{i}/bias" for i in (0, 2)]
    return Case(lambda p, x: net.apply(p, x).astype(jnp.float32), params, batches, shifts=shifts, tolerance=2e-2)


def used_twice():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]) @ p["w"].T

    return Case(fn, {"w": draw(4, 5), "v": draw(5, 5)}, data(6, 4), ".")


def experts():
    def fn(p, x):
        h = jnp.tanh(jnp.einsum("ecd,edf->ecf", x, p["up"]) + p["bias"][:, None])
        return jnp.einsum("efd,ecf->dec", p["down"], h).transpose(1, 2, 0)

    return Case(
        fn, {"up": draw(3, 4, 6), "down": draw(3, 6, 2), "bias": draw(3, 6)}, data(3, 5, 4), "up|down", ["up + bias"]
    )


def slices():
    def fn(p, x):
        q, k = x @ p["qkv"][:, :3], x @ p["qkv"][:, 3:6]
        v, gate = jnp.split(p["qkv"][:, 6:], 2, axis=1)
        return (q * k) @ p["out"] + (x @ v) * jax.nn.sigmoid(x @ gate)

    return Case(fn, {"qkv": draw(4, 12), "out": draw(3, 3)}, data(5, 4), ".*")


def recurrent():
    net, batches = nn.RNN(nn.GRUCell(3)), data(2, 4, 2)
    return Case(net.apply, filled(net.init, batches[0]), batches)


def calls_in_calls():
    """jit in remat in a custom rule, an output beside, a key as part of the batch, and a parameter that is no leaf of a
    product at all."""

    @jax.custom_vjp
    def dense(x, w):
        return jax.checkpoint(jax.jit(lambda x, w: jax.nn.relu(x @ w)))(x, w)

    dense.defvjp(lambda x, w: (dense(x, w), (x, w)), lambda saved, g: saved)

    def fn(p, batch):
        h = dense(batch["x"], p["w1"])
        h = jnp.where(jax.random.bernoulli(batch["key"], 0.5, h.shape), h, 0) * jnp.exp(p["scale"])
        return lax.stop_gradient(h @ p["w2"])

    params = {"w1": draw(4, 6), "w2": draw(6, 3), "scale": draw(6), "steps": jnp.int32(3)}
    return Case(fn, params, [{"x": x, "key": jax.random.key(i)} for i, x in enumerate(data(5, 4))], "w.")


def joined_along_either_side():
    """As an LSTM's gates; then its inputs are two kernels, one of them two, beside a constant; then seen transposed."""

    def fn(p, x):
        x = jnp.tanh(x @ jnp.concatenate([p["a"], p["b"]], 1) + jnp.concatenate([p["bias"], p["bias"]]))
        whole = jnp.concatenate([jnp.block([[p["c"], p["d"]]]), jnp.ones((2, 4)), p["e"]])
        return x @ whole.astype(jnp.bfloat16).astype(jnp.float32)[::-1, 1:3] + x @ whole[::-1, :1] + x @ whole[::-1, 3:]

    params = {"a": draw(4, 3), "b": draw(4, 5), "bias": draw(4), "c": draw(3, 3), "d": draw(3, 1), "e": draw(3, 4)}
    return Case(fn, params, data(5, 4), "[a-e]")


def joined_layers():
    """Stacked for a scan and a loop, on the first axis and on the last; as experts; rows of two layers in one array."""

    def fn(p, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, jnp.stack([p["a"], p["b"].T]))[0]
        whole = jnp.stack([p["a"], p["b"]], 2)
        x = x + lax.scan(lambda x, w: (jnp.tanh(w @ x.T).T, None), x, whole.transpose(2, 0, 1), reverse=True)[0]
        x = x + lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ whole[:, :, i]), x)
        y = jnp.einsum("bi,eoi->ebo", x, jnp.stack([p["a"].T, p["b"]], 0)[:, ::-1])
        q, k = jnp.concatenate([p["c"].reshape(-1), p["d"].reshape(-1)]).reshape(2, 4, 3)
        return jnp.einsum("ebi,eio->beo", y, jnp.stack([q, k])).reshape(len(x), -1)

    return Case(fn, {"a": draw(4, 4), "b": draw(4, 4, seed=1), "c": draw(4, 3), "d": draw(12)}, data(5, 4), "[a-d]")


def joined_filters():
    """Of a convolution, along its outputs and along its inputs."""

    def fn(p, x):
        conv = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jnp.tanh(conv(x, jnp.concatenate([p["a"], p["b"]], 3), (1, 2), "SAME"))
        return conv(x, jnp.concatenate([p["c"], p["d"].swapaxes(0, 1)], 2), (1, 1), "SAME")

    params = {"a": draw(2, 3, 2, 3), "b": draw(2, 3, 2, 1), "c": draw(2, 1, 1, 2), "d": draw(1, 2, 3, 2)}
    return Case(fn, params, data(2, 4, 5, 2), "[a-d]")


def parts_of_a_mesh():
    """Rows of the data on one axis, columns and then rows of the weights on the other; a scan with a mean over all."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def fn(p, x):
        def part(w, up, down, b, x):
            x = lax.scan(lambda x, _: (jnp.tanh(x @ w) + lax.pmean(x.sum(), "data"), None), x, None, 2)[0]
            y = lax.psum(jnp.tanh(x @ up + b) @ down, "model") * (1 + lax.axis_index("data"))
            return y, lax.all_gather(y, "data", axis=0, tiled=True).sum(0)

        specs = P(), P(None, "model"), P("model"), P("model"), P("data")
        both = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=(P("data"), P("data")))
        y, sums = both(p["w"], p["up"], p["down"], p["b"], x)
        return jnp.concatenate([y, sums.reshape(2, -1).repeat(2, 0)], 1)

    params = {"w": draw(4, 4), "up": draw(4, 6), "down": draw(6, 3), "b": draw(6)}
    return Case(fn, params, data(4, 4), "w|up|down", ["up + b"])


def rows_of_a_mesh():
    """Only the data are split, over both axes of the mesh; a kernel is one of a stack."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def fn(p, x):
        part = jax.jit(lambda w, x: (jax.nn.softmax(x @ w[0]) @ w[1], jnp.float32(1)))
        both = jax.shard_map(part, mesh=mesh, in_specs=(P(), P(("a", "b"))), out_specs=(P(("a", "b")), P()))
        y, one = both(p["w"], x)
        return y * one

    return Case(fn, {"w": draw(2, 4, 4)}, data(8, 4), "w")


CASES = [
    *(linen_conv, nnx_net, weights_on_the_left, transformer, linen_scan, reversed_scan_of_slices, fori_loop),
    *(convolutions, channels_first, short_floats, used_twice, experts, slices, recurrent, calls_in_calls),
    *(joined_along_either_side, joined_layers, joined_filters, parts_of_a_mesh, rows_of_a_mesh),
]


def probed(case):
    """The function followed by a product with an identity, so that the last product's results are the function's."""
    batch = case.batches[0]
    out = jax.eval_shape(case.fn, case.params, batch)

    def fn(params, batch):
        result = case.fn(params["net"], batch)
        return {"out": result.reshape(len(result), -1) @ params["probe"], "beside": result.sum()}

    return fn, {"net": case.params, "probe": jnp.eye(out.size // out.shape[0])}


def assert_near(got, wanted, tolerance):
    wanted = np.asarray(wanted, np.float32)
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def assert_canonical(product, x, leaf, tolerance):
    """Y[g] = X[g] W[g], and where each weight lies in its leaf."""
    w = product.weight.of(leaf)
    canonical = jax.jit(lambda x, w: (product.outputs(product(x, w)), product.inputs(x), product.weights(w)))
    y, inputs, weights = canonical(x, w)
    assert (y.shape[:2], inputs.shape[2], y.shape[2]) == (product.shape[:2], *product.shape[2:])
    exact = np.einsum("gmk,gkn->gmn", np.asarray(inputs, np.float32), np.asarray(weights, np.float32))
    assert_near(y, exact, tolerance)
    elements = np.asarray(leaf).reshape(-1)[product.weight.elements(leaf.shape)]
    np.testing.assert_array_equal(elements, product.weight.moved(leaf))


@pytest.mark.parametrize("make", CASES, ids=lambda make: make.__name__)
def test_both_results_are_the_functions(make):
    case = make()
    fn, params = probed(case)
    original, structure = flatten(params)
    net = [path for path in original if path.startswith("net/") and re.fullmatch(case.pattern, path[4:])]
    wanted = {path: original[path] + 0.3 * draw(*original[path].shape, seed=7) for path in net}
    program = trace(fn, params, case.batches[0], [*net, "probe"])
    other, found = dict(original), []
    for visit in walk(program, original, other, case.batches):
        product = visit.product
        if product.path != "probe":
            assert_canonical(product, visit.inputs[1][1], original[product.path], case.tolerance)
            if visit.unit is not None:
                leaf, places = np.array(other[product.path]), product.weight.elements(original[product.path].shape)
                assert (leaf.reshape(-1)[places] == np.asarray(original[product.path]).reshape(-1)[places]).all()
                leaf.reshape(-1)[places] = np.asarray(wanted[product.path]).reshape(-1)[places]
                other[product.path] = jnp.asarray(leaf)
        delta = None
        if product.number in program.bias_sites:
            shift, delta = program.bias_sites[product.number], draw(product.shape[0], product.shape[3])
            names = " ".join(part.path for part in shift.parts)
            found.append(f"{product.path} {'+' if shift.sign > 0 else '-'} {names}".replace("net/", ""))
            for path, neurons, elements in shift.parts:
                leaf = np.array(wanted.get(path, original[path]))
                leaf.reshape(-1)[elements] += shift.sign * np.asarray(delta).reshape(-1)[neurons]
                wanted[path] = leaf
        visit.finish(delta)
    for path in net:
        np.testing.assert_array_equal(other[path], wanted[path])
    assert found == list(case.shifts)
    direct = jax.jit(case.fn)
    perturbed = jax.tree.unflatten(structure, (original | wanted).values())["net"]
    for batch, (one, two) in zip(case.batches, visit.results[0], strict=True):
        assert_near(one, direct(case.params, batch).reshape(one.shape), case.tolerance)
        assert_near(two, direct(perturbed, batch).reshape(one.shape), case.tolerance)


def test_shift_and_error_of_a_product():
    """The shift is added in the other net only; the error counts it, over all batches."""

    def fn(p, x):
        return (jnp.einsum("gio,bgi->bgo", p["w"], x) ** 2).reshape(len(x), -1) @ p["v"]

    original = {"w": draw(2, 3, 4), "v": draw(8, 2)}
    other, batches, shift = original | {"w": original["w"] / 2}, data(5, 2, 3), draw(2, 4)
    steps = walk(trace(fn, original, batches[0], ["w", "v"]), original, other, batches)
    first = next(steps)
    assert [a is b for a, b in first.inputs] == [True, True]
    error = first.finish(shift).error
    second = next(steps)
    x = np.concatenate(batches)
    y = np.einsum("gio,bgi->bgo", original["w"], x)
    z = y / 2 + np.asarray(shift)
    np.testing.assert_allclose(error, ((y - z) ** 2).sum() / (y**2).sum(), rtol=1e-5)
    for i, results in enumerate(zip(*second.inputs, strict=True)):
        np.testing.assert_allclose(np.concatenate(results), ((y, z)[i] ** 2).reshape(10, 8), rtol=1e-4, atol=1e-5)
    second.finish()
