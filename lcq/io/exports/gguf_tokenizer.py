"""A tokenizer of Hugging Face's libraries as metadata of GGUF: byte pairs on bytes, as GPT-2, Llama 3 and SmolLM2 have.

    tokenizer.ggml.model         gpt2
    tokenizer.ggml.pre           how text is cut before merges: what llama.cpp calls the pre-tokenizer
    tokenizer.ggml.tokens        by number
    tokenizer.ggml.token_type    1 normal, 3 control (special), 4 added by the user, 5 unused
    tokenizer.ggml.merges        "a b", the first before all others
    tokenizer.ggml.X_token_id    of bos, eos, unknown, padding, where the files beside it say them
    tokenizer.chat_template      likewise

Source: llama.cpp's convert_hf_to_gguf.py, get_vocab_base and _set_vocab_gpt2; gguf-py/gguf/vocab.py; the expressions in
llama-vocab.cpp.
"""

import os
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

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

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
    if model.get("type") not in ("BPE", None) or "merges" not in model or not _on_bytes(said):
        raise ValueError(
            f"{path}: expected byte pairs on bytes (BPE, ByteLevel), got {model.get('type')}; make the tokenizer's "
            "fields with llama.cpp's convert_hf_to_gguf.py --vocab-only, and give those as config"
        )
    tokens, kinds = _tokens(path, model["vocab"], said.get("added_tokens") or [])
    fields: dict[str, Json] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre or _pre(path, said),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [_merge(path, merge) for merge in model["merges"]],
    }
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
    return fields | {
        "tokenizer.ggml.tokens": tokens + [f"[PAD{number}]" for number in more],
        "tokenizer.ggml.token_type": np.append(kinds, np.full(len(more), UNUSED, np.int32)),
    }


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
