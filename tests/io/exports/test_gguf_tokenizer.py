"""A tokenizer.json in GGUF's metadata: tokens by number, types, merges, the way text is cut, special tokens."""

import json

import numpy as np
import pytest

import lcq
from lcq.io import Name, export
from lcq.io.exports.gguf_tokenizer import tokenizer_fields
from tests.io.exports.test_gguf import LLAMA

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
ADDED = [
    {"id": 0, "content": "<|endoftext|>", "special": True},
    {"id": 5, "content": "<|im_start|>", "special": True},
    {"id": 7, "content": "<repo>", "special": False},
]


def sequence(*steps):
    return {"type": "Sequence", "pretokenizers": list(steps)}


def split(pattern, use_regex=False):
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return sequence(cut, BYTES | {"use_regex": use_regex})


def files(folder, pre=BYTES, model=None, config=None, beside=None, **more):
    """A tokenizer of five tokens and three special ones; number 6 is nobody's."""
    bpe = {"type": "BPE", "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "\u0120": 3, "ab": 4}, "merges": [["a", "b"]]}
    said = {"added_tokens": ADDED, "pre_tokenizer": pre, "model": bpe | (model or {}), **more}
    (folder / "tokenizer.json").write_text(json.dumps(said))
    for name, content in (("config.json", config), ("tokenizer_config.json", beside)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def written(folder, **options):
    """The fields of a file with an embedding of 9 tokens."""
    tree = {"embed": np.ones((9, 4), np.float32)}
    names = [Name("embed", "token_embd.weight")]
    report = export(tree, folder / "net.gguf", format="gguf", names=names, config=LLAMA, **options)
    return {key: field.value for key, field in lcq.io.open_gguf(folder / "net.gguf").fields.items()}, report


def test_tokens_types_merges_and_special_tokens(tmp_path):
    beside = {"eos_token": {"content": "<|im_start|>"}, "unk_token": "?", "chat_template": "{{ x }}"}
    config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": [5, 0]}
    fields, report = written(tmp_path, tokenizer=files(tmp_path, config=config, beside=beside))
    assert not report.notes
    assert {
        key.removeprefix("tokenizer."): getattr(value, "tolist", lambda v=value: v)()
        for key, value in fields.items()
        if "tokenizer" in key
    } == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.tokens": ["<|endoftext|>", "a", "b", "\u0120", "ab", "<|im_start|>", "[PAD6]", "<repo>", "[PAD8]"],
        "ggml.token_type": [3, 1, 1, 1, 1, 3, 5, 4, 5],
        "ggml.merges": ["a b"],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 5,
        "ggml.padding_token_id": 5,
        "ggml.add_bos_token": False,
        "ggml.add_eos_token": False,
        "chat_template": "{{ x }}",
    }


def test_a_template_with_a_byte_order_mark(tmp_path):
    files(tmp_path, config={})
    (tmp_path / "chat_template.jinja").write_text("{{ x }}", "utf-8-sig")
    assert tokenizer_fields(tmp_path)["tokenizer.chat_template"] == "{{ x }}"


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        (BYTES, "gpt-2"),
        (sequence({"type": "Digits", "individual_digits": True}, BYTES), "smollm"),
        (split(LLAMA3), "llama-bpe"),
        (split(LLAMA3.replace("{1,3}", "")), "qwen2"),
        (split(LLAMA3.replace("{1,3}", "{1,4}")), None),
        (split(LLAMA3, use_regex=True), None),
        (BYTES | {"add_prefix_space": True}, None),
        (sequence({"type": "Digits", "individual_digits": False}, BYTES), None),
    ],
)
def test_how_text_is_cut(pre, name, tmp_path):
    """Another way is refused, unless it is said."""
    files(tmp_path, pre)
    if name is None:
        with pytest.raises(ValueError, match=r"tokenizer.json: expected a pre-tokenizer as GPT-2.*tokenizer.ggml.pre"):
            tokenizer_fields(tmp_path)
        name = "mine"
    given = "mine" if name == "mine" else None
    assert tokenizer_fields(tmp_path / "tokenizer.json", given)["tokenizer.ggml.pre"] == name


def test_what_is_put_around_a_text(tmp_path):
    """By the template of the tokenizer, unless its config says it."""
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}
    after = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    ends = ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token")
    fields = tokenizer_fields(files(tmp_path, post_processor=after))
    assert [fields[end] for end in ends] == [True, False]
    fields = tokenizer_fields(files(tmp_path, post_processor=after, beside={"add_bos_token": False}))
    assert [fields[end] for end in ends] == [False, False]


TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREFIXED = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, TO_SPACE]}
BYTE_TOKENS = [f"<0x{i:02X}>" for i in range(256)]
SP = "\u2581"
PIECES = ["<unk>", "<s>", *BYTE_TOKENS, SP, "a", "b", "ab", SP + "a", SP + "ab"]
MERGES = [["a", "b"], [SP, "a"], [SP, "ab"], [SP + "a", "b"]]


