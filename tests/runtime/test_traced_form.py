"""Forms are turned, cut and looked up while a function is followed, and heads of attention stay codes."""

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import pytest
from flax import nnx

import lcq
import lcq.runtime.uses
from lcq.forms.columns import Columns
from lcq.forms.prepacked import Prepacked
from lcq.runtime.packed import packed
from tests.runtime.functions import CASES, EXPECTED, KINDS, X, close, coded, linen, normal, products, stored


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """Convolutions of any size on patches of their images, so that small ones show that they are right."""
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 1 << 30)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_form(kind):
    """As left operand, in rows, in columns of its transpose, looked up; only what is prepacked cannot be cut."""

    def fn(w, x, ids):
        parts = [w.T @ jnp.tile(x, 2).T, x @ w[:4], x @ w[:, 2:].T[:, 4:].T]
        return parts, jnp.take(w, ids, axis=0), (x[:, :2] @ jnp.tanh(w)[6:])

    form, args = KINDS[kind], (X, jnp.array([0, 7, 9]))
    ready = isinstance(form, Prepacked)
    forms = (form, form if ready else form.pack())
    got, wanted = jax.jit(lambda forms, *args: ([packed(fn)(f, *args) for f in forms], fn(form.dense(), *args)))(
        forms, *args
    )
    for each, report in zip(got, [packed(fn).report(f, *args) for f in forms], strict=True):
        close(each, wanted)
        assert [use.how for use in report].count("dense") == (4 if ready else 1), report


@pytest.mark.parametrize("case", ["net", "scan", "tied", "slices", "convolution", "grouped"])
def test_stored_forms_through_the_door_as_it_is(case):
    fn, params, args, stacked, expected = CASES[case]
    forms = coded(params, stacked)
    words = stored(forms)
    assert [use[:3] for use in packed(fn).report(words, *args)] == EXPECTED.get(case, expected)
    got, wanted = jax.jit(lambda *args: (packed(fn)(*args), fn(lcq.decompress(forms), *args[1:])))(words, *args)
    close(got, wanted)


HEADS_RULES = {
    "channel": ("channel", "channel"),
    "groups of inputs": ((4, 0, 1), 2),
    "groups for each head": ((4, 1, 1), (0, 2, 1)),
    "heads": ((1, 0), (1, 0, 0)),
    "one": (None, None),
}


HEADS_PRODUCTS = {  # x [2, 3, 8] and w [8, 2, 4]; o [2, 4, 8] back
    "all axes": ("bti,ihd->bthd", "bthd,hdo->bto"),
    "heads first": ("bti,ihd->bhtd", "bhtd,hdo->bto"),
    "units first": ("bti,ihd->bdht", "bdht,hdo->obt"),
}


@pytest.mark.parametrize("rule", HEADS_RULES)
@pytest.mark.parametrize("product", HEADS_PRODUCTS)
def test_heads_of_attention_run_on_codes(rule, product):
    """Kernels [inputs, heads, units] and [heads, units, outputs] whose scales are those of channels, groups, heads."""
    into, back = HEADS_PRODUCTS[product]

    def fn(p, x):
        return jnp.einsum(back, jnp.tanh(jnp.einsum(into, x, p["w"])), p["o"])

    w, o = (
        lcq.Uniform(4, per=per, zero_point=True).project(normal(*shape))
        for per, shape in zip(HEADS_RULES[rule], ((8, 2, 4), (2, 4, 8)), strict=True)
    )
    forms, x, net = {"w": w, "o": o.pack()}, normal(2, 3, 8), packed(fn)
    assert [use[:3] for use in net.report(forms, x)] == products(w=(1, 6, 8, 8), o=(1, 6, 8, 8))
    ready = net.prepack(forms, x)
    assert all(isinstance(form, Columns) for form in ready.values())
    both = jax.jit(lambda f, r, x: (net(f, x), net(r, x), fn(lcq.decompress(f), x)))(forms, ready, x)
    close(both[0], both[2])
    close(both[1], both[2])


@pytest.mark.parametrize("per", ["channel", (4, 1, 1), (4, 0, 1)])
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_attention_of_flax_runs_on_codes(kind, per):
    x = normal(2, 3, 8)
    if kind == "linen":
        params, fn = linen(nn.MultiHeadDotProductAttention(num_heads=2), x)
    else:
        graph, params = nnx.split(nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0)))

        def fn(p, x):
            return nnx.merge(graph, p)(x)

    kernels = [lcq.Rule("(.*/)?out/kernel", lcq.Uniform(4, per="channel" if per == "channel" else 2))]
    forms = lcq.compress(params, [*kernels, lcq.Rule("(.*/)?kernel", lcq.Uniform(4, per=per))])
    report = packed(fn).report(forms, x)
    assert len(report) == 4 and {use.how for use in report} == {"product"}, report
    close(packed(fn)(forms, x), fn(lcq.decompress(forms), x), 1e-4)
