"""What every scheme and every form promises, from one list of cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.base import FORMS, split_leafwise
from lcq.plan import SCHEMES, format_scheme, parse_scheme

CASES = [
    lcq.KMeans(1),
    lcq.KMeans(4),
    lcq.KMeans(3, fixed=(0.0,)),
    lcq.KMeans(4, per="channel"),
    lcq.KMeans(3, exact=True),
    lcq.KMeans(300),
    lcq.Levels((-1.0, 0.25, 2.0)),
    lcq.Levels((-1.0, 0.25, 2.0), scale=True, per=4),
    lcq.Levels((-1.0, 0.25, 2.0), scale=True, exact=True),
    lcq.Binary(),
    lcq.Binary(scale=False),
    lcq.Ternary(per="channel"),
    lcq.Ternary(scale=False),
    lcq.PowersOfTwo(3),
    lcq.PowersOfTwo(2, scale=True),
    lcq.Uniform(3),
    lcq.Uniform(8, per=2),
    lcq.Uniform(4, zero_point=True, per="channel"),
    lcq.Cast("bfloat16"),
    lcq.Cast("float16"),
]
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)


def case(scheme):
    return format_scheme(scheme)


@pytest.fixture(params=CASES, ids=case, scope="module")
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def form(scheme):
    return scheme.project(X)


def distortion(form, x=X):
    return float(((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum())


def test_the_list_has_every_scheme_and_form():
    assert {type(s) for s in CASES} == {made for made in SCHEMES.values() if isinstance(made, type)}
    assert {type(s.project(X)).__name__ for s in CASES} == set(FORMS)


def test_settings_hash_and_have_a_text(scheme):
    again = parse_scheme(format_scheme(scheme))
    assert again == scheme and hash(again) == hash(scheme)


def test_dense_has_the_leafs_shape_and_dtype(scheme, form):
    assert form.shape == X.shape and form.dense().shape == X.shape and form.dense().dtype == X.dtype
    half = scheme.project(X.astype(jnp.bfloat16))
    assert half.dense().dtype == jnp.bfloat16 and half.dtype == "bfloat16"


def test_both_layouts_have_equal_dense(form):
    stored = form.pack()
    assert stored.pack() is stored
    np.testing.assert_array_equal(stored.dense(), form.dense())
    np.testing.assert_array_equal(stored.unpack().dense(), form.dense())
    assert jax.tree.structure(stored.unpack()) == jax.tree.structure(form)
    assert stored.bits == form.bits > 0
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stored))


def test_projection_is_idempotent(scheme, form):
    np.testing.assert_allclose(scheme.project(form.dense(), form).dense(), form.dense(), rtol=2e-6, atol=1e-7)


def test_no_move_of_one_code_is_nearer(form):
    if not isinstance(getattr(form, "codes", None), jax.Array):
        return
    best = distortion(form)
    for k in range(form.size_of_table):
        moved = type(form)(jnp.full_like(form.codes, k), form.levels, form.scale, form.zero, form.values)
        nearer = np.minimum((np.asarray(moved.dense()) - X) ** 2, (np.asarray(form.dense()) - X) ** 2)
        assert nearer.sum(dtype=np.float64) >= best * (1 - 1e-5) - 1e-9


def test_a_warm_start_never_raises_the_distortion(scheme, form):
    x = X + 0.05 * jnp.sin(jnp.arange(48.0)).reshape(8, 6)
    assert distortion(scheme.project(x, form), x) <= distortion(form, x) * (1 + 1e-5) + 1e-9


def test_eager_is_jit_is_vmap(scheme, form):
    if scheme.host:
        with pytest.raises(ValueError, match="cannot run under jit"):
            jax.jit(scheme.project)(X)
        return
    np.testing.assert_array_equal(jax.jit(scheme.project)(X).dense(), form.dense())
    both = jax.vmap(scheme.project)(jnp.stack([X, X + 1]))
    np.testing.assert_allclose(both.dense()[0], form.dense(), rtol=1e-6, atol=1e-7)


def test_a_mesh_with_explicit_axes_keeps_codes_where_the_leaf_is(scheme, form):
    if scheme.host:
        return
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("a", "b")))
        sharded = jax.jit(lambda x: scheme.project(x, scheme.project(x)))(x)
        assert all(jax.typeof(array).sharding.spec == jax.P("a", "b") for array in split_leafwise(sharded)[0])
    alone = scheme.project(X, form).dense()
    np.testing.assert_allclose(jax.device_get(sharded.dense()), alone, rtol=1e-5, atol=1e-6)


def test_leafwise_arrays_are_as_declared_and_shaped_like_the_leaf(scheme, form):
    arrays, _ = split_leafwise(form)
    assert len(arrays) <= scheme.leafwise and all(array.shape == X.shape for array in arrays)


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_equal_weights_are_defined(scheme, value):
    form = scheme.project(jnp.full((8, 6), value))
    assert bool(jnp.isfinite(form.dense()).all())
    if isinstance(scheme, lcq.KMeans) and (not scheme.fixed or value == 0):
        np.testing.assert_array_equal(form.dense(), value)


def test_what_cannot_be_projected_is_refused(scheme):
    for bad in (jnp.ones((0, 6)), jnp.ones((8, 6), jnp.int32)):
        with pytest.raises(ValueError, match="wanted"):
            scheme.project(bad)
