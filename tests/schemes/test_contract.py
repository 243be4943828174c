"""What every scheme and every form promises, from one list of cases."""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Codes, Factors
from lcq.forms.base import FORMS, split_leafwise
from lcq.plans.text import SCHEMES, format_scheme, parse_scheme
from lcq.schemes.base import Quantizer, Scheme
from lcq.schemes.sparsity import Sparsifier

CASES = [
    lcq.KMeans(1),
    lcq.KMeans(4),
    lcq.KMeans(3, fixed=(0.0,)),
    lcq.KMeans(4, per="channel"),
    lcq.KMeans(6, rate=0.1),
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
    lcq.Uniform(3, per=4, zero_point=True, scale_bits=6),
    lcq.Cast("bfloat16"),
    lcq.Cast("float16"),
    lcq.Prune(fraction=0.25),
    lcq.Prune(count=7),
    lcq.Prune(count=0),
    lcq.NofM(1, 2),
    lcq.PruneGroups("channel", fraction=0.5),
    lcq.PruneGroups((2, 3), fraction=0.5),
    lcq.Prune(fraction=0.3, values=lcq.KMeans(4)),
    lcq.Prune(fraction=0.3, values=lcq.KMeans(2, exact=True)),
    lcq.Prune(fraction=0.3, values="bfloat16"),
    lcq.PruneGroups(2, count=5, values=lcq.KMeans(3)),
    lcq.NofM(2, 4, values="bfloat16"),
    lcq.L1Ball(6.0),
    lcq.L1Ball(6.0, group="channel"),
    lcq.L0Penalty(0.5),
    lcq.L1Penalty(0.5),
    lcq.L1Penalty(0.5, group="channel", values="bfloat16"),
    lcq.L0Penalty(2.0, group=2),
    lcq.LowRank(2),
    lcq.LowRank(penalty=0.005),
    lcq.CodedTrellis(0.01, memory=3),
    lcq.Trellis(1, memory=4),
    lcq.Trellis(2, memory=5, per="channel", code="gaussian"),
    lcq.Trellis(2, memory=4, code="learned"),
    lcq.Rotated(lcq.KMeans(2)),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(fraction=0.1)),
    lcq.Additive(lcq.LowRank(1), lcq.L0Penalty(0.5)),
    lcq.Additive(lcq.KMeans(2, exact=True), lcq.LowRank(1)),
]
MU = 1.0
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.float32)
H = jnp.asarray(np.random.default_rng(1).lognormal(sigma=1.5, size=(8, 6)), jnp.float32)
TIMES = np.array([1, 3, 3, 1, 1, 3, 3, 1])  # every two and every four rows become twice as many


def case(scheme):
    return format_scheme(scheme)


@pytest.fixture(params=CASES, ids=case, scope="module")
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def form(scheme):
    return scheme.project(X, mu=MU)


def settings_of(scheme):
    """A scheme and those in it."""
    inside = [v for v in vars(scheme).values() if isinstance(v, Scheme)] + list(getattr(scheme, "parts", ()))
    return [scheme, *(each for part in inside for each in settings_of(part))]


def importances_of(scheme):
    """Weights that a scheme takes: of low rank those of rows; none for groups that shrink."""
    if any(isinstance(s, lcq.LowRank) for s in settings_of(scheme)):
        return [H[:, :1]]
    return [] if isinstance(scheme, lcq.L1Penalty | lcq.L1Ball) and scheme.group else [H, H[:, :1]]


def objective(scheme, form, x=X, h=1.0):
    return distortion(form, x, h) + 2 / MU * float(scheme.cost((form,))) + coded(scheme, form)


def coded(scheme, form):
    """The squared distance that entropy-coded codes are worth."""
    if not getattr(scheme, "rate", 0):
        return 0.0
    codes = np.asarray(form.codes).reshape(-1)
    kinds = [codes[codes % 2 == kind] for kind in (0, 1)] if isinstance(scheme, lcq.CodedTrellis) else [codes]
    numbers = [np.unique(kind, return_counts=True)[1] for kind in kinds]
    return float(scheme.rate * sum((number * np.log2(number.sum() / number)).sum() for number in numbers))


