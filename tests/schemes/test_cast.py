"""Casts to shorter floating-point formats."""

import jax
import jax.numpy as jnp
import optax

import lcq


def test_casts_go_to_the_nearest_number():
    w = {"var": jnp.array([500.0, 1.0, 2.0, 3.0])}
    rules = [lcq.Rule(".*", lcq.Cast("float8_e4m3fn"))]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=lcq.geometric(0.1, 1.3, steps=5), every=3)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, w), tx.init(w), w)
    assert lcq.decompress(lcq.compress(w, rules))["var"].tolist() == [448, 1, 2, 3]
    assert jnp.isfinite(updates["var"]).all()


def test_leaves_in_a_small_format_keep_the_nearest_number():
    w = {"var": jnp.array([448.0, -448.0, 208.0, 1.0], jnp.float8_e4m3fn)}
    forms = lcq.compress(w, [lcq.Rule("var", lcq.Cast("bfloat16"))])
    assert lcq.decompress(forms)["var"].astype(jnp.float32).tolist() == [448, -448, 208, 1]
