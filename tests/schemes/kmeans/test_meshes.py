"""Many blocks on 1, 2 and 8 devices: the same codes, by the best partition of short blocks and by few warm passes."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.forms import Codes
from lcq.schemes.kmeans import columns

rng = np.random.default_rng(0)
RULES = [
    lcq.Rule("groups", lcq.KMeans(2, per=4)),
    lcq.Rule("stacked", lcq.KMeans(2, per=4), stacked=1),
]
PARAMS = {
    "groups": rng.normal(size=(64, 20)).astype(np.float32),
    "stacked": rng.normal(size=(8, 8, 136)).astype(np.float32),
}
SPECS = {"groups": P("d"), "stacked": P("d")}
WEIGHTS = {"groups": rng.lognormal(size=(64, 20)).astype(np.float32)}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit, "auto, not set": AxisType.Auto}


def mesh_of(devices, kind):
    """The mesh, and a context: that of the mesh, or none."""
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(KINDS[kind],), devices=jax.devices()[:devices])
    return mesh, contextlib.nullcontext() if "not set" in kind else jax.set_mesh(mesh)


def placed(tree, mesh, specs=SPECS):
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in tree.items()}


def compressed(params, weights):
    return lcq.compress(params, RULES, importance=weights)


@pytest.fixture(scope="module")
def alone():
    return jax.jit(compressed)(PARAMS, WEIGHTS)


def assert_same(got, expected):
    for name in expected:
        np.testing.assert_array_equal(got[name].codes, expected[name].codes, name)
        np.testing.assert_allclose(got[name].levels, expected[name].levels, rtol=1e-5, atol=1e-6, err_msg=name)


def least_of_two_cells(x, h):
    """The least error, by trying them all."""
    order = np.argsort(x)
    x, h = x[order].astype(np.float64), h[order].astype(np.float64)

    def error(x, h):
        return h @ (x - np.average(x, weights=h)) ** 2

    return min(error(x[:i], h[:i]) + error(x[i:], h[i:]) for i in range(1, len(x)))


def test_one_device_finds_the_best_partition_of_every_block(alone):
    x, h, dense = (
        np.asarray(a, np.float64).reshape(16, 4, 20).swapaxes(1, 2).reshape(-1, 4)
        for a in (PARAMS["groups"], WEIGHTS["groups"], alone["groups"].dense())
    )
    best = [least_of_two_cells(*block) for block in zip(x, h, strict=True)]
    np.testing.assert_allclose((h * (dense - x) ** 2).sum(1), best, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("devices", "kind"), [(8, "auto, not set"), (8, "explicit")])
def test_short_blocks_on_a_mesh_have_the_codes_of_one_device_and_stay_where_they_are(devices, kind, alone):
    mesh, here = mesh_of(devices, kind)
    with here:
        args = placed(PARAMS, mesh), placed(WEIGHTS, mesh)
        program = jax.jit(compressed).lower(*args).compile()
        there = program(*args)
        assert_same(there, alone)
        for name in SPECS:
            assert there[name].codes.sharding.is_equivalent_to(args[0][name].sharding, there[name].codes.ndim)
    assert not re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", program.as_text())


def test_blocks_that_a_mesh_cuts_are_brought_together_a_part_at_a_time(monkeypatch):
    monkeypatch.setattr(columns, "_LANES", 16)
    x, scheme = rng.normal(size=(8, 512)).astype(np.float32), lcq.KMeans(2, per="channel")
    expected = jax.jit(scheme.project)(x)
    mesh, here = mesh_of(8, "auto")
    with here:
        there = jax.device_put(x, NamedSharding(mesh, P("d")))
        program = jax.jit(scheme.project).lower(there).compile()
        form = program(there)
    assert form.codes.sharding.is_equivalent_to(there.sharding, 2)
    assert_same({"": form}, {"": expected})
    moved = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program.as_text())
    assert moved and max(np.prod(list(map(int, shape.split(",")))) for shape in moved) <= x.size // 4


@pytest.mark.parametrize(("devices", "kind", "spec"), [(8, "auto", P("d")), (2, "explicit", P(None, "d"))])
def test_warm_passes_over_many_blocks_are_as_many_on_a_mesh(devices, kind, spec, monkeypatch):
    """In one block of three a level is lost, far from all numbers: others follow."""
    monkeypatch.setattr(columns, "_LARGE", 1)
    scheme, x = lcq.KMeans(2, per="channel"), rng.normal(size=(72, 264)).astype(np.float32)
    levels = np.where(np.arange(264)[None, :, None] % 3, (-0.5, 1.0), (-0.5, 9.0)).astype(np.float32)
    before = Codes(np.zeros(x.shape, np.uint8), levels=jnp.asarray(levels), dtype="float32")
    project = jax.jit(lambda x, levels: scheme.project(x, dataclasses.replace(before, levels=levels)))
    expected = project(x, levels)
    mesh, here = mesh_of(devices, kind)
    with here:
        got = project(jax.device_put(x, NamedSharding(mesh, spec)), levels)
    assert_same({"": got}, {"": expected})


def c_step(params):
    tx = lcq.lc(optax.sgd(0.1), RULES[1:], mu=lcq.geometric(0.1, 2.0, steps=4), every=None)
    state = tx.init(params)
    state = lcq.training.c_step(state, jax.tree.map(lambda w: w + 0.1 * jnp.sin(9 * w), params)).lagrangian
    return state.codes, state.codebooks, state.multipliers


@pytest.fixture(scope="module")
def c_step_alone():
    return jax.jit(c_step)({"stacked": PARAMS["stacked"]})


@pytest.mark.parametrize(("devices", "kind"), [(8, "auto"), (2, "explicit")])
def test_a_c_step_of_lc_has_the_codes_of_one_device(devices, kind, c_step_alone):
    mesh, here = mesh_of(devices, kind)
    with here:
        got = jax.jit(c_step)(placed({"stacked": PARAMS["stacked"]}, mesh))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(c_step_alone), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-5, atol=1e-6)
