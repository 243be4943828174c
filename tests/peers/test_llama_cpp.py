"""llama.cpp runs a llama that lcq exports from Hugging Face's names and halves: the same probabilities, and tokens."""

import json
import urllib.request

import jax
import numpy as np
import pytest

import lcq
from lcq.examples import llama, llama_names
from lcq.io import export
from lcq.io import llama_names as gguf_names
from tests.io.exports.made import codes, grid
from tests.io.exports.test_gguf_tokenizer import LLAMA3

runner = pytest.importorskip("xllamacpp", reason="pip install '.[peers]', or run .ci/peers")

RNG = np.random.default_rng(0)
WIDTH, HIDDEN, HEADS, KV, WORDS, LAYERS = 64, 96, 4, 2, 300, 2
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH * KV // HEADS, WIDTH),
    "self_attn.v_proj": (WIDTH * KV // HEADS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
SPECIAL = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
CONFIG = {
    "model_type": "llama",
    "max_position_embeddings": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "intermediate_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "vocab_size": WORDS,
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*SPECIAL, *map(str, range(WORDS - len(SPECIAL)))],
    "tokenizer.ggml.scores": np.zeros(WORDS, np.float32),
    "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * (WORDS - 259)], np.int32),
}


def net(quantized):
    """A llama of random weights, and the same in numbers alone."""
    tree = {"model.embed_tokens.weight": RNG.normal(size=(WORDS, WIDTH)).astype(np.float32)}
    tree["model.norm.weight"] = np.ones(WIDTH, np.float32)
    numbers = dict(tree)
    for i in range(LAYERS):
        for seed, (name, shape) in enumerate(SHAPES.items()):
            form, dense = codes(shape, (shape[0], shape[1] // 32), grid(-8, 7), scale="float16", seed=seed)
            path, numbers_of = f"model.layers.{i}.{name}.weight", dense.astype(np.float32)
            numbers[path] = numbers_of
            tree[path] = form if quantized else numbers_of
        for name in ("input_layernorm", "post_attention_layernorm"):
            path = f"model.layers.{i}.{name}.weight"
            tree[path] = numbers[path] = RNG.uniform(0.5, 1.5, WIDTH).astype(np.float32)
    return tree, numbers


def likeliest(path, tokens):
    """Log probabilities of the ten likeliest next tokens, in float32 throughout but for products with blocks."""
    params = runner.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    params.cache_type_k = params.cache_type_v = runner.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = runner.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = 1
    asked = {"prompt": [int(t) for t in tokens], "n_predict": 1, "n_probs": 10, "temperature": -1.0}
    told = runner.Server(params).handle_completions(asked)
    return {each["id"]: each["logprob"] for each in told["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


@pytest.mark.parametrize(("quantized", "within"), [(False, 1e-4), (True, 0.3)])  # activations are rounded to 8 bits
def test_the_same_probabilities(quantized, within, tmp_path):
    tree, numbers = net(quantized)
    names = gguf_names(HEADS, KV)
    report = export(tree, tmp_path / "net.gguf", format="gguf", names=names, config=CONFIG)
    assert not report.notes and not report.changed
    tokens = RNG.integers(3, WORDS, 12).astype(np.int32)
    config = llama_names.Config(HEADS, 1e-5, 1e4, halves=True)
    expected = np.asarray(jax.nn.log_softmax(llama.logits(numbers, tokens[None], config)[0, -1]))
    found = likeliest(tmp_path / "net.gguf", tokens)
    assert max(abs(expected[token] - value) for token, value in found.items()) < within
    other = llama_names.Config(HEADS, 1e-5, 1e4, halves=False)
    wrong = np.asarray(jax.nn.log_softmax(llama.logits(numbers, tokens[None], other)[0, -1]))
    assert max(abs(wrong[token] - value) for token, value in found.items()) > within  # the convention is seen


JSON = {"Content-Type": "application/json"}
TEXTS = [
    "Once upon a time, there were 12 cats.",
    "  Lily's  dog\n\n ran!\t2024 h\u00e9llo <|end|> I'LL x_y \u4e2d\u6587",
]


@pytest.mark.parametrize("cut", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_the_same_tokens(cut, tmp_path):
    """A tokenizer that the library tokenizers has trained, by its tokenizer.json."""
    library = pytest.importorskip("tokenizers", reason="pip install '.[peers]', or run .ci/peers")
    cuts, whole = library.pre_tokenizers, library.pre_tokenizers.ByteLevel
    split = cuts.Split(library.Regex(LLAMA3.replace("{1,3}", "" if cut == "qwen2" else "{1,3}")), "isolated")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = {
        "gpt-2": lambda: whole(add_prefix_space=False),
        "smollm": lambda: cuts.Sequence([cuts.Digits(individual_digits=True), whole(add_prefix_space=False)]),
    }.get(cut, lambda: cuts.Sequence([split, whole(add_prefix_space=False, use_regex=False)]))()
    alphabet = whole.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=WORDS, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([*TEXTS, *TEXTS, "there were 1222 cats and 2024 dogs'll'"], trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "add_bos_token": false}')
    tree, _ = net(quantized=True)
    config = {key: value for key, value in CONFIG.items() if "tokenizer" not in key}
    path = tmp_path / "net.gguf"
    report = export(tree, path, format="gguf", names=gguf_names(HEADS, KV), config=config, tokenizer=tmp_path)
    assert not report.notes and lcq.io.open_gguf(path).fields["tokenizer.ggml.pre"].value == cut
    assert_the_same_tokens(path, tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_the_same_pieces(prefix, tmp_path):
    """Merges trained by the library, completed as files made of sentencepiece's are; bytes stand for what has none."""
    library = pytest.importorskip("tokenizers", reason="pip install '.[peers]', or run .ci/peers")
    normal = library.normalizers
    to_space = normal.Replace(" ", "\u2581")
    normalizer = normal.Sequence([normal.Prepend("\u2581"), to_space]) if prefix else to_space
    trained = library.Tokenizer(library.models.BPE())
    trained.normalizer, trained.pre_tokenizer = normalizer, library.pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = library.trainers.BpeTrainer(vocab_size=WORDS, special_tokens=SPECIAL)
    plain = TEXTS[0].lower()
    trained.train_from_iterator([plain, plain], trainer)
    vocabulary = trained.get_vocab()
    order = sorted(set(vocabulary) - set(SPECIAL), key=vocabulary.__getitem__)
    merges = [
        (piece[:i], piece[i:])
        for piece in order
        for i in range(1, len(piece))
        if piece[:i] in vocabulary and piece[i:] in vocabulary
    ]
    model = library.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = library.Tokenizer(model)
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(SPECIAL[:3])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false}')
    tree, _ = net(quantized=True)
    config = {key: value for key, value in CONFIG.items() if "tokenizer" not in key}
    path = tmp_path / "net.gguf"
    export(tree, path, format="gguf", names=gguf_names(HEADS, KV), config=config, tokenizer=tmp_path)
    assert lcq.io.open_gguf(path).fields["tokenizer.ggml.model"].value == "llama" and len(merges) > 20
    assert_the_same_tokens(path, tokenizer)


def assert_the_same_tokens(path, tokenizer):
    params = runner.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 64, 1, False
    params.cpuparams.n_threads = 1
    server = runner.Server(params)
    for text in TEXTS:
        asked = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        answer = urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/tokenize", asked, JSON))
        assert json.load(answer)["tokens"] == tokenizer.encode(text).ids
