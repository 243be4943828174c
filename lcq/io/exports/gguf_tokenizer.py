"""A tokenizer of Hugging Face's libraries as metadata of GGUF: byte pairs on bytes, as GPT-2, Llama 3 and SmolLM2 have,
or pieces of sentencepiece in whose place bytes stand, as Llama 2, Mistral and Gemma have.

    tokenizer.ggml.model         gpt2, or llama of pieces
    tokenizer.ggml.pre           how text is cut before merges: what llama.cpp calls the pre-tokenizer
    tokenizer.ggml.tokens        by number
    tokenizer.ggml.token_type    1 normal, 2 unknown, 3 control (special), 4 added by the user, 5 unused, 6 a byte
    tokenizer.ggml.merges        "a b", the first before all others, on bytes
    tokenizer.ggml.scores        of pieces: 0 for the one that is merged before all others, then -1, -2, ..
    tokenizer.ggml.add_space_prefix   of pieces, whether a space is put before the text
    tokenizer.ggml.X_token_id    of bos, eos, unknown, padding, where the files beside it say them
    tokenizer.chat_template      likewise

llama.cpp merges the neighbours that make the piece of the highest score, whichever they are. So merges become scores if
all ways in which two pieces make a third are among them, and those that make one piece follow each other, as in files
that were made of sentencepiece's.

Source: llama.cpp's convert_hf_to_gguf.py, get_vocab_base, _set_vocab_gpt2 and _set_vocab_llama_hf;
gguf-py/gguf/vocab.py; the expressions, and llm_tokenizer_spm, in llama-vocab.cpp; SentencePieceExtractor in
transformers' convert_slow_tokenizer.py.
"""

import itertools
import os
import re
from pathlib import Path

import numpy as np

from lcq.io.container import Json, read_object

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_SPLITS = {
    _ENDINGS + _WORDS + r"\p{N}{1,3}" + _SPACES: "llama-bpe",
    _ENDINGS + _WORDS + r"\p{N}" + _SPACES: "qwen2",
}
"""Names of expressions that cut text."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_PREFIX = {"type": "Prepend", "prepend": _SPACE}
_PREFIXES = {"always": True, "first": True, "never": False}

_IDS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Special tokens by their names there and in GGUF."""


def tokenizer_fields(path: str | os.PathLike[str], pre: str | None = None) -> dict[str, Json]:
    """Metadata of a tokenizer.json, and of the tokenizer_config.json and config.json beside it.

    Args:
        path: of the file, or its folder.
        pre: what llama.cpp calls the way in which text is cut; None to tell it by the file.

    Raises:
        ValueError: no JSON of a tokenizer, one that is not of byte pairs on bytes, or one that cuts text in a way that
            llama.cpp has no known name for.
        FileNotFoundError: there is none.
    """
    path = tokenizer_of(path)
    said, folder = _read(path), path.parent
    model = said.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict) or not isinstance(said, dict):
        raise ValueError(f"{path}: expected the tokenizer.json of a fast tokenizer, got another file")
    if model.get("type") not in ("BPE", None) or "merges" not in model or not (_on_bytes(said) or _of_pieces(said)):
        raise ValueError(
            f"{path}: expected byte pairs on bytes (BPE, ByteLevel), or on pieces as sentencepiece (byte_fallback), "
            f"got {model.get('type')}; make the tokenizer's fields with llama.cpp's convert_hf_to_gguf.py "
            "--vocab-only, and give those as config"
        )
    tokens, kinds = _tokens(path, model["vocab"], said.get("added_tokens") or [])
    merges = [_merge(path, merge) for merge in model["merges"]]
    fields: dict[str, Json] = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": np.array(kinds, np.int32)}
    if _on_bytes(said):
        fields |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre or _pre(path, said)}
        fields["tokenizer.ggml.merges"] = merges
    else:
        fields |= _pieces(path, said, tokens, kinds, merges)
    beside = {name: _read(folder / name, missing={}) for name in ("config.json", "tokenizer_config.json")}
    numbers = {token: number for number, token in enumerate(tokens)}
    for theirs, ours in _IDS.items():
        number = _special(theirs, beside, numbers)
        if number is not None:
            fields[f"tokenizer.ggml.{ours}_token_id"] = np.uint32(number)
    for end, place in (("bos", 0), ("eos", -1)):
        fields[f"tokenizer.ggml.add_{end}_token"] = _adds(end, place, said, beside["tokenizer_config.json"])
    template = beside["tokenizer_config.json"].get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8-sig")
    return fields | ({"tokenizer.chat_template": template} if isinstance(template, str) else {})


