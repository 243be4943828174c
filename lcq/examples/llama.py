"""A decoder of the llama family as plain functions: logits, a cache of keys and values, and generation.

Parameters are nested dicts of arrays, weights (in, out) as in `x @ w`:

    tok_embeddings (vocab, d)   norm (d,)   output (d, vocab), left out where the embedding is the head
    layers: attention_norm (d,)  wq (d, heads w)  wk, wv (d, groups w)  wo (heads w, d)
            ffn_norm (d,)  w1, w3 (d, hidden)  w2 (hidden, d)

Layers are stacked, each array with an axis of them in front, and run by `jax.lax.scan`; or a list, run one by one. The
flat dict of a checkpoint does as well, by the names of Hugging Face or of llama.cpp, see `llama_names.by_layers`; so
rules and `lcq.quantize` can use the names that are in the file.

Forms stand in for any of the weights in `step` and `generate`, and in `lcq.packed(logits)`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

import lcq
from lcq.examples.llama_names import Config, by_layers
from lcq.tree.aliases import Forms, Params

Attend = Callable[[Array, Array, Array], tuple[Array, PyTree]]
"""Queries, keys and values of a layer to what it attends to, and what it keeps."""


class Cache(NamedTuple):
    """Keys, turned, and values of all layers for the tokens so far.

    Attributes:
        keys: zeros behind the first `length` positions.
        values: likewise.
        length: tokens so far.
    """

    keys: Float[Array, "layers n t groups w"]
    values: Float[Array, "layers n t groups w"]
    length: Int[Array, ""]


def logits(params: Params, tokens: Int[Array | np.ndarray, "n t"], config: Config) -> Float[Array, "n t vocab"]:
    """Logits of the token after each of `tokens`: pre-norm blocks of causal attention and a SwiGLU.

        x <- x + wo att(turn(wq y), turn(wk y), wv y),  y = norm(x);   x <- x + w2 (silu(w1 y) * w3 y),  y = norm(x)

    Args:
        params: as the module says.
        tokens: sentences of the same length, each from its first token on.
        config: what the parameters do not say.

    Raises:
        ValueError: names of no llama.

    Source: Touvron et al., arXiv 2302.13971; grouped queries: Ainslie et al., arXiv 2305.13245.
    """
    params = by_layers(params)
    causal = jnp.tri(tokens.shape[1], dtype=bool)
    turn = functools.partial(rope, theta=config.theta, halves=config.halves)

    def attend(q: Array, k: Array, v: Array) -> tuple[Array, PyTree]:
        return attention(turn(q), turn(k), v, causal), None

    x, _ = _through(params["layers"], lambda x, p: _layer(x, p, config, attend), _embed(params, tokens))
    return _head(x, params, config)


def step(
    params: Params, tokens: Int[Array | np.ndarray, "n t"], cache: Cache, config: Config
) -> tuple[Float[Array, "n t vocab"], Cache]:
    """What `logits` gives for tokens that follow those in the cache, and the cache with them.

    Args:
        params: as the module says.
        tokens: of a prompt, or the last one alone; the cache must have room for them, which `generate` sees to.
        cache: of the tokens before, from `empty_cache` or an earlier step.
        config: what the parameters do not say.
    """
    params = by_layers(params)
    new, room = tokens.shape[1], cache.keys.shape[2]
    seen = jnp.arange(room) <= cache.length + jnp.arange(new)[:, None]
    turn = functools.partial(rope, theta=config.theta, halves=config.halves, start=cache.length, room=room)

    def layer(x: Array, p: Params, keys: Array, values: Array) -> tuple[Array, PyTree]:
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, PyTree]:
            place = (0, cache.length, 0, 0)
            k, v = (jax.lax.dynamic_update_slice(a, b, place) for a, b in ((keys, turn(k)), (values, v)))
            return attention(turn(q), k, v, seen), (k, v)

        return _layer(x, p, config, attend)

    x, (keys, values) = _through(params["layers"], layer, _embed(params, tokens), cache.keys, cache.values)
    return _head(x, params, config), Cache(keys, values, cache.length + new)


def empty_cache(params: Forms, sentences: int, room: int, config: Config) -> Cache:
    """A cache of no tokens.

    Args:
        params: as the module says; only shapes and dtypes are looked at, of forms too.
        sentences: that are generated at once.
        room: positions, of the prompt and all that follows.
        config: what the parameters do not say.
    """
    tree = _shapes(params)
    stack = tree["layers"]
    scanned = isinstance(stack, Mapping)
    layers, first = (stack["wq"].shape[0], stack) if scanned else (len(stack), stack[0])
    width = _head_width(first, config)
    shape = (layers, sentences, room, first["wk"].shape[-1] // width, width)
    zeros = functools.partial(jnp.zeros, shape, jnp.result_type(*jax.tree.leaves(tree)))
    return Cache(zeros(), zeros(), jnp.zeros((), jnp.int32))


def generate(
    params: Forms,
    prompt: Int[Array | np.ndarray, "n t"],
    count: int,
    config: Config,
    choose: Callable[[Array], Array] | None = None,
) -> Int[np.ndarray, "n count"]:
    """Tokens that follow a prompt, one after another; forms are run as `lcq.packed` does, prepacked once.

    Args:
        params: as the module says, with or without forms.
        prompt: sentences of the same length.
        count: how many tokens.
        config: what the parameters do not say.
        choose: logits (n, vocab) to the next tokens (n,); None for the likeliest.

    Raises:
        ValueError: no prompt, no count, tokens outside of the vocabulary, or heads that do not divide the weights.

    Example:
        >>> square, one = jnp.zeros((1, 8, 8)), jnp.ones((1, 8))
        >>> layers = {name: square for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")}
        >>> params = {"tok_embeddings": jnp.eye(4, 8), "norm": jnp.ones(8), "output": jnp.roll(jnp.eye(8, 4), 1, 1)}
        >>> params["layers"] = layers | {"attention_norm": one, "ffn_norm": one}
        >>> generate(params, jnp.array([[0]]), 5, Config(heads=2)).tolist()
        [[1, 2, 3, 0, 1]]
    """
    if prompt.shape[1] < 1 or count < 1:
        raise ValueError(
            f"expected a prompt of one token at least and a count above 0, got {list(prompt.shape)} and {count}; "
            "start with the token that begins a text"
        )
    vocabulary = _shapes(params)["tok_embeddings"].shape[0]
    if np.min(prompt) < 0 or np.max(prompt) >= vocabulary:
        raise ValueError(
            f"expected tokens from 0 to {vocabulary - 1}, got a prompt from {np.min(prompt)} to {np.max(prompt)}"
        )
    choose = choose or functools.partial(jnp.argmax, axis=-1)
    cache = empty_cache(params, len(prompt), prompt.shape[1] + count, config)
    run, compiled = _compiled_step(config)
    params = run.prepack(params, prompt[:, :1], cache)
    tokens, made = jnp.asarray(prompt), []
    for _ in range(count):
        scores, cache = compiled(params, tokens, cache)
        made.append(choose(scores[:, -1]))
        tokens = made[-1][:, None]
    return np.stack([np.asarray(chosen) for chosen in made], axis=1)


@functools.lru_cache(maxsize=16)
def _compiled_step(config: Config) -> tuple[Any, Callable[..., Any]]:
    run = lcq.packed(functools.partial(step, config=config))
    return run, jax.jit(run, donate_argnums=2)


def rope(
    x: Float[Array, "n t heads d"],
    theta: float = 10000.0,
    *,
    halves: bool = False,
    start: Int[Array, ""] | int = 0,
    room: int | None = None,
) -> Float[Array, "n t heads d"]:
    """Turns the i-th pair at position t by the angle t theta^(-2i/d), so that inner products of queries and keys depend
    on the distance of their positions alone.

    Args:
        x: queries or keys; index 0 of the second axis is position `start`, d is even.
        theta: the larger, the slower the last pairs turn.
        halves: pairs are (x_i, x_i+d/2), as in Hugging Face's checkpoints; else (x_2i, x_2i+1), as in Meta's and GGUF.
        start: position of the first.
        room: positions there are, if `start` is traced.

    Source: Su et al., arXiv 2104.09864, equation 34.
    """
    _, t, _, d = x.shape
    angle = np.arange(t if room is None else room)[:, None] * theta ** (-np.arange(0, d, 2) / d)
    cos, sin = (jnp.asarray(f(angle), x.dtype)[:, None] for f in (np.cos, np.sin))
    if room is not None:
        cos, sin = (jax.lax.dynamic_slice_in_dim(table, start, t) for table in (cos, sin))
    one, other = (x[..., : d // 2], x[..., d // 2 :]) if halves else (x[..., 0::2], x[..., 1::2])
    turned = [one * cos - other * sin, one * sin + other * cos]
    return jnp.concatenate(turned, axis=-1) if halves else jnp.stack(turned, axis=-1).reshape(x.shape)


def attention(
    q: Float[Array, "n t heads w"],
    k: Float[Array, "n s groups w"],
    v: Float[Array, "n s groups w"],
    allowed: Bool[Array, "..."],
) -> Float[Array, "n t d"]:
    """softmax(q k' / sqrt(w)) v of each head; heads/groups queries that follow each other share keys and values.

    Args:
        q: queries.
        k: keys.
        v: values.
        allowed: whether a query sees a key, of a shape that broadcasts to (n, groups, heads/groups, t, s).

    Source: Vaswani et al., arXiv 1706.03762, equation 1; Ainslie et al., arXiv 2305.13245.
    """
    n, t, heads, width = q.shape
    q = q.reshape(n, t, k.shape[2], -1, width)
    scores = jnp.einsum("ntgrw,nsgw->ngrts", q, k) / width**0.5
    weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
    return jnp.einsum("ngrts,nsgw->ntgrw", weights, v).reshape(n, t, heads * width)


def rms_norm(x: Float[Array, "*n d"], scale: Float[Array | np.ndarray, " d"], eps: float) -> Float[Array, "*n d"]:
    """x scale / sqrt(mean x^2 + eps)."""
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def _shapes(params: Forms) -> Params:
    """Shapes and dtypes of `by_layers`, of forms too."""
    structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(a.dtype)), params, is_leaf=_is_form)
    return jax.eval_shape(by_layers, structs)


def _head_width(p: Params, config: Config) -> int:
    """The width of a head."""
    queries, keys = p["wq"].shape[-1], p["wk"].shape[-1]
    width = queries // config.heads
    if width * config.heads != queries or keys % width or config.heads % (keys // width):
        raise ValueError(
            f"wq, wk: expected widths that are whole heads, got {queries} and {keys} for heads={config.heads}; say the "
            "number of heads that the net was trained with"
        )
    return width


def _is_form(node: PyTree) -> bool:
    return isinstance(node, lcq.forms.Form)


def _layer(x: Array, p: Params, config: Config, attend: Attend) -> tuple[Array, PyTree]:
    y = rms_norm(x, p["attention_norm"], config.eps)
    width = _head_width(p, config)
    q, k, v = ((y @ p[name]).reshape(*y.shape[:2], -1, width) for name in ("wq", "wk", "wv"))
    y, kept = attend(q, k, v)
    x = x + y @ p["wo"]
    y = rms_norm(x, p["ffn_norm"], config.eps)
    return x + (jax.nn.silu(y @ p["w1"]) * (y @ p["w3"])) @ p["w2"], kept


def _through(
    layers: Params, layer: Callable[..., tuple[Array, PyTree]], x: Array, *others: Array
) -> tuple[Array, PyTree]:
    """x through all layers, each with its part of the others, and what all of them keep, stacked."""
    if isinstance(layers, Mapping):
        return jax.lax.scan(lambda x, parts: layer(x, *parts), x, (layers, *others))
    kept = []
    for i, p in enumerate(layers):
        x, own = layer(x, p, *(a[i] for a in others))
        kept.append(own)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *kept) if kept else others


def _embed(params: Params, tokens: Int[Array | np.ndarray, "n t"]) -> Float[Array, "n t d"]:
    """Rows of the embedding in the dtype that all parameters promote to, which the layers then keep."""
    return jnp.take(params["tok_embeddings"], tokens, axis=0).astype(jnp.result_type(*jax.tree.leaves(params)))


def _head(x: Array, params: Params, config: Config) -> Array:
    x = rms_norm(x, params["norm"], config.eps)
    return x @ params["output"] if "output" in params else x @ params["tok_embeddings"].T
