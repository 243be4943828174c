"""Positions that do not count: codes, biases and errors are those of batches without them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import lcq
from lcq.ptq.batches import counts_of

UNIFORM = lcq.Uniform(3, per="channel")
KERNELS = [lcq.Rule("(.*/)?kernel", UNIFORM)]
LENGTHS = [7, 3, 5]


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def assert_same(one, two, tolerance=1e-5):
    """Quantized nets, and what their records say."""
    forms = [jax.tree.leaves(done.forms, is_leaf=lambda a: hasattr(a, "codes")) for done in (one, two)]
    for a, b in zip(*forms, strict=True):
        if hasattr(a, "codes"):
            np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_allclose(a.dense(), b.dense(), atol=1e-5)
        else:
            np.testing.assert_allclose(a, b, atol=tolerance)
    for a, b in zip(one.records, two.records, strict=True):
        assert (a.path, a.rows, a.dead, a.bias_correction, a.lost) == (b.path, b.rows, b.dead, b.bias_correction, "")
        np.testing.assert_allclose(a.error, b.error, rtol=1e-3)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Texts(nn.Module):
    """Attention and a layer of its own for every position, then the mean of those that are no padding."""

    @nn.compact
    def __call__(self, tokens):
        there = tokens != 0
        x = nn.Embed(9, 8)(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_attention_mask(there, there))
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(x))))
        x = (x * there[..., None]).sum(1) / there.sum(1)[:, None]
        return nn.Dense(3)(x)


@pytest.mark.parametrize("recursion", ["blocked", "follow"])
def test_padded_texts_are_those_without_padding(recursion):
    tokens = np.random.default_rng(0).integers(1, 9, size=(3, 8))
    for row, length in zip(tokens, LENGTHS, strict=True):
        row[length:] = 0
    net = Texts()
    params = net.init(jax.random.key(0), tokens)
    how = lcq.GPFQ(search=False, shrink=0.0, recursion=recursion)
    padded = lcq.quantize(net.apply, params, [tokens], KERNELS, how, mask=lambda tokens: tokens != 0)
    each = [tokens[i : i + 1, :length] for i, length in enumerate(LENGTHS)]
    assert_same(padded, lcq.quantize(net.apply, params, each, KERNELS, how))
    assert [record.rows for record in padded.records] == [15] * 6 + [3]
    plain = lcq.quantize(net.apply, params, [tokens], KERNELS, how)
    assert any((a.codes != b.codes).any() for a, b in zip(*map(codes, (padded, plain)), strict=True))


def codes(done):
    leaves = jax.tree.leaves(done.forms, is_leaf=lambda a: hasattr(a, "codes"))
    return [leaf for leaf in leaves if hasattr(leaf, "codes")]


@pytest.mark.parametrize("before", [0, 2])
def test_steps_of_a_recurrent_cell(before):
    """The state goes on over the padding, which may come first, with inputs of 0; only steps of the sequence count."""
    params = {"a": {"kernel": draw(4, 6)}, "b": {"kernel": draw(6, 6)}}

    def fn(p, batch):
        x = batch["x"]

        def step(h, x):
            return jnp.tanh(x @ p["a"]["kernel"] + h @ p["b"]["kernel"]), None

        return lax.scan(step, jnp.zeros((len(x), 6)), x.swapaxes(0, 1))[0]

    x = draw(3, 7 + before, 4)
    there = (np.arange(7 + before) - before < np.array(LENGTHS)[:, None]) & (np.arange(7 + before) >= before)
    x[~there] = 0
    padded = lcq.quantize(
        fn, params, [{"x": x, "mask": there}], KERNELS, mask="mask", method=lcq.GPFQ(search=False, shrink=0.0)
    )
    each = [{"x": x[i : i + 1, before : before + length]} for i, length in enumerate(LENGTHS)]
    assert_same(padded, lcq.quantize(fn, params, each, KERNELS, method=lcq.GPFQ(search=False, shrink=0.0)))


def test_examples_of_a_convolutional_net():
    """A last batch that was filled up, with NaN; part by part, with biases that take up the mean."""
    params = {"a": {"kernel": draw(3, 3, 2, 4), "bias": draw(4)}, "b": {"kernel": draw(4, 5)}}

    def fn(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["a"]["kernel"], (1, 1), "SAME", dimension_numbers=numbers) + p["a"]["bias"]
        x = lax.reduce_window(jax.nn.relu(x), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return x.mean((1, 2)) @ p["b"]["kernel"]

    x = draw(8, 6, 6, 2) + 1
    filled = np.concatenate([x[5:], np.full((2, 6, 6, 2), np.nan, np.float32)])
    full = lcq.quantize(fn, params, [x[:5], x[5:]], KERNELS, method=lcq.GPFQ(search=False, shrink=0.0))
    done = lcq.quantize(
        fn,
        params,
        [x[:5], filled],
        KERNELS,
        mask=lambda x: ~jnp.isnan(x).any((1, 2, 3)),
        method=lcq.GPFQ(search=False, shrink=0.0),
    )
    assert_same(done, full)
    assert [record.rows for record in done.records] == [8 * 36, 8] and done.records[0].bias_correction


def test_tokens_of_experts():
    """Sorted by expert, with the padding among them, and put back."""
    params = {"kernel": draw(3, 4, 5), "out": {"kernel": draw(5, 2)}}
    expert = np.random.default_rng(1).integers(0, 3, 20)

    def fn(p, batch):
        x, expert = batch
        order = jnp.argsort(expert)
        y = lax.ragged_dot(x[order], p["kernel"], jnp.bincount(expert, length=3))
        return jnp.tanh(jnp.zeros_like(y).at[order].set(y)) @ p["out"]["kernel"]

    x, there = draw(20, 4), np.random.default_rng(2).random(20) < 0.6
    masked = lcq.quantize(
        fn, params, [(x, expert)], KERNELS, mask=lambda batch: there, method=lcq.GPFQ(search=False, shrink=0.0)
    )
    assert_same(
        masked,
        lcq.quantize(fn, params, [(x[there], expert[there])], KERNELS, method=lcq.GPFQ(search=False, shrink=0.0)),
    )


def test_curvature_counts_as_quantize_does():
    params = {"kernel": draw(4, 5)}
    x, there = draw(3, 7, 4), np.arange(7) < np.array(LENGTHS)[:, None]

    def fn(p, x):
        return jnp.tanh(x) @ p["kernel"]

    h = lcq.ptq.curvature(fn, params, [x], KERNELS, mask=lambda x: there)["kernel"]
    each = lcq.ptq.curvature(fn, params, [x[i : i + 1, :length] for i, length in enumerate(LENGTHS)], KERNELS)["kernel"]
    wanted = (np.tanh(x.astype(np.float64))[there] ** 2).mean(0)
    np.testing.assert_allclose(h, np.tile(wanted[:, None], 5), rtol=1e-5)
    np.testing.assert_allclose(each, h, rtol=1e-5)


def test_where_it_is_lost_is_said():
    params = {"kernel": draw(4, 5), "after": {"kernel": draw(5, 2)}}

    def fn(p, x):
        x = jnp.tanh(x @ p["kernel"])
        return lax.while_loop(lambda x: x.sum() > 1e9, lambda x: x / 2, x) @ p["after"]["kernel"]

    x = draw(6, 4)
    with pytest.warns(UserWarning, match=r"^after/kernel: .*mask=.* lost at while at .*test_batches\.py"):
        done = lcq.quantize(fn, params, [x], KERNELS, mask=lambda x: np.arange(6) < 4)
    records = {record.path: record for record in done.records}
    assert (records["kernel"].rows, records["kernel"].lost, records["after/kernel"].rows) == (4, "", 6)
    assert records["after/kernel"].lost.startswith("while at")


BATCH = {"x": draw(3, 7, 4), "there": np.arange(7) < np.array(LENGTHS)[:, None], "label": np.arange(3), "bias": draw(4)}

MASKS = {  # mask, for which leaves there is one and of which shape
    "a function": (lambda b: b["there"], {"x": (3, 7), "there": (3, 7), "label": (3,)}),
    "a path": ("there", {"x": (3, 7), "there": (3, 7), "label": (3,)}),
    "of examples": (lambda b: b["label"] > 0, {"x": (3,), "there": (3,), "label": (3,)}),
    "of zeros and ones": (lambda b: b["there"].astype(np.float32), {"x": (3, 7), "there": (3, 7), "label": (3,)}),
    "for each leaf": (
        lambda b: {"x": b["there"], "there": None, "label": b["label"] > 0, "bias": None},
        {"x": (3, 7), "label": (3,)},
    ),
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_and_leaves(case):
    mask, wanted = MASKS[case]
    found = dict(zip(sorted(BATCH), counts_of(mask, BATCH, 0), strict=True))
    assert {name: one.shape for name, one in found.items() if one is not None} == wanted
    assert all(one.dtype == bool for one in found.values() if one is not None)


BAD = {
    "no such leaf": ("mask", "mask='mask': expected the path of a leaf of the batch: bias, label, there, x"),
    "of no leaf's axes": (lambda b: np.ones((7, 3)), r"batch 1: expected a mask of the leading axes .*got \[7, 3\]"),
    "numbers": (lambda b: b["x"][..., 0], "batch 1: expected a mask of booleans, or of 0 and 1.*compare first"),
    "a number": (lambda b: np.asarray(True), "batch 1: expected a mask of booleans, or of 0 and 1"),
    "nothing": (lambda b: np.zeros((3, 7)), "batch 1: .* a position that counts, got none; drop the batch"),
    "too few": (
        lambda b: [b["there"]],
        "batch 1: expected a mask for all leaves, or for each of bias, label, there, x",
    ),
    "of another leaf": (
        lambda b: {"x": b["label"][:2] > 0, "there": None, "label": None, "bias": None},
        r"batch 1: expected a mask of the leading axes of x \[3, 7, 4\], got \[2\]",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_masks_that_fit_none(case):
    mask, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        counts_of(mask, BATCH, 1)


def test_a_function_that_takes_the_parts_of_a_batch_one_by_one():
    params, x = {"w": jnp.ones((4, 3))}, jnp.ones((8, 4))
    rules = [lcq.Rule("w", lcq.Uniform(4))]
    with pytest.raises((TypeError, AttributeError)) as caught:
        lcq.quantize(lambda params, x, y: (x @ params["w"], y), params, [(x, x)], rules)
    words = (
        "and here batch is a tuple of 2; if it takes the parts one by one pass lambda params, batch: fn(params, *batch)"
    )
    assert any(words in note for note in caught.value.__notes__)
    with pytest.raises(TypeError) as caught:
        lcq.quantize(lambda params, x: x @ "w", params, [x], rules)
    assert not any("batch" in note for note in getattr(caught.value, "__notes__", []))