def distortion(form, x=X, h=1.0):
    h = np.asarray(h, np.float64)
    return float((h * (np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum())


def test_the_list_has_every_scheme_and_form():
    assert {type(s) for s in CASES} == {SCHEMES[name] for name in SCHEMES}
    assert {type(s.project(X, mu=MU)).__name__ for s in CASES} == set(FORMS)


def test_settings_hash_and_have_a_text(scheme):
    again = parse_scheme(format_scheme(scheme))
    assert again == scheme and hash(again) == hash(scheme)


def test_dense_has_the_leafs_shape_and_dtype(scheme, form):
    assert form.shape == X.shape and form.dense().shape == X.shape and form.dense().dtype == X.dtype
    half = scheme.project(X.astype(jnp.bfloat16), mu=MU)
    assert half.dense().dtype == jnp.bfloat16 and half.dtype == "bfloat16"


def test_both_layouts_have_equal_dense(form):
    stored = form.pack()
    assert stored.pack() is stored
    np.testing.assert_array_equal(stored.dense(), form.dense())
    np.testing.assert_array_equal(stored.unpack().dense(), form.dense())
    assert jax.tree.structure(stored.unpack()) == jax.tree.structure(form)
    assert stored.bits == form.bits and (form.bits > 0 or not form.dense().any())
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(stored))


def test_projection_is_idempotent(scheme, form):
    if isinstance(scheme, lcq.Additive | lcq.L1Penalty):
        return  # the latter shrinks again
    again, rounding = scheme.project(form.dense(), form, mu=MU), 2e-6 if isinstance(scheme, lcq.LowRank) else 1e-7
    np.testing.assert_allclose(again.dense(), form.dense(), rtol=2e-6, atol=rounding)


def test_no_move_of_one_code_is_nearer(scheme, form):
    if not isinstance(getattr(form, "codes", None), jax.Array) or coded(scheme, form):
        return
    best = distortion(form)
    for k in range(form.size_of_table):
        moved = type(form)(jnp.full_like(form.codes, k), form.levels, form.scale, form.zero, form.values)
        nearer = np.minimum((np.asarray(moved.dense()) - X) ** 2, (np.asarray(form.dense()) - X) ** 2)
        assert nearer.sum(dtype=np.float64) >= best * (1 - 1e-5) - 1e-9


def test_a_warm_start_never_raises_the_distortion(scheme, form):
    x = X + 0.05 * jnp.sin(jnp.arange(48.0)).reshape(8, 6)
    assert objective(scheme, scheme.project(x, form, mu=MU), x) <= objective(scheme, form, x) * (1 + 1e-5) + 1e-9


@pytest.mark.skipif("optimization_level=0" in os.environ["XLA_FLAGS"], reason="runs in test_optimized.py")
def test_eager_is_jit_is_vmap(scheme, form):
    if scheme.host:
        with pytest.raises(ValueError, match="cannot run under jit"):
            jax.jit(scheme.project)(X, mu=MU)
        return
    project = functools.partial(scheme.project, mu=MU)
    np.testing.assert_array_equal(jax.jit(project)(X).dense(), form.dense())
    both = jax.vmap(project)(jnp.stack([X, X + 1]))
    assert both.shape == (2, 8, 6)
    np.testing.assert_allclose(both.dense()[0], form.dense(), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(both.pack().dense(), both.dense())
    np.testing.assert_array_equal(both.pack().unpack().dense(), both.dense())


def test_a_mesh_with_explicit_axes_keeps_codes_where_the_leaf_is(scheme, form):
    if scheme.host:
        return
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("a", "b")))
        sharded = jax.jit(lambda x: scheme.project(x, scheme.project(x, mu=MU), mu=MU))(x)
        assert all(jax.typeof(array).sharding.spec == jax.P("a", "b") for array in split_leafwise(sharded)[0])
    alone = scheme.project(X, form, mu=MU).dense()
    np.testing.assert_allclose(jax.device_get(sharded.dense()), alone, rtol=1e-5, atol=1e-6)


def test_leafwise_arrays_are_as_declared_and_shaped_like_the_leaf(scheme, form):
    arrays, _ = split_leafwise(form)
    assert len(arrays) <= scheme.leaf_arrays and all(array.shape == X.shape for array in arrays)


COPIES = 4
LARGE = [
    lcq.KMeans(16),
    lcq.KMeans(16, rate=0.01),
    lcq.Binary(),
    lcq.Ternary(),
    lcq.Ternary(per=32),
    lcq.PowersOfTwo(3, scale=True),
    lcq.Uniform(4),
    lcq.Uniform(4, per=32),
    lcq.Uniform(4, zero_point=True),
    lcq.Uniform(4, per=32, zero_point=True, scale_bits=6),
    lcq.Prune(fraction=0.05),
    lcq.PruneGroups((4, 4), fraction=0.05),
    lcq.NofM(2, 4),
    lcq.L1Ball(100.0),
    lcq.L0Penalty(0.1),
    lcq.LowRank(10),
    lcq.LowRank(penalty=1e-4),
    lcq.Prune(fraction=0.05, values=lcq.KMeans(16)),
    lcq.Additive(lcq.KMeans(2), lcq.Prune(fraction=0.01)),
    lcq.Additive(lcq.LowRank(10), lcq.Prune(fraction=0.01)),
]


