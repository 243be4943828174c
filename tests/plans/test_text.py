"""Schemes and rules as text."""

import contextlib
import dataclasses
from typing import Literal

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import lcq
from lcq.plans.text import format_rule, format_scheme, parse_rule, parse_scheme
from lcq.schemes import SCHEMES
from lcq.schemes.base import Scheme

# Schemes built inside strategies are checked by beartype, which draws at random what it looks at.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")

PER = st.one_of(
    st.none(),
    st.just("channel"),
    st.integers(1, 512),
    st.lists(st.integers(0, 64), min_size=1, max_size=4).map(tuple),
)
FLOATS = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
SCALED = st.one_of(
    st.just({"scale": False}),
    st.builds(lambda per, exact: {"scale": True, "per": per, "exact": exact}, PER, st.booleans()),
)


def plain(settings):
    return {key: value for key, value in settings.items() if key != "exact"}


schemes = st.one_of(
    st.builds(lcq.KMeans, k=st.integers(1, 300), exact=st.booleans(), per=PER),
    st.builds(
        lambda fixed, more: lcq.KMeans(len(fixed) + more, fixed=tuple(fixed)),
        st.lists(FLOATS, unique=True, min_size=1, max_size=4),
        st.integers(1, 3),
    ),
    st.builds(
        lambda values, settings: lcq.Levels(tuple(values), **settings),
        st.lists(FLOATS.filter(bool), min_size=1, max_size=9),
        SCALED,
    ),
    st.builds(lambda settings: lcq.Binary(**plain(settings)), SCALED),
    st.builds(lambda settings: lcq.Ternary(**plain(settings)), SCALED),
    st.builds(lambda c, settings: lcq.PowersOfTwo(c, **plain(settings)), st.integers(0, 126), SCALED),
    st.builds(lcq.Uniform, bits=st.integers(2, 16), per=PER, zero_point=st.booleans()),
    st.builds(lcq.Cast, format=st.sampled_from(["bfloat16", "float16", "float8_e4m3fn", "float32"])),
)


@given(schemes)
def test_text_of_a_scheme_reads_back(scheme):
    text = format_scheme(scheme)
    assert parse_scheme(text) == scheme
    assert text.count(" = ") == 0 and text.partition("(")[0] in SCHEMES


@given(
    st.from_regex(r"[a-z0-9/().*?=|\\;]{1,12}", fullmatch=True).filter(lambda s: compiles(s)),
    st.one_of(st.none(), schemes),
    st.booleans(),
    st.integers(0, 3),
)
def test_text_of_a_rule_reads_back(pattern, scheme, joint, stacked):
    rule = lcq.Rule(pattern, scheme, joint=joint, stacked=stacked)
    assert parse_rule(format_rule(rule)) == rule


