"""Functions on forms: fn(decompress(forms), ...) is what packed(fn)(forms, ...) must compute, and the report says how.

The door of the kernels is replaced by one that multiplies with the dense array and counts, so that what is tested here
is which products come to it, with which form of which shape. That a dense fallback does not pass for a product is seen
by comparing the report and the count with what is expected of each case.
"""

import chex
import jax
import jax.export
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax

import lcq
import lcq.runtime.uses
from lcq.runtime.packed import packed
from tests.runtime.functions import CASES, EXPECTED, W, X, close, code, coded, normal, weight_norm


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """Convolutions of any size on patches of their images, so that small ones show that they are right."""
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 1 << 30)


@pytest.fixture
def door(monkeypatch):
    """Stands in for the door: (x's shape, x's dtype) of every product."""
    seen = []

    def matmul(x, form, *, kernel=None):
        assert isinstance(form, lcq.forms.Form) and x.shape[-1] == form.shape[-2], (x.shape, form.shape)
        assert x.shape[:-2] == form.shape[:-2]
        seen.append((x.shape, x.dtype))
        return jnp.matmul(x, form.dense())

    monkeypatch.setattr(lcq.runtime.uses, "matmul", matmul)
    return seen


@pytest.mark.parametrize("case", CASES)
def test_equals_the_function_of_dense_arrays(case, door):
    fn, params, args, stacked, expected = CASES[case]
    expected = EXPECTED.get(case, expected)
    forms = coded(params, stacked)
    report = packed(fn).report(forms, *args)
    assert [use[:3] for use in report] == expected
    assert all(use.source == "output" or ".py:" in use.source for use in report), report
    shapes = [shape for _, how, shape in expected if how == "product"]
    assert {x for x, _ in door} == {(g, m, k) if g > 1 else (m, k) for g, m, k, _ in shapes}
    if case == "bfloat16 with a wide sum":
        assert {dtype for _, dtype in door} == {jnp.dtype("float32")}
    got, wanted = jax.jit(lambda *args: (packed(fn)(*args), fn(lcq.decompress(args[0]), *args[1:])))(forms, *args)
    close(got, wanted, 2e-2 if case in ("bfloat16", "linen embedding", "numbers and keys") else 1e-5)


def test_jit_traces_once():
    net = jax.jit(packed(chex.assert_max_traces(lambda p, x: x @ p["w"], 1)))
    for seed in range(3):
        net({"w": code(W)}, normal(5, 8) + seed)
    assert net._cache_size() == 1


def test_vmap_over_inputs_and_over_forms():
    """Of a product through the door, rows that are looked up, and a weight that has to be dense."""

    def fn(p, x, ids):
        return x @ p["w"] @ weight_norm({"w": p["u"], "g": 1}, p["b"][ids])

    one = {"w": normal(4, 6), "u": normal(4, 3), "b": normal(6, 4)}
    xs, ids = normal(3, 5, 4), jnp.array([0, 3, 5, 5, 1, 2])
    forms, ensemble = coded(one), coded(jax.tree.map(lambda a: jnp.stack([a] * 3), one), 1)

    def each(fn, forms, ensemble):
        return jax.vmap(fn, (None, 0, None))(forms, xs, ids), jax.vmap(fn, (0, 0, None))(ensemble, xs, ids)

    got, wanted = jax.jit(lambda *f: (each(packed(fn), *f), each(fn, *lcq.decompress(f))))(forms, ensemble)
    close(got, wanted)


@pytest.mark.parametrize("case", ["net", "scan", "remat", "grouped"])
def test_gradients_with_respect_to_inputs(case, door):
    fn, params, (x,), stacked, _ = CASES[case]
    forms = coded(params, stacked)

    def loss(fn):
        return jax.grad(lambda x, p: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(fn(p, x))))

    close(*jax.jit(lambda x, f: (loss(packed(fn))(x, f), loss(fn)(x, lcq.decompress(f))))(x, forms), 1e-4)
    assert door


@jax.custom_jvp
def odd(x):
    return x**2


odd.defjvp(lambda primals, tangents: (odd(*primals), 100 * tangents[0]))


@jax.custom_vjp
def clipped(w, x):
    return x @ w


clipped.defvjp(lambda w, x: (x @ w, w), lambda w, g: (jnp.zeros_like(w), jnp.clip(g, -0.1, 0.1) @ w.T))


def test_gradient_rules_are_kept(door):
    """Of a function that no form enters, and of one that a form enters, which runs packed but for its gradient."""
    forms, x = {"w": code(normal(4, 6))}, X

    def plain(p, x):
        return odd(x @ p["w"]).sum()

    def entered(p, x):
        return (3 * clipped(p["w"], x)).sum()

    for fn in (plain, entered):
        assert [use.how for use in packed(fn).report(forms, x)] == ["product"]
        pair = packed(fn), lambda f, x, fn=fn: fn(lcq.decompress(f), x)
        both = jax.jit(lambda f, x, pair=pair: [jax.value_and_grad(g, 1)(f, x) for g in pair])
        close(*both(forms, x))
        close(*jax.jit(jax.vmap(both, (None, 0)))(forms, x[:, None]))


def test_an_algorithm_that_is_spelled_out_is_left_to_jax():
    f32 = np.dtype(np.float32)
    algorithm = lax.DotAlgorithm(f32, f32, f32, 1, 1, 1, False)
    net = packed(lambda p, x: lax.dot(x, p["w"], precision=algorithm))
    assert [use.how for use in net.report({"w": code(W)}, jnp.tile(X, 2))] == ["dense"]


@pytest.mark.parametrize("shape", [(3, 3, 4, 6), (1, 1, 4, 6)])
def test_no_images(shape):
    def net(p, x):
        return lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    forms = {"w": lcq.Binary().project(jnp.ones(shape))}
    run, none = lcq.packed(net), jnp.zeros((0, 5, 5, 4))
    assert run(run.prepack(forms, none), none).shape == (0, 5, 5, 6)


def test_forms_are_no_function(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"expected a function of .*, got dict; .* packed\(fn\)\(forms, x\)"):
        packed({"w": code(normal(4, 6))})


def test_bytes_that_are_none():
    with pytest.raises(ValueError, match="expected held= a number of bytes, 0 or more, got -1"):
        packed(lambda p, x: x, held=-1)


def test_what_is_no_array():
    net = packed(lambda p, x, mode: x @ p["w"])
    for call in (net, net.report):
        with pytest.raises(
            ValueError, match=r"kwargs/mode: expected an array, a form or a number, got str 'train'.*close"
        ):
            call({"w": code(normal(4, 6))}, X, mode="train")
        with pytest.raises(ValueError, match=r"params/f: .* got function .*; close over"):
            call({"w": code(normal(4, 6)), "f": lambda: 0}, X, mode=1)


def test_report_of_shapes():
    """Nothing is computed, so shapes are enough; a form that nothing uses is not in it."""
    forms = {"w": code(normal(4, 6)), "v": code(normal(3))}
    (use,) = packed(lambda p, x: x @ p["w"]).report(*jax.eval_shape(lambda *a: a, forms, X))
    assert use[:3] == ("w", "product", (1, 5, 4, 6)) and "test_packed.py" in use.source