@pytest.mark.parametrize("scheme", LARGE, ids=case)
def test_peak_memory_of_a_warm_c_step_in_copies_of_the_leaf(scheme):
    x = jnp.zeros((512, 512))
    project = functools.partial(scheme.project, mu=MU)
    memory = jax.jit(project).lower(x, jax.eval_shape(project, x)).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= COPIES * x.nbytes


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_equal_weights_are_defined(scheme, value):
    form = scheme.project(jnp.full((8, 6), value), mu=MU)
    assert bool(jnp.isfinite(form.dense()).all())
    if isinstance(scheme, lcq.KMeans) and (not scheme.fixed or value == 0):
        np.testing.assert_array_equal(form.dense(), value)


def test_what_cannot_be_projected_is_refused(scheme):
    for bad in (jnp.ones((0, 6)), jnp.ones((8, 6), jnp.int32)):
        with pytest.raises(ValueError, match="expected"):
            scheme.project(bad, mu=MU)


def test_schemes_with_a_cost_want_mu(scheme):
    if scheme.costly:
        with pytest.raises(ValueError, match="has a cost: pass mu="):
            scheme.project(X)


# Weights: sum h (x - Delta)^2


def test_quantizers_are_the_schemes_whose_forms_are_codes(scheme, form):
    assert isinstance(scheme, Quantizer) == isinstance(form, Codes)
    if isinstance(scheme, Quantizer):
        assert scheme.per in (None, "channel", 2, 4) and type(scheme).check is Quantizer.check


def test_an_importance_of_one_is_none(scheme, form):
    if importances_of(scheme):
        ones = scheme.project(X, mu=MU, importance=np.ones((8, 1), bool))
        assert objective(scheme, ones) == pytest.approx(objective(scheme, form), rel=1e-5, abs=1e-9)


def test_whole_importances_are_repetitions(scheme):
    if any(isinstance(s, Sparsifier) for s in settings_of(scheme)) or scheme.costly or getattr(scheme, "rate", 0):
        return  # budgets and costs count weights: repeated ones would count again
    if isinstance(scheme, lcq.Trellis | lcq.Rotated):
        return  # each of them has a code of its own, or a place in the rotation
    long = scheme
    if isinstance(getattr(scheme, "per", None), int):
        long = dataclasses.replace(scheme, per=2 * scheme.per)
    each = scheme.project(X, importance=jnp.asarray(TIMES[:, None]))
    start = each if isinstance(scheme, lcq.KMeans) else None  # of several local minima, the same one
    repeated = long.project(jnp.repeat(X, TIMES, axis=0), start)
    near = 1e-6 if isinstance(scheme, Quantizer) else 3e-5
    np.testing.assert_allclose(jnp.repeat(each.dense(), TIMES, axis=0), repeated.dense(), rtol=1e-4, atol=near)


def test_an_importance_lowers_the_weighted_distortion(scheme, form):
    if isinstance(scheme, lcq.Rotated):
        return  # it is the mean over inputs, see test_rotated.py
    for h in importances_of(scheme):
        cold = scheme.project(X, mu=MU, importance=h)
        assert objective(scheme, cold, h=h) <= objective(scheme, form, h=h) * (1 + 1e-5) + 1e-9
        learned = isinstance(form, Codes | Factors) and (form.shared_bits or isinstance(form, Factors))
        if learned and distortion(form) > 1e-9:
            assert objective(scheme, cold, h=h) < 0.9999 * objective(scheme, form, h=h)
        for start in (form, cold):
            warm = scheme.project(X, start, mu=MU, importance=h)
            assert objective(scheme, warm, h=h) <= objective(scheme, start, h=h) * (1 + 1e-5) + 1e-9


def test_only_ratios_of_importances_matter(scheme):
    if scheme.costly or getattr(scheme, "rate", 0):
        return  # a cost is traded against them
    for h in importances_of(scheme)[:1]:
        form = scheme.project(X, importance=h)
        np.testing.assert_allclose(
            scheme.project(X, importance=h * 2.0**-90).dense(), form.dense(), rtol=1e-5, atol=1e-6
        )
        for scale in (3.0, 1e30):
            again = scheme.project(X, importance=scale * h)
            assert distortion(again, h=h) == pytest.approx(distortion(form, h=h), rel=1e-5)