def tokenizer_of(path: str | os.PathLike[str]) -> Path:
    """The path of the tokenizer.json, of that or of its folder."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the tokenizer.json of the model, or its folder")
    return path


def padded_to(fields: dict[str, Json], rows: int) -> dict[str, Json]:
    """The same with unused tokens for the rows of an embedding that have none.

    Raises:
        ValueError: more tokens than rows.

    Example:
        >>> fields = {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.token_type": np.array([1], np.int32)}
        >>> padded_to(fields, 3)["tokenizer.ggml.tokens"]
        ['a', '[PAD1]', '[PAD2]']
    """
    tokens, kinds = list(fields["tokenizer.ggml.tokens"]), fields["tokenizer.ggml.token_type"]
    if len(tokens) > rows:
        raise ValueError(f"tokenizer: expected at most {rows} tokens, as the embedding has, got {len(tokens)}")
    more = range(len(tokens), rows)
    made = {
        "tokenizer.ggml.tokens": tokens + [f"[PAD{number}]" for number in more],
        "tokenizer.ggml.token_type": np.append(kinds, np.full(len(more), UNUSED, np.int32)),
    }
    if (scores := fields.get("tokenizer.ggml.scores")) is not None:
        made["tokenizer.ggml.scores"] = np.append(scores, np.zeros(len(more), np.float32))
    return fields | made


def _read(path: Path, missing: Json = None) -> Json:
    return missing if missing is not None and not path.is_file() else read_object(path)


def _steps(said: Json) -> list[Json]:
    """What cuts text, one after another."""
    found = said.get("pre_tokenizer")
    if not isinstance(found, dict):
        return []
    return list(found.get("pretokenizers") or []) if found.get("type") == "Sequence" else [found]


def _on_bytes(said: Json) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(said))


def _of_pieces(said: Json) -> bool:
    model = said["model"]
    return bool(model.get("byte_fallback")) and not model.get("ignore_merges") and _space_prefix(said) is not None


def _space_prefix(said: Json) -> bool | None:
    """Whether a space is put before a text whose spaces become letters, as sentencepiece does; None of other ways."""
    steps, normalizer = _steps(said), said.get("normalizer") or {}
    several = normalizer.get("normalizers") or ([normalizer] if normalizer else [])
    match several, steps:
        case [first, second], [] if first == _PREFIX and second == _TO_SPACE:
            return True
        case [one], [] if one == _TO_SPACE:
            return False
        case [one], [{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}] if (
            one == _TO_SPACE
        ):
            return False
        case [], [{"type": "Metaspace", "replacement": letter, "split": False} as step] if letter == _SPACE:
            return _PREFIXES.get(str(step.get("prepend_scheme", "always")))
    return None


def _pieces(path: Path, said: Json, tokens: list[str], kinds: list[int], merges: list[str]) -> dict[str, Json]:
    """The fields of pieces alone; their types are set.

    Raises:
        ValueError: bytes without a token, or merges that no scores stand for.
    """
    for number, token in enumerate(tokens):
        if _BYTE.fullmatch(token):
            kinds[number] = BYTE
        elif token == said["model"].get("unk_token"):
            kinds[number] = UNKNOWN
    if kinds.count(BYTE) != 256:
        raise ValueError(f"{path}: expected 256 tokens from <0x00> to <0xFF>, got {kinds.count(BYTE)}")
    made = [merge.replace(" ", "") for merge in merges]
    order = [piece for piece, _ in itertools.groupby(made)]
    known = {token for token, kind in zip(tokens, kinds, strict=True) if kind == NORMAL}
    there, ranks = set(merges), {piece: rank for rank, piece in enumerate(order)}
    for piece in known:
        for cut in range(1, len(piece)):
            parts = piece[:cut], piece[cut:]
            if known.issuperset(parts) and " ".join(parts) not in there:
                raise ValueError(_no_scores(path, f"{' '.join(parts)!r} is none of them"))
    if len(ranks) < len(order):
        twice = next(piece for piece in order if order.count(piece) > 1)
        raise ValueError(_no_scores(path, f"those that make {twice!r} lie apart"))
    scores = np.array([-ranks.get(token, 0) for token in tokens], np.float32)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _space_prefix(said),
    }


def _no_scores(path: Path, why: str) -> str:
    return (
        f"{path}: expected merges that are in order of the pieces that they make, all of each, as files made of "
        f"sentencepiece's have them, got others: {why}; give the tokenizer's fields as config"
    )


def _pre(path: Path, said: Json) -> str:
    """What llama.cpp calls the way in which text is cut."""
    match _steps(said):
        case [{"type": "ByteLevel", "use_regex": True}] | [{"type": "ByteLevel"}] if _cuts(said):
            return "gpt-2"
        case [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}] if _cuts(said):
            return "smollm"
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}, {"type": "ByteLevel"}] if (
            pattern in _SPLITS and not _cuts(said)
        ):
            return _SPLITS[pattern]
    raise ValueError(
        f"{path}: expected a pre-tokenizer as GPT-2, SmolLM2, Llama 3 or Qwen 2 have it, got another; say what "
        "llama.cpp calls it: config={'tokenizer.ggml.pre': NAME, ..}"
    )


def _cuts(said: Json) -> bool:
    """Whether bytes are cut by GPT-2's expression, and no space is put before the text."""
    last = _steps(said)[-1]
    return bool(last.get("use_regex", True)) and not last.get("add_prefix_space", False)


def _tokens(path: Path, vocabulary: Json, added: Json) -> tuple[list[str], list[int]]:
    """Tokens by number, and their types; numbers that none has are unused."""
    known = {number: (token, NORMAL) for token, number in vocabulary.items()}
    known |= {each["id"]: (each["content"], CONTROL if each.get("special") else USER_DEFINED) for each in added}
    if not known or min(known) < 0 or max(known) >= 1 << 24:
        raise ValueError(f"{path}: expected tokens with numbers from 0 to {(1 << 24) - 1}, got others")
    every = [known.get(number, (f"[PAD{number}]", UNUSED)) for number in range(max(known) + 1)]
    return [token for token, _ in every], [kind for _, kind in every]


def _merge(path: Path, merge: Json) -> str:
    """Older files have them as text, newer ones as pairs."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2 or any(" " in part for part in pair):
        raise ValueError(f"{path}: expected merges of two parts without spaces, got {merge!r:.80}")
    return " ".join(pair)


def _special(name: str, beside: dict[str, Json], numbers: dict[str, int]) -> int | None:
    """The number of a special token: of tokenizer_config.json by its text, else of config.json."""
    told = beside["tokenizer_config.json"].get(f"{name}_token")
    text = told.get("content") if isinstance(told, dict) else told
    if text in numbers:
        return numbers[text]
    number = beside["config.json"].get(f"{name}_token_id")
    number = number[0] if isinstance(number, list) and number else number
    return number if isinstance(number, int) and 0 <= number < len(numbers) else None


def _adds(end: str, place: int, said: Json, told: Json) -> bool:
    """Whether a special token is put before a text, or after it."""
    if isinstance(given := told.get(f"add_{end}_token"), bool):
        return given
    after = said.get("post_processor") or {}
    several = after.get("processors") or [after]
    templates = [each.get("single") or [] for each in several if each.get("type") == "TemplateProcessing"]
    return any(template and "SpecialToken" in template[place] for template in templates)
