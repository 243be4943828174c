"""Layouts of leaves, and which leaves seem to be stacks of layers."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms.axes import block_lengths, letters
from lcq.plans.plan import parse_plan

CHANNEL = lcq.Uniform(4, per="channel")


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def compressed(w, scheme, **settings):
    return lcq.compress({"w": w}, [lcq.Rule("w", scheme, **settings)])["w"]


# Layouts

TURNED = [  # a layout, the leaf's shape, and the order of axes that makes it a kernel of JAX
    ("oi", (6, 8), (1, 0)),
    ("oihw", (6, 8, 2, 3), (2, 3, 1, 0)),
    ("oi", (6, 8, 2, 3), (2, 3, 1, 0)),
    ("oiw", (6, 8, 3), (2, 1, 0)),
    ("io", (8, 6), (0, 1)),
    ("hwio", (2, 3, 8, 6), (0, 1, 2, 3)),
]
SCHEMES = [
    CHANNEL,
    lcq.Uniform(3, per=4),
    lcq.KMeans(2, per="channel"),
    lcq.Binary(scale=True, per=2),
    lcq.PruneGroups("channel", count=2),
    lcq.NofM(1, 4),
    lcq.Additive(lcq.Binary(per="channel"), lcq.Prune(count=3)),
    lcq.KMeans(3),
    lcq.Cast(),
]


@pytest.mark.parametrize(("layout", "shape", "order"), TURNED)
def test_a_layout_is_the_kernel_of_jax_turned(layout, shape, order):
    """Of schemes that look at axes, and of some that do not: the leaf as it is, or turned to JAX's layout first."""
    w = draw(*shape)
    for scheme in SCHEMES if layout == "oihw" else SCHEMES[:2]:
        form = compressed(w, scheme, layout=layout)
        plain = compressed(w.transpose(order), scheme, layout="wwio"[-len(shape) :])
        assert form.shape == shape
        np.testing.assert_allclose(form.dense().transpose(order), plain.dense(), atol=1e-6, err_msg=str(scheme))
        assert form.bits == plain.bits


def test_heads():
    """[inputs, heads, units]: a neuron is a head and a unit; [heads, units, outputs]: inputs are."""
    w = draw(8, 2, 3)
    for scheme in (CHANNEL, lcq.Uniform(4, per=4)):
        matrix = compressed(w.reshape(8, 6), scheme).dense()
        np.testing.assert_allclose(compressed(w, scheme, layout="ioo").dense().reshape(8, 6), matrix, atol=1e-6)
    w = draw(2, 4, 5)
    for scheme in (CHANNEL, lcq.Uniform(4, per=4), lcq.Uniform(4, per=2)):
        matrix = compressed(w.reshape(8, 5), scheme).dense()
        np.testing.assert_allclose(compressed(w, scheme, layout="iio").dense().reshape(8, 5), matrix, atol=1e-6)


def test_stacked_leaves_with_a_layout():
    w = draw(3, 6, 8)
    form = compressed(w, lcq.Uniform(4, per=4), stacked=1, layout="oi")
    for one, alone in zip(w, form.dense(), strict=True):
        np.testing.assert_allclose(alone, compressed(one.T, lcq.Uniform(4, per=4)).dense().T, atol=1e-6)


def test_products_of_leaves_with_a_layout_run_on_codes(tmp_path):
    """And are what they were after a file, and prepacked."""
    params, x = {"w": draw(6, 64)}, draw(2, 64, seed=1)
    net = lcq.packed(lambda p, x: x @ p["w"].T)
    for scheme in (CHANNEL, lcq.Uniform(4, per=32), lcq.KMeans(4, per="channel"), lcq.Binary(per="channel")):
        forms = lcq.compress(params, [lcq.Rule("w", scheme, layout="oi")])
        lcq.save(tmp_path / "w.lcq", forms)
        assert {use.how for use in net.report(forms, x)} == {"product"}
        wanted = x @ forms["w"].dense().T
        for tree in (forms, lcq.load(tmp_path / "w.lcq"), net.prepack(forms, x)):
            np.testing.assert_allclose(net(tree, x), wanted, atol=1e-4)


def test_lc_on_leaves_with_a_layout():
    import optax

    w = draw(6, 8)
    rules = [lcq.Rule("w", lcq.KMeans(2, per="channel"), layout="oi")]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=0.1, every=1)
    state = tx.init({"w": w})
    assert lcq.extract(state, {"w": w})["w"].levels.shape == (6, 1, 2)


