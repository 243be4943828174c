"""The decoder against one that goes token by token and head by head in float64, its cache, and names of checkpoints."""

import dataclasses
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.cli.main import main
from lcq.examples import llama, llama_names, transformers
from lcq.examples.llama_names import (
    Config,
    by_layers,
    config_from_gguf,
    from_llama2c,
    read_config,
    stacked,
    to_huggingface,
)

needs_data = pytest.mark.skipif(
    "LCQ_DATA" not in os.environ, reason="real data: set LCQ_DATA to the folder that holds it"
)

HEADS, WIDTH, VOCAB, LAYERS, HIDDEN = 4, 8, 11, 2, 20
TOKENS = np.array([[1, 5, 3, 9, 9, 2, 0], [1, 8, 8, 4, 7, 6, 3]], np.int32)
CONFIG = Config(HEADS, eps=1e-5, theta=100.0)


def make(groups=2, tied=True, seed=0):
    """A stacked tree of random weights; scales of norms lie around 1."""
    rng, d = np.random.default_rng(seed), HEADS * WIDTH
    matrices = {"wq": (d, d), "wk": (d, groups * WIDTH), "wv": (d, groups * WIDTH), "wo": (d, d)}
    matrices |= {"w1": (d, HIDDEN), "w3": (d, HIDDEN), "w2": (HIDDEN, d)}
    layers = {name: 0.3 * rng.normal(size=(LAYERS, *shape)) for name, shape in matrices.items()}
    layers |= {name: 1 + 0.1 * rng.normal(size=(LAYERS, d)) for name in ("attention_norm", "ffn_norm")}
    tree = {"tok_embeddings": rng.normal(size=(VOCAB, d)), "norm": 1 + 0.1 * rng.normal(size=d), "layers": layers}
    tree |= {} if tied else {"output": rng.normal(size=(d, VOCAB))}
    return jax.tree.map(lambda a: a.astype(np.float32), tree)


# The same in float64


def norm(v, scale, eps):
    return v / np.sqrt(np.mean(v**2) + eps) * scale


def turned(v, position, config):
    """Pairs of one head's numbers as complex numbers, turned."""
    half = len(v) // 2
    pairs = [(i, i + half) if config.halves else (2 * i, 2 * i + 1) for i in range(half)]
    out = np.zeros_like(v)
    for i, (a, b) in enumerate(pairs):
        z = (v[a] + 1j * v[b]) * np.exp(1j * position * config.theta ** (-2 * i / len(v)))
        out[a], out[b] = z.real, z.imag
    return out


def slow(params, sentence, config, groups):
    p64 = jax.tree.map(lambda a: a.astype(np.float64), params)
    xs = [p64["tok_embeddings"][token] for token in sentence]
    for layer in range(LAYERS):
        p = {name: a[layer] for name, a in p64["layers"].items()}
        ys = [norm(x, p["attention_norm"], config.eps) for x in xs]
        parts = {"wq": HEADS, "wk": groups, "wv": groups}
        q, k, v = ([np.split(y @ p[name], n) for y in ys] for name, n in parts.items())
        q, k = ([[turned(h, t, config) for h in heads] for t, heads in enumerate(u)] for u in (q, k))
        for t in range(len(xs)):
            heads = []
            for h in range(HEADS):
                g = h * groups // HEADS
                e = np.exp([q[t][h] @ k[s][g] / np.sqrt(WIDTH) for s in range(t + 1)])
                heads.append(sum(e[s] / e.sum() * v[s][g] for s in range(t + 1)))
            xs[t] = xs[t] + np.concatenate(heads) @ p["wo"]
        for t, x in enumerate(xs):
            y = norm(x, p["ffn_norm"], config.eps)
            gate = y @ p["w1"]
            xs[t] = x + (gate / (1 + np.exp(-gate)) * (y @ p["w3"])) @ p["w2"]
    head = p64["output"] if "output" in p64 else p64["tok_embeddings"].T
    return np.array([norm(x, p64["norm"], config.eps) @ head for x in xs])


@pytest.mark.parametrize(("groups", "tied", "halves"), [(1, True, False), (2, False, True), (4, True, True)])
def test_logits_against_a_loop(groups, tied, halves):
    params, config = make(groups, tied), Config(HEADS, 1e-5, 100.0, halves)
    found = jax.jit(llama.logits, static_argnums=2)(params, TOKENS, config)
    expected = np.array([slow(params, sentence, config, groups) for sentence in TOKENS])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_rope_leaves_the_first_position_and_all_lengths():
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8))
    y = llama.rope(x)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    pairs = [jnp.hypot(a[..., 0::2], a[..., 1::2]) for a in (x, y)]
    np.testing.assert_allclose(*pairs, rtol=1e-5)


@pytest.mark.parametrize(("theta", "halves"), [(10000.0, False), (100.0, True)])
def test_rope_depends_on_distances_alone(theta, halves):
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))
    q, k = (llama.rope(jnp.broadcast_to(a, (1, 12, 1, 8)), theta, halves=halves)[0, :, 0] for a in (q, k))
    products = np.asarray(q @ k.T)
    for distance in range(-11, 12):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], rtol=1e-4, atol=1e-5)
    assert np.ptp(products[0]) > 0.1


