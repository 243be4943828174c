"""Scales that follow the activations: the function stays, and the choice is the one that numpy makes in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.examples import llama
from lcq.ptq.transforms import activation_aware

RNG = np.random.default_rng(0)
SCHEME = lcq.Uniform(3, per="channel")
GRID = 4


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def gated(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def problem():
    params = {"gate": draw(6, 8), "up": draw(6, 8), "down": draw(8, 5)}
    params["up"][:, 2] *= 30
    return params, [draw(40, 6), draw(24, 6)]


def oracle(params, batches, scheme):
    """The grid search as the paper has it, on the rows themselves."""
    x = np.concatenate(batches).astype(np.float64)
    gate, up, w = (np.asarray(params[name], np.float64) for name in ("gate", "up", "down"))
    z = x @ gate
    z = z / (1 + np.exp(-z)) * (x @ up)
    size, errors, scales = np.abs(z).mean(0), [], []
    for step in range(GRID):
        s = size ** (step / GRID)
        s = s / np.sqrt(s.max() * s.min())
        rounded = np.asarray(scheme.project(jnp.asarray(w * s[:, None], jnp.float32)).dense(), np.float64)
        errors.append((((z / s) @ rounded - z @ w) ** 2).sum() / ((z @ w) ** 2).sum())
        scales.append(s)
    best = int(np.argmin(errors))
    return best / GRID, scales[best], errors[0], errors[best]


def unchanged(fn, params, batch, done, within=1e-5):
    run = jax.jit(fn)
    one, two = run(params, batch), run(done.params, batch)
    assert np.abs(one - two).max() <= within * np.abs(one).max()


def test_the_choice():
    params, batches = problem()
    done = activation_aware(gated, params, batches, [lcq.Rule("down", SCHEME)], grid=GRID)
    alpha, s, before, after = oracle(params, batches, SCHEME)
    record = next(record for record in done.records if not record.reason)
    assert (record.producers, record.consumers, record.size) == (("up",), ("down",), 8)
    assert record.setting == f"alpha={alpha:g}" and alpha > 0
    np.testing.assert_allclose([record.before, record.after], [before, after], rtol=1e-3)
    np.testing.assert_allclose(done.params["down"], params["down"] * s[:, None], rtol=1e-4)
    np.testing.assert_allclose(done.params["up"], params["up"] / s, rtol=1e-4)
    unchanged(gated, params, batches[0], done)


def test_positions_that_do_not_count():
    params, (x, _) = problem()
    spoiled = np.concatenate([x, 1000 * draw(10, 6)])

    def counts(batch):
        return np.arange(len(batch)) < len(x)

    rules = [lcq.Rule("down", SCHEME)]
    one = activation_aware(gated, params, [x], rules, grid=GRID)
    two = activation_aware(gated, params, [spoiled], rules, grid=GRID, mask=counts)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(two.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


def test_products_that_share_a_norm_choose_together():
    def fn(p, x):
        x = jnp.asarray(x)
        y = llama.rms_norm(x, p["gain"], 1e-5)
        return jnp.tanh(y @ p["q"]) + y @ p["k"] + jnp.tanh(y) @ p["other"]

    def separate(p, x):
        y = llama.rms_norm(jnp.asarray(x), p["gain"], 1e-5)
        return jnp.tanh(y @ p["q"]) + y @ p["k"]

    params = {"gain": np.exp(draw(6)), "q": draw(6, 3), "k": draw(6, 3)}
    batches, rules = [draw(30, 6)], [lcq.Rule("[qk]", SCHEME)]
    done = activation_aware(separate, params, batches, rules, grid=GRID)
    record = next(record for record in done.records if not record.reason)
    assert (record.producers, record.consumers) == (("gain",), ("q", "k")) and record.after <= record.before
    unchanged(separate, params, batches[0], done)
    refused = activation_aware(fn, params | {"other": draw(6, 3)}, batches, rules, grid=GRID).records
    assert not [record for record in refused if not record.reason] and "tanh at" in refused[0].reason


def test_stacked_llama():
    layers = {name: draw(2, 8, 8) / 3 for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}
    layers |= {"attention_norm": np.exp(draw(2, 8)), "ffn_norm": np.exp(draw(2, 8))}
    params = {"tok_embeddings": draw(20, 8), "norm": np.ones(8, np.float32), "layers": layers}
    fn = functools.partial(llama.logits, config=llama.Config(heads=4))
    tokens = RNG.integers(0, 20, (2, 6)).astype(np.int32)
    done = activation_aware(fn, params, [tokens], [lcq.Rule("layers/w.", lcq.Uniform(3, per=4))], grid=2)
    unchanged(fn, params, tokens, done)
    moved = [record for record in done.records if not record.reason]
    assert len(moved) == 8 and moved[0].consumers == ("layers/wq[0]", "layers/wk[0]", "layers/wv[0]")
    assert all(record.after <= record.before for record in moved)


def test_convolutions():
    def fn(p, x):
        def conv(x, w):
            return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        return conv(jax.nn.relu(conv(x, p["a"])), p["b"])

    params = {"a": draw(3, 3, 2, 4), "b": draw(3, 3, 4, 2)}
    params["a"][..., 1] *= 20
    x = draw(2, 5, 5, 2)
    done = activation_aware(fn, params, [x], [lcq.Rule("b", SCHEME)], grid=GRID)
    unchanged(fn, params, x, done)
    record = done.records[0]
    assert (record.consumers, record.size) == (("b",), 4) and record.after <= record.before


def test_refusals():
    params, batches = problem()
    with pytest.raises(ValueError, match="expected rules"):
        activation_aware(gated, params, batches, [])
    told = {r.producers: r.reason for r in activation_aware(gated, params, batches, [lcq.Rule("up", SCHEME)]).records}
    assert told[("up",)] == "no product with a rule reads these channels"

    def scaled(p, x):
        return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ (p["down"] * 2)

    told = activation_aware(scaled, params, batches, [lcq.Rule("down", SCHEME)]).records
    assert any("down is multiplied with something before dot_general" in record.reason for record in told)
