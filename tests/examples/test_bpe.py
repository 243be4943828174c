"""Byte pairs against a merge that goes through the list in order, and back to the text."""

import itertools
import random

import pytest

from lcq.examples.bpe import byte_pairs


def letters():
    """GPT-2's bytes_to_unicode."""
    bs = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    cs, n = bs[:], 0
    for b in range(256):
        if b not in bs:
            bs.append(b)
            cs.append(256 + n)
            n += 1
    return {b: chr(c) for b, c in zip(bs, cs, strict=True)}


def tokenizer():
    of = letters()
    merges = ["t h", "th e", "\u0120 the", "a n", "an d", "\u0120 and", "1 2", "\u010a \u010a", "\u00c3 \u00a9"]
    vocabulary = [*of.values(), *("".join(merge.split(" ")) for merge in merges)]
    return byte_pairs(vocabulary, merges), vocabulary, merges


@pytest.mark.parametrize("text", ["the and then", " the12 and", "a\n\nthe  é ☃ theand", "don't __x", "", "日本 the"])
def test_merges_in_the_order_of_the_list(text):
    found, vocabulary, merges = tokenizer()
    tokens = found.encode(text)
    assert found.decode(tokens) == text
    # No pair of neighbours inside a word is left that the list has.
    for a, b in itertools.pairwise([vocabulary[t] for t in tokens]):
        if a.isalpha() and b.isalpha() and a.isascii() and b.isascii():
            assert f"{a} {b}" not in merges


def test_digits_stand_alone_and_words_take_their_space():
    found, vocabulary, _ = tokenizer()
    assert [vocabulary[t] for t in found.encode("the 12 the and")] == [
        "the",
        "\u0120",
        "1",
        "2",
        "\u0120the",
        "\u0120and",
    ]


def test_any_bytes_come_back():
    found, *_ = tokenizer()
    rng = random.Random(0)
    for _ in range(20):
        text = "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 0x2000)])) for _ in range(20))
        assert found.decode(found.encode(text)) == text