def compiles(pattern):
    try:
        lcq.Rule(pattern, None)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("text", "scheme"),
    [
        ("KMeans(4, per='channel')", lcq.KMeans(4, per="channel")),
        ("kmeans(k=4)", lcq.KMeans(4)),
        (" lcq.KMeans( k = 4 ) ", lcq.KMeans(4)),
        ("k_means(2, fixed=[0])", lcq.KMeans(2, fixed=(0,))),
        ("Levels([-1, 0, 1.5], scale=True)", lcq.Levels((-1, 0, 1.5), scale=True)),
        ("binary", lcq.Binary()),
        ("Ternary()", lcq.Ternary()),
        ("powers_of_two(3)", lcq.PowersOfTwo(3)),
        ("UNIFORM(bits=8, per=(1, 0))", lcq.Uniform(8, per=(1, 0))),
        ("Cast", lcq.Cast("bfloat16")),
    ],
)
def test_spellings(text, scheme):
    assert parse_scheme(text) == scheme


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (lcq.KMeans(4), "KMeans(4)"),
        (lcq.KMeans(4, rate=0), "KMeans(4)"),
        (lcq.KMeans(16, rate=1), "KMeans(16, rate=1.0)"),
        (lcq.Binary(scale=True), "Binary()"),
        (lcq.Levels((-1, 1), scale=True), "Levels((-1, 1), scale=True)"),
        (lcq.Levels((-1, 1), scale=True, exact=True), "Levels((-1, 1), scale=True, exact=True)"),
        (lcq.Ternary(scale=False), "Ternary(scale=False)"),
        (lcq.PowersOfTwo(1), "PowersOfTwo(1)"),
        (lcq.Levels((0.5,)), "Levels((0.5,))"),
        (lcq.Cast("bfloat16"), "Cast()"),
        (lcq.Uniform(4, per=64), "Uniform(4, per=64)"),
    ],
)
def test_text_is_what_one_would_write(scheme, text):
    assert format_scheme(scheme) == text


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Kmeens(4)", "known schemes: Additive, Cast, "),
        ("Kmeens(4)", "; nearest: KMeans(k, "),
        ("lcq.Unifrom", "; nearest: Uniform(bits, "),
        ("Cast(bfloat16)", 'got the name bfloat16; put it in quotes: "bfloat16"'),
        ("Additive(KMeans(2), KMeans(2, per=channel))", 'put it in quotes: "channel"'),
        ("", "known schemes"),
        ("KMeans(", "does not parse"),
        ("KMeans(4); import os", "does not parse"),
        ("4", "expected a scheme"),
        ("None", "expected a scheme"),
        ("os.system('true')", "expected a scheme"),
        ("KMeans.mro()", "expected a scheme"),
        ("KMeans(4)(4)", "expected a scheme"),
        ("KMeans(__import__('os').getpid())", "plain numbers"),
        ("KMeans(2**3)", "plain numbers, strings, tuples and schemes as settings; KMeans(k, "),
        ("KMeans(*(4,))", "plain numbers"),
        ("KMeans(**{'k': 4})", "plain numbers"),
        ("KMeans()", "'k'; expected KMeans(k"),
        ("KMeans(4, levels=3)", "'levels'; expected KMeans(k"),
        ("KMeans(4, 4, 4, 4, 4, 4, 4)", "expected KMeans(k"),
        ("KMeans('4')", "expected k: int, got '4'"),
        ("KMeans(True)", "expected k: int, got True"),
        ("Binary(scale='no')", "expected scale: bool, got 'no'"),
        ("Levels(('a', 'b'))", "expected values"),
        ("Uniform(4, per=1.5)", "expected per"),
        ("Uniform(99)", "16 bits"),
        ("PowersOfTwo(-1)", "0 <= c <= 126"),
        ("Cast('int8')", "floating-point"),
        ("KMeans(" + "(" * 5000 + ")" * 5000 + ")", "expected"),
    ],
)
def test_errors_say_what_is_known(text, complaint):
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        parse_scheme(text)
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("(.*/)?kernel=KMeans(4)", lcq.Rule("(.*/)?kernel", lcq.KMeans(4))),
        ("kernel = kmeans(k=4)", lcq.Rule("kernel", lcq.KMeans(4))),
        ("a(?=b)b=KMeans(4, per=None)", lcq.Rule("a(?=b)b", lcq.KMeans(4))),
        ("x=Binary=Binary()", lcq.Rule("x=Binary", lcq.Binary())),
        ("head/.*=None", lcq.Rule("head/.*", None)),
        ("a|b=KMeans(4); joint", lcq.Rule("a|b", lcq.KMeans(4), joint=True)),
        ("w=lcq.Ternary;stacked=2;joint", lcq.Rule("w", lcq.Ternary(), joint=True, stacked=2)),
        ("w=Levels((1, 2), scale=True)", lcq.Rule("w", lcq.Levels((1, 2), scale=True))),
    ],
)
def test_rules(text, rule):
    assert parse_rule(text) == rule


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("kernel", "expected PATTERN=SCHEME"),
        ("kernel:KMeans(4)", "expected PATTERN=SCHEME"),
        ("kernel=Kmeens(4)", "known schemes"),
        ("kernel=Kmeens(4, per=None)", "; nearest: KMeans(k, "),
        ("kernel=KMeans(4", "expected PATTERN=SCHEME"),
        ("kernel=KMeans(4); jiont", "got 'jiont'"),
        ("kernel=KMeans(4); stacked=-1", "got 'stacked=-1'"),
        ("(kernel=KMeans(4)", "regular expression"),
        ("kernel=KMeans('4')", "expected k: int"),
    ],
)
def test_rule_errors(text, complaint):
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        parse_rule(text)
    assert complaint in str(caught.value)


@dataclasses.dataclass(frozen=True)
class Own(Scheme):
    """A scheme of a user's own."""

    def check(self, shape):
        del shape

    def solve(self, xs, previous, mu):
        return lcq.Cast().solve(xs, previous, mu)


def test_schemes_without_a_text_are_refused():
    with pytest.raises(ValueError, match="known schemes"):
        format_scheme(Own())
    with pytest.raises(ValueError, match="known schemes"):
        format_rule(lcq.Rule("w", Own()))


# Schemes as settings of schemes