def test_blocks_without_weight_are_unweighted(scheme, form):
    for h in importances_of(scheme):
        nothing = scheme.project(X, mu=MU, importance=jnp.zeros_like(h))
        np.testing.assert_allclose(nothing.dense(), form.dense(), rtol=1e-5, atol=1e-6)
        some = scheme.project(X, mu=MU, importance=h.at[:4, 0].set(0))
        assert bool(jnp.isfinite(some.dense()).all())
        if getattr(scheme, "per", None) in (2, 4):
            np.testing.assert_allclose(some.dense()[:4, 0], form.dense()[:4, 0], rtol=1e-5, atol=1e-6)


def test_what_weighs_nothing_decides_nothing(scheme):
    for h in importances_of(scheme)[:1]:
        h = h.at[::2].set(0)
        forms = [scheme.project(X.at[::2].set(value), mu=MU, importance=h) for value in (0.0, -3e38, 7.0)]
        for form in forms[1:]:
            np.testing.assert_allclose(form.dense()[1::2], forms[0].dense()[1::2], rtol=1e-5, atol=1e-6)


def test_importance_under_jit_and_vmap(scheme):
    for h in importances_of(scheme)[:1]:
        if scheme.host:
            with pytest.raises(ValueError, match=r"solved on the host: .*a concrete importance"):
                jax.jit(lambda h: scheme.project(X, mu=MU, importance=h))(h)
            return
        alone = scheme.project(X, mu=MU, importance=h).dense()
        both = jax.jit(jax.vmap(lambda h: scheme.project(X, mu=MU, importance=h)))(jnp.stack([h[::-1], h]))
        np.testing.assert_allclose(both.dense()[1], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", [lcq.KMeans(4), lcq.Uniform(8, per=2), lcq.Uniform(4, "channel", True)], ids=case)
def test_importance_on_a_mesh_with_explicit_axes(scheme):
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.NamedSharding(mesh, jax.P("a", "b")))
        h = jax.device_put(H[:, :1], jax.NamedSharding(mesh, jax.P("a", None)))
        sharded = jax.jit(lambda x, h: scheme.project(x, importance=h))(x, h)
    alone = scheme.project(X, importance=H[:, :1]).dense()
    np.testing.assert_allclose(jax.device_get(sharded.dense()), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("importance", "words"),
    [
        (-H, r"expected finite numbers >= 0, at most .*, got some from -.* in float32\[8, 6\]; clip"),
        (H.at[0, 0].set(jnp.nan), "expected finite numbers >= 0, .*, got some from nan"),
        (H.at[0, 0].set(jnp.inf), "expected finite numbers >= 0, .* to inf"),
        (np.full((8, 6), 1e38), r"expected finite numbers >= 0, at most 8.5e37, got some from 1e\+38"),
        (np.full((8, 6), 1e300), r"expected finite numbers >= 0, .* in float64"),
        (H[:, 0], r"expected a shape that broadcasts to \[8, 6\], got \[8\]; .*\(rows, 1\)"),
        (H[None], r"expected a shape that broadcasts to \[8, 6\], got \[1, 8, 6\]"),
        (H * 1j, "expected an array of real numbers, got complex64; convert"),
        (2.0, "expected an array of real numbers, got float; convert"),
        ((H, H), "expected an array of real numbers, got tuple; convert"),
    ],
)
def test_an_importance_that_does_not_fit_is_refused(importance, words):
    for scheme in (lcq.KMeans(2), lcq.Levels((-1, 1), scale=True, exact=True), lcq.Cast()):
        with pytest.raises(ValueError, match=f"importance: {words}"):
            scheme.project(X, importance=importance)


def test_importance_of_joint_leaves():
    for scheme in (lcq.KMeans(4), lcq.KMeans(4, exact=True), lcq.Ternary(), lcq.Uniform(4, zero_point=True)):
        whole = scheme.project(X, importance=H)
        parts = scheme.project((X[:3], X[3:].ravel()), importance=(H[:3], H[3:].ravel()))
        np.testing.assert_allclose(
            np.concatenate([np.asarray(part.dense()).ravel() for part in parts]), whole.dense().ravel(), 1e-4, 1e-6
        )
        with pytest.raises(ValueError, match="expected a tuple of 2 arrays, got 1 of them; pass one for each"):
            scheme.project((X, X), importance=(H,))
        with pytest.raises(ValueError, match="expected a tuple of 2 arrays, got ArrayImpl"):
            scheme.project((X, X), importance=H)
