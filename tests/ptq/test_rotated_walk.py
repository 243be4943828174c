"""Turned coordinates in the walk of `quantize`: the same as to quantize a net that turns its inputs itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Rotated
from lcq.forms.rotation import turned
from lcq.ptq import BlockLDL
from lcq.ptq.preview import preview
from tests.forms.test_rotated import rotation
from tests.ptq.small_net import draw

N, OUT = 12, 6
GRID = lcq.Uniform(3, per="channel")
PATHS = lcq.Trellis(2, memory=4, per="channel")
FAST = BlockLDL(block=4, ahead=2, sweeps=1, shrink=0.0)


def mixed(rows=64, seed=0):
    return jnp.asarray(draw(rows, N, seed=seed) @ (draw(N, N, seed=3) + 1) / 4)


def quantized(fn, leaf, scheme, x=None, method="descent", **settings):
    x = mixed() if x is None else x
    return lcq.quantize(fn, {"w": jnp.asarray(leaf)}, [x], [lcq.Rule("w", scheme)], method, **settings).forms["w"]


@pytest.mark.parametrize("scheme", [GRID, PATHS, lcq.Uniform(3, per=4), lcq.KMeans(4)], ids=str)
def test_it_is_the_walk_on_turned_inputs_and_weights(scheme):
    w, r = draw(N, OUT), rotation(N, 5)
    method = FAST if scheme is PATHS else "gptq"
    form = quantized(lambda p, x: x @ p["w"], w, lcq.Rotated(scheme, seed=5), method=method)
    there = jnp.asarray(np.asarray(mixed(), np.float64) @ r, jnp.float32)
    plain = quantized(lambda p, x: x @ p["w"], (r.T @ w).astype(np.float32), scheme, there, method)
    assert isinstance(form, Rotated) and form.axes == (-2,) and form.seed == 5
    np.testing.assert_allclose(form.dense(), r @ np.asarray(plain.dense(), np.float64), atol=1e-5)
    assert form.bits == plain.bits


def conv(p, x):
    image = x.reshape(-1, 2, 2, 3)
    return jax.lax.conv_general_dilated(image, p["w"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("scheme", [GRID, PATHS], ids=str)
def test_layouts_of_leaves_are_of_one_product(scheme):
    w, method = draw(N, OUT), FAST if scheme is PATHS else "gptq"
    scheme = lcq.Rotated(scheme)
    plain = quantized(lambda p, x: x @ p["w"], w, scheme, method=method)
    other = quantized(lambda p, x: x @ p["w"].T, w.T, scheme, method=method)
    assert other.axes == (-1,)
    np.testing.assert_allclose(other.dense().T, plain.dense(), atol=1e-6)
    kernel = quantized(conv, w.reshape(2, 2, 3, OUT), scheme, method=method)
    assert kernel.axes == (-4, -3, -2)
    np.testing.assert_allclose(kernel.dense().reshape(N, OUT), plain.dense(), atol=1e-6)
    if scheme.scheme is GRID:  # paths part where sums of two widths differ by a rounding error
        fused = quantized(lambda p, x: (x @ p["w"][:, :2], x @ p["w"][:, 2:]), w, scheme, method="rtn")
        plain = quantized(lambda p, x: x @ p["w"], w, scheme, method="rtn")
        np.testing.assert_allclose(fused.dense(), plain.dense(), atol=1e-6)


def test_layers_heads_experts_and_recurrent_cells():
    def chosen(fn, leaf):
        return quantized(fn, leaf, lcq.Rotated(GRID), method="rtn")

    stack = chosen(lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0], draw(2, N, N))
    assert stack.axes == (-2,) and stack.shape == (2, N, N)
    heads = chosen(lambda p, x: jnp.einsum("mhk,hko->mo", x.reshape(-1, 3, 4), p["w"]), draw(3, 4, OUT))
    assert heads.axes == (-3, -2)
    sizes = jnp.array([20, 44])
    experts = chosen(lambda p, x: jax.lax.ragged_dot(x, p["w"], sizes), draw(2, N, OUT))
    assert experts.axes == (-2,) and experts.shape == (2, N, OUT)
    cell = chosen(lambda p, x: jax.lax.scan(lambda h, x: (jnp.tanh(x + h @ p["w"]),) * 2, x[0], x)[1], draw(N, N))
    assert cell.axes == (-2,)


def test_inputs_that_stand_out_lose_less():
    """Of large weights: they take the whole grid of a neuron; turned, all inputs share them."""
    w, x = draw(64, OUT), draw(256, 64, seed=1)
    w[7] *= 20
    x = jnp.asarray(x)

    def loss(form):
        return float(((x @ form.dense() - x @ w) ** 2).sum())

    plain, better = (quantized(lambda p, x: x @ p["w"], w, scheme, x) for scheme in (GRID, lcq.Rotated(GRID)))
    assert loss(better) < 0.5 * loss(plain)


def test_records_biases_masks_and_packed_nets():
    def net(p, x):
        return jax.nn.relu(x @ p["w"] + p["b"]) @ p["v"]

    params = {"w": jnp.asarray(draw(N, 16)), "b": jnp.zeros(16), "v": jnp.asarray(draw(16, 4, seed=2))}
    rules = [lcq.Rule("w|v", lcq.Rotated(lcq.Uniform(4, per="channel")))]
    batches = [mixed(), mixed(seed=4)]
    done = lcq.quantize(net, params, batches, rules, mask=lambda x: x[:, 0] > 0)
    assert [record.path for record in done.records] == ["w", "v"] and done.records[0].bias_correction
    assert all(record.error < 0.01 for record in done.records)
    expected = net(lcq.decompress(done.forms), batches[0])
    np.testing.assert_allclose(lcq.packed(net)(done.forms, batches[0]), expected, atol=1e-4)
    assert {use.how for use in lcq.packed(net).report(done.forms, batches[0])} == {"product"}
    shapes, _ = preview(net, params, batches[0], rules)
    for name in ("w", "v"):
        assert jax.tree.structure(shapes[name].inner) == jax.tree.structure(done.forms[name].unpack().inner)
        assert shapes[name].axes == done.forms[name].axes and shapes[name].dtype == done.forms[name].dtype


def test_files_and_runs_that_go_on(tmp_path):
    rule = [lcq.Rule("w", lcq.Rotated(PATHS))]
    fn, params = (lambda p, x: x @ p["w"]), {"w": jnp.asarray(draw(N, OUT)).astype(jnp.bfloat16)}
    one, two = (lcq.quantize(fn, params, [mixed()], rule, FAST, resume=tmp_path / "part").forms for _ in range(2))
    np.testing.assert_array_equal(one["w"].dense(), two["w"].dense())
    lcq.save(tmp_path / "net.lcq", one)
    back = lcq.load(tmp_path / "net.lcq")["w"]
    np.testing.assert_array_equal(back.dense(), one["w"].dense())
    assert back.dense().dtype == jnp.bfloat16 and back.axes == (-2,)


def test_products_of_one_input(tmp_path):
    """As of a kernel that is one pixel and one channel: there is nothing to turn it with."""
    w, x = draw(1, OUT), jnp.asarray(draw(8, 1, seed=1))
    made = quantized(lambda p, x: x @ p["w"], w, lcq.Rotated(GRID), x, method="rtn")
    np.testing.assert_allclose(made.dense(), w, rtol=1e-5)
    lcq.save(tmp_path / "net.lcq", {"w": made})
    back = lcq.load(tmp_path / "net.lcq")["w"]
    np.testing.assert_array_equal(back.dense(), made.dense())
    np.testing.assert_allclose(lcq.packed(lambda p, x: x @ p["w"])({"w": back}, x), x @ w, rtol=1e-4)


def test_a_product_decides_what_its_inputs_are():
    """Not the leaf: the first axis of a head [vocabulary, inputs] has a length without a rotation."""
    w = draw(4099, 4)
    made = quantized(lambda p, x: x @ p["w"].T, w, lcq.Rotated(GRID), jnp.asarray(draw(8, 4, seed=1)), method="rtn")
    assert made.axes == (-1,) and made.shape == w.shape


def test_dry_runs():
    params = {"w": jnp.zeros((10, 8))}
    rules = [lcq.Rule("w", lcq.Rotated(lcq.Uniform(4, per=4)))]
    plain = [lcq.Rule("w", lcq.Uniform(4, per=4))]
    with pytest.warns(UserWarning, match="compress cannot take this rule: per=4 cuts axis 0"):
        table = lcq.dry_run(params, rules)
    with pytest.warns(UserWarning):
        assert table.rows[0].bits == lcq.dry_run(params, plain).rows[0].bits
    assert table.rows[0].form.startswith("rotated codes K=16")
    used = lcq.dry_run(params, rules, lambda p, x: x @ p["w"].T, jnp.ones((3, 8)))
    assert used.rows[0].bits == table.rows[0].bits
    with pytest.raises(ValueError, match="w: expected a number of inputs whose odd factor"):
        lcq.dry_run({"w": jnp.zeros((2053, 2))}, [lcq.Rule("w", lcq.Rotated(GRID))], dot, jnp.ones((3, 2053)))


def dot(p, x):
    return x @ p["w"]


def test_refusals():
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    with pytest.raises(ValueError, match=r"along=None, as Rotated runs along the inputs"):
        quantized(fn, draw(N, OUT), lcq.Rotated(GRID, along=(-2,)))
    with pytest.raises(ValueError, match=r"w: expected a number of inputs whose odd factor"):
        quantized(fn, draw(2053, 2), lcq.Rotated(GRID), jnp.ones((3, 2053)))
    with pytest.raises(ValueError, match=r"w: expected products with all inputs along axes \[-2\].*products of 6"):
        quantized(lambda p, x: x[:, :6] @ p["w"][:6] + x[:, 6:] @ p["w"][6:], draw(N, OUT), lcq.Rotated(GRID))
    with pytest.raises(ValueError, match=r"w: expected products with as many inputs"):
        quantized(lambda p, x: x[:, :4] @ p["w"][:4] + x[:, 4:] @ p["w"][4:], draw(N, OUT), lcq.Rotated(GRID))


def test_activation_aware_leaves_turned_products_alone():
    def net(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params = {"a": jnp.asarray(draw(N, 8)), "b": jnp.asarray(draw(8, 4))}
    rules = [lcq.Rule("b", lcq.Rotated(GRID))]
    records = lcq.ptq.transforms.activation_aware(net, params, [mixed()], rules).records
    assert [r.reason for r in records if "b" in r.consumers] == [
        "b is rounded in turned coordinates, where no input stands out"
    ]


def test_turned_is_what_the_product_sees():
    x = jnp.asarray(draw(3, N))
    np.testing.assert_allclose(turned(x, (-1,), 2), np.asarray(x) @ rotation(N, 2), atol=1e-6)