# The cache


def unstacked(params):
    return {**params, "layers": [{k: a[i] for k, a in params["layers"].items()} for i in range(LAYERS)]}


@pytest.mark.parametrize("view", [lambda p: p, unstacked], ids=["scan", "list"])
def test_steps_with_a_cache_are_the_whole(view):
    params, config = view(make()), Config(HEADS, 1e-5, 100.0, halves=True)
    whole = llama.logits(params, TOKENS, config)
    cache = llama.empty_cache(params, len(TOKENS), 9, config)
    found = []
    for part in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:]):
        scores, cache = jax.jit(llama.step, static_argnums=3)(params, part, cache, config)
        found.append(scores)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=1e-5, atol=1e-5)
    assert cache.length == 7 and not cache.keys[:, :, 7:].any()


@pytest.mark.parametrize("heads", [3, 1])
def test_heads_that_do_not_divide_the_weights_are_refused(heads):
    config = dataclasses.replace(CONFIG, heads=heads)
    for call in (llama.logits, lambda *args: llama.generate(args[0], args[1], 2, args[2])):
        with pytest.raises(ValueError, match="wq, wk: expected widths that are whole heads"):
            call(make(), TOKENS, config)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_tokens_outside_of_the_vocabulary_are_refused(token):
    with pytest.raises(ValueError, match="expected tokens from 0 to"):
        llama.generate(make(), np.array([[0, token]]), 2, CONFIG)


def test_generation_is_that_of_the_whole_net():
    rules = [lcq.Rule("layers/w.", lcq.Uniform(4, per=4), stacked=1), lcq.Rule("tok_embeddings", lcq.Uniform(8))]
    forms = lcq.compress(make(), rules)
    dense, tokens = lcq.decompress(forms), TOKENS[:, :3]
    found = llama.generate(forms, tokens, 5, CONFIG)
    whole = jax.jit(llama.logits, static_argnums=2)
    padded = np.pad(tokens, ((0, 0), (0, 5)))
    for i in range(5):
        scores = whole(dense, padded, CONFIG)[:, 2 + i]
        top = jnp.sort(scores)[:, -2:]
        assert (top[:, 1] - top[:, 0] > 1e-3).all()  # no tie that rounding could decide
        padded[:, 3 + i] = scores.argmax(-1)
    np.testing.assert_array_equal(found, padded[:, 3:])
    likely = llama.generate(forms, tokens, 1, CONFIG, lambda scores: scores.argmin(-1))
    assert (likely != found[:, :1]).all()
    with pytest.raises(ValueError, match="a prompt of one token at least"):
        llama.generate(forms, tokens[:, :0], 5, CONFIG)


# Names


def named(params, kind):
    """The flat dict of a checkpoint (out, in); the names stand here once more, spelled out."""
    top = {"tok_embeddings": ("model.embed_tokens", "token_embd"), "norm": ("model.norm", "output_norm")}
    top |= {"output": ("lm_head", "output")}
    inner = {
        "attention_norm": ("input_layernorm", "attn_norm"),
        "wq": ("self_attn.q_proj", "attn_q"),
        "wk": ("self_attn.k_proj", "attn_k"),
        "wv": ("self_attn.v_proj", "attn_v"),
        "wo": ("self_attn.o_proj", "attn_output"),
        "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
        "w1": ("mlp.gate_proj", "ffn_gate"),
        "w3": ("mlp.up_proj", "ffn_up"),
        "w2": ("mlp.down_proj", "ffn_down"),
    }
    flat = {f"{top[k][kind]}.weight": a for k, a in params.items() if k != "layers"}
    if "output" in params:
        flat[f"{top['output'][kind]}.weight"] = params["output"].T
    for k, a in params["layers"].items():
        flat |= {f"{('model.layers', 'blk')[kind]}.{i}.{inner[k][kind]}.weight": a[i].T for i in range(LAYERS)}
    return flat


@pytest.mark.parametrize("kind", [0, 1])
def test_names_of_checkpoints(kind):
    params = make(tied=False)
    flat = named(params, kind)
    jax.tree.map(np.testing.assert_array_equal, stacked(flat), params)
    jax.tree.map(np.testing.assert_array_equal, stacked(params), params)
    np.testing.assert_allclose(
        llama.logits(flat, TOKENS, CONFIG), llama.logits(params, TOKENS, CONFIG), rtol=1e-5, atol=1e-5
    )
    lost = next(name for name in flat if ".1." in name)
    with pytest.raises(ValueError, match=f"{re.escape(lost)}: expected this parameter of a llama"):
        by_layers({name: a for name, a in flat.items() if name != lost})
    with pytest.raises(ValueError, match=r"q_proj\.bias: expected parameters of a llama"):
        by_layers(flat | {"model.layers.0.self_attn.q_proj.bias": np.zeros(3)})


