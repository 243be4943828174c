"""Which factors the parameters of a function may have: each that is found is tried out, others have a reason."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.tracing.scaling import scaling
from lcq.tree.paths import flatten

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4)).astype(np.float32)
IMAGE = RNG.normal(size=(2, 6, 6, 3)).astype(np.float32)


def draw(**shapes):
    return {name: (RNG.normal(size=shape) + 0.1).astype(np.float32) for name, shape in shapes.items()}


def conv(x, w, **settings):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


def norm(x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def told(found):
    """What can be scaled: (channels, producers, consumers)."""
    return [
        (len(g.symbols), *(" ".join(dict.fromkeys(use.path for use in uses)) for uses in (g.producers, g.consumers)))
        for g in found.groups
        if not g.reason
    ]


def check(fn, params, x):
    """Random factors for all that may have any leave the function as it is."""
    found = scaling(fn, params, x)
    values = {s: float(np.exp(RNG.normal())) for g in found.groups if not g.reason for s in g.symbols.tolist()}
    leaves, structure = flatten(params)
    other = [
        jnp.asarray(leaf * found.factors(path, leaf.size, values).reshape(leaf.shape), leaf.dtype)
        for path, leaf in leaves.items()
    ]
    run = jax.jit(fn)
    one, two = run(params, x), run(jax.tree.unflatten(structure, other), x)
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    return found


def relu_net(p, x):
    return jnp.maximum(x @ p["w1"] + p["b1"], 0) @ p["w2"] + p["b2"]


def gated(p, x):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"].T


def convolved(p, x):
    y = jax.nn.relu(conv(x, p["w1"]) + p["b1"])
    y = conv(y, p["deep"], feature_group_count=4)
    y = lax.reduce_window(jax.nn.leaky_relu(y), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return conv(y, p["w2"]).mean((1, 2))


def grouped(p, x):
    return conv(jax.nn.relu(conv(x, p["w1"])), p["w2"], feature_group_count=2).sum((1, 2))


def flattened(p, x):
    y = jax.nn.relu(conv(x, p["w1"]))
    return y.transpose(0, 3, 1, 2).reshape(2, -1) @ p["w2"]


def normed(p, x):
    y = norm(x) * p["gain"]
    return jnp.tanh(y @ p["q"]) + y @ p["k"]


def batch_normed(p, x):
    y = (x @ p["w1"] - p["mean"]) * (lax.rsqrt(p["var"] ** 2 + 1e-3) * p["gain"]) + p["bias"]
    return jax.nn.relu(y) @ p["w2"]


def attended(p, x):
    """Two heads of queries share one of keys and values."""
    q, k, v = ((x @ p[name]).reshape(5, -1, 3) for name in "qkv")
    q = q.reshape(5, 2, 2, 3)
    weights = jax.nn.softmax(jnp.einsum("tgrw,sgw->grts", q, k))
    return jnp.einsum("grts,sgw->tgrw", weights, v).reshape(5, 12) @ p["o"]


def fused(p, x):
    a, b = jnp.split(x @ p["w"], [6], axis=1)
    return jax.nn.sigmoid(a[:, :3]) @ p["u"] + jax.nn.relu(b) @ p["v"]


def residual(p, x):
    y = jax.nn.relu(x @ p["w0"])
    for name in ("1", "2"):
        y = y + jax.nn.relu(y @ p["a" + name]) @ p["b" + name]
    return y @ p["w3"]


def widened(p, x):
    """A shortcut that adds channels of zeros."""
    y = jax.nn.relu(x @ p["w1"])
    return jax.nn.relu(jnp.pad(y, ((0, 0), (1, 1))) + jnp.tanh(x) @ p["w2"]) @ p["w3"]


def scanned(p, x):
    def layer(x, w):
        return x + jax.nn.relu(x @ w["a"]) @ w["b"], None

    return lax.scan(layer, x, p["layers"])[0]


def recurrent(p, x):
    def step(h, x):
        return jax.nn.relu(x @ p["in"] + h @ p["w"]), None

    return lax.scan(step, jnp.zeros(6), x)[0] @ p["out"]


def looked_up(p, x):
    tokens = jnp.array([0, 2, 2, 1])
    return jax.nn.relu(jnp.take(p["table"], tokens, axis=0) + p["position"]) @ p["w"]


def scaled_weight(p, x):
    return jax.nn.relu(x @ (p["w1"] * 0.5)) @ (p["w2"] / 3).astype(jnp.float32)


def experts(p, x):
    sizes = jnp.array([2, 3])
    return lax.ragged_dot(jax.nn.relu(lax.ragged_dot(x, p["up"], sizes)), p["down"], sizes)


def masked(p, x):
    y = jnp.where(X > 0, x @ p["w1"], 0.0)
    return jnp.clip(y, 0) @ p["w2"] + jnp.cumsum(y, 0).max(0) @ p["w3"]


def learned_start(p, x):
    return jax.nn.relu(jnp.concatenate([p["token"][None], x @ p["w1"]])) @ p["w2"]


CASES = {
    relu_net: (dict(w1=(4, 6), b1=(6,), w2=(6, 3), b2=(3,)), X, [(6, "w1 b1", "w2")]),
    gated: (dict(gate=(4, 6), up=(4, 6), down=(3, 6)), X, [(6, "up", "down")]),
    convolved: (
        dict(w1=(3, 3, 3, 4), b1=(4,), deep=(3, 3, 1, 8), w2=(3, 3, 8, 2)),
        IMAGE,
        [(4, "w1 b1", "deep"), (8, "deep", "w2")],
    ),
    grouped: (dict(w1=(3, 3, 3, 4), w2=(3, 3, 2, 6)), IMAGE, [(4, "w1", "w2")]),
    flattened: (dict(w1=(3, 3, 3, 4), w2=(144, 5)), IMAGE, [(4, "w1", "w2")]),
    normed: (dict(gain=(4,), q=(4, 3), k=(4, 3)), X, [(4, "gain", "q k")]),
    batch_normed: (
        dict(w1=(4, 6), mean=(6,), var=(6,), gain=(6,), bias=(6,), w2=(6, 3)),
        X,
        [(6, "w1 mean", "gain"), (6, "gain bias", "w2")],
    ),
    attended: (dict(q=(4, 12), k=(4, 6), v=(4, 6), o=(12, 4)), X, [(6, "v", "o")]),
    fused: (dict(w=(4, 10), u=(3, 2), v=(4, 2)), X, [(4, "w", "v"), (3, "w", "")]),
    residual: (
        dict(w0=(4, 6), a1=(6, 7), b1=(7, 6), a2=(6, 7), b2=(7, 6), w3=(6, 2)),
        X,
        [(6, "w0 b1 b2", "a1 a2 w3"), (7, "a1", "b1"), (7, "a2", "b2")],
    ),
    widened: (dict(w1=(4, 6), w2=(4, 8), w3=(8, 2)), X, [(6, "w1 w2", "w3"), (2, "w2", "w3")]),
    recurrent: (dict([("in", (4, 6)), ("w", (6, 6)), ("out", (6, 2))]), X, [(6, "in w", "w out")]),
    looked_up: (dict(table=(3, 4), position=(4,), w=(4, 2)), X, [(4, "table position", "w")]),
    scaled_weight: (dict(w1=(4, 6), w2=(6, 3)), X, [(6, "w1", "w2")]),
    experts: (dict(up=(2, 4, 6), down=(2, 6, 3)), X, [(6, "up", "down")]),
    masked: (dict(w1=(4, 4), w2=(4, 2), w3=(4, 2)), X, [(4, "w1", "w2 w3")]),
    learned_start: (dict(token=(6,), w1=(4, 6), w2=(6, 3)), X, [(6, "w1 token", "w2")]),
}


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_factors(fn):
    shapes, x, wanted = CASES[fn]
    found = check(fn, draw(**shapes), x)
    assert sorted(told(found)) == sorted(wanted)


def test_scanned_layers():
    params = {"layers": draw(a=(3, 4, 6), b=(3, 6, 4))}
    found = check(scanned, params, X)
    assert told(found) == [(6, "layers/a", "layers/b")] * 3
    places = [use.places for group in found.groups for use in group.producers if use.path == "layers/a"]
    np.testing.assert_array_equal(places[:3], np.arange(72).reshape(3, 4, 6))


def test_a_use_may_multiply_the_weights():
    found = scaling(scaled_weight, draw(w1=(4, 6), w2=(6, 3)), X)
    assert [use.pure for use in found.uses] == [False, False]
    assert all(use.pure for use in scaling(relu_net, draw(**CASES[relu_net][0]), X).uses)


def test_signs():
    """What a relu has seen may not become negative; a gated product may."""
    for fn, signed in ((relu_net, True), (gated, False), (normed, False), (masked, True)):
        shapes, x, _ = CASES[fn]
        found = scaling(fn, draw(**shapes), x)
        assert {group.signed for group in found.groups if not group.reason} == {signed}, fn.__name__


# Where nothing may be scaled, and why

W = dict(w1=(4, 6), w2=(6, 3))
REFUSED = {
    "tanh": (lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], W, "tanh at .*test_scaling.py"),
    "clipped": (lambda p, x: jnp.clip(x @ p["w1"], 0, 6) @ p["w2"], W, "min at .*, with what cannot be scaled"),
    "a constant": (lambda p, x: (x @ p["w1"] + 1) @ p["w2"], W, "add at"),
    "squared": (lambda p, x: (x @ p["w1"]) ** 2 @ p["w2"], W, "(integer_pow|square) at"),
    "returned": (lambda p, x: ((h := jax.nn.relu(x @ p["w1"])), h @ p["w2"]), W, "the output of the function"),
    "two that vary": (lambda p, x: (x @ p["w1"]) @ (x[:4] @ p["w1"]).T, W, "dot_general at .*, of two that could"),
    "a norm": (lambda p, x: norm(x @ p["w1"]) @ p["w2"], W, "mul at .*, of two that could be scaled"),
    "used elsewhere": (
        lambda p, x: (jax.nn.relu(x @ p["w1"]) @ p["w2"], jnp.tanh(x @ p["w1"])),
        W,
        "tanh at|w1 is used at",
    ),
    "read": (lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"] * p["w1"].sum(), W, "of two|output"),
    "a loop": (
        lambda p, x: lax.fori_loop(0, jnp.int32(x[0, 0] > 0) + 1, lambda i, h: h + 1, x @ p["w1"]) @ p["w2"],
        W,
        "while at",
    ),
    "whole numbers": (
        lambda p, x: (x @ p["w1"]).astype(jnp.int32).astype(jnp.float32) @ p["w2"],
        W,
        "convert_element_type",
    ),
    "rows that there are not": (
        lambda p, x: jnp.take(x @ p["w1"], jnp.array([0, 9]), axis=0, mode="fill", fill_value=1.0) @ p["w2"],
        W,
        "gather at",
    ),
    "over zero": (lambda p, x: jnp.exp((x @ p["w1"] / 0.0) @ p["w2"]), W, "div at"),
    "sorted": (lambda p, x: jnp.sort(x @ p["w1"], 1) @ p["w2"], W, "sort at"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    fn, shapes, reason = REFUSED[name]
    found = scaling(fn, draw(**shapes), X)
    assert not [g for g in found.groups if not g.reason and g.producers and g.consumers]
    told = [g.reason for g in found.groups if any(u.path == "w1" and u.role == "product" for u in g.producers)]
    assert re.search(reason, told[0])


def test_tied_weights_have_one_factor():
    """A table that is read by rows and multiplied: rows are outputs, so nothing is left."""

    def fn(p, x):
        y = norm(jnp.take(p["table"], x, axis=0)) * p["gain"]
        return y @ p["table"].T

    found = scaling(fn, draw(table=(3, 4), gain=(4,)), np.array([0, 2]))
    (reason,) = {g.reason for g in found.groups if any(u.path == "gain" for u in g.producers) and g.consumers}
    assert not told(found) and re.fullmatch("table is used at gather at .*, dot_general at .*", reason)


def test_leaves_that_stay():
    found = scaling(relu_net, draw(**CASES[relu_net][0]), X, unchanged=["b1"])
    assert told(found) == [] and any("add at" in group.reason for group in found.groups)
    found = scaling(relu_net, draw(**CASES[relu_net][0]), X, stay={"b1": "b1 stays"})
    assert told(found) == [] and any(group.reason == "b1 stays" for group in found.groups)


def by_position(p, x):
    return jax.nn.relu(x @ p["w1"] + p["position"][: len(x)]) @ p["w2"]


def test_every_shape_is_looked_at():
    params, longer = draw(w1=(4, 6), position=(7, 6), w2=(6, 3)), np.ones((7, 4), np.float32)
    found = scaling(by_position, params, X)
    assert told(found) == [] and any("position is used in part, 30 of 42" in group.reason for group in found.groups)
    assert (6, "w1 position", "w2") in told(scaling(by_position, params, X, longer, X))

    def otherwise(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w2"] if len(x) > 5 else jax.nn.relu(x @ p["w1"]) @ p["w2"]

    assert told(scaling(otherwise, draw(**W), X)) and not told(scaling(otherwise, draw(**W), X, longer))


def test_windows_that_shift_channels_make_them_equal():
    def fn(p, x):
        y = lax.reduce_window(jax.nn.relu(x @ p["w1"]), 0.0, lax.add, (1, 1), (1, 1), ((0, 0), (1, -1)))
        return y @ p["w2"]

    assert told(check(fn, draw(**W), X)) == [(1, "w1", "w2")]


def test_nothing():
    """Arrays without elements, and loops without rounds."""

    def fn(p, x):
        y = lax.scan(lambda c, _: (c * 2, c), x @ p["w1"], None, length=0)[0]
        y = jax.nn.relu(jnp.concatenate([y, x @ p["none"]], 1))
        return y @ p["w2"] + p["bias"].sum(0) + (p["bias"].reshape(3, 0) * 2).sum()

    params = draw(w1=(4, 6), none=(4, 0), w2=(6, 3), bias=(0, 3))
    check(fn, params, X)


@pytest.mark.parametrize(
    "fn",
    [
        lambda p, x: (norm(x) * jnp.abs(p["gain"])) @ p["w"],
        lambda p, x: (norm(x) * p["gain"]) @ p["w"] * (jnp.argmax(p["gain"]) + 1),
        lambda p, x: (norm(x) * p["gain"]) @ p["w"] * jnp.sign(p["gain"]).sum(),
        lambda p, x: jnp.where(x[:, :1] > 0, norm(x) * p["gain"], jnp.inf) @ p["w"],
    ],
    ids=["abs", "argmax", "sign", "infinite"],
)
def test_gains_whose_sign_counts(fn):
    found = scaling(fn, draw(gain=(4,), w=(4, 3)), X)
    groups = [group for group in found.groups if not group.reason and group.producers]
    assert all(group.signed for group in groups) and (groups or fn.__name__)
