"""Where the state of `lc` lies on a mesh, however it is made, and what a step moves between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.forms.base import is_form
from lcq.training.placeholders import Placeholder

SHAPE = (2, 64, 32)
SPEC = P(None, None, "data")
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
RULES = {
    "k-means": lcq.Rule("w", lcq.KMeans(16), stacked=1),
    "k-means per channel": lcq.Rule("w", lcq.KMeans(16, per="channel"), stacked=1),
    "k-means with a rate": lcq.Rule("w", lcq.KMeans(10, rate=0.01)),
    "grid in groups": lcq.Rule("w", lcq.Uniform(4, per=16), stacked=1),
    "pruned": lcq.Rule("w", lcq.Prune(fraction=0.2)),
    "pruned, k-means": lcq.Rule("w", lcq.Prune(fraction=0.2, values=lcq.KMeans(10))),
}


def optimizer(rule, **settings):
    return lcq.lc(
        optax.adam(0.03), [rule, lcq.Rule("v", None)], mu=lcq.geometric(0.1, 1.5, steps=9), every=2, **settings
    )


def parameters(mesh):
    place = NamedSharding(mesh, SPEC)
    return {"v": jax.device_put(jnp.ones(8), NamedSharding(mesh, P())), "w": jax.device_put(X, place)}


def training_step(tx):
    def step(params, state):
        slopes = jax.tree.map(lambda w: w - 0.1, params)
        updates, state = tx.update(slopes, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


def gathered(program):
    """Elements of the largest array that an all-gather makes."""
    lines = [line for line in program.as_text().splitlines() if re.search(r" all-(gather|to-all)(-start)?\(", line)]
    shapes = [dims for line in lines for dims in re.findall(r"\w+\[([\d,]*)\]", line.split(" all-")[0])]
    return max((int(np.prod([int(n) for n in dims.split(",") if n])) for dims in shapes), default=0)


def local(leaf):
    return leaf.addressable_shards[0].data.size


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


@pytest.mark.parametrize(
    "name, kind",
    [
        ("k-means per channel", AUTO),
        ("grid in groups", AUTO),
        ("pruned", AUTO),
        ("k-means", EXPLICIT),
        ("k-means per channel", EXPLICIT),
        ("k-means with a rate", EXPLICIT),
        ("pruned, k-means", EXPLICIT),
    ],
)
def test_a_state_made_under_jit_lies_where_its_parameters_do_and_stays_there(name, kind):
    tx = optimizer(RULES[name])
    alone = {"v": jnp.ones(8), "w": jnp.asarray(X)}
    expected = tx.init(alone)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = parameters(mesh)
        init = jax.jit(tx.init).lower(params).compile()
        state = init(params)
        step = training_step(tx)
        program = step.lower(params, state).compile()
        _, after = program(params, state)
        for compiled, made in ((init, state), (program, after)):
            assert gathered(compiled) <= X.size // 16, gathered(compiled)
            lagrangian = made.lagrangian
            for tree in (lagrangian.multipliers, *lagrangian.codes):
                assert tree["w"].sharding.is_equivalent_to(params["w"].sharding, 3), tree["w"].sharding
            for table in jax.tree.leaves(lagrangian.codebooks):
                shared = table.ndim < 3 or table.shape[2] == 1  # one number for all outputs
                assert shared or local(table) == table.size // 8, (table.shape, table.sharding)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ["k-means", "pruned"])
def test_placeholders_for_every_leaf_make_the_state_of_placeholders(name):
    tx = optimizer(RULES[name])
    state, params = tx.init({"v": jnp.ones(8), "w": jnp.asarray(X)}), {"v": "of v", "w": "of w"}
    whole = optax.tree.map_params(tx, lambda _, name: name, state, params, is_leaf=masked)
    each = optax.tree.map_params(
        lambda placeholder: tx.init(jax.tree.map(lambda _: placeholder, params)), lambda leaf: "a leaf", state
    )
    found = [leaf for leaf in jax.tree.leaves(each) if leaf == "a leaf"]
    arrays = RULES[name].scheme.leaf_arrays
    assert len(found) == 4 + 1 + arrays  # Adam's two for both leaves, multipliers and codes for one
    assert each.lagrangian.codes[0]["w"] == "a leaf" and whole.lagrangian.codes[0]["w"] == "of w"
    assert masked(each.lagrangian.codes[0]["v"])
    blank = tx.init(jax.tree.map(lambda _: Placeholder(), params))
    assert not any(map(is_form, jax.tree.leaves(blank, is_leaf=is_form)))


def masked(node):
    return isinstance(node, optax.MaskedNode)


@pytest.mark.parametrize("name", ["k-means", "pruned, k-means"])
def test_narrow_codes_make_the_same_run(name):
    params, runs = {"v": jnp.ones(8), "w": jnp.asarray(X)}, []
    for narrow in (False, True):
        tx = optimizer(RULES[name], narrow_codes=narrow)
        w, state, step = params, tx.init(params), training_step(tx)
        for _ in range(3):
            w, state = step(w, state)
        assert all((tree["w"].dtype == jnp.uint4) == narrow for tree in state.lagrangian.codes)
        runs.append((w, jax.tree.map(lambda a: np.asarray(a, np.float32), state.lagrangian)))
    for narrow, wide in zip(*map(jax.tree.leaves, runs), strict=True):
        np.testing.assert_array_equal(narrow, wide)
