"""Schemes and rules as text, and the dry run."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import lcq
from lcq.base import Scheme
from lcq.plan import SCHEMES, dry_run, format_rule, format_scheme, parse_rule, parse_scheme

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
        (lcq.Levels((-1, 1), scale=True), "Binary()"),
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
        ("Kmeens(4)", "known schemes: KMeans(k"),
        ("", "known schemes"),
        ("KMeans(", "does not parse"),
        ("KMeans(4); import os", "does not parse"),
        ("4", "wanted a scheme"),
        ("None", "wanted a scheme"),
        ("os.system('true')", "wanted a scheme"),
        ("KMeans.mro()", "wanted a scheme"),
        ("KMeans(4)(4)", "wanted a scheme"),
        ("KMeans(__import__('os').getpid())", "plain numbers"),
        ("KMeans(2**3)", "plain numbers"),
        ("KMeans(*(4,))", "plain numbers"),
        ("KMeans(**{'k': 4})", "plain numbers"),
        ("KMeans()", "'k'; wanted KMeans(k"),
        ("KMeans(4, levels=3)", "'levels'; wanted KMeans(k"),
        ("KMeans(4, 4, 4, 4, 4, 4, 4)", "wanted KMeans(k"),
        ("KMeans('4')", "wanted k: int; got '4'"),
        ("KMeans(True)", "wanted k: int; got True"),
        ("Binary(scale='no')", "wanted scale: bool; got 'no'"),
        ("Levels(('a', 'b'))", "wanted values"),
        ("Uniform(4, per=1.5)", "wanted per"),
        ("Uniform(99)", "16 bits"),
        ("PowersOfTwo(-1)", "0 <= c <= 126"),
        ("Cast('int8')", "floating-point"),
        ("KMeans(" + "(" * 5000 + ")" * 5000 + ")", "wanted"),
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
        ("kernel", "wanted PATTERN=SCHEME"),
        ("kernel:KMeans(4)", "wanted PATTERN=SCHEME"),
        ("kernel=Kmeens(4)", "known schemes"),
        ("kernel=KMeans(4", "wanted PATTERN=SCHEME"),
        ("kernel=KMeans(4); jiont", "got 'jiont'"),
        ("kernel=KMeans(4); stacked=-1", "got 'stacked=-1'"),
        ("(kernel=KMeans(4)", "regular expression"),
        ("kernel=KMeans('4')", "wanted k: int"),
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


RULES = [
    lcq.Rule("head/.*", None),
    lcq.Rule("block/kernel", lcq.KMeans(4, per="channel"), stacked=1),
    lcq.Rule("(a|b)/kernel", lcq.KMeans(3), joint=True),
    lcq.Rule("c/kernel", lcq.Uniform(4, per=4, zero_point=True)),
    lcq.Rule("d/kernel", Own()),
    lcq.Rule("(.*/)?bias", lcq.Cast("float16")),
]


def params():
    rng = np.random.default_rng(0)
    shapes = {"head": (4, 2), "block": (2, 8, 4), "a": (8, 4), "b": (5,), "c": (8, 4), "d": (3, 3)}
    tree = {name: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for name, s in shapes.items()}
    return tree | {"bias": jnp.ones(7), "count": jnp.arange(3)}


def test_dry_run_is_what_compress_costs():
    tree = params()
    planned, real = dry_run(tree, RULES), lcq.table(lcq.compress(tree, RULES))
    assert [(r.path, r.shape, r.form, r.bits) for r in planned.rows] == [
        (r.path, r.shape, r.form, r.bits) for r in real.rows
    ]
    assert (
        planned.total.bits
        == real.total.bits
        == sum(size.bits for size in lcq.sizes(lcq.compress(tree, RULES)).values())
    )
    asked = {row.path: (row.rule, row.scheme) for row in planned.rows}
    assert asked["head/kernel"] == ("head/.*", "None")
    assert asked["block/kernel"] == ("block/kernel", "KMeans(4, per='channel'); stacked=1")
    assert asked["b/kernel"] == ("(a|b)/kernel", "KMeans(3); joint")
    assert asked["d/kernel"] == ("d/kernel", "Own()")
    assert asked["count"] == (None, None)
    assert all(words in str(planned) for words in ("rule", "(a|b)/kernel", "KMeans(3); joint"))


def test_dry_run_of_exact_schemes_and_shape_structs():
    shapes = {
        "w": jax.ShapeDtypeStruct((1 << 16, 1 << 12), jnp.bfloat16),
        "v": jax.ShapeDtypeStruct((64,), jnp.float32),
    }
    rules = [lcq.Rule("w", lcq.KMeans(16, exact=True)), lcq.Rule("v", lcq.Levels((0, 1), scale=True, exact=True))]
    v, w = dry_run(shapes, rules).rows
    assert w.bits == 4 * 2**28 + 16 * 32 and v.bits == 64 + 32


def test_dry_run_checks_the_rules():
    with pytest.raises(ValueError, match="nearest of"):
        dry_run(params(), [lcq.Rule("kernle", lcq.KMeans(2))])
