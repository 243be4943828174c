"""Text to tokens and back by byte pairs, as GPT-2 and SmolLM2 do: a vocabulary and an ordered list of merges."""

import functools
import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

_WORD = re.compile(
    r"'(?:s|t|re|ve|m|ll|d)| ?[^\W\d_]+|\d| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+",
)
"""What merges stay inside of: GPT-2's pattern, with digits alone."""


class Tokenizer(NamedTuple):
    """How text becomes tokens.

    Attributes:
        encode: text to tokens; none that stands for a control is made.
        decode: tokens to text; bytes that are no UTF-8 are replaced.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]


def byte_pairs(vocabulary: Sequence[str], merges: Sequence[str]) -> Tokenizer:
    """Neighbours merge, the pair that stands first in the list before all others, until none stands in it.

    Args:
        vocabulary: tokens as strings, a letter for each byte as GPT-2 has them; of a GGUF file the field
            tokenizer.ggml.tokens.
        merges: pairs with a space between them; tokenizer.ggml.merges.

    Example:
        >>> tokenizer = byte_pairs(["a", "b", "ab", "\u0120", "\u0120ab"], ["a b", "\u0120 ab"])
        >>> tokenizer.encode("ab abb"), tokenizer.decode([2, 4, 1])
        ([2, 4, 1], 'ab abb')

    Source: Sennrich, Haddow & Birch, arXiv 1508.07909; bytes as letters: GPT-2's encoder.py.
    """
    index = {token: i for i, token in enumerate(vocabulary)}
    rank = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    letters = _letters()
    back = {letter: byte for byte, letter in letters.items()}

    @functools.lru_cache(maxsize=1 << 16)
    def word(text: str) -> tuple[int, ...]:
        parts = [letters[byte] for byte in text.encode()]
        while True:
            pairs = list(itertools.pairwise(parts))
            best = min(pairs, key=lambda pair: rank.get(pair, len(rank)), default=None)
            if best not in rank:
                return tuple(index[part] for part in parts)
            at = pairs.index(best)
            parts[at : at + 2] = ["".join(best)]

    def encode(text: str) -> list[int]:
        return [token for part in _WORD.findall(text) for token in word(part)]

    def decode(tokens: Sequence[int]) -> str:
        whole = "".join(vocabulary[token] for token in tokens)
        return b"".join(bytes([back[c]]) if c in back else c.encode() for c in whole).decode(errors="replace")

    return Tokenizer(encode, decode)


def _letters() -> dict[int, str]:
    """A printable letter for each byte: itself where it is one, others from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
