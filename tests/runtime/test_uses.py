"""No dense array is made where a product can run on codes, and where one is, it lives shortly."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lcq
import lcq.runtime.uses
from lcq.forms.base import is_form
from lcq.runtime.packed import packed
from tests.runtime.functions import CASES, close, code, coded, stored


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """Convolutions of any size on patches of their images, so that small ones show that they are right."""
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 1 << 30)


@pytest.mark.parametrize("case", ["convolution", "grouped", "pointwise"])
def test_the_kernel_of_a_convolution_at_many_places_is_decoded(case, monkeypatch):
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 2)
    fn, params, args, stacked, expected = CASES[case]
    forms = coded(params, stacked)
    report = packed(fn).report(forms, *args)
    decoded = [("kernel", "decoded", params["kernel"].shape)]
    assert [use[:3] for use in report] == (expected if case == "pointwise" else decoded)
    close(jax.jit(packed(fn))(forms, *args), fn(lcq.decompress(forms), *args))


def arrays_of(jaxpr):
    """Every variable of a jaxpr and those inside."""
    for eqn in jaxpr.eqns:
        yield from (var.aval for var in eqn.outvars)
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
                yield from arrays_of(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("case", ["net", "scan", "by number", "cond", "while", "remat", "convolution", "grouped"])
def test_no_dense_array_and_no_constant(case, monkeypatch):
    """With a door that decodes nothing no array of floats is as large as a weight; and forms are no constants.

    With no room for what loops would hold; that they hold it, and how much, see `test_loops`.
    """
    fn, params, args, stacked, _ = CASES[case]
    small = [a[:1] if a.ndim > 1 else a for a in args]
    monkeypatch.setattr(lcq.runtime.uses, "matmul", lambda x, form: jnp.zeros((*x.shape[:-1], form.shape[-1])))
    forms = coded(params, stacked)
    for each in (forms, stored(forms)):
        closed = jax.make_jaxpr(packed(fn, held=0))(each, *small)
        weights = {f.shape[s:] for f in jax.tree.leaves(forms, is_leaf=is_form) if is_form(f) for s in (0, stacked)}
        wide = {a.shape for a in arrays_of(closed.jaxpr) if jnp.issubdtype(a.dtype, jnp.floating)}
        assert not weights & wide, weights & wide
        assert sum(np.size(c) for c in closed.consts) <= 8


def test_memory_of_a_scan_over_layers():
    """All 8 layers dense are 8 MiB, of one of them 1 MiB is made at a time."""

    def fn(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def temporary(fn, *args):
        return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes / 2**20

    form, x = code(jnp.zeros((8, 512, 512)), 1), jnp.zeros((16, 512))
    assert temporary(lambda f, x: fn(f.dense(), x), form, x) > 7
    for each in (form, form.pack()):
        assert temporary(packed(fn), each, x) < 2.5
        assert temporary(packed(lambda w, x: fn(w * 2, x)), each, x) > 7  # dense before the scan


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="XLA for CPUs ignores optimization_barrier")
def test_memory_of_dense_uses():
    """Of 8 weights that have to be dense one is made at a time."""

    def fn(p, x):
        for w in p:
            x = jnp.tanh(x @ (w / jnp.linalg.norm(w, axis=0)))
        return x

    forms, x = [code(jnp.zeros((512, 512))) for _ in range(8)], jnp.zeros((16, 512))
    assert jax.jit(packed(fn)).lower(forms, x).compile().memory_analysis().temp_size_in_bytes < 2.5 * 2**20


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.int8])
def test_places_in_a_small_type_in_a_longer_table(dtype):
    """Beside an index of 8 bits jax takes the length 300 for 44, without a word."""
    forms = lcq.compress({"w": jax.random.normal(jax.random.key(0), (300, 2))}, [lcq.Rule("w", lcq.KMeans(k=4))])
    ids = jnp.array([3, 0, 120]).astype(dtype)

    def rows(p, ids):
        found = [jnp.take(p["w"], ids, axis=0, mode=mode) for mode in ("fill", "clip")]
        return *found, lax.dynamic_slice_in_dim(p["w"], ids[2], 2)

    assert [use.how for use in packed(rows).report(forms, ids)] == ["rows", "rows", "dense"]
    jax.tree.map(np.testing.assert_array_equal, packed(rows)(forms, ids), rows(lcq.decompress(forms), ids))
