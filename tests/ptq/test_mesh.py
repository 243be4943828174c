"""On eight devices: codes as on one, forms where their leaves lie, activations that stay, and sums that alone cross."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.ptq import gathering, two_stream
from lcq.ptq.neurons import mesh_of
from lcq.ptq.pieces import Structure
from lcq.tracing.contraction import Operand
from lcq.tracing.param_flow import trace
from tests.ptq.small_net import bare, draw

LAYERS, WIDTH = 2, 16
RULES = [lcq.Rule("w|v", lcq.Uniform(4, per=8)), lcq.Rule("head", lcq.KMeans(4, per="channel"))]
METHODS = {"plain": bare("qronos"), "searched": lcq.GPTQ()}


def net(p, x):
    """Two layers of a scan, each of two products of one input, and a head with a bias."""

    def layer(x, parts):
        w, v = parts
        return x + jnp.tanh(x @ w) * (x @ v), None

    return jax.lax.scan(layer, x, (p["w"], p["v"]))[0] @ p["head"] + p["bias"]


def problem():
    params = {"w": draw(LAYERS, WIDTH, WIDTH) / 4, "v": draw(LAYERS, WIDTH, WIDTH, seed=1) / 4}
    params |= {"head": draw(WIDTH, 12), "bias": draw(12)}
    mix = draw(WIDTH, WIDTH, seed=3) / 4
    return params, [(draw(rows, WIDTH, seed=i) + 0.5) @ mix for i, rows in enumerate((64, 32))]


def spread(kind):
    """Rows over "data"; inputs and neurons over the others as far as the net can run on explicit axes."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"w": P(None, "data", "model"), "v": P(None, None, "model"), "head": P("data", "model"), "bias": P("model")}
    if kind is AxisType.Explicit:
        specs = {"w": P(), "v": P(), "head": P(None, "model"), "bias": P("model")}
    params, batches = problem()
    params = {name: jax.device_put(a, NamedSharding(mesh, specs[name])) for name, a in params.items()}
    return mesh, params, [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batches]


@pytest.mark.parametrize(("kind", "method"), [(AxisType.Auto, "searched"), (AxisType.Explicit, "plain")])
def test_codes_are_those_of_one_device_and_lie_as_their_leaves(kind, method):
    alone = lcq.quantize(net, *problem(), RULES, METHODS[method])
    mesh, params, batches = spread(kind)
    with jax.set_mesh(mesh):
        done = lcq.quantize(net, params, batches, RULES, METHODS[method])
    for name in ("w", "v", "head"):
        one, many = alone.forms[name], done.forms[name]
        assert (np.asarray(one.codes) != np.asarray(many.codes)).sum() == 0, name  # no ties here
        np.testing.assert_allclose(many.dense(), one.dense(), rtol=1e-5, atol=1e-6)
        assert many.codes.sharding.is_equivalent_to(params[name].sharding, many.codes.ndim), name
        for table in (many.scale, many.levels):
            assert table is None or table.sharding.mesh == mesh
    assert done.forms["w"].scale.shape == (LAYERS, 2, WIDTH)
    cut = P(None, "data", "model") if kind is AxisType.Auto else P()
    assert done.forms["w"].scale.sharding.is_equivalent_to(NamedSharding(mesh, cut), 3)
    np.testing.assert_allclose(done.forms["bias"], alone.forms["bias"], atol=1e-5)
    for one, many in zip(alone.records, done.records, strict=True):
        assert (one.path, one.rows, one.recursion) == (many.path, many.rows, many.recursion)
        np.testing.assert_allclose(many.error, one.error, rtol=1e-3)


def test_activations_stay_on_the_mesh(monkeypatch):
    """Also where those of one device go to the host's memory."""
    monkeypatch.setattr(two_stream.jax, "default_backend", lambda: "tpu")
    _, params, batches = spread(AxisType.Auto)
    for given, stay in (((params, batches), True), (problem(), False)):
        program = trace(net, *(given[0], given[1][0]), ["w", "v", "head"])
        other, seen = dict(given[0]), []
        for visit in two_stream.walk(program, given[0], other, given[1][:1]):
            seen += [a for pair in visit.inputs for a in pair]
            visit.finish()
        for a in seen[2:]:
            assert isinstance(a, jax.Array) is stay
            assert not stay or a.sharding.shard_shape(a.shape)[0] == len(a) // 2


def largest_gathered(text):
    """Elements of the largest array that a program gathers from all devices."""
    found = re.findall(r"= \w+\[([\d,]*)\][^=]* all-gather\(", text)
    return max((int(np.prod([int(n) for n in shape.split(",") if n])) for shape in found), default=0)


def test_sums_cross_devices_and_rows_do_not():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(draw(1024, WIDTH), NamedSharding(mesh, P("data")))
    y = jax.device_put(draw(1024, WIDTH, seed=1), NamedSharding(mesh, P("data")))
    (product,) = trace(lambda p, x: x @ p["w"], {"w": draw(WIDTH, 8)}, x, ["w"]).products
    add = gathering._gather(Structure(product.reading, product), 1, 4, False, True)
    text = add.lower(Operand(y), Operand(x), None, None, 0).compile().as_text()
    assert largest_gathered(text) <= 4 * WIDTH * WIDTH < x.size, largest_gathered(text)
    moments = add(Operand(y), Operand(x), None, None, 0).moments
    whole, away = np.asarray(y, np.float64), np.asarray(x, np.float64) - np.asarray(y, np.float64)
    for k in range(4):
        rows = slice(256 * k, 256 * k + 256)
        moved = whole[rows] - np.asarray(moments.shift[0, k], np.float64)
        np.testing.assert_allclose(moments.gram[0, k], moved.T @ moved, rtol=1e-4, atol=1e-3)
        np.testing.assert_allclose(moments.drift[0, k], moved.T @ away[rows], rtol=1e-4, atol=1e-3)
    assert mesh_of(x).axis_types == (AxisType.Auto,) and mesh_of(draw(2)) is None
