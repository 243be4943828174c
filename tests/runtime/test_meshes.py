"""Forms on meshes with explicit axes: packed(fn) computes what fn does of dense arrays, and its results lie alike."""

import contextlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lcq
from lcq.forms.base import is_form
from lcq.forms.prepacked import Prepacked
from lcq.kernels.api import matmul
from lcq.layers import frozen
from lcq.layers.binary import window
from lcq.runtime.packed import packed

RNG = np.random.default_rng(0)
MESH = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:2])
SCHEMES = {
    "one bit": lcq.KMeans(2),
    "ternary": lcq.Ternary(),
    "grid with groups": lcq.Uniform(4, per=2, zero_point=True),
    "codebook": lcq.KMeans(20),
    "codebooks": lcq.KMeans(4, per="channel"),
    "cast": lcq.Cast("bfloat16"),
    "few": lcq.Prune(count=9),
    "few codes": lcq.Prune(count=9, values=lcq.KMeans(2)),
    "factors": lcq.LowRank(2),
    "sum": lcq.Additive(lcq.KMeans(2), lcq.Prune(count=3)),
    "grid in steps": lcq.Uniform(4, per=2, zero_point=True, scale_bits=5),
    "paths": lcq.Trellis(2, memory=5),
    "coded paths": lcq.CodedTrellis(0.05, memory=3),
    "rotated": lcq.Rotated(lcq.Uniform(3, per="channel")),
}


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def put(array, *spec):
    return jax.device_put(array, NamedSharding(MESH, PartitionSpec(*spec)))


def named(array, *spec):
    """A sharding for `out_sharding=`, if there is a mesh."""
    return None if jax.typeof(array).sharding.mesh.empty else NamedSharding(MESH, PartitionSpec(*spec))


def dot(w, x):
    return x @ w


def contracted(w, x):
    return jnp.einsum("bi,io->bo", x, w, out_sharding=named(x, "d"))


def looked_up(w, ids):
    return w.at[ids].get(out_sharding=named(ids, "d", None))


def convolution(w, x):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def heads(w, x):
    return jnp.einsum("bi,iho->bho", x, w)


def experts(w, x):
    return jnp.einsum("bi,eio->ebo", x, w)