def test_quantize_takes_neurons_whatever_the_layout():
    params, x = {"w": draw(6, 8), "e": draw(5, 8)}, draw(40, 8, seed=1)

    def fn(p, x):
        return (x + p["e"][0]) @ p["w"].T

    rules = [lcq.Rule("w", CHANNEL, layout="oi")]
    near = [lcq.Rule("e", CHANNEL, layout="oi")]
    done = lcq.quantize(fn, params, [x], rules, rtn=near)
    plain = lcq.quantize(fn, params, [x], [lcq.Rule("w", CHANNEL)], rtn=near)
    np.testing.assert_array_equal(done.forms["w"].codes, plain.forms["w"].codes)
    assert done.forms["w"].scale.shape == (6, 1) and done.forms["e"].scale.shape == (5, 1)


def test_layouts_as_text_and_toml():
    from lcq.plans.text import format_rule, parse_rule

    rule = lcq.Rule("w", CHANNEL, stacked=1, layout="oihw")
    assert parse_rule(format_rule(rule)) == rule and format_rule(rule).endswith("; stacked=1; layout=oihw")
    assert parse_rule("w=Uniform(4); layout='oi'").layout == "oi"
    assert parse_plan(str(lcq.Plan([rule]))).rules == (rule,)
    assert "layout" not in str(lcq.Plan([lcq.Rule("w", CHANNEL)]))
    with pytest.raises(ValueError, match=r"rule 1: rule 'w': expected layout= a letter for each axis.*, got 'oo'"):
        parse_plan("[[rule]]\npattern = 'w'\nscheme = 'Cast'\nlayout = 'oo'")


@pytest.mark.parametrize("layout", ["", "o", "i", "OI", "o i", "oi1"])
def test_layouts_that_are_none(layout):
    with pytest.raises(ValueError, match="rule 'w': expected layout= a letter for each axis"):
        lcq.Rule("w", CHANNEL, layout=layout)


def test_layouts_that_do_not_fit():
    with pytest.raises(ValueError, match=r"rule 'w': expected layout= or lengths as a tuple, got .* drop one"):
        lcq.Rule("w", lcq.Uniform(4, per=(1, 0)), layout="oi")
    with pytest.raises(ValueError, match=r"^w: layout='oihw' names 4 axes, got 2; change rule 'w', or exclude it"):
        compressed(draw(4, 4), CHANNEL, layout="oihw")
    with pytest.raises(ValueError, match=r"^w: LowRank.* wants one axis of outputs, the last, .* transpose"):
        compressed(draw(4, 4, 2, 2), lcq.LowRank(1), layout="oihw")
    assert compressed(draw(4, 4), lcq.LowRank(1), layout="oi").shape == (4, 4)
    with pytest.raises(ValueError, match=r"rule '.': joint leaves with a layout must have equally many axes"):
        rule = lcq.Rule(".", lcq.PruneGroups("channel", fraction=0.5), joint=True, layout="oi")
        lcq.compress({"v": draw(4, 4), "w": draw(4, 4, 1, 1)}, [rule])


def test_lengths():
    assert block_lengths((3, 0), "oi", 2) == (3, 0) and block_lengths(None, "oi", 2) is None
    assert block_lengths("channel", "hwio", 4) == (0, 0, 0, 1) and block_lengths(8, "hwio", 4) == (0, 0, 8, 1)
    assert letters("hwio", 5) == "whwio"


# Stacks of layers without stacked=


BINARY = lcq.Binary(per="channel")  # warnings are the same for all that share scales; its programs are small


def warned(shapes, scheme=BINARY, pattern=".*(w|kernel)", **settings):
    """Leaves that are warned of by `dry_run` and `compress` alike."""
    tree = jax.tree.map(jnp.zeros, shapes, is_leaf=lambda node: isinstance(node, tuple))
    each = []
    for call in (lcq.dry_run, lcq.compress):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call(tree, [lcq.Rule(pattern, scheme, **settings)])
        assert all(note.category is UserWarning for note in caught)
        each.append([str(note.message).partition(":")[0] for note in caught])
    assert each[0] == each[1]
    return each[0]


