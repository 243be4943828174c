"""Functions, parameters with codes in them, and which uses of them `packed` is to report."""

import functools

import chex
import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from lcq.forms import Codes, Factors, Sparse, Sum
from lcq.forms.base import is_form
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


def close(got, wanted, tolerance=1e-5):
    """Equal trees, dtypes and, up to the order of sums, numbers."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.nanmax(np.abs(b), initial=0)))


def stored(forms):
    return jax.tree.map(lambda f: f.pack() if is_form(f) else f, forms, is_leaf=is_form)


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


W = normal(8, 6)
MANY = jnp.asarray(RNG.integers(0, 16, (8, 6)), jnp.uint8)


KINDS = {
    "codes in groups": Codes(MANY, scale=normal(4, 6), zero=normal(4, 6), values=tuple(range(16))),
    "factors": Factors(normal(8, 2), right=normal(2, 6), tail=(8, 6)),
    "sum": Sum((code(W), Sparse(MANY < 6, normal(8, 6)))),
    "prepacked": code(W).prepack(),
    "lists": Sparse(jnp.asarray(np.arange(48).reshape(8, 6) % 5 == 0), W).prepack(),
}
