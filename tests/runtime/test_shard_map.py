"""Inside of `jax.shard_map`, which checks what varies from device to device, packed(fn) is fn of dense arrays, too.

Gradients are summed over the devices along which an input does not vary: JAX does it by what it knows to vary.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

import lcq
from lcq.forms import Codes, Trellis
from lcq.runtime.packed import packed

RNG = np.random.default_rng(0)
MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
K, N = 32, 6


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def integers(high, *shape):
    return jnp.asarray(RNG.integers(0, high, shape), jnp.uint8)


ALONG = {"width": 2, "memory": 4, "along": (-2,), "length": K}
KINDS = {
    "grid": Codes(integers(16, K, N), scale=normal(4, N), zero=integers(16, 4, N), values=tuple(map(float, range(16)))),
    "bits": Codes(integers(2, K, N), levels=jnp.asarray([[[-1.0, 2.0]]])),
    "codebooks": Codes(integers(3, K, N), levels=normal(1, N, 3)),
    "trellis": Trellis(integers(4, K, N), scale=normal(1, N), **ALONG),
    "sum": lcq.forms.Sum((Codes(integers(3, K, N), levels=normal(1, N, 3)), lcq.forms.Cast(normal(K, N)))),
}
KINDS["prepacked"] = KINDS["grid"].prepack()
STACK = Codes(integers(16, 4, K, K), scale=normal(4, 4, K), values=tuple(map(float, range(-8, 8))))


def shard(fn, ins, outs):
    return jax.jit(jax.shard_map(fn, mesh=MESH, in_specs=ins, out_specs=outs))


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients(kind, rows):
    """Rows over "data", columns over "model"."""
    form, x = KINDS[kind], normal(2 * rows, K)
    columns = jax.tree.map(lambda a: PartitionSpec(*("model" if size == N else None for size in a.shape)), form)
    net = packed(lambda w, x: x @ w)

    def part(form, x):
        y, pull = jax.vjp(lambda x: net(form, x), x)
        return y, *pull(y)

    ins, outs = (columns, PartitionSpec("data")), (PartitionSpec("data", "model"), PartitionSpec("data"))
    y, slopes = shard(part, ins, outs)(form, x)
    w = np.asarray(form.dense(), np.float64)
    np.testing.assert_allclose(y, x @ w, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(slopes, np.asarray(x) @ w @ w.T, rtol=1e-4, atol=2e-2)


USES = {
    "loop": lambda p, x: lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["w"][i] / 9), x),
    "scan": lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w / 9), None), x, p["w"])[0],
    "experts": lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([1, 0, 2, 1])),
    "joined": lambda p, x: x @ jnp.concatenate([p["w"][0], p["w"][1].T], 1),
    "dense": lambda p, x: x @ p["w"][0] + jnp.linalg.norm(p["w"]),
    "rows": lambda p, x: p["w"][1][(x[:, 0] > 0).astype(jnp.int32)],
}


@pytest.mark.parametrize("case", USES)
def test_uses(case):
    x, rows = normal(8, K), PartitionSpec("data")
    run = {fn: shard(fn, (PartitionSpec(), rows), rows) for fn in (USES[case], packed(USES[case]))}
    wanted, got = (each({"w": w}, x) for each, w in zip(run.values(), (STACK.dense(), STACK), strict=True))
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-3 * float(jnp.abs(wanted).max()))