STACKS = {
    "layers": {"w": (4, 8, 6)},
    "long": {"w": (30, 8, 6)},
    "with biases": {"kernel": (3, 8, 6), "bias": (3, 6)},
    "with a norm": {"kernel": (3, 8, 6), "scale": (3, 8)},
    "of heads": {"layers": {"query": {"kernel": (2, 8, 2, 4)}, "norm": {"scale": (2, 8)}}},
    "of heads, wide": {"kernel": (2, 32, 4, 8)},
    "of filters": {"kernel": (6, 3, 3, 4, 8), "bias": (6, 8)},
    "of filters without biases": {"kernel": (6, 3, 3, 4, 8)},
    "of filters in one dimension": {"conv": {"kernel": (5, 3, 4, 8), "bias": (5, 8)}},
    "of experts": {"moe": {"w": (8, 4, 6)}, "embed": (100, 4), "norm": (6,)},
    "layout of PyTorch": {"kernel": (32, 24, 3, 3)},
}


@pytest.mark.parametrize("case", STACKS)
def test_stacks_without_stacked_are_warned_of(case):
    names = warned(STACKS[case])
    assert len(names) == 1 and names[0].endswith(("w", "kernel"))
    assert warned(STACKS[case], lcq.Binary()) == []  # one scale for all was asked for
    assert warned(STACKS[case], stacked=1) == []
    rank = len(next(s for s in jax.tree.leaves(STACKS[case], is_leaf=lambda n: isinstance(n, tuple)) if len(s) > 2))
    assert warned(STACKS[case], layout="wwwio"[-rank:]) == []
    assert warned(STACKS[case], lcq.Binary(per=(1,) + (0,) * (rank - 2) + (1,))) == []


NO_STACKS = {
    "matrix": {"w": (8, 6)},
    "filters": {"kernel": (3, 3, 4, 8)},
    "filters with biases": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "a net of filters": {f"conv{i}": {"kernel": (3, 3, 4, 4)} for i in range(3)},
    "filters and a matrix": {"conv": {"kernel": (3, 3, 4, 8)}, "dense": {"kernel": (8, 3), "bias": (3,)}},
    "wide filters": {"kernel": (7, 7, 3, 8)},
    "patches": {"kernel": (16, 16, 3, 8)},
    "cubes": {"kernel": (3, 3, 3, 4, 8)},
    "frames": {"kernel": (1, 3, 3, 4, 8)},
    "depthwise": {"kernel": (3, 3, 1, 8)},
    "in one dimension": {"Conv_0": {"kernel": (3, 4, 8)}},
    "in one dimension, with a bias": {"kernel": (3, 4, 8), "bias": (8,)},
    "heads with biases": {"kernel": (8, 2, 4), "bias": (2, 4)},
    "heads to outputs": {"kernel": (2, 4, 8), "bias": (8,)},
}


@pytest.mark.parametrize("case", NO_STACKS)
def test_what_is_no_stack_is_not_warned_of(case):
    assert warned(NO_STACKS[case]) == []


def test_a_second_stacked_axis_is_warned_of_where_others_have_it_too():
    shapes = {"w": (2, 3, 8, 6), "bias": (2, 3, 6)}
    assert warned(shapes, stacked=1) == ["w"] and warned(shapes, stacked=2) == []
    assert warned({"w": (2, 8, 2, 4)}, stacked=1) == []


def test_what_the_warning_says_is_what_stacked_gives():
    w = {"layers": {"w": draw(3, 8, 6)}}
    for scheme, before, after, lengths in ((CHANNEL, 6, 18, (1, 0, 1)), (lcq.Uniform(4, per=4), 12, 36, (1, 4, 1))):
        with pytest.warns(UserWarning) as caught:
            form = lcq.compress(w, [lcq.Rule("layers/w", scheme)])["layers"]["w"]
        words = str(caught[0].message)
        assert words.startswith("layers/w: ") and f"all 3 of axis 0 share each of {before} scales" in words
        assert f"lcq.Rule(..., stacked=1), or per={lengths}, gives each its own, {after} in all" in words
        stacked = lcq.compress(w, [lcq.Rule("layers/w", scheme, stacked=1)])["layers"]["w"]
        kind = str(stacked.scale.dtype)  # of groups another one than of lengths
        same = lcq.compress(w, [lcq.Rule("layers/w", lcq.Uniform(4, per=lengths, scale_dtype=kind))])["layers"]["w"]
        assert (form.scale.size, stacked.scale.size, same.scale.size) == (before, after, after)
        np.testing.assert_array_equal(stacked.dense(), same.dense())