def pieces(folder, tokens=PIECES, merges=MERGES, **more):
    """As files made of sentencepiece's: pieces in the order in which they are merged."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "byte_fallback": True, "unk_token": "<unk>"}
    said = {"added_tokens": [{"id": n, "content": PIECES[n], "special": True} for n in (0, 1)], "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(said | {"normalizer": PREFIXED, "model": model} | more))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "add_bos_token": true}')
    return folder


def test_pieces_of_sentencepiece(tmp_path):
    """Bytes, scores by the order of merges, an unknown token; rows without a token have neither."""
    fields = tokenizer_fields(pieces(tmp_path))
    assert fields["tokenizer.ggml.model"] == "llama" and "tokenizer.ggml.merges" not in fields
    assert fields["tokenizer.ggml.token_type"].tolist() == [2, 3, *[6] * 256, *[1] * 6]
    assert fields["tokenizer.ggml.scores"].tolist() == [0.0] * 261 + [0, -1, -2]
    assert fields["tokenizer.ggml.add_space_prefix"] and fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    tree, names = {"embed": np.ones((266, 4), np.float32)}, [Name("embed", "token_embd.weight")]
    export(tree, tmp_path / "net.gguf", format="gguf", names=names, config=LLAMA, tokenizer=tmp_path)
    made = lcq.io.open_gguf(tmp_path / "net.gguf").fields
    lengths = [len(made[f"tokenizer.ggml.{name}"].value) for name in ("tokens", "token_type", "scores")]
    assert lengths == [266] * 3 and made["tokenizer.ggml.tokens"].value[-1] == "[PAD265]"


@pytest.mark.parametrize(
    ("more", "prefix"),
    [
        ({"normalizer": TO_SPACE}, False),
        (
            {"normalizer": TO_SPACE, "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "X"}},
            None,
        ),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": SP, "split": False}}, True),
        (
            {
                "normalizer": None,
                "pre_tokenizer": {"type": "Metaspace", "replacement": SP, "prepend_scheme": "never", "split": False},
            },
            False,
        ),
        ({"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": SP}}, None),
    ],
)
def test_a_space_before_the_text(more, prefix, tmp_path):
    pieces(tmp_path, **more)
    if prefix is None:
        with pytest.raises(ValueError, match=r"expected byte pairs on bytes .* or on pieces as sentencepiece"):
            tokenizer_fields(tmp_path)
    else:
        assert tokenizer_fields(tmp_path)["tokenizer.ggml.add_space_prefix"] == prefix


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"merges": MERGES[:3]}, r"files made of sentencepiece's have them, got others: '\u2581a b' is none of them"),
        ({"merges": [MERGES[2], *MERGES[:2], MERGES[3]]}, r"got others: those that make '\u2581ab' lie apart"),
        ({"tokens": [token for token in PIECES if token != "<0x0A>"]}, r"expected 256 tokens .*, got 255"),
    ],
)
def test_pieces_that_no_scores_stand_for(changed, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        tokenizer_fields(pieces(tmp_path, **changed))


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (
            {"model": {"type": "Unigram"}},
            r"tokenizer.json: expected byte pairs on bytes .*, got Unigram",
        ),
        ({"pre": {"type": "Metaspace"}}, r"expected byte pairs on bytes"),
        ({"model": {"merges": ["a b c"]}}, r"expected merges of two parts without spaces, got 'a b c'"),
        ({"model": {"vocab": 5}}, r"expected the tokenizer.json of a fast tokenizer"),
        (
            {"model": {"vocab": {str(i): i for i in range(12)}}},
            r"expected at most 9 tokens, .*, got 12",
        ),
    ],
)
def test_what_is_refused(more, complaint, tmp_path):
    with pytest.raises(ValueError, match=complaint):
        written(tmp_path, tokenizer=files(tmp_path, **more))
    assert not (tmp_path / "net.gguf").exists()


def test_folders_get_a_copy_and_others_have_no_place(tmp_path):
    files(tmp_path, beside={"eos_token": "b"})
    tree = {"w": np.ones((2, 2), np.float32)}
    report = export(tree, tmp_path / "net", format="compressed-tensors", tokenizer=tmp_path)
    assert report.notes == ("note: copied tokenizer.json, tokenizer_config.json",)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "net" / name).read_bytes() == (tmp_path / name).read_bytes()
    with pytest.raises(FileNotFoundError, match=r"give the tokenizer.json of the model, or its folder"):
        export(tree, tmp_path / "other", format="gptq", tokenizer=tmp_path / "net" / "lost")
    assert not (tmp_path / "other").exists()
