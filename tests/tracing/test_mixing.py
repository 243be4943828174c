"""Which channels may be mixed: each mixture that is found is tried out, each that is not has a reason."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.tracing.mixing import mixtures
from lcq.tree.paths import flatten

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 4)).astype(np.float32)


def draw(**shapes):
    return {name: RNG.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def check(fn, params, x, uniform=()):
    """Random orthogonal matrices for all cells leave the function as it is; what is mixed: (channels, paths)."""
    found = mixtures(fn, params, x, uniform=uniform)
    leaves, structure = flatten(params)
    arrays = {path: np.asarray(leaf, np.float64).copy() for path, leaf in leaves.items()}
    told = []
    for cell in found.cells:
        if cell.reason:
            continue
        q, _ = np.linalg.qr(RNG.normal(size=(len(cell.coordinates),) * 2))
        for use, block in found.blocks(cell):
            flat = arrays[use.path].reshape(-1)
            flat[block] = flat[block] @ q
        told.append((len(q), " ".join(dict.fromkeys(use.path for use in cell.uses))))
    other = jax.tree.unflatten(structure, [jnp.asarray(a, jnp.float32) for a in arrays.values()])
    run = jax.jit(fn)
    one, two = run(params, x), run(other, x)
    assert np.abs(one - two).max() <= 1e-5 * np.abs(one).max()
    assert not told or any(np.abs(a - b).max() > 0.01 for a, b in zip(arrays.values(), leaves.values(), strict=True))
    return sorted(told)


def norm(x):
    return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-3)


def plain(p, x):
    return (x @ p["a"] + p["b"]) @ p["c"].T


def stream(p, x):
    x = x @ p["in"]
    for name in "12":
        x = x + jnp.tanh(norm(x) @ p["a" + name]) @ p["b" + name] * 0.5
    return norm(x) @ p["out"]


def gained(p, x):
    return jnp.tanh((norm(x @ p["in"]) * p["gain"]) @ p["out"])


def attended(p, x):
    """Two heads of queries share one of keys and values."""
    q, k, v = ((x @ p[name]).reshape(5, -1, 3) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("tgrw,sgw->grts", jnp.tanh(q).reshape(5, 2, 2, 3), k))
    return jnp.einsum("grts,sgw->tgrw", weights, v).reshape(5, 12) @ p["o"]


def inner(p, x):
    """Queries and keys of two heads, with a bias."""
    q, k = ((x @ p[name] + p["bias"]).reshape(5, 2, 3) for name in "qk")
    return jax.nn.softmax(jnp.einsum("thw,shw->hts", q, k)).sum(0)


def kernels_of_heads(p, x):
    v = jnp.einsum("td,dhw->thw", x, p["v"])
    weights = jax.nn.softmax(jnp.stack([x @ x.T, x @ x.T / 2]))
    return jnp.einsum("hts,shw,hwd->td", weights, v, p["o"])


def fused(p, x):
    a, b = jnp.split(x @ p["w"], [2], axis=1)
    return a @ p["u"] + b @ p["v"]


def norm_of_groups(p, x):
    y = (x @ p["w"]).reshape(5, 2, 3)
    return norm(y).reshape(5, 6) @ p["u"]


def tied(p, x):
    tokens = (x[:, 0] > 0).astype(jnp.int32)
    return norm(p["table"][tokens]) @ p["table"].T


def scanned(p, x):
    def layer(x, w):
        return x + jnp.tanh(norm(x) @ w["a"]) @ w["b"], None

    return norm(lax.scan(layer, x @ p["in"], p["layers"])[0]) @ p["out"]


def with_positions(p, x):
    return norm(x @ p["in"] + p["table"] + p["place"]) @ p["out"]


def convolved(p, x):
    y = x.reshape(1, 5, 4, 1)
    for name in "ab":
        y = lax.conv_general_dilated(y, p[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y


def masked(p, x):
    y = jnp.where((x > 0).any(1, keepdims=True), x @ p["a"], 0.0)
    return (jnp.concatenate([y, jnp.zeros((5, 1))], 1) / (1 + jnp.abs(x[:, :1]))) @ p["c"]


def shared(p, x):
    """One matrix twice, with the same inputs and outputs."""
    y = x @ p["in"]
    return norm(y + jnp.tanh(norm(y) @ p["a"]) @ p["b"] + jnp.tanh(2 * norm(y) @ p["a"]) @ p["b"]) @ p["out"]


def from_the_stream_to_itself(p, x):
    x = x @ p["in"]
    return norm(x + norm(x) @ p["a"]) @ p["out"]


def used_in_parts(p, x):
    """Some columns of a matrix are used twice, and others in another order."""
    y = x @ p["a"]
    return jnp.concatenate([y @ p["c"], y @ p["c"][:, :2], y @ p["c"][:, ::2]], 1)


def bias_of_zeros(p, x):
    """Channels that are nothing but a bias have to be mixed like what is added to them."""
    y = jnp.concatenate([x @ p["a"], jnp.zeros((5, 3))], 1) + p["b"]
    return jnp.tanh((y + x @ p["d"]) @ p["c"])


CASES = {
    used_in_parts: (dict(a=(4, 6), c=(6, 4)), [(6, "a c")]),
    bias_of_zeros: (dict(a=(4, 3), b=(6,), d=(4, 6), c=(6, 3)), [(3, "a b d c"), (3, "b d c")]),
    from_the_stream_to_itself: (dict(a=(6, 6), out=(6, 3)) | {"in": (4, 6)}, [(6, "in a out")]),
    plain: (dict(a=(4, 6), b=(6,), c=(3, 6)), [(6, "a b c")]),
    stream: (
        dict(a1=(6, 7), b1=(7, 6), a2=(6, 7), b2=(7, 6), out=(6, 3)) | {"in": (4, 6)},
        [(6, "in a1 b1 a2 b2 out")],
    ),
    attended: (dict(q=(4, 12), k=(4, 6), v=(4, 6), o=(12, 4)), [(3, "v o"), (3, "v o")]),
    inner: (dict(q=(4, 6), k=(4, 6), bias=(6,)), [(3, "q bias k"), (3, "q bias k")]),
    kernels_of_heads: (dict(v=(4, 2, 3), o=(2, 3, 4)), [(3, "v o"), (3, "v o")]),
    fused: (dict(w=(4, 5), u=(2, 3), v=(3, 3)), [(2, "w u"), (3, "w v")]),
    norm_of_groups: (dict(w=(4, 6), u=(6, 2)), [(3, "w u"), (3, "w u")]),
    tied: (dict(table=(3, 6)), [(6, "table")]),
    with_positions: (dict(table=(5, 6), place=(6,), out=(6, 3)) | {"in": (4, 6)}, [(6, "in table place out")]),
    convolved: (dict(a=(3, 3, 1, 4), b=(3, 3, 4, 2)), [(4, "a b")]),
    masked: (dict(a=(4, 3), c=(4, 2)), [(3, "a c")]),
    shared: (dict(a=(6, 7), b=(7, 6), out=(6, 3)) | {"in": (4, 6)}, [(6, "in a b out")]),
}


@pytest.mark.parametrize("fn", CASES, ids=lambda fn: fn.__name__)
def test_mixtures(fn):
    shapes, wanted = CASES[fn]
    assert check(fn, draw(**shapes), X) == wanted


def test_scanned_layers():
    params = {"layers": draw(a=(3, 6, 7), b=(3, 7, 6)), **draw(**{"in": (4, 6), "out": (6, 3)})}
    assert check(scanned, params, X) == [(6, "in layers/a layers/b out")]


def test_a_gain_that_is_uniform_mixes():
    params = draw(**{"in": (4, 6), "gain": (6,), "out": (6, 3)})
    assert check(gained, params, X) == []
    assert check(gained, {**params, "gain": np.full(6, 2, np.float32)}, X, uniform=["gain"]) == [(6, "in out")]


# Where nothing may be mixed, and why

W = dict(w1=(4, 6), w2=(6, 3))
REFUSED = {
    "relu": (lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], "max at .*test_mixing.py"),
    "a constant": (lambda p, x: (x @ p["w1"] + 1) @ p["w2"], "add at .*, with what cannot be mixed"),
    "a weight for each": (lambda p, x: (x @ p["w1"] * jnp.arange(6)) @ p["w2"], "mul at"),
    "running sums of a constant": (lambda p, x: (x @ p["w1"] * jnp.cumsum(jnp.ones(6))) @ p["w2"], "mul at"),
    "a mask": (lambda p, x: jnp.where(jnp.arange(6) > 2, x @ p["w1"], 0) @ p["w2"], "select_n at"),
    "a mean": (lambda p, x: ((y := x @ p["w1"]) - y.mean(1, keepdims=True)) @ p["w2"], "reduce_sum at"),
    "a sum of some": (lambda p, x: norm(x @ p["w1"])[:, :1] + (x @ p["w1"])[:, 1:2], "output"),
    "cubes": (lambda p, x: ((y := x @ p["w1"]) * y * y).sum(1), "mul at"),
    "halves": (
        lambda p, x: (y := x @ p["w1"])[:, :3] @ p["w2"][:3] + y[:, 3:] ** 2 @ p["w2"][3:],
        "(dot_general|square) at",
    ),
    "largest": (lambda p, x: (x @ p["w1"]).max(1), "reduce_max at"),
    "whole": (lambda p, x: (x @ p["w1"]).astype(jnp.int32) @ jnp.ones((6, 1), jnp.int32), "convert_element_type at"),
    "read": (lambda p, x: (x @ p["w1"]) @ p["w2"] + jnp.tanh(p["w2"]).sum(), "w2 is used at"),
    "another layout": (lambda p, x: jnp.tanh(x @ p["w1"] @ p["w2"] @ p["w2"].T), "w2 is used at|tanh"),
    "reversed": (
        lambda p, x: (y := x @ p["w1"]) @ p["w2"] + y[:, ::-1] @ p["w2"] + (y + y[:, ::-1]).max(),
        "reduce_max",
    ),
    "rows that there are not": (
        lambda p, x: jnp.take(x @ p["w1"], jnp.array([0, 9]), axis=0, mode="fill", fill_value=1.0) @ p["w2"],
        "gather at",
    ),
    "infinite rows": (
        lambda p, x: jnp.nan_to_num(jnp.where(x[:, :1] > 0, x @ p["w1"], -jnp.inf) @ p["w2"], posinf=0, neginf=0),
        "select_n at",
    ),
    "over zero": (lambda p, x: jnp.tanh(x @ p["w1"] / 0.0) @ p["w2"], "div at"),
    "scaled": (lambda p, x: (x @ p["w1"]) @ (p["w2"] * jnp.arange(6)[:, None]), "mul at|dot_general at"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    fn, reason = REFUSED[name]
    params = draw(**W)
    mixed = check(fn, params, X)
    assert not [told for told in mixed if told[0] == 6]
    cells = mixtures(fn, params, X).cells
    assert any(re.search(reason, cell.reason) for cell in cells if any(use.path == "w1" for use in cell.uses))


def test_a_reversed_sum_keeps_the_pairs():
    def fn(p, x):
        y = x @ p["w1"]
        return (y + y[:, ::-1]) @ p["w2"]

    check(fn, draw(**W), X)


def test_leaves_that_stay():
    found = mixtures(plain, draw(**CASES[plain][0]), X, unchanged=["b"])
    assert all(cell.reason for cell in found.cells)
    found = mixtures(plain, draw(**CASES[plain][0]), X, stay={"b": "b stays"})
    assert any(cell.reason == "b stays" for cell in found.cells) and all(cell.reason for cell in found.cells)


def test_every_shape_is_looked_at():
    def fn(p, x):
        return norm(x @ p["in"] + p["place"][: len(x)]) @ p["out"]

    params, longer = draw(**{"in": (4, 6), "place": (7, 6), "out": (6, 3)}), np.ones((7, 4), np.float32)
    (reason,) = {cell.reason for cell in mixtures(fn, params, X).cells if len(cell.uses) > 1}
    assert reason.startswith("place is used in part, 30 of 42 elements")
    (cell,) = (cell for cell in mixtures(fn, params, X, longer).cells if not cell.reason)
    assert len(cell.coordinates) == 6
