"""What of a loop is done once, before it; kernels that are concatenated; products for each expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import lcq
from lcq.forms.columns import Columns
from lcq.runtime.packed import packed

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def uses(net, *args):
    return [use[:3] for use in net.report(*args)]


def close(got, wanted, tolerance=1e-4):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def arrays_of(jaxpr):
    """(whether in a loop, array) of every variable."""
    for eqn in jaxpr.eqns:
        inside = eqn.primitive.name in ("scan", "while")
        yield from ((False, var.aval) for var in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from ((inside or deep, a) for deep, a in arrays_of(getattr(value, "jaxpr", value)))


def step(p, x):
    """A loop whose kernels are the same in each round: one joined with another, one normed, one through a jit."""

    def body(h, x):
        w = jnp.concatenate([p["a"], p["b"]], axis=1).astype(jnp.float32)
        normed = p["c"] / jnp.sqrt((p["c"] ** 2).sum(0) + jnp.exp(p["g"]))
        return jnp.tanh(jax.jit(jnp.dot)(h, w) @ p["d"].T + x @ normed), h.sum()

    return lax.scan(body, jnp.zeros((5, 4)), x)


STEP = {"a": normal(4, 3), "b": normal(4, 2), "c": normal(6, 4), "d": normal(4, 5), "g": normal(4)}


def forms_of(params, scheme=None):
    return lcq.compress(params, [lcq.Rule("[abcdw]", scheme or lcq.Uniform(4, per="channel"))])


def test_what_a_loop_decodes_is_decoded_before_it():
    forms, x = forms_of(STEP), normal(7, 5, 6)
    net, wanted = packed(step), step(lcq.decompress(forms), x)
    assert sorted(uses(net, forms, x)) == [
        *(("a", "decoded", (4, 3)), ("b", "decoded", (4, 2))),
        *((("c", "dense", (6, 4)),) * 2),
        ("d", "decoded", (5, 4)),
    ]
    close(jax.jit(net)(forms, x), wanted)
    found = {(deep, a.shape, str(a.dtype)) for deep, a in arrays_of(jax.make_jaxpr(net)(forms, x).jaxpr)}
    assert not {(True, shape, "uint8") for shape in ((4, 3), (4, 2), (6, 4), (4, 5))} & found


def test_without_room_loops_run_on_codes():
    """Concatenated kernels piece by piece; what has to be dense is made in each round."""
    forms, x = forms_of(STEP), normal(7, 5, 6)
    net = packed(step, held=0)
    assert {use[:2] for use in uses(net, forms, x)} == {
        *((name, "product") for name in "abd"),
        ("c", "dense"),
    }
    close(jax.jit(net)(forms, x), step(lcq.decompress(forms), x), 1e-3)
    ready = net.prepack(forms, x)
    assert [isinstance(ready[name], Columns) for name in "abcd"] == [True, True, False, True]
    close(jax.jit(net)(ready, x), step(lcq.decompress(forms), x), 1e-3)  # rounding, through seven rounds
    some = packed(step, held=4 * 12).report(forms, x)  # room for a alone
    assert {use.path for use in some if use.how == "decoded"} <= {"a", "b", "d"} and len(some) >= 4


def test_layers_that_a_loop_looks_up_stay_on_codes():
    def fn(p, x):
        return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)

    forms, x = lcq.compress({"w": normal(3, 4, 4)}, [lcq.Rule("w", lcq.KMeans(4), stacked=1)]), normal(5, 4)
    assert uses(packed(fn), forms, x) == [("w", "product", (1, 5, 4, 4))]
    close(jax.jit(packed(fn))(forms, x), fn(lcq.decompress(forms), x))


def test_loops_in_loops_and_whiles():
    def fn(p, x):
        def inner(x):
            return lax.fori_loop(0, 2, lambda _, x: jnp.tanh(x @ p["w"]), x)

        done = lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, inner(c[1])), (0, x))[1]
        return lax.scan(lambda x, _: (jax.checkpoint(inner)(x), None), done, None, length=2)[0]

    forms, x = forms_of({"w": normal(4, 4)}), normal(5, 4)
    net = packed(fn)
    assert uses(net, forms, x) == [("w", "decoded", (4, 4))] * 2
    close(jax.jit(net)(forms, x), fn(lcq.decompress(forms), x))
    slopes = [
        jax.grad(lambda x, f=f, p=p: jnp.sin(lax.scan(lambda x, _: (f(p, x), None), x, None, 2)[0]).sum())(x)
        for f, p in ((packed(lambda p, x: x @ p["w"]), forms), (lambda p, x: x @ p["w"], lcq.decompress(forms)))
    ]
    close(*slopes)


def test_few_rows_by_large_codes_and_factors_stay(monkeypatch):
    monkeypatch.setattr("lcq.runtime.loops.LARGE", 16)

    def fn(p, x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ p["w"]), None), x, None, length=3)[0]

    for rows, scheme, how in ((1, None, "product"), (5, None, "decoded"), (5, lcq.LowRank(1), "product")):
        forms, x = forms_of({"w": normal(4, 4)}, scheme), normal(rows, 4)
        assert [use[1] for use in uses(packed(fn), forms, x)] == [how]
        close(jax.jit(packed(fn))(forms, x), fn(lcq.decompress(forms), x))


@pytest.mark.parametrize("cell", [nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_nets_of_flax(cell):
    net, x = nn.RNN(cell(8)), normal(4, 6, 5)
    v = net.init(jax.random.key(0), x)
    forms = lcq.compress(v, [lcq.Rule("(.*/)?kernel", lcq.Uniform(4, per="channel"))])
    for held, how in ((1 << 20, "decoded"), (0, "product")):
        run = packed(net.apply, held=held)
        assert {use.how for use in run.report(forms, x)} == {how}
        close(jax.jit(run)(forms, x), net.apply(lcq.decompress(forms), x))


JOINS = {
    "columns": lambda p, x: x @ jnp.concatenate([p["a"], p["b"]], 1),
    "columns, cast and turned": lambda p, x: (
        x.astype(jnp.bfloat16) @ jnp.concatenate([p["a"].T, p["b"].T], 0).T.astype(jnp.bfloat16)
    ).astype(jnp.float32),
    "rows": lambda p, x: jnp.tile(x, 2) @ jnp.concatenate([p["a"], p["d"][:, :3]], 0),
    "with an array": lambda p, x: x @ jnp.concatenate([p["a"], jnp.ones((4, 2)), p["b"]], 1),
    "stack": lambda p, x: jnp.einsum("bi,eio->ebo", x, jnp.stack([p["a"], p["d"][:, :3]])),
    "split again": lambda p, x: x @ jnp.split(jnp.concatenate([p["a"], p["b"]], 1), [3], axis=1)[1],
}


@pytest.mark.parametrize("case", JOINS)
def test_concatenated_kernels(case):
    fn, forms, x = JOINS[case], forms_of(STEP), normal(5, 4)
    net = packed(fn)
    assert {use.how for use in net.report(forms, x)} == {"product"}
    assert all("test_loops.py" in use.source for use in net.report(forms, x))
    close(jax.jit(net)(forms, x), fn(lcq.decompress(forms), x), 2e-2 if "cast" in case else 1e-4)


def test_a_concatenation_that_is_returned_is_dense():
    forms = forms_of(STEP)
    net = packed(lambda p, x: jnp.concatenate([p["a"], p["b"]], 1) * x)
    assert uses(net, forms, 2.0) == [("a", "dense", (4, 3)), ("b", "dense", (4, 2))]
    close(net(forms, 2.0), 2 * np.concatenate([forms["a"].dense(), forms["b"].dense()], 1))


EXPERTS = {
    "codes": lcq.Uniform(4, per="channel"),
    "one bit": lcq.KMeans(2),
    "factors": lcq.LowRank(2),
    "few": lcq.Prune(fraction=0.1),
    "cast": lcq.Cast("bfloat16"),
}


@pytest.mark.parametrize("scheme", EXPERTS.values(), ids=EXPERTS)
def test_experts_by_ragged_dot(scheme):
    """Few rows and many, experts without rows, rows of no expert; oracle: one product for each expert."""
    forms = lcq.compress({"w": normal(4, 8, 6)}, [lcq.Rule("w", scheme, stacked=1)])
    net = packed(lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes))
    dense = np.asarray(forms["w"].dense(), np.float64)
    run = jax.jit(net)
    for rows, sizes in ((5, [1, 2, 0, 1]), (200, [70, 0, 130, 0])):
        x, sizes = normal(rows, 8), jnp.array(sizes)
        wanted, start = np.zeros((rows, 6)), 0
        for w, size in zip(dense, np.asarray(sizes), strict=True):
            wanted[start : start + size] = np.asarray(x, np.float64)[start : start + size] @ w
            start += size
        (use,) = net.report(forms, x, sizes)
        assert use[:3] == ("w", "product", (4, rows, 8, 6)) and use.kind == "ragged dot"
        ready = net.prepack(forms, x, sizes)
        assert isinstance(ready["w"], Columns) == (type(forms["w"]).__name__ == "Codes")
        for each in (forms, ready):
            close(run(each, x, sizes), wanted)
    slope = jax.grad(lambda x: jnp.sin(net(forms, x, sizes)).sum())(x)
    close(slope, jax.grad(lambda x: jnp.sin(lax.ragged_dot(x, forms["w"].dense(), sizes)).sum())(x))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_counts_of_experts_rows_in_other_integers(dtype):
    form, x, sizes = lcq.Uniform(4).project(normal(3, 8, 6)), normal(200, 8), [70, 0, 101]
    y = jax.jit(packed(lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes)))({"w": form}, x, jnp.array(sizes, dtype))
    w = np.asarray(form.dense(), np.float64)[[0] * 70 + [2] * 101]
    wanted = np.einsum("mk,mkn->mn", np.asarray(x, np.float64)[:171], w)
    close(y, jnp.asarray(np.pad(wanted, ((0, 29), (0, 0))), jnp.float32))
