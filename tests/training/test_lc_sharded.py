"""`lc` on a mesh of eight simulated devices: states sharded like the parameters, the same run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq


def optimizer(scheme):
    rules = [lcq.Rule("dense0/kernel", scheme), lcq.Rule(".*kernel", lcq.Levels((-0.2, 0.0, 0.2)))]
    return lcq.lc(optax.adam(0.03), rules, mu=lcq.geometric(1e-2, 1.5, steps=20), every=(3, 2))


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


def training_step(tx):
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def run(step, params, state, steps=8):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def shardings(mesh):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), SPECS, is_leaf=lambda s: isinstance(s, P))


def state_shardings(tx, state, of_params, mesh):
    return optax.tree.map_params(
        tx,
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
    for leaf in jax.tree.leaves((lagrangian.codebooks, lagrangian.info, state.steps)):
        assert leaf.sharding.is_fully_replicated


def assert_same_run(got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-3, atol=2e-4)


def compilations_of_the_bare_optimizer(how, of_params):
    params, tx = jax.device_put(start(), of_params), optax.adam(0.03)
    step = training_step(tx)
    run(step, params, tx.init(params) if how == "eager init" else jax.jit(tx.init)(params), steps=3)
    return step._cache_size()


CASES = {  # k-means scatters on CPU, which a mesh with explicit axes refuses
    "auto axes, eager init": (AxisType.Auto, "eager init", lcq.KMeans(4)),
    "explicit axes, jit init": (AxisType.Explicit, "jit init", lcq.Binary()),
}


@pytest.mark.parametrize("case", CASES)
def test_sharded_run_is_the_run_alone(case):
    kind, how, scheme = CASES[case]
    tx = optimizer(scheme)
    alone = run(training_step(tx), start(), tx.init(start()))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    of_params = shardings(mesh)
    with jax.set_mesh(mesh):
        params = jax.device_put(start(), of_params)
        if how == "eager init":
            state = tx.init(params)
        else:
            of_state = state_shardings(tx, jax.eval_shape(tx.init, params), of_params, mesh)
            state = jax.jit(tx.init, out_shardings=of_state)(params)
        assert_sharded_like_params(state, of_params)
        step = training_step(tx)
        params, state = run(step, params, state)
        assert step._cache_size() == compilations_of_the_bare_optimizer(how, of_params)
        assert_sharded_like_params(state, of_params)
    assert_same_run((params, state), alone)
