"""The largest of many numbers and the shrinkage of a ball, against sorts in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lcq.schemes import topk

SHAPES = [(5, 3), (7,), (), (2, 2, 2)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
RNG = np.random.default_rng(0)
N = sum(SIZES)
LAWS = {
    "distinct": abs(RNG.normal(size=N)),
    "ties": RNG.integers(0, 4, N),
    "zeros": np.where(RNG.random(N) < 0.8, 0, 1 + RNG.random(N)),
    "all zero": np.zeros(N),
    "all equal": np.full(N, 2.5),
    "tiny": RNG.integers(1, 9, N) * 2.0**-126,
    "huge": RNG.integers(1, 9, N) * 2.0**124,
    "all magnitudes": 2.0 ** RNG.integers(-126, 127, N),
    "neighbours": np.float32(1) + RNG.integers(0, 3, N) * np.float32(2.0**-23),
}
largest = jax.jit(topk.largest)


def leaves(flat, dtype=jnp.float32):
    parts = np.split(np.asarray(flat), np.cumsum(SIZES)[:-1])
    return [jnp.asarray(part.reshape(shape), dtype) for part, shape in zip(parts, SHAPES, strict=True)]


def flat(arrays):
    return np.concatenate([np.ravel(a) for a in arrays])


def marks(scores, count):
    """The first `count` places of a stable sort, largest first."""
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-np.asarray(scores, np.float64), kind="stable")[:count]] = True
    return chosen


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_largest_of_several_leaves_are_the_first_of_a_stable_sort(law, dtype):
    scores = leaves(LAWS[law], dtype)
    for count in (0, 1, 5, 16, N - 1, N):
        found = largest(scores, jnp.uint32(count))
        assert [f.shape for f in found] == SHAPES
        np.testing.assert_array_equal(flat(found), marks(flat(scores).astype(np.float64), count))


def test_magnitudes_compete_also_along_axes_longer_than_16_bits_count():
    rng = np.random.default_rng(4)
    scores = [rng.choice(np.float32([-2, -1, 1, 2]), shape) for shape in ((65_536,), (2, 65_535), (65_536, 2))]
    whole = np.concatenate([np.ravel(s) for s in scores])
    for count in (1, 100_000, whole.size - 1):
        found = flat(largest([jnp.asarray(s) for s in scores], jnp.uint32(count)))
        np.testing.assert_array_equal(found, marks(abs(whole), count))


def test_numbers_below_the_smallest_normal_are_counted_exactly():
    """Compilers may take them for zero; their number has to be right all the same, and what is larger comes first."""
    tiny = RNG.integers(0, 9, N) * np.float32(1e-45)
    tiny[[3, 20]] = 1, 2.0**-126
    for count in (0, 1, 2, 7, N):
        chosen = flat(largest(leaves(tiny), jnp.uint32(count)))
        assert chosen.sum() == count and chosen[[3, 20]].sum() == min(count, 2)


def test_many_ties_over_two_large_leaves():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 50, (300, 70)).astype(np.float32), rng.integers(0, 50, 9000).astype(np.float32)
    scores = np.concatenate([a.ravel(), b])
    for count in (1234, 20_999, 21_001, 29_990):
        np.testing.assert_array_equal(flat(largest([a, b], jnp.uint32(count))), marks(scores, count))


def test_the_largest_of_many_problems_at_once():
    rows = np.stack([LAWS[law] for law in LAWS]).astype(np.float32)
    counts = jnp.arange(1, 4 * len(LAWS), 4, dtype=jnp.uint32)
    found = jax.vmap(lambda row, count: topk.largest([row[:9], row[9:]], count))(jnp.asarray(rows), counts)
    for row, count, chosen in zip(rows, counts, np.concatenate(found, axis=1), strict=True):
        np.testing.assert_array_equal(chosen, marks(row, int(count)))


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_the_largest_in_runs_are_those_of_every_run_alone(count):
    scores = np.random.default_rng(2).integers(0, 5, (3, 4, 5)).astype(np.float32)
    found = np.asarray(topk.largest_in_runs(jnp.asarray(scores), count))
    for i, j in np.ndindex(3, 5):
        np.testing.assert_array_equal(found[i, :, j], marks(scores[i, :, j], count))


def by_a_sort(u, radius):
    """tau = (S_j - radius)/j with j = max{j : u_j > (S_j - radius)/j}, u sorted down; 0 inside the ball."""
    u = np.sort(np.asarray(u, np.float64))[::-1]
    if u.sum() <= radius:
        return 0.0
    if radius == 0:
        return u[0]
    tau = (np.cumsum(u) - radius) / np.arange(1, u.size + 1)
    return tau[np.flatnonzero(u > tau)[-1]]


def test_shrinkage_is_the_formula_of_the_sort():
    rng = np.random.default_rng(3)
    u = abs(rng.standard_t(2, size=(60, 17))).astype(np.float32)
    u[20:30] = rng.integers(0, 3, (10, 17))
    u[30], u[31], u[32, 1:] = 0, 1, 0
    u[33:40] *= 10.0 ** rng.integers(-30, 30, (7, 1))
    radius = (u.sum(1, dtype=np.float64) * rng.choice([0, 0.01, 0.3, 0.9, 1, 2], 60)).astype(np.float32)
    solve = jax.jit(jax.vmap(lambda row, r: topk.shrinkage([row[:5], row[5:].reshape(3, 4)], r)))
    found = np.asarray(solve(jnp.asarray(u), jnp.asarray(radius)))
    for row, r, tau in zip(u, radius, found, strict=True):
        assert tau == pytest.approx(by_a_sort(row, np.float64(r)), rel=2e-6, abs=2e-6 * float(row.max()))


def test_spread_shrinkage_is_the_root_of_its_equation():
    rng = np.random.default_rng(4)
    u, s = abs(rng.normal(size=(40, 9))).astype(np.float32), rng.lognormal(sigma=2, size=(40, 9)).astype(np.float32)
    radius = jnp.linspace(0.05, 9, 40)
    found = jax.jit(jax.vmap(lambda u, s, r: topk.shrinkage([u], r, [s])))(u, s, radius)
    for row, slack, r, tau in zip(u.astype(float), s.astype(float), radius, np.asarray(found, float), strict=True):
        left = np.maximum(row - tau * slack, 0).sum()
        assert left == pytest.approx(float(r), rel=1e-5) if row.sum() > r else tau == 0