def scanned(w, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def gathered(w, x):
    return x @ (w if named(x) is None else jax.sharding.reshard(w, named(x)))


def normed(w, x):
    return x @ (w / jnp.sqrt((w**2).sum(0)))


CASES = {  # fn, w, where its axes lie, x, where, stacked
    "data": (dot, normal(8, 6), (), normal(4, 2, 8), ("d",), 0),
    "few rows": (dot, normal(8, 6), (), normal(2, 8), ("d",), 0),
    "inner data": (dot, normal(8, 6), (), normal(3, 2, 8), (None, "d"), 0),
    "outputs": (dot, normal(8, 6), (None, "d"), normal(6, 8), (), 0),
    "inputs": (contracted, normal(8, 6), ("d",), normal(6, 8), (None, "d"), 0),
    "gathered": (gathered, normal(8, 6), ("d",), normal(6, 8), ("d",), 0),
    "looked up": (looked_up, normal(8, 6), (), jnp.array([0, 3, 2, 7]), ("d",), 0),
    "window": (convolution, normal(3, 3, 2, 6), (), normal(2, 4, 4, 2), ("d",), 0),
    "pointwise": (convolution, normal(1, 1, 8, 6), (), normal(2, 4, 4, 8), ("d",), 0),
    "heads": (heads, normal(8, 4, 6), (None, "d"), normal(6, 8), (), 0),
    "experts": (experts, normal(2, 8, 6), ("d",), normal(6, 8), (), 1),
    "scan": (scanned, normal(3, 8, 8), (), normal(4, 8), ("d",), 1),
    "dense": (normed, normal(8, 6), (None, "d"), normal(6, 8), (), 0),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", SCHEMES)
def test_results_lie_as_those_of_the_dense_function(kind, case):
    fn, w, where, x, spec, stacked = CASES[case]
    if kind not in ("one bit", "few") and case not in ("data", "outputs", "heads"):
        pytest.skip("the ways of the equations are the same for all kinds")
    form = lcq.compress({"w": w}, [lcq.Rule("w", SCHEMES[kind], stacked=stacked)])["w"]
    wanted, xs = fn(form.dense(), x), put(x, *spec)
    where = () if kind == "factors" else where  # these lie as their factors do
    lies = jax.typeof(jax.jit(fn)(put(form.dense(), *where), xs)).sharding.spec
    form = jax.tree.map(lambda a: put(a, *where) if a.shape == w.shape else put(a), form)
    net = packed(fn)
    with jax.set_mesh(MESH) if case != "data" else contextlib.nullcontext():
        for each in (form, net.prepack(form, xs)):
            got = jax.jit(net)(each, xs)
            np.testing.assert_allclose(np.asarray(got), wanted, atol=1e-4)
            assert jax.typeof(got).sharding.spec == lies or (isinstance(each, Prepacked) and case == "inputs")


def test_one_bit_on_a_mesh_with_explicit_axes():
    with jax.set_mesh(MESH):
        x = put(jnp.ones((6, 8)), "d", None)
        forms = lcq.compress({"k": jnp.eye(8)[:, :4]}, [lcq.Rule("k", lcq.KMeans(2))])
        net = packed(lambda p, x: x @ p["k"])
        for tree in (forms, net.prepack(forms, x), jax.tree.map(lambda f: f.pack(), forms, is_leaf=is_form)):
            y = jax.jit(net)(tree, x)
            assert jax.typeof(y).sharding.spec[0] == "d"
            np.testing.assert_allclose(np.asarray(y), np.ones((6, 8)) @ lcq.decompress(forms)["k"], atol=1e-5)


@pytest.mark.parametrize("kind", SCHEMES)
def test_the_door_of_the_kernels_on_a_mesh(kind):
    form, x = SCHEMES[kind].project(normal(8, 6)), normal(4, 3, 8)
    with jax.set_mesh(MESH):
        y = jax.jit(matmul)(put(x, "d"), jax.tree.map(put, form))
        assert jax.typeof(y).sharding.spec[0] == "d"
    np.testing.assert_allclose(np.asarray(y), x @ form.dense(), atol=1e-4)


def test_gradients_and_layers_that_are_looked_up_on_a_mesh():
    form, x = jax.vmap(lcq.KMeans(2).project)(normal(3, 8, 8)), normal(4, 8)

    def fn(w, x):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)

    wanted = fn(form.dense(), x)
    slopes = jax.grad(lambda x: jnp.sin(x @ form.dense()[0]).sum())(x)
    with jax.set_mesh(MESH):
        forms, xs = jax.tree.map(put, form), put(x, "d")
        y = jax.jit(packed(fn))(forms, xs)
        got = jax.jit(jax.grad(lambda x: jnp.sin(packed(lambda w, x: x @ w[0])(forms, x)).sum()))(xs)
        assert jax.typeof(y).sharding.spec[0] == "d" and jax.typeof(got).sharding.spec[0] == "d"
    np.testing.assert_allclose(np.asarray(y), wanted, atol=1e-4)
    np.testing.assert_allclose(np.asarray(got), slopes, atol=1e-4)


def test_layers_of_signs_on_a_mesh():
    kernel, x = normal(3, 3, 4, 5), normal(2, 5, 5, 4)
    for layer in (
        frozen.freeze(kernel, window=window((3, 3), padding="SAME")),
        frozen.freeze(kernel, window=window((3, 3)), norm={"mean": jnp.zeros(5), "var": jnp.ones(5)}),
    ):
        wanted = frozen.apply(layer, x)
        with jax.set_mesh(MESH):
            got = jax.jit(frozen.apply)(jax.tree.map(put, layer), put(x, "d"))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            assert jax.typeof(a).sharding.spec[0] == "d"
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-6)


def test_a_symbolic_batch_of_signs():
    layer, x = frozen.freeze(normal(40, 5)), normal(3, 40)
    (batch,) = jax.export.symbolic_shape("b")
    allowed = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    shape = jax.ShapeDtypeStruct((batch, 40), jnp.float32)
    exported = jax.export.export(jax.jit(lambda x: frozen.apply(layer, x)), disabled_checks=allowed)(shape)
    np.testing.assert_allclose(exported.call(x), frozen.apply(layer, x), rtol=1e-6)
