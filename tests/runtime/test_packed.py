"""Functions on forms: fn(decompress(forms), ...) is what packed(fn)(forms, ...) must compute, and the report says how.

The door of the kernels is replaced by one that multiplies with the dense array and counts, so that what is tested here
is which products come to it, with which form of which shape. That a dense fallback does not pass for a product is seen
by comparing the report and the count with what is expected of each case.
"""

import functools
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax import lax

import lcq
import lcq.runtime.uses
from lcq.forms import Codes, Factors, Sparse, Sum
from lcq.forms.base import is_form
from lcq.forms.columns import Columns
from lcq.forms.ell import Ell
from lcq.forms.prepacked import Prepacked
from lcq.runtime.packed import packed
from lcq.tree.paths import flatten

RNG = np.random.default_rng(0)
CODED = {"kernel", "embedding", "w", "u", "v", "a", "b"}


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def code(w, stacked=0):
    """A form of w's shape with three levels, in each of the stacked layers."""
    blocks = (*w.shape[:stacked], *(1,) * (w.ndim - stacked), 1)
    levels = np.array([-1.5, 0.25, 1], np.float32) * RNG.uniform(0.5, 1, blocks).astype(np.float32)
    return Codes(jnp.asarray(RNG.integers(0, 3, w.shape), jnp.uint8), levels=jnp.asarray(levels))


def coded(params, stacked=0):
    """Forms in place of the leaves whose last name says so."""
    leaves, structure = flatten(params)
    new = [code(leaf, stacked) if path.split("/")[-1] in CODED else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(structure, new)


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """Convolutions of any size on patches of their images, so that small ones show that they are right."""
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 1 << 30)


@pytest.fixture
def door(monkeypatch):
    """Stands in for the door: (x's shape, x's dtype) of every product."""
    seen = []

    def matmul(x, form, *, kernel=None):
        assert isinstance(form, lcq.forms.Form) and x.shape[-1] == form.shape[-2], (x.shape, form.shape)
        assert x.shape[:-2] == form.shape[:-2]
        seen.append((x.shape, x.dtype))
        return jnp.matmul(x, form.dense())

    monkeypatch.setattr(lcq.runtime.uses, "matmul", matmul)
    return seen


def close(got, wanted, tolerance=1e-5):
    """Equal trees, dtypes and, up to the order of sums, numbers."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.nanmax(np.abs(b), initial=0)))


def stored(forms):
    return jax.tree.map(lambda f: f.pack() if is_form(f) else f, forms, is_leaf=is_form)


# Functions and what is expected of them


def dense_net(p, x):
    return jax.nn.relu(x @ p["in"]["w"] + p["in"]["bias"]) @ p["out"]["w"]


def left_operand(p, x):
    return jax.vmap(lambda x: p["w"] @ x + p["bias"])(x)


def lora(p, x):
    return x @ p["kernel"] + (x @ p["a"]) @ p["b"]


def weight_norm(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"])


def tied(p, tokens):
    x = jnp.take(p["embedding"], tokens, axis=0)
    return jnp.tanh(x) @ p["embedding"].T


def split_heads(p, x):
    q, k, v = jnp.split(x @ p["u"], 3, axis=-1)
    scores = jnp.einsum("bqd,bkd->bqk", q, k)
    left, right = jnp.split(p["w"], [2], axis=0)
    return (scores @ v)[..., :2] @ left + (scores @ v)[..., 2:] @ right


def experts(p, x):
    return jnp.einsum("gmn,gno->gmo", jax.nn.relu(jnp.einsum("mk,gkn->gmn", x, p["w"])), p["u"])


def block(p, x):
    y = x + jax.nn.gelu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    return y / jnp.sqrt((y**2).mean(-1, keepdims=True))


def layers_in_scan(p, x):
    return lax.scan(lambda x, q: (block(q, x), x.sum()), x, p["layers"], reverse=True)


def layers_by_number(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def layers_by_slices(p, x):
    return jnp.tanh(x @ p["w"][0]) @ p["w"][2].T


def stack_of_stacks(p, x):
    def inner(x, w):
        return jnp.tanh(x @ w), None

    return lax.scan(lambda x, w: lax.scan(inner, x, w), x, p["w"])[0]


def in_a_cond(p, x):
    return lax.cond(x[0, 0] > 0, lambda x: x @ p["w"], lambda x: x @ p["u"].T + 1, x)


def in_a_while(p, x):
    limit = (x[:1] @ p["u"]).sum()
    return lax.while_loop(
        lambda c: (c[0] < 3) & ((c[1][:1] @ p["u"]).sum() < limit + 99), lambda c: (c[0] + 1, c[1] @ p["w"]), (0, x)
    )


def remat(p, x):
    return jax.checkpoint(lambda w, x: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable)(p["w"], x)


def half(p, x):
    return jax.nn.gelu(x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)) * 2


def wide_sum(p, x):
    half = x.astype(jnp.bfloat16), p["w"].astype(jnp.bfloat16)
    return lax.dot_general(*half, (((1,), (0,)), ((), ())), precision="highest", preferred_element_type=jnp.float32)


def widened(p, x):
    return x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)


def moved(p, x):
    w = lax.stop_gradient(lax.rev(p["w"].reshape(2, 2, 6).transpose(2, 1, 0), (2,)))
    return jnp.einsum("bij,oji->bo", x.reshape(5, 2, 2), w)


def both(p, x):
    return x @ (p["a"] @ p["b"])


def jitted(p, x):
    layer = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return layer(p["w"], layer(p["w"], x))


def outer_product(p, x):
    return jnp.tensordot(x[:, 0], p["v"], 0) + jnp.broadcast_to(p["v"], (5, 6))


def lookups(p, ids):
    e = p["embedding"]
    found = [e[ids], jnp.take(e, ids, axis=0), e.at[ids].get(mode="clip"), e.at[ids].get(mode="fill", fill_value=7)]
    return found, e[ids[0, 0]], jnp.take(e, ids, axis=1), e.astype(jnp.bfloat16)[ids]


def convolution(p, x, **settings):
    settings = {"window_strides": (2, 1), "padding": [(1, 0), (0, 2)]} | settings
    return lax.conv_general_dilated(x, p["kernel"], **settings, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def other_layout(p, x):
    return lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "CNHW"))


def transposed(p, x):
    return lax.conv_transpose(
        x, p["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )


def linen(module, *args):
    """Variables, positive as a variance is and drawn by numpy, so that nothing is compiled; and the module's apply."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), *args)
    return jax.tree.map(lambda leaf: abs(normal(*leaf.shape)), shapes), module.apply


