"""compress, decompress and the sizes of trees."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq

KERNEL = "(.*/)?kernel"


def lenet300():
    rng = np.random.default_rng(0)
    shapes = [(784, 300), (300, 100), (100, 10)]
    return {
        f"dense{i}": {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32), "bias": jnp.zeros(s[1])}
        for i, s in enumerate(shapes)
    }


@pytest.mark.parametrize(("k", "published"), [(2, 30.52), (4, 15.63), (8, 10.50), (16, 7.90), (32, 6.33), (64, 5.28)])
def test_ratios_are_the_published_ones(k, published):
    params = lenet300()
    forms = jax.eval_shape(lambda p: lcq.compress(p, [lcq.Rule(KERNEL, lcq.KMeans(k))]), params)
    assert lcq.ratio(forms) == pytest.approx(published, abs=0.006)


def test_sizes_leave_nothing_out_and_count_a_joint_codebook_once():
    params = {"a": {"kernel": jnp.ones((8, 4))}, "b": {"kernel": jnp.zeros((3,))}, "c": jnp.ones(5, jnp.bfloat16)}
    for joint, expected in ((True, 35 * 2 + 4 * 32 + 80), (False, 35 * 2 + 8 * 32 + 80)):
        forms = lcq.compress(params, [lcq.Rule(KERNEL, lcq.KMeans(4), joint=joint)])
        stored = forms["a"]["kernel"].pack()
        assert sum(size.bits for size in lcq.sizes(forms).values()) == expected
        assert lcq.sizes({"a": stored})["a"].bits == 32 * 2 + 128
    assert lcq.sizes(forms)["c"] == (80, 80, "-")


def test_decompress_gives_dense_arrays_of_the_leaves_dtypes():
    params = {"kernel": jnp.asarray([0.5, 2.0, -3.0], jnp.bfloat16), "bias": jnp.ones(2)}
    dense = lcq.decompress(lcq.compress(params, [lcq.Rule("kernel", lcq.Binary())]))
    assert dense["kernel"].dtype == jnp.bfloat16 and dense["bias"] is params["bias"]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad):
    params = {"a": {"kernel": jnp.ones((2, 2)).at[0, 1].set(bad)}}
    with pytest.raises(
        ValueError, match=r"a/kernel: expected finite weights, got 1 NaN or infinite of 4; .* exclude it"
    ):
        lcq.compress(params, [lcq.Rule(KERNEL, lcq.KMeans(2))])


@pytest.mark.parametrize("scheme", [lcq.KMeans(2), lcq.Uniform(4), lcq.Binary()])
def test_weights_near_the_largest_number_are_refused_and_smaller_ones_are_kept(scheme):
    rules = [lcq.Rule(KERNEL, scheme)]
    with pytest.raises(ValueError, match=r"a/kernel: expected finite weights of at most 8.5e\+37, got some .* larger"):
        lcq.compress({"a": {"kernel": jnp.full((8, 8), 3e38)}}, rules)
    large = {"a": {"kernel": jnp.full((8, 8), 3e37)}}
    dense = lcq.decompress(lcq.compress(large, rules))
    np.testing.assert_allclose(dense["a"]["kernel"], 3e37, rtol=0.05)


@pytest.mark.parametrize("name", ["net.lcq", pathlib.Path("net.lcq")])
def test_a_file_has_to_be_loaded_before_it_is_decompressed(name):
    with pytest.raises(ValueError, match=r"got the name 'net.lcq'; read it: lcq.load"):
        lcq.decompress(name)


def test_compress_runs_under_jit():
    params = lenet300()["dense2"]
    rules = [lcq.Rule("kernel", lcq.KMeans(4))]
    inside = jax.jit(lambda p: lcq.compress(p, rules))(params)
    np.testing.assert_allclose(inside["kernel"].dense(), lcq.compress(params, rules)["kernel"].dense(), rtol=1e-6)
