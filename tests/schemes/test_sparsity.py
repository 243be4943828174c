"""What all schemes of sparse arrays share: the values that are stored, stacked leaves, settings."""

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lcq
from tests.schemes.sparse_problems import problems


@pytest.mark.parametrize(("exact", "joint"), [(False, True), (True, False)])
def test_a_codebook_is_fitted_to_what_is_kept(exact, joint):
    rng = np.random.default_rng(2)
    around = np.repeat([-7, 4, 9, 0], [5, 6, 3, 34])
    x = rng.permutation(around + rng.normal(size=48) / 9).astype(np.float32).reshape(8, 6)
    heaps = [(-8, -6), (3, 5), (8, 10)]
    scheme = lcq.Prune(count=14, values=lcq.KMeans(3, exact=exact))
    xs = (x[:3], x[3:].ravel()) if joint else (x,)
    means = [x[(a < x) & (x < b)].astype(np.float64).mean() for a, b in heaps]
    for one, form in zip(xs, scheme.project(tuple(map(jnp.asarray, xs))), strict=True):
        np.testing.assert_allclose(form.levels.ravel(), means, rtol=1e-6)
        assert form.levels.shape == (1,) * one.ndim + (3,)
        expected = sum(np.where((a < one) & (one < b), mean, 0) for (a, b), mean in zip(heaps, means, strict=True))
        np.testing.assert_allclose(form.dense(), expected, rtol=1e-6)


def test_a_weighted_codebook_is_fitted_to_the_weights_of_what_is_kept():
    x, h = np.array([5.0, 6, 9, 0.1, -4, 2], np.float32), np.array([1.0, 3, 1, 90, 2, 0.01], np.float32)
    form = lcq.Prune(count=4, values=lcq.KMeans(2)).project(jnp.asarray(x), importance=jnp.asarray(h))
    np.testing.assert_allclose(form.dense(), [6.4, 6.4, 6.4, 0, -4, 0], rtol=1e-6)


def test_shorter_values():
    x = problems(1)[0][0]
    form = lcq.Prune(count=3, values="bfloat16").project(jnp.asarray(x))
    mask = np.asarray(form.mask)
    np.testing.assert_array_equal(form.dense(), np.where(mask, x.astype(jnp.bfloat16).astype(np.float32), 0))
    assert form.dtype == "float32" and form.bits == 32 + 3 * 16


def test_values_of_a_bfloat16_leaf_are_kept_as_they_are():
    x = jnp.asarray(problems(1)[0][0], jnp.bfloat16)
    form = lcq.Prune(count=3).project(x)
    np.testing.assert_array_equal(form.dense(), jnp.where(form.mask, x, 0))
    assert form.dense().dtype == jnp.bfloat16 and form.bits == 32 + 3 * 16


def test_stacked_leaves_are_projected_one_by_one():
    x = np.random.default_rng(3).normal(size=(3, 4, 2)).astype(np.float32) * [[[1]], [[9]], [[0.1]]]
    x = jnp.asarray(x, jnp.float32)
    for scheme in (lcq.Prune(count=3), lcq.L1Ball(2.0)):
        form = lcq.compress({"w": x}, [lcq.Rule("w", scheme, stacked=1)])["w"]
        alone = jnp.stack([scheme.project(one).dense() for one in x])
        np.testing.assert_allclose(form.dense(), alone, rtol=1e-6)
        np.testing.assert_array_equal(form.pack().dense(), form.dense())


def test_lists_are_settings_too(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for scheme in (lcq.PruneGroups([4, 2], count=1), lcq.L0Penalty(1.0, group=[4, 2])):
        assert scheme.group == (4, 2) and isinstance(hash(scheme), int)


@pytest.mark.parametrize(
    "make",
    [
        lambda **values: lcq.Prune(count=1, **values),
        lambda **values: lcq.PruneGroups(2, count=1, **values),
        lambda **values: lcq.NofM(1, 2, **values),
        lambda **values: lcq.L0Penalty(1.0, **values),
        lambda **values: lcq.L1Penalty(1.0, **values),
        lambda **values: lcq.L1Ball(1.0, **values),
    ],
)
def test_values_that_are_refused(make):
    with pytest.raises(ValueError, match=r"a floating-point format, .*, or KMeans\(\.\.\.\), got 'int8'"):
        make(values="int8")
    with pytest.raises(ValueError, match=r"or KMeans\(...\) without per="):
        make(values=lcq.KMeans(2, per="channel"))
