"""Learned codebooks: float64 oracles in numpy, fixed levels, blocks, joint leaves, sharding, memory."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from tests.schemes.kmeans.samples import FOUR, LLOYD_MAX, PARTLY, N, distortion, gaussian, weigh, weighted


@pytest.mark.parametrize("k", [3, 16])
def test_lloyd_max_constants(k):
    x = np.random.default_rng(k).permutation(gaussian(100_000)).astype(np.float32)
    form = lcq.KMeans(k).project(jnp.asarray(x))
    assert distortion(form, x) / x.size == pytest.approx(LLOYD_MAX[k], rel=1e-3)
    wide = x.astype(np.float64)
    means = [wide[np.asarray(form.codes) == i].mean() for i in range(k)]
    np.testing.assert_allclose(form.levels[0], means, atol=1e-6)  # so the multipliers sum to 0 over every cell


def test_float32_sums_are_accurate_far_from_zero():
    x = (np.random.default_rng(0).permutation(gaussian(100_000)) + 100).astype(np.float32)
    form = lcq.KMeans(16).project(jnp.asarray(x))
    x = x.astype(np.float64)
    means = np.array([x[np.asarray(form.codes) == i].mean() for i in range(16)])
    assert distortion(form, x) == pytest.approx(((x - means[np.asarray(form.codes)]) ** 2).sum(), rel=1e-4)
    assert distortion(form, x) / x.size == pytest.approx(LLOYD_MAX[16], rel=5e-3)


def test_fixed_levels_stay_under_weights():
    x, h = np.random.default_rng(0).normal(size=N).astype(np.float32), weigh(0)
    exact = lcq.KMeans(4, (0, 1.25), exact=True).project(jnp.asarray(x), importance=jnp.asarray(h))
    before = PARTLY.project(jnp.asarray(x))
    for start, most in ((None, 1.3 * weighted(exact, x, h)), (before, weighted(before, x, h))):
        form = PARTLY.project(jnp.asarray(x), start, importance=jnp.asarray(h))
        assert {0.0, 1.25} <= set(form.levels.ravel().tolist())
        assert weighted(exact, x, h) * (1 - 1e-6) <= weighted(form, x, h) <= most * (1 + 1e-6)


def test_one_level_is_the_mean():
    x = jnp.arange(8.0)
    form = lcq.KMeans(1).project(x)
    assert form.levels.tolist() == [[3.5]] and not form.codes.any()
    assert lcq.KMeans(1).project(x + 1, form).levels.tolist() == [[4.5]]


def test_fixed_levels_stay_and_the_others_serve_the_rest():
    scheme = PARTLY
    rng = np.random.default_rng(0)
    x = jnp.asarray(np.r_[rng.normal(-3, 0.1, N // 3), rng.normal(0, 0.1, N // 3), rng.normal(2, 0.1, N // 3)])
    form = scheme.project(x)
    assert {0.0, 1.25} <= set(form.levels.ravel().tolist())
    assert distortion(form, x) == pytest.approx(
        distortion(lcq.KMeans(4, (0, 1.25), exact=True).project(x), x), rel=1e-5
    )
    warm = scheme.project(x + 0.01, form)
    assert {0.0, 1.25} <= set(warm.levels.ravel().tolist())
    assert {0.0, 1.25} <= set(scheme.project(x + 9).levels.ravel().tolist())
    frozen = lcq.KMeans(2, fixed=(1, -1))
    np.testing.assert_array_equal(frozen.project(x).dense(), np.where(x > 0, 1, -1))
    some = jnp.asarray([0, 1.25, 7, -2] * (N // 4))
    np.testing.assert_array_equal(scheme.project(some, form).dense(), some)


def test_jit_is_eager():
    x = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.float32)
    eager, jitted = FOUR.project(x), jax.jit(FOUR.project)(x)
    np.testing.assert_array_equal(eager.codes, jitted.codes)
    np.testing.assert_array_equal(eager.levels, jitted.levels)


def test_vmap_is_a_loop():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, N)), jnp.float32).at[1].set(1).at[2, :20].set(0)
    many = jax.vmap(FOUR.project)(x)
    warm = jax.vmap(FOUR.project)(x + 0.1, many)
    for i in range(3):
        one = FOUR.project(x[i])
        np.testing.assert_array_equal(many.codes[i], one.codes)
        np.testing.assert_allclose(many.levels[i], one.levels, rtol=1e-6)
        np.testing.assert_array_equal(warm.codes[i], FOUR.project(x[i] + 0.1, one).codes)


def test_bfloat16_has_float32_statistics():
    x = jnp.asarray(np.random.default_rng(0).normal(size=N), jnp.bfloat16)
    form, wide = FOUR.project(x), FOUR.project(x.astype(jnp.float32))
    assert (form.dtype, form.levels.dtype, form.dense().dtype) == ("bfloat16", jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(form.codes, wide.codes)
    np.testing.assert_array_equal(form.levels, wide.levels)
    np.testing.assert_array_equal(FOUR.project(form.dense()).dense(), form.dense())


@pytest.mark.parametrize("per", ["channel", N // 2])
def test_every_block_has_the_codebook_it_would_have_alone(per):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
    parts, shape = {
        "channel": ([np.s_[:, j] for j in range(N)], (1, N, 4)),
        N // 2: ([np.s_[i : i + N // 2, j] for i in (0, N // 2) for j in range(N)], (2, N, 4)),
    }[per]
    form = lcq.KMeans(4, per=per).project(x)
    assert form.levels.shape == shape
    for i in range(0, len(parts), 5):
        alone = FOUR.project(x[parts[i]])
        np.testing.assert_array_equal(form.codes[parts[i]], alone.codes)
        np.testing.assert_allclose(form.levels.reshape(-1, 4)[i], alone.levels[0], rtol=1e-5)


def test_a_joint_task_is_the_concatenated_one():
    rng = np.random.default_rng(0)
    xs = tuple(jnp.asarray(rng.normal(i, 1, shape), jnp.float32) for i, shape in enumerate([(4, 3), (2, 3, 1), (6,)]))
    forms, whole = FOUR.project(xs), FOUR.project(jnp.concatenate([x.ravel() for x in xs]))
    assert [f.codes.shape for f in forms] == [x.shape for x in xs]
    assert [f.levels.shape for f in forms] == [(1, 1, 4), (1, 1, 1, 4), (1, 4)]
    for form in forms:
        np.testing.assert_allclose(form.levels.ravel(), whole.levels.ravel(), rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate([f.codes.ravel() for f in forms]), whole.codes)
    with pytest.raises(ValueError, match="drop per= or joint="):
        lcq.KMeans(4, per="channel").project(xs[:2])


@pytest.mark.parametrize("per", [None, "channel"])
def test_sharded_leaves_give_the_same_codes_and_stay_where_they_are(per):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))
    scheme = lcq.KMeans(4, per=per)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(N, N)), jnp.float32)
    there = jax.device_put(x, NamedSharding(mesh, P("a", "b")))
    whole, shared = scheme.project(x), scheme.project(there)
    np.testing.assert_array_equal(shared.codes, whole.codes)
    np.testing.assert_allclose(shared.levels, whole.levels, rtol=1e-5, atol=1e-6)
    assert shared.codes.sharding.is_equivalent_to(there.sharding, 2)
    text = jax.jit(scheme.project).lower(there, shared).compile().as_text()
    moved = [math.prod(map(int, d.split(","))) for d in re.findall(r"\[([\d,]+)\]\S* all-(?:gather|to-all)\(", text)]
    assert "all-reduce" in text and max(moved, default=0) <= whole.levels.size  # codebooks travel, leaves do not


def test_peak_memory_is_four_copies_of_the_leaf():
    x = jnp.zeros((512, 512))
    scheme = lcq.KMeans(16)
    form = jax.eval_shape(scheme.project, x)
    for args in ((x,), (x, form)):
        memory = jax.jit(scheme.project).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 4 * x.nbytes


def test_settings_are_checked_and_hash():
    assert hash(lcq.KMeans(3, fixed=(1, 0))) == hash(lcq.KMeans(3, fixed=(0.0, 1.0)))
    assert lcq.KMeans(3, fixed=(1, 0)) == lcq.KMeans(3, fixed=(0.0, 1.0))
    for bad in ({"k": 0}, {"k": 65537}, {"k": 1, "fixed": (0, 1)}, {"k": 3, "fixed": (0, 0)}):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            lcq.KMeans(**bad)
    with pytest.raises(ValueError, match="finite"):
        lcq.KMeans(3, fixed=(np.inf,))