def test_names_of_llama2c():
    params = make()
    layers = {k: a.swapaxes(1, 2) if a.ndim == 3 else a for k, a in params["layers"].items()}
    found = from_llama2c({"tok_embeddings": params["tok_embeddings"], "norm": params["norm"], **layers, "config": 0})
    jax.tree.map(np.testing.assert_array_equal, found, params)


HF = {"model_type": "llama", "num_attention_heads": 9, "rms_norm_eps": 1e-5, "rope_theta": 1e5, "hidden_act": "silu"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"}}, None),
        ({"num_attention_heads": None}, "config.json: expected num_attention_heads of a llama, got none"),
        ({"model_type": "gemma"}, "model_type: expected llama or mistral or smollm, got 'gemma'"),
        ({"attention_bias": True}, "attention_bias: expected False, got True"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling: expected None, got"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type: expected default, got 'yarn'"),
    ],
)
def test_configs_of_hugging_face(tmp_path, change, complaint):
    said = {key: value for key, value in (HF | change).items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(said))
    if complaint is None:
        assert read_config(tmp_path) == Config(9, 1e-5, 1e5, halves=True)
    else:
        with pytest.raises(ValueError, match=complaint):
            read_config(tmp_path)


@pytest.mark.parametrize(("text", "complaint"), [("[1]", "an object of JSON, got list"), ('{"a": ', "expected JSON")])
def test_a_config_that_is_no_object(tmp_path, text, complaint):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json: .*{complaint}"):
        read_config(tmp_path)


@pytest.mark.parametrize(("halves", "tied"), [(False, True), (True, False)])
def test_a_folder_of_hugging_face(halves, tied, tmp_path):
    params, config = make(tied=tied), Config(HEADS, 1e-5, 100.0, halves)
    flat, said = to_huggingface(params, config, 64)
    lcq.io.write(tmp_path / "model.safetensors", flat, {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(said))
    read, again = llama_names.load(tmp_path)
    assert again == dataclasses.replace(config, halves=True)
    assert said["num_key_value_heads"] == 2 and said["tie_word_embeddings"] == tied
    expected = llama.logits(params, TOKENS, config)
    np.testing.assert_allclose(llama.logits(read, TOKENS, again), expected, rtol=1e-4, atol=1e-4)


def test_configs_of_gguf():
    said = {"general.architecture": "llama", "llama.attention.head_count": "9"}
    said["llama.attention.layer_norm_rms_epsilon"] = "1e-05"
    assert config_from_gguf(said) == Config(9, 1e-5, 1e4)
    for change in ({"general.architecture": "qwen2"}, {"llama.rope.scaling.type": "linear"}):
        with pytest.raises(ValueError, match=f"{next(iter(change))}: expected"):
            config_from_gguf(said | change)
    with pytest.raises(ValueError, match=r"expected llama.attention.head_count in the metadata of a llama, got none"):
        config_from_gguf({key: value for key, value in said.items() if "head_count" not in key})


def test_the_command_line_quantizes_it(tmp_path, monkeypatch, capsys):
    """A folder as Hugging Face's, two lines of code, and tokenised text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "net", raising=False)
    (tmp_path / "model").mkdir()
    flat = named(make(), 0)
    lcq.io.write("model/model.safetensors", flat, {"format": "pt"})
    Path("model/config.json").write_text(json.dumps(HF | {"num_attention_heads": HEADS}))
    Path("net.py").write_text(
        "import functools\nfrom lcq.examples import llama, llama_names\n"
        "apply = functools.partial(llama.logits, config=llama_names.read_config('model'))\n"
    )
    np.savez("tokens.npz", np.random.default_rng(0).integers(0, VOCAB, (6, 12)).astype(np.int32))
    rule = r"model\.layers\.[01]\.(self_attn\.q|mlp\.down)_proj\.weight=Uniform(4, per=4)"
    status = main(
        ["quantize", "net:apply", "model", "--data", "tokens.npz", "--method", "rtn", "--rule", rule, "-o", "net.lcq"]
    )
    assert status == 0, capsys.readouterr().err
    forms = lcq.load("net.lcq")
    quantized = [name for name, leaf in forms.items() if lcq.forms.base.is_form(leaf)]
    assert len(quantized) == 2 * LAYERS and all("q_proj" in name or "down_proj" in name for name in quantized)
    config = read_config("model")
    found = llama.logits(lcq.decompress(forms), TOKENS, config) - llama.logits(flat, TOKENS, config)
    assert 1e-3 < np.abs(found).max() < 5


@needs_data
def test_stories260k_is_the_net_of_transformers():
    """Whose likelihood is tested there."""
    arrays = np.load(Path(os.environ["LCQ_DATA"]) / "stories" / "stories260k_llama.npz")
    tokens = np.random.default_rng(0).integers(0, 512, (1, 20)).astype(np.int32)
    expected = transformers.llama(transformers.llama_from_llama2c(arrays), tokens, heads=8)
    np.testing.assert_allclose(llama.logits(from_llama2c(arrays), tokens, Config(8)), expected, rtol=1e-4, atol=1e-4)
