"""Codes are prepacked once, before the calls, where that is worth it."""

import jax
import jax.export
import jax.numpy as jnp
import pytest

import lcq
import lcq.runtime.uses
from lcq.forms.base import is_form
from lcq.forms.columns import Columns
from lcq.forms.ell import Ell
from lcq.runtime.packed import packed
from tests.runtime.functions import CASES, KINDS, W, X, close, code, coded, normal, stored


@pytest.fixture(autouse=True)
def patches(monkeypatch):
    """Convolutions of any size on patches of their images, so that small ones show that they are right."""
    monkeypatch.setattr(lcq.runtime.uses, "_PLACES", 1 << 30)


LAID_OUT = {  # how many leaves: slices of one are products of their own, and groups are no columns of the leaf
    "net": 2,
    "left operand": 1,
    "scan": 2,
    "tied": 1,
    "slices": 1,
    "convolution": 1,
    "grouped": 0,
    "experts": 2,
}


@pytest.mark.parametrize("case", LAID_OUT)
def test_codes_are_prepacked_once(case):
    fn, params, args, stacked, _ = CASES[case]
    forms, net = coded(params, stacked), packed(fn)
    ready = net.prepack(stored(forms), *args)
    assert net.report(ready, *args) == net.report(forms, *args)
    assert sum(isinstance(f, Columns) for f in jax.tree.leaves(ready, is_leaf=is_form)) == LAID_OUT[case]
    got, wanted = jax.jit(lambda *args: (net(*args), fn(lcq.decompress(forms), *args[1:])))(ready, *args)
    close(got, wanted)
    close(lcq.decompress(ready), lcq.decompress(forms))


def test_codes_of_a_sum_are_prepacked_and_those_of_another_use_are_not():
    forms, x = {"w": KINDS["sum"], "v": code(W)}, jnp.tile(X, 2)
    ready = packed(lambda p, x: x @ p["w"] + jnp.tanh(p["v"])[0] + x @ p["v"]).prepack(forms, x)
    assert [type(part).__name__ for part in ready["w"].parts] == ["Columns", "Sparse"]  # its columns are not short
    assert ready["v"] is forms["v"]


def test_few_weights_are_prepacked_and_no_dense_array_of_them_is_made():
    w, x = normal(512, 384), normal(2, 512)
    forms = {"w": lcq.Prune(fraction=0.05, values=lcq.KMeans(4)).project(w).pack()}
    net = packed(lambda p, x: x @ p["w"])
    ready = net.prepack(forms, x)
    assert isinstance(ready["w"], Ell) and ready["w"].places.dtype == jnp.uint16
    assert ready["w"].bits < 8 * w.nbytes / 4
    for rows in (x, jnp.tile(x, (32, 1))):
        close(jax.jit(net)(ready, rows), rows @ lcq.decompress(forms)["w"])
        memory = jax.jit(net).lower(ready, rows).compile().memory_analysis()
        assert memory.temp_size_in_bytes < w.nbytes / 2 + 2 * len(rows) * 384 * 4
    traced = jax.jit(lambda forms: net.prepack(forms, x)["w"])(forms)
    assert type(traced).__name__ == "Sparse"
