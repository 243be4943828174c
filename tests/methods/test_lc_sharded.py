"""`lc` on a mesh of eight simulated devices: states sharded like the parameters, the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq

pytestmark = pytest.mark.filterwarnings("ignore:the weights are")
RULES = [lcq.Rule("(.*/)?kernel", lcq.KMeans(4))]
TX = lcq.lc(optax.adam(0.03), RULES, mu=lcq.geometric(1e-2, 1.5, steps=20), every=(3, 2))
SPECS = {"dense0": {"bias": P(), "kernel": P("data", None)}, "dense1": {"kernel": P(None, "data")}}
X = jax.random.normal(jax.random.key(1), (32, 16))


def start():
    keys = jax.random.split(jax.random.key(0))
    return {
        "dense0": {"bias": jnp.zeros(24), "kernel": jax.random.normal(keys[0], (16, 24)) / 4},
        "dense1": {"kernel": jax.random.normal(keys[1], (24, 8)) / 5},
    }


def loss(params):
    hidden = jnp.tanh(jnp.dot(X, params["dense0"]["kernel"]) + params["dense0"]["bias"])
    return jnp.mean((jnp.dot(hidden, params["dense1"]["kernel"]) - jnp.sin(X[:, :8])) ** 2)


def step(params, state):
    updates, state = TX.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


def run(step, params, state, steps=8):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


@pytest.fixture(scope="module")
def alone():
    """The run on one device."""
    return run(jax.jit(step), start(), TX.init(start()))


def shardings(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda s: isinstance(s, P))


def state_shardings(state, of_params, mesh):
    return optax.tree.map_params(
        TX,
        lambda _, sharding: sharding,
        state,
        of_params,
        transform_non_params=lambda _: NamedSharding(mesh, P()),
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )


def assert_sharded_like_params(state, of_params):
    lagrangian = state.lagrangian
    for tree in (lagrangian.multipliers, *lagrangian.codes):
        for name in ("dense0", "dense1"):
            leaf = tree[name]["kernel"]
            assert leaf.sharding.is_equivalent_to(of_params[name]["kernel"], leaf.ndim), (name, leaf.sharding)
    for leaf in jax.tree.leaves((lagrangian.tables, lagrangian.info, state.steps)):
        assert leaf.sharding.is_fully_replicated


def assert_same_run(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-3, atol=2e-4)
    forms = [lcq.extract(state, params) for params, state in (got, expected)]
    np.testing.assert_array_equal(*(np.asarray(f["dense0"]["kernel"].codes) for f in forms))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("how", ["eager init", "jit init"])
def test_sharded_run_is_the_run_alone(alone, kind, how):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    of_params = shardings(mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), of_params)
        if how == "eager init":
            state = TX.init(params)
        else:
            of_state = state_shardings(jax.eval_shape(TX.init, params), of_params, mesh)
            state = jax.jit(TX.init, out_shardings=of_state)(params)
        assert_sharded_like_params(state, of_params)
        compiled = jax.jit(step, donate_argnums=(0, 1))
        params, state = run(compiled, params, state)
        assert compiled._cache_size() == 1
        assert_sharded_like_params(state, of_params)
        stepped = jax.jit(lcq.c_step)(state, params)
        assert_sharded_like_params(stepped, of_params)
    assert_same_run((params, state), alone)