@dataclasses.dataclass(frozen=True)
class Thinned(Own):
    """Keeps a share of the weights, as they are or quantized."""

    kept: float
    values: Scheme | None = None
    norm: Literal["l1", "l2"] = "l2"


@dataclasses.dataclass(frozen=True, init=False)
class Total(Own):
    """A sum of forms."""

    parts: tuple[Scheme, ...]
    rounds: int
    first: tuple[Scheme, ...] = ()

    def __init__(self, *parts: Scheme, rounds: int, first: tuple[Scheme, ...] = ()):
        if not parts:
            raise ValueError("expected parts")
        for name, value in {"parts": parts, "rounds": rounds, "first": first}.items():
            object.__setattr__(self, name, value)


@contextlib.contextmanager
def two_more():
    """The schemes, with two more that take schemes."""
    SCHEMES.register("Thinned")(Thinned)
    SCHEMES.register("Total")(Total)
    try:
        yield
    finally:
        SCHEMES.unregister("Thinned")
        SCHEMES.unregister("Total")


@pytest.fixture
def more():
    with two_more():
        yield


nested = st.recursive(
    schemes,
    lambda inner: st.one_of(
        st.builds(Thinned, st.floats(0, 1), st.one_of(st.none(), inner), st.sampled_from(["l1", "l2"])),
        st.builds(
            lambda parts, rounds, first: Total(*parts, rounds=rounds, first=tuple(first)),
            st.lists(inner, min_size=1, max_size=3),
            st.integers(1, 9),
            st.lists(inner, max_size=2),
        ),
    ),
    max_leaves=6,
)


@given(nested)
def test_text_of_nested_schemes_reads_back(scheme):
    with two_more():
        assert parse_scheme(format_scheme(scheme)) == scheme
        rule = lcq.Rule("a=(b)?", scheme, stacked=1)
        assert parse_rule(format_rule(rule)) == rule


@pytest.mark.parametrize(
    ("text", "scheme", "again"),
    [
        ("Thinned(1, values=k_means(16))", Thinned(1, lcq.KMeans(16)), "Thinned(1, values=KMeans(16))"),
        ("thinned(kept=1.0, values=binary, norm='l1')", Thinned(1.0, lcq.Binary(), "l1"), None),
        ("Total(KMeans(2), Thinned(0.01), rounds=3)", Total(lcq.KMeans(2), Thinned(0.01), rounds=3), None),
        (
            "Total(lcq.Total(Cast, rounds=1), rounds=1, first=[Cast(), Uniform(2)])",
            Total(Total(lcq.Cast(), rounds=1), rounds=1, first=(lcq.Cast(), lcq.Uniform(2))),
            "Total(Total(Cast(), rounds=1), rounds=1, first=(Cast(), Uniform(2)))",
        ),
    ],
)
def test_nested_schemes(more, text, scheme, again):
    assert parse_scheme(text) == scheme
    assert again is None or format_scheme(scheme) == again
    assert parse_rule(f"x=KMeans=y={text}; joint") == lcq.Rule("x=KMeans=y", scheme, joint=True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("Thinned(0.5, values=4)", "expected values: "),
        ("Thinned(0.5, values=Kmeens(4))", "plain numbers"),
        ("Thinned(0.5, values=KMeans('4'))", "expected k: int, got '4'"),
        ("Thinned(0.5, norm='l3')", "expected norm: "),
        ("Thinned(KMeans(2))", "expected kept: float, got KMeans"),
        ("Total(rounds=1)", "expected parts"),
        ("Total(KMeans(2), 3, rounds=1)", "expected parts: tuple"),
        ("Total(KMeans(2))", "'rounds'; expected Total(*parts, rounds, first=())"),
        ("Total(*[KMeans(2)], rounds=1)", "plain numbers"),
        ("Total(os.system('true'), rounds=1)", "plain numbers"),
        ("KMeans(Binary)", "expected k: int, got Binary"),
        ("Total(" * 300 + ")" * 300, "expected"),
    ],
)
def test_nested_schemes_that_are_none(more, text, complaint):
    with pytest.raises(ValueError, match=r"(?s).*") as caught:
        parse_scheme(text)
    assert complaint in str(caught.value)


def test_a_nested_scheme_needs_a_text_too(more):
    with pytest.raises(ValueError, match=r"expected a scheme that has a text, got Own\(\)"):
        format_scheme(Total(lcq.Cast(), Own(), rounds=1))


def test_settings_of_numpy_have_a_text(more):
    assert format_scheme(Thinned(np.float32(0.5))) == "Thinned(0.5)"
