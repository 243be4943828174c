"""Layers of a stack a few at a time: what a plain loop over them gives, wherever they lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.training import layer_turns

rng = np.random.default_rng(0)
GIVEN = rng.normal(size=(16, 3, 8)).astype(np.float32)
KEPT = {"a": rng.normal(size=(16, 3, 8)).astype(np.float32), "b": np.arange(16, dtype=np.int32)}


def step(number, x, kept):
    return {"a": kept["a"] + x * number, "b": kept["b"] - 1}, jnp.sum(x) * kept["b"]


def expected():
    a = KEPT["a"] + GIVEN * np.arange(16, dtype=np.float32)[:, None, None]
    return {"a": a, "b": KEPT["b"] - 1}, (GIVEN.astype(np.float64).sum((1, 2)) * KEPT["b"]).sum()


def assert_expected(got):
    (kept, said), (wanted, total) = got, expected()
    np.testing.assert_allclose(kept["a"], wanted["a"], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(kept["b"], wanted["b"])
    assert float(said) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("numbers", [1, 100, 1 << 20])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_step_is_made_once_for_each_layer(numbers, one_by_one, monkeypatch):
    monkeypatch.setattr(layer_turns, "_NUMBERS", numbers)
    assert_expected(layer_turns.each_layer(step, jnp.asarray(GIVEN), KEPT, one_by_one=one_by_one))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("d"), P(None, None, "d")])
def test_no_layer_moves_on_a_mesh(kind, spec, monkeypatch):
    monkeypatch.setattr(layer_turns, "_NUMBERS", 1)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        given, a = (jax.device_put(x, NamedSharding(mesh, spec)) for x in (GIVEN, KEPT["a"]))
        b = jax.device_put(KEPT["b"], NamedSharding(mesh, P(*spec[:1])))
        program = (
            jax.jit(lambda x, kept: layer_turns.each_layer(step, x, kept)).lower(given, {"a": a, "b": b}).compile()
        )
        got = program(given, {"a": a, "b": b})
    assert_expected(got)
    assert got[0]["a"].sharding.is_equivalent_to(given.sharding, 3)
    assert "all-gather" not in program.as_text() and "all-to-all" not in program.as_text()


@pytest.mark.parametrize("kept", [{}, {"multipliers_dtype": "bfloat16", "narrow_codes": True}])
def test_c_steps_in_turns_are_those_of_all_layers_at_once(kept, monkeypatch):
    rules = [lcq.Rule("one", lcq.Uniform(4, per=8), stacked=1), lcq.Rule("two", lcq.Ternary(), stacked=2)]
    params = {"one": GIVEN[:4], "two": GIVEN.reshape(4, 4, 3, 8)}
    params["one"] = rng.normal(size=(4, 16, 3)).astype(np.float32)
    tx = lcq.lc(optax.sgd(0.1), rules, mu=lcq.geometric(0.1, 2.0, steps=4), every=None, **kept)

    def run(params):
        state = lcq.training.c_step(tx.init(params), jax.tree.map(lambda w: w + 0.1 * jnp.sin(9 * w), params))
        return state.lagrangian._replace(info=None)

    at_once = jax.jit(run)(params)
    monkeypatch.setattr(layer_turns, "_NUMBERS", 1)
    for got, wanted in zip(jax.tree.leaves(jax.jit(run)(params)), jax.tree.leaves(at_once), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(wanted, np.float32), rtol=1e-6, atol=1e-7)
