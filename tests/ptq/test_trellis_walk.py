"""A trellis in the walk of `quantize`: forms of leaves in every layout, records, and what it refuses."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq import BlockLDL
from lcq.ptq.preview import preview
from tests.ptq.small_net import draw

SCHEME = lcq.Trellis(2, memory=4, per="channel")
FAST = BlockLDL(block=4, ahead=2, sweeps=1, shrink=0.0)
N, OUT = 12, 6


def mixed(seed=0, rows=64):
    return jnp.asarray(draw(rows, N, seed=seed) @ (draw(N, N, seed=3) + 1) / 4)


def quantized(fn, leaf, x=None, scheme=SCHEME, method=FAST, **settings):
    x = mixed() if x is None else x
    return lcq.quantize(fn, {"w": jnp.asarray(leaf)}, [x], [lcq.Rule("w", scheme)], method, **settings)


def same_paths(form, weights, expected):
    """Whether a leaf's form means what the form [N, n] of a product does, after `weights` of the leaf."""
    np.testing.assert_array_equal(weights(np.asarray(form.dense())), np.asarray(expected.dense()))


def conv(p, x):
    image = x.reshape(-1, 2, 2, 3)
    return jax.lax.conv_general_dilated(image, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def test_layouts_of_leaves_are_of_one_product():
    w = draw(N, OUT)
    plain = quantized(lambda p, x: x @ p["w"], w).forms["w"]
    assert plain.along == (-2,) and plain.length == N and plain.scale.shape == (1, OUT)
    turned = quantized(lambda p, x: x @ p["w"].T, w.T).forms["w"]
    assert turned.along == (-1,) and turned.scale.shape == (OUT, 1)
    same_paths(turned, np.transpose, plain)
    kernel = quantized(conv, w.reshape(2, 2, 3, OUT)).forms["w"]
    assert kernel.along == (-4, -3, -2)
    same_paths(kernel, lambda a: a.reshape(N, OUT), plain)
    fused = quantized(lambda p, x: (x @ p["w"][:, :2], x @ p["w"][:, 2:]), w).forms["w"]
    same_paths(fused, np.asarray, plain)
    for form in (turned, kernel):
        np.testing.assert_array_equal(form.pack().unpack().dense(), form.dense())


def test_layers_of_a_stack():
    w = draw(2, N, N)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    done = quantized(fn, w)
    assert [record.path for record in done.records] == ["w[0]", "w[1]"]
    form = done.forms["w"]
    assert form.along == (-2,) and form.scale.shape == (2, 1, N) and np.isfinite(form.dense()).all()
    first = quantized(lambda p, x: jnp.tanh(x @ p["w"]), w[0]).forms["w"]
    np.testing.assert_array_equal(form.dense()[0], first.dense())


def test_by_the_usual_method_better_than_direct(tmp_path):
    """Also where paths have one scale; a run that goes on has the same bytes, a preview the same shapes."""
    w, x = {"w": jnp.asarray(draw(N, OUT))}, mixed()
    other = mixed(seed=9)

    def fn(p, x):
        return x @ p["w"]

    def missed(forms):
        return float(((fn(lcq.decompress(forms), other) - fn(w, other)) ** 2).sum())

    scheme = lcq.Trellis(2, memory=4)
    rules = [lcq.Rule("w", scheme)]
    done = lcq.quantize(fn, w, [x], rules, resume=tmp_path)
    (record,) = done.records
    assert record.method == "BlockLDL()" and record.levels == 4 and 0 < record.error < 1
    assert missed(done.forms) < 0.9 * missed(lcq.compress(w, rules))
    again = lcq.quantize(fn, w, [x], rules, resume=tmp_path)
    np.testing.assert_array_equal(again.forms["w"].dense(), done.forms["w"].dense())
    tree, _ = preview(fn, w, x, rules)
    assert jax.tree.structure(tree) == jax.tree.structure(done.forms)
    assert [a.shape for a in jax.tree.leaves(tree)] == [a.shape for a in jax.tree.leaves(done.forms)]
    assert tree["w"].bits == done.forms["w"].bits


@pytest.mark.parametrize(
    ("fn", "scheme", "method", "said"),
    [
        (None, SCHEME, "gpfq", "w: expected a method that rounds a trellis, got GPFQ"),
        (None, lcq.Trellis(2, along=(-2,)), FAST, "expected along=None"),
        (None, lcq.Trellis(2, code="learned"), FAST, "expected code='computed' or 'gaussian'"),
        (lambda p, x: x[:, :8] @ p["w"][:8] + x[:, 8:] @ p["w"][8:], SCHEME, FAST, "w: expected products with as many"),
        (lambda p, x: x[:, ::2] @ p["w"][::2] + x[:, 1::2] @ p["w"][1::2], SCHEME, FAST, "w: expected products whose"),
    ],
)
def test_what_has_no_paths(fn, scheme, method, said):
    with pytest.raises(ValueError, match=said):
        quantized(fn or (lambda p, x: x @ p["w"]), draw(N, OUT), scheme=scheme, method=method)


def test_schemes_without_rounding_warn():
    params = {"w": jnp.asarray(draw(N, OUT))}
    rules = [lcq.Rule("w", lcq.Prune(fraction=0.5))]

    def fn(p, x):
        return x @ p["w"]

    with pytest.warns(UserWarning, match=r"w: expected a scheme that is rounded.*Prune"):
        assert lcq.quantize(fn, params, [mixed()], rules).records == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lcq.quantize(fn, params, [mixed()], [lcq.Rule("w", lcq.Cast("bfloat16"))])
        lcq.quantize(fn, params, [mixed()], [], rtn=rules)
