"""The best partition of bins, against all partitions that there are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.schemes.kmeans import partition
from lcq.schemes.kmeans.partition import best_partition


def least_error(u, mass, k, fixed=()):
    """By brute force in float64: every way to cut the bins into k runs, some numbers left to the frozen levels."""
    best = np.inf
    for cuts in itertools.combinations(range(1, len(u)), k - 1):
        edges = (0, *cuts, len(u))
        means = [np.average(u[a:b], weights=mass[a:b]) for a, b in itertools.pairwise(edges) if mass[a:b].sum()]
        for chosen in itertools.product([False, True], repeat=len(means)) if fixed else [(False,) * len(means)]:
            levels = np.array([*(m for m, skip in zip(means, chosen, strict=True) if not skip), *fixed])
            if len(levels):
                best = min(best, error(u, mass, levels))
    if fixed:  # runs between the learned cells
        for bounds in itertools.combinations(range(len(u) + 1), 2 * k):
            means = [np.average(u[a:b], weights=mass[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
            best = min(best, error(u, mass, np.array([*means, *fixed])))
    return best


def error(u, mass, levels):
    return float((mass * np.min((u[:, None] - np.asarray(levels, np.float64)) ** 2, 1)).sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2, 3])
def test_it_is_the_best_of_all_partitions(seed, k):
    rng = np.random.default_rng(seed)
    u, mass = np.sort(rng.normal(size=9)), rng.integers(1, 5, 9) / 20
    found = best_partition(jnp.asarray(mass, jnp.float32), jnp.asarray(mass * u, jnp.float32), k)
    assert error(u, mass, found) <= least_error(u, mass, k) * (1 + 1e-5) + 1e-7


def test_four_loops_find_what_one_does(monkeypatch):
    rng = np.random.default_rng(3)
    u, mass = np.sort(rng.normal(size=(2, 30))), rng.integers(0, 3, (2, 30)) / 30
    for fixed in (None, jnp.array([[-0.5, 0.7]] * 2)):
        given = jnp.asarray(mass, jnp.float32), jnp.asarray(mass * u, jnp.float32), 3, fixed
        one = best_partition(*given)
        with monkeypatch.context() as patch:
            patch.setattr(partition, "_MANY", 4)
            np.testing.assert_array_equal(best_partition(*given), one)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 2])
def test_beside_frozen_levels_too(seed, k):
    rng = np.random.default_rng(seed)
    u, mass, fixed = np.sort(rng.normal(size=8)), rng.integers(1, 5, 8) / 20, (-0.5, 0.7)
    found = best_partition(
        jnp.asarray(mass, jnp.float32), jnp.asarray(mass * u, jnp.float32), k, jnp.asarray(fixed, jnp.float32)
    )
    assert error(u, mass, np.concatenate([found, fixed])) <= least_error(u, mass, k, fixed) * (1 + 1e-5) + 1e-7


def test_empty_bins_and_few_of_them():
    mass = jnp.array([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    u = jnp.array([9.0, -1.0, 9.0, 9.0, 2.0, 9.0])
    assert best_partition(mass, mass * u, 2).tolist() == [-1, 2]
    four = best_partition(mass, mass * u, 4)
    assert set(four.tolist()) == {-1.0, 2.0} and (four[1:] >= four[:-1]).all()


def test_blocks_are_parted_one_by_one():
    rng = np.random.default_rng(0)
    u, mass = np.sort(rng.normal(size=(2, 3, 20))), rng.uniform(size=(2, 3, 20))
    args = jnp.asarray(mass, jnp.float32), jnp.asarray(mass * u, jnp.float32)
    whole = best_partition(*args, 3)
    each = [[best_partition(args[0][i, j], args[1][i, j], 3) for j in range(3)] for i in range(2)]
    np.testing.assert_allclose(whole, np.asarray(each), rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(lambda m, t: best_partition(m, t, 3))(*args), whole, rtol=1e-5)