def attention(p, x):
    return nn.MultiHeadDotProductAttention(num_heads=2).apply(p, x)


def recurrent(p, x):
    cell = nn.GRUCell(4)
    carry = jnp.zeros((5, 4))
    return lax.scan(lambda c, x: cell.apply(p, c, x), carry, x)


def concatenated(p, x):
    cell = nn.OptimizedLSTMCell(4)
    return cell.apply(p, (jnp.zeros((5, 4)), jnp.ones((5, 4))), x)


class Residual(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=True)(y)
        return nn.Dense(3)(jax.nn.relu(x + y).mean((1, 2)))


class Embedder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 4, dtype=jnp.bfloat16)
        return embed.attend(embed(ids))


GRAPH, STATE = nnx.split(nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
X, IMAGE, IDS = normal(5, 4), normal(2, 6, 5, 4), jnp.array([[1, 9], [-1, 0]])
HEADS = linen(nn.MultiHeadDotProductAttention(num_heads=2), normal(2, 3, 4))[0]
GRU = linen(nn.GRUCell(4), jnp.zeros((5, 4)), X)[0]
LSTM = linen(nn.OptimizedLSTMCell(4), (jnp.zeros((5, 4)),) * 2, X)[0]


def products(**shapes):
    return [(path.replace("__", "/"), "product", shape) for path, shape in shapes.items()]


LAYERS = {"layers": {"up": {"kernel": normal(3, 4, 8)}, "down": {"kernel": normal(3, 8, 4)}}}

CASES = {  # fn, params, arguments, rules, uses
    "net": (
        dense_net,
        {"in": {"w": normal(4, 6), "bias": normal(6)}, "out": {"w": normal(6, 3)}},
        (X,),
        0,
        products(in__w=(1, 5, 4, 6), out__w=(1, 5, 6, 3)),
    ),
    "left operand": (left_operand, {"w": normal(6, 4), "bias": normal(6)}, (X,), 0, products(w=(1, 5, 4, 6))),
    "linen": (*linen(Residual(), IMAGE)[::-1], (IMAGE,), 0, None),
    "linen embedding": (*linen(Embedder(), IDS)[::-1], (IDS,), 0, None),
    "nnx": (lambda s, x: nnx.merge(GRAPH, s)(x), STATE, (X,), 0, products(kernel=(1, 5, 4, 6))),
    "attention": (
        attention,
        HEADS,
        (normal(2, 3, 4),),
        0,
        [(f"params/{name}/kernel", "product", (1, 6, 4, 4)) for name in ("query", "key", "value", "out")],
    ),
    "recurrent": (
        recurrent,
        GRU,
        (normal(6, 5, 4),),
        0,
        [(f"params/{name}/kernel", "decoded", (4, 4)) for name in ("ir", "hr", "iz", "hz", "in", "hn")],
    ),
    "concatenated": (
        concatenated,
        LSTM,
        (X,),
        0,
        [(f"params/{side}{gate}/kernel", "product", (1, 5, 4, 4)) for side in "hi" for gate in "ifgo"],
    ),
    "lora": (
        lora,
        {"kernel": normal(4, 6), "a": normal(4, 2), "b": normal(2, 6)},
        (X,),
        0,
        products(kernel=(1, 5, 4, 6), a=(1, 5, 4, 2), b=(1, 5, 2, 6)),
    ),
    "weight norm": (
        weight_norm,
        {"w": normal(4, 6), "g": normal(6)},
        (X,),
        0,
        [("w", "dense", (4, 6))] * 3,
    ),
    "tied": (
        tied,
        {"embedding": normal(7, 4)},
        (IDS % 7,),
        0,
        [("embedding", "rows", (2, 2, 4)), ("embedding", "product", (1, 4, 4, 7))],
    ),
    "slices": (
        split_heads,
        {"u": normal(4, 12), "w": normal(4, 3)},
        (normal(2, 3, 4),),
        0,
        [("u", "product", (1, 6, 4, 12)), ("w", "product", (1, 6, 2, 3)), ("w", "product", (1, 6, 2, 3))],
    ),
    "experts": (
        experts,
        {"w": normal(3, 4, 6), "u": normal(3, 6, 2)},
        (X,),
        0,
        [("w", "product", (1, 5, 4, 18)), ("u", "product", (3, 5, 6, 2))],
    ),
    "scan": (
        layers_in_scan,
        LAYERS,
        (X,),
        1,
        [("layers/up/kernel", "product", (1, 5, 4, 8)), ("layers/down/kernel", "product", (1, 5, 8, 4))],
    ),
    "scan, one codebook": (
        layers_in_scan,
        LAYERS,
        (X,),
        0,
        [("layers/up/kernel", "product", (1, 5, 4, 8)), ("layers/down/kernel", "product", (1, 5, 8, 4))],
    ),
    "by number": (layers_by_number, {"w": normal(3, 4, 4)}, (X,), 1, products(w=(1, 5, 4, 4))),
    "by slices": (layers_by_slices, {"w": normal(3, 4, 4)}, (X,), 1, products(w=(1, 5, 4, 4)) * 2),
    "stack of stacks": (
        stack_of_stacks,
        {"w": normal(2, 3, 4, 4)},
        (X,),
        2,
        products(w=(1, 5, 4, 4)),
    ),
    "cond": (
        in_a_cond,
        {"w": normal(4, 6), "u": normal(6, 4)},
        (X,),
        0,
        products(u=(1, 5, 4, 6), w=(1, 5, 4, 6)),
    ),
    "while": (
        in_a_while,
        {"w": normal(4, 4), "u": normal(4, 2)},
        (X,),
        0,
        [*products(u=(1, 1, 4, 2)), ("u", "decoded", (4, 2)), ("w", "decoded", (4, 4))],
    ),
    "remat": (remat, {"w": normal(4, 6)}, (X,), 0, products(w=(1, 5, 4, 6))),
    "bfloat16": (half, {"w": normal(4, 6)}, (X,), 0, products(w=(1, 5, 4, 6))),
    "bfloat16 with a wide sum": (wide_sum, {"w": normal(4, 6)}, (X,), 0, products(w=(1, 5, 4, 6))),
    "bfloat16, widened": (widened, {"w": normal(4, 6)}, (X,), 0, products(w=(1, 5, 4, 6))),
    "moved": (moved, {"w": normal(4, 6)}, (X,), 0, products(w=(1, 5, 4, 6))),
    "two forms": (
        both,
        {"a": normal(4, 2), "b": normal(2, 6)},
        (X,),
        0,
        [("b", "product", (1, 4, 2, 6)), ("a", "dense", (4, 2))],
    ),
    "jitted twice": (jitted, {"w": normal(4, 4)}, (X,), 0, products(w=(1, 5, 4, 4)) * 2),
    "outer product": (outer_product, {"v": normal(6)}, (X,), 0, [("v", "dense", (6,))] * 2),
    "lookups": (
        lookups,
        {"embedding": normal(7, 4)},
        (IDS,),
        0,
        [("embedding", "rows", (2, 2, 4))] * 4
        + [("embedding", "dense", (7, 4)), ("embedding", "rows", (2, 2, 4)), ("embedding", "dense", (4,))],
    ),
    "experts looked up": (
        lambda p, x, ids: jnp.einsum("bk,bkn->bn", x, p["w"][ids]),
        {"w": normal(3, 4, 6)},
        (X, jnp.array([0, 2, 1, 1, 2])),
        1,
        [("w", "rows", (5, 4, 6))],
    ),
    "convolution": (
        convolution,
        {"kernel": normal(3, 2, 4, 6)},
        (IMAGE,),
        0,
        products(kernel=(1, 36, 24, 6)),
    ),
    "grouped": (
        functools.partial(convolution, feature_group_count=2),
        {"kernel": normal(3, 2, 2, 6)},
        (IMAGE,),
        0,
        products(kernel=(2, 36, 12, 3)),
    ),
    "dilated": (
        functools.partial(convolution, rhs_dilation=(1, 2), lhs_dilation=(2, 1)),
        {"kernel": normal(2, 2, 4, 6)},
        (IMAGE,),
        0,
        products(kernel=(1, 60, 16, 6)),
    ),
    "pointwise": (
        functools.partial(convolution, window_strides=(1, 1), padding="VALID"),
        {"kernel": normal(1, 1, 4, 6)},
        (IMAGE,),
        0,
        products(kernel=(1, 60, 4, 6)),
    ),
    "other layout": (other_layout, {"kernel": normal(3, 6, 2, 2)}, (IMAGE,), 0, products(kernel=(1, 40, 24, 3))),
    "transposed": (transposed, {"kernel": normal(3, 3, 6, 4)}, (IMAGE,), 0, products(kernel=(1, 240, 36, 6))),
    "image": (
        lambda p, x: lax.conv(p["kernel"], x[:1, :2, :2], (1, 1), "SAME"),
        {"kernel": normal(2, 2, 3, 3)},
        (IMAGE,),
        0,
        [("kernel", "dense", (2, 2, 3, 3))],
    ),
    "returned": (
        lambda p, x: (p["w"], p["w"].T, x @ p["w"]),
        {"w": normal(4, 6)},
        (X,),
        0,
        [*products(w=(1, 5, 4, 6)), ("w", "dense", (4, 6)), ("w", "dense", (6, 4))],
    ),
    "numbers and keys": (
        lambda p, x, key, by, n: jnp.where(jax.random.bernoulli(key, shape=x.shape), x, 0) @ p["w"] * by + n,
        {"w": normal(4, 6), "unused": normal(3), "a": normal(3)},
        (X.astype(jnp.bfloat16), jax.random.key(1), 2.0, 3),
        0,
        products(w=(1, 5, 4, 6)),
    ),
}
EXPECTED = {
    "linen": [("params/Conv_0/kernel", "product", (1, 60, 36, 4)), ("params/Dense_0/kernel", "product", (1, 2, 4, 3))],
    "linen embedding": [
        ("params/Embed_0/embedding", "rows", (2, 2, 4)),
        ("params/Embed_0/embedding", "product", (1, 4, 4, 7)),
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_function_of_dense_arrays(case, door):
    fn, params, args, stacked, expected = CASES[case]
    expected = EXPECTED.get(case, expected)
    forms = coded(params, stacked)
    report = packed(fn).report(forms, *args)
    assert [use[:3] for use in report] == expected
    assert all(use.source == "output" or ".py:" in use.source for use in report), report
    shapes = [shape for _, how, shape in expected if how == "product"]
    assert {x for x, _ in door} == {(g, m, k) if g > 1 else (m, k) for g, m, k, _ in shapes}
    if case == "bfloat16 with a wide sum":
        assert {dtype for _, dtype in door} == {jnp.dtype("float32")}
    got, wanted = jax.jit(lambda *args: (packed(fn)(*args), fn(lcq.decompress(args[0]), *args[1:])))(forms, *args)
    close(got, wanted, 2e-2 if case in ("bfloat16", "linen embedding", "numbers and keys") else 1e-5)


# Forms of all kinds, of both layouts, through the door as it is

W = normal(8, 6)


MANY = jnp.asarray(RNG.integers(0, 16, (8, 6)), jnp.uint8)
KINDS = {
    "codes in groups": Codes(MANY, scale=normal(4, 6), zero=normal(4, 6), values=tuple(range(16))),
    "factors": Factors(normal(8, 2), right=normal(2, 6), tail=(8, 6)),
    "sum": Sum((code(W), Sparse(MANY < 6, normal(8, 6)))),
    "prepacked": code(W).prepack(),
    "lists": Sparse(jnp.asarray(np.arange(48).reshape(8, 6) % 5 == 0), W).prepack(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_form(kind):
    """As left operand, in rows, in columns of its transpose, looked up; only what is prepacked cannot be cut."""

    def fn(w, x, ids):
        parts = [w.T @ jnp.tile(x, 2).T, x @ w[:4], x @ w[:, 2:].T[:, 4:].T]
        return parts, jnp.take(w, ids, axis=0), (x[:, :2] @ jnp.tanh(w)[6:])

    form, args = KINDS[kind], (X, jnp.array([0, 7, 9]))
    ready = isinstance(form, Prepacked)
    forms = (form, form if ready else form.pack())
    got, wanted = jax.jit(lambda forms, *args: ([packed(fn)(f, *args) for f in forms], fn(form.dense(), *args)))(
        forms, *args
    )
    for each, report in zip(got, [packed(fn).report(f, *args) for f in forms], strict=True):
        close(each, wanted)
        assert [use.how for use in report].count("dense") == (4 if ready else 1), report


@pytest.mark.parametrize("case", ["net", "scan", "tied", "slices", "convolution", "grouped"])
def test_stored_forms_through_the_door_as_it_is(case):
    fn, params, args, stacked, expected = CASES[case]
    forms = coded(params, stacked)
    words = stored(forms)
    assert [use[:3] for use in packed(fn).report(words, *args)] == EXPECTED.get(case, expected)
    got, wanted = jax.jit(lambda *args: (packed(fn)(*args), fn(lcq.decompress(forms), *args[1:])))(words, *args)
    close(got, wanted)


@pytest.mark.parametrize("case", ["convolution", "grouped", "pointwise"])
def test_the_kernel_of_a_convolution_at_many_places_is_decoded(case, monkeypatch):
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 2)
    fn, params, args, stacked, expected = CASES[case]
    forms = coded(params, stacked)
    report = packed(fn).report(forms, *args)
    decoded = [("kernel", "decoded", params["kernel"].shape)]
    assert [use[:3] for use in report] == (expected if case == "pointwise" else decoded)
    close(jax.jit(packed(fn))(forms, *args), fn(lcq.decompress(forms), *args))


HEADS_RULES = {
    "channel": ("channel", "channel"),
    "groups of inputs": ((4, 0, 1), 2),
    "groups for each head": ((4, 1, 1), (0, 2, 1)),
    "heads": ((1, 0), (1, 0, 0)),
    "one": (None, None),
}
HEADS_PRODUCTS = {  # x [2, 3, 8] and w [8, 2, 4]; o [2, 4, 8] back
    "all axes": ("bti,ihd->bthd", "bthd,hdo->bto"),
    "heads first": ("bti,ihd->bhtd", "bhtd,hdo->bto"),
    "units first": ("bti,ihd->bdht", "bdht,hdo->obt"),
}


@pytest.mark.parametrize("rule", HEADS_RULES)
@pytest.mark.parametrize("product", HEADS_PRODUCTS)
def test_heads_of_attention_run_on_codes(rule, product):
    """Kernels [inputs, heads, units] and [heads, units, outputs] whose scales are those of channels, groups, heads."""
    into, back = HEADS_PRODUCTS[product]

    def fn(p, x):
        return jnp.einsum(back, jnp.tanh(jnp.einsum(into, x, p["w"])), p["o"])

    w, o = (
        lcq.Uniform(4, per=per, zero_point=True).project(normal(*shape))
        for per, shape in zip(HEADS_RULES[rule], ((8, 2, 4), (2, 4, 8)), strict=True)
    )
    forms, x, net = {"w": w, "o": o.pack()}, normal(2, 3, 8), packed(fn)
    assert [use[:3] for use in net.report(forms, x)] == products(w=(1, 6, 8, 8), o=(1, 6, 8, 8))
    ready = net.prepack(forms, x)
    assert all(isinstance(form, Columns) for form in ready.values())
    both = jax.jit(lambda f, r, x: (net(f, x), net(r, x), fn(lcq.decompress(f), x)))(forms, ready, x)
    close(both[0], both[2])
    close(both[1], both[2])


@pytest.mark.parametrize("per", ["channel", (4, 1, 1), (4, 0, 1)])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_attention_of_flax_runs_on_codes(kind, per):
    x = normal(2, 3, 8)
    if kind == "linen":
        params, fn = linen(nn.MultiHeadDotProductAttention(num_heads=2), x)
    else:
        graph, params = nnx.split(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)))

        def fn(p, x):
            return nnx.merge(graph, p)(x)

    kernels = [lcq.Rule("(.*/)?out/kernel", lcq.Uniform(4, per="channel" if per == "channel" else 2))]
    forms = lcq.compress(params, [*kernels, lcq.Rule("(.*/)?kernel", lcq.Uniform(4, per=per))])
    report = packed(fn).report(forms, x)
    assert len(report) == 4 and {use.how for use in report} == {"product"}, report
    close(packed(fn)(forms, x), fn(lcq.decompress(forms), x), 1e-4)


LAID_OUT = {  # how many leaves: slices of one are products of their own, and groups are no columns of the leaf
    "net": 2,
    "left operand": 1,
    "scan": 2,
    "tied": 1,
    "slices": 1,
    "convolution": 1,
    "grouped": 0,
    "experts": 2,
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_codes_are_prepacked_once(case):
    fn, params, args, stacked, _ = CASES[case]
    forms, net = coded(params, stacked), packed(fn)
    ready = net.prepack(stored(forms), *args)
    assert net.report(ready, *args) == net.report(forms, *args)
    assert sum(isinstance(f, Columns) for f in jax.tree.leaves(ready, is_leaf=is_form)) == LAID_OUT[case]
    got, wanted = jax.jit(lambda *args: (net(*args), fn(lcq.decompress(forms), *args[1:])))(ready, *args)
    close(got, wanted)
    close(lcq.decompress(ready), lcq.decompress(forms))


def test_codes_of_a_sum_are_prepacked_and_those_of_another_use_are_not():
    forms, x = {"w": KINDS["sum"], "v": code(W)}, jnp.tile(X, 2)
    ready = packed(lambda p, x: x @ p["w"] + jnp.tanh(p["v"])[0] + x @ p["v"]).prepack(forms, x)
    assert [type(part).__name__ for part in ready["w"].parts] == ["Columns", "Sparse"]  # its columns are not short
    assert ready["v"] is forms["v"]


def test_few_weights_are_prepacked_and_no_dense_array_of_them_is_made():
    w, x = normal(512, 384), normal(2, 512)
    forms = {"w": lcq.Prune(kept=0.05, values=lcq.KMeans(4)).project(w).pack()}
    net = packed(lambda p, x: x @ p["w"])
    ready = net.prepack(forms, x)
    assert isinstance(ready["w"], Ell) and ready["w"].places.dtype == jnp.uint16
    assert ready["w"].bits < 8 * w.nbytes / 4
    for rows in (x, jnp.tile(x, (32, 1))):
        close(jax.jit(net)(ready, rows), rows @ lcq.decompress(forms)["w"])
        memory = jax.jit(net).lower(ready, rows).compile().memory_analysis()
        assert memory.temp_size_in_bytes < w.nbytes / 2 + 2 * len(rows) * 384 * 4
    traced = jax.jit(lambda forms: net.prepack(forms, x)["w"])(forms)
    assert type(traced).__name__ == "Sparse"


# No dense array


def arrays_of(jaxpr):
    """Every variable of a jaxpr and those inside."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from arrays_of(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("case", ["net", "scan", "by number", "cond", "while", "remat", "convolution", "grouped"])
def test_no_dense_array_and_no_constant(case, monkeypatch):
    """With a door that decodes nothing no array of floats is as large as a weight; and forms are no constants.

    With no room for what loops would hold; that they hold it, and how much, see `test_loops`.
    """
    fn, params, args, stacked, _ = CASES[case]
    small = [a[:1] if a.ndim > 1 else a for a in args]
    monkeypatch.setattr(lcq.runtime.uses, "matmul", lambda x, form: jnp.zeros((*x.shape[:-1], form.shape[-1])))
    forms = coded(params, stacked)
    for each in (forms, stored(forms)):
        closed = jax.make_jaxpr(packed(fn, held=0))(each, *small)
        weights = {f.shape[s:] for f in jax.tree.leaves(forms, is_leaf=is_form) if is_form(f) for s in (0, stacked)}
        wide = {a.shape for a in arrays_of(closed.jaxpr) if jnp.issubdtype(a.dtype, jnp.floating)}
        assert not weights & wide, weights & wide
        assert sum(np.size(c) for c in closed.consts) <= 8


def test_memory_of_a_scan_over_layers():
    """All 8 layers dense are 8 MiB, of one of them 1 MiB is made at a time."""

    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def temporary(fn, *args):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20

    form, x = code(jnp.zeros((8, 512, 512)), 1), jnp.zeros((16, 512))
    assert temporary(lambda f, x: fn(f.dense(), x), form, x) > 7
    for each in (form, form.pack()):
        assert temporary(packed(fn), each, x) < 2.5
        assert temporary(packed(lambda w, x: fn(w * 2, x)), each, x) > 7  # dense before the scan


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA for CPUs ignores optimization_barrier")
def test_memory_of_dense_uses():
    """Of 8 weights that have to be dense one is made at a time."""

    def fn(p, x):
        for w in p:
            x = jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0)))
        return x

    forms, x = [code(jnp.zeros((512, 512))) for _ in range(8)], jnp.zeros((16, 512))
    assert jax.jit(packed(fn)).lower(forms, x).compile().memory_analysis().temp_size_in_bytes < 2.5 * 2**20


# Transformations


def test_jit_traces_once():
    net = jax.jit(packed(chex.assert_max_traces(lambda p, x: x @ p["w"], 1)))
    for seed in range(3):
        net({"w": code(W)}, normal(5, 8) + seed)
    assert net._cache_size() == 1


def test_vmap_over_inputs_and_over_forms():
    """Of a product through the door, rows that are looked up, and a weight that has to be dense."""

    def fn(p, x, ids):
        return x @ p["w"] @ weight_norm({"w": p["u"], "g": 1}, p["b"][ids])

    one = {"w": normal(4, 6), "u": normal(4, 3), "b": normal(6, 4)}
    xs, ids = normal(3, 5, 4), jnp.array([0, 3, 5, 5, 1, 2])
    forms, ensemble = coded(one), coded(jax.tree.map(lambda a: jnp.stack([a] * 3), one), 1)

    def each(fn, forms, ensemble):
        return jax.vmap(fn, (None, 0, None))(forms, xs, ids), jax.vmap(fn, (0, 0, None))(ensemble, xs, ids)

    got, wanted = jax.jit(lambda *f: (each(packed(fn), *f), each(fn, *lcq.decompress(f))))(forms, ensemble)
    close(got, wanted)


@pytest.mark.parametrize("case", ["net", "scan", "remat", "grouped"])
def test_gradients_with_respect_to_inputs(case, door):
    fn, params, (x,), stacked, _ = CASES[case]
    forms = coded(params, stacked)

    def loss(fn):
        return jax.grad(lambda x, p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(p, x))))

    close(*jax.jit(lambda x, f: (loss(packed(fn))(x, f), loss(fn)(x, lcq.decompress(f))))(x, forms), 1e-4)
    assert door


@jax.custom_jvp
def odd(x):
    return x**2


odd.defjvp(lambda primals, tangents: (odd(*primals), 100 * tangents[0]))


@jax.custom_vjp
def clipped(w, x):
    return x @ w


clipped.defvjp(lambda w, x: (x @ w, w), lambda w, g: (jnp.zeros_like(w), jnp.clip(g, -0.1, 0.1) @ w.T))


def test_gradient_rules_are_kept(door):
    """Of a function that no form enters, and of one that a form enters, which runs packed but for its gradient."""
    forms, x = {"w": code(normal(4, 6))}, X

    def plain(p, x):
        return odd(x @ p["w"]).sum()

    def entered(p, x):
        return (3 * clipped(p["w"], x)).sum()

    for fn in (plain, entered):
        assert [use.how for use in packed(fn).report(forms, x)] == ["product"]
        pair = packed(fn), lambda f, x, fn=fn: fn(lcq.decompress(f), x)
        both = jax.jit(lambda f, x, pair=pair: [jax.value_and_grad(g, 1)(f, x) for g in pair])
        close(*both(forms, x))
        close(*jax.jit(jax.vmap(both, (None, 0)))(forms, x[:, None]))


# What comes in


def test_an_algorithm_that_is_spelled_out_is_left_to_jax():
    f32 = np.dtype(np.float32)
    algorithm = lax.DotAlgorithm(f32, f32, f32, 1, 1, 1, False)
    net = packed(lambda p, x: lax.dot(x, p["w"], precision=algorithm))
    assert [use.how for use in net.report({"w": code(W)}, jnp.tile(X, 2))] == ["dense"]


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 4, 6)])
def test_no_images(shape):
    def net(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forms = {"w": lcq.Binary().project(jnp.ones(shape))}
    run, none = lcq.packed(net), jnp.zeros((0, 5, 5, 4))
    assert run(run.prepack(forms, none), none).shape == (0, 5, 5, 6)


def test_what_is_no_array():
    net = packed(lambda p, x, mode: x @ p["w"])
    for call in (net, net.report):
        with pytest.raises(
            ValueError, match=r"kwargs/mode: expected an array, a form or a number, got str 'train'.*close"
        ):
            call({"w": code(normal(4, 6))}, X, mode="train")
        with pytest.raises(ValueError, match=r"params/f: .* got function .*; close over"):
            call({"w": code(normal(4, 6)), "f": lambda: 0}, X, mode=1)


def test_report_of_shapes():
    """Nothing is computed, so shapes are enough; a form that nothing uses is not in it."""
    forms = {"w": code(normal(4, 6)), "v": code(normal(3))}
    (use,) = packed(lambda p, x: x @ p["w"]).report(*jax.eval_shape(lambda *a: a, forms, X))
    assert use[:3] == ("w", "product", (1, 5, 4, 6)) and "test_packed.py" in use.source


# Exported


@pytest.mark.parametrize("ready", [False, True], ids=["forms", "prepacked"])
@pytest.mark.parametrize("scheme", [lcq.Uniform(4, per="channel"), lcq.KMeans(2), lcq.Prune(kept=9)], ids=repr)
def test_exported_with_forms_as_arguments(scheme, ready):
    net, x = packed(lambda p, x: x @ p["kernel"]), normal(3, 8)
    forms = {"kernel": scheme.project(W)}
    tree = net.prepack(forms, x) if ready else forms
    exported = jax.export.deserialize(jax.export.export(jax.jit(net))(tree, x).serialize())
    close(exported.call(tree, x), net(tree, x))


@pytest.fixture
def unchecked():
    """To the checks of the tests a symbolic dimension is no int."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


SYMBOLIC = {  # fn, w, stacked, x without its batch
    "product": (lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, normal(8, 6), 0, (8,)),
    "rows": (lambda p, x: p["w"][x[:, 0].astype(int)].sum(1), normal(8, 32), 0, (1,)),
    "experts looked up": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][x[:, 0].astype(int)]),
        normal(3, 8, 8),
        1,
        (8,),
    ),
    "window": (lambda p, x: convolution({"kernel": p["w"]}, x), normal(3, 2, 2, 6), 0, (4, 4, 2)),
    "pointwise": (lambda p, x: convolution({"kernel": p["w"]}, x), normal(1, 1, 2, 6), 0, (4, 4, 2)),
    "scan": (lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], normal(3, 8, 8), 1, (8,)),
}


@pytest.mark.parametrize("case", SYMBOLIC)
@pytest.mark.parametrize("scheme", [lcq.Uniform(4, per="channel"), lcq.KMeans(2), lcq.Prune(kept=9)], ids=repr)
def test_exported_with_a_symbolic_batch(scheme, case, unchecked):
    fn, w, stacked, rest = SYMBOLIC[case]
    net, forms = packed(fn), stored(lcq.compress({"w": w}, [lcq.Rule("w", scheme, stacked=stacked)]))
    (batch,) = jax.export.symbolic_shape("b")
    shape = jax.ShapeDtypeStruct((batch, *rest), jnp.float32)
    for tree in (forms, net.prepack(forms, shape)):
        exported = jax.export.export(jax.jit(lambda x, tree=tree: net(tree, x)))(shape)
        for count in (1, 5):
            x = abs(normal(count, *rest))
            close(exported.call(x), fn(lcq.decompress(forms), x), 1e-4)


WITHOUT_LCQ = """
import sys
import jax, numpy as np
from jax import export
net = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
np.save(sys.argv[2], net.call(np.load(sys.argv[3])))
assert "lcq" not in sys.modules
"""


def test_an_exported_net_runs_in_a_process_without_lcq(tmp_path):
    fn, params, (x, *_), stacked, _ = CASES["net"]
    net, forms = packed(fn), coded(params, stacked)
    ready = net.prepack(forms, x)
    exported = jax.export.export(jax.jit(lambda x: net(ready, x)))(x)
    (tmp_path / "net").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", x)
    files = [tmp_path / "net", tmp_path / "y.npy", tmp_path / "x.npy"]
    subprocess.run([sys.executable, "-c", WITHOUT_LCQ, *files], check=True, cwd=tmp_path)
    close(np.load(tmp_path / "y.npy"), np.asarray(net(ready, x)))


def test_a_product_of_one_bit_is_exported_with_the_kernel_of_the_platform():
    product, x = packed(lambda p, x: x @ p["w"]), jnp.ones((2, 64))
    ready = product.prepack({"w": lcq.KMeans(2).project(normal(64, 128))}, x)
    net = jax.jit(lambda x: product(ready, x))
    triton = "__gpu$xla.gpu.triton"
    allowed = [jax.export.DisabledSafetyCheck.custom_call(triton)]
    # newer JAX wants to know which GPU, where there is none
    gpu = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="gpu")
    for platform, kernel in (("tpu", "tpu_custom_call"), ("cuda", triton), ("cpu", None)):
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu if platform == "cuda" else None)
        with jax.sharding.use_abstract_mesh(mesh):
            exported = jax.export.export(net, platforms=[platform], disabled_checks=allowed)(x)
        module = exported.mlir_module()
        assert [name for name in ("tpu_custom_call", triton) if name in module] == [kernel] * (kernel is not None)
        assert jax.export.deserialize(exported.serialize()).platforms == (platform,)
