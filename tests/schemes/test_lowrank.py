"""Low rank against numpy's singular values in float64, all ranks tried, and random perturbations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.tree.rules import Task

RNG = np.random.default_rng(0)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix(x, separable=False):
    """The matrix of a leaf, entry by entry."""
    if x.ndim == 2:
        return np.asarray(x, np.float64)
    kh, kw, cin, cout = x.shape
    m = np.zeros((kh * cin, kw * cout) if separable else (kh * kw * cin, cout))
    for i, j, c, k in np.ndindex(x.shape):
        m[(i * cin + c, j * cout + k) if separable else ((i * kw + j) * cin + c, k)] = x[i, j, c, k]
    return m


def truncated(m, r):
    u, s, v = np.linalg.svd(np.asarray(m, np.float64), full_matrices=False)
    return (u[:, :r] * s[:r]) @ v[:r]


@pytest.mark.parametrize(
    ("shape", "separable"), [((7, 5), False), ((4, 9), False), ((3, 2, 4, 5), False), ((3, 2, 4, 5), True)], ids=str
)
@pytest.mark.parametrize("rank", [0, 1, 3, 99])
def test_a_rank_is_the_truncated_svd(shape, separable, rank):
    x = normal(*shape)
    form = lcq.LowRank(rank, separable=separable).project(jnp.asarray(x))
    m = matrix(x, separable)
    np.testing.assert_allclose(matrix(np.asarray(form.dense()), separable), truncated(m, rank), atol=1e-5)
    room = min(rank, *m.shape)
    assert form.left.shape == (m.shape[0], room) and form.right.shape == (room, m.shape[1]) and form.rank == room
    np.testing.assert_allclose(np.linalg.norm(form.left, axis=0), np.linalg.norm(form.right, axis=1), rtol=1e-5)


def rows_of(shape, separable, seed=0):
    """Weights that differ from row to row of the matrix, as a leaf takes them, and for every entry of the matrix."""
    lengths = (shape[0], 1, shape[2], 1) if separable else (*shape[:-1], 1)
    h = np.random.default_rng(seed).lognormal(sigma=1.5, size=lengths).astype(np.float32)
    return h, matrix(np.broadcast_to(h, shape), separable)


@pytest.mark.parametrize(
    ("shape", "separable"), [((7, 5), False), ((3, 2, 4, 5), False), ((3, 2, 4, 5), True)], ids=str
)
def test_weights_of_rows_scale_them(shape, separable):
    x = normal(*shape)
    h, whole = rows_of(shape, separable)
    form = lcq.LowRank(2, separable=separable).project(jnp.asarray(x), importance=jnp.asarray(h))
    m, found = matrix(x, separable), matrix(np.asarray(form.dense()), separable)
    best = truncated(np.sqrt(whole) * m, 2) / np.sqrt(whole)
    np.testing.assert_allclose(found, best, rtol=1e-4, atol=1e-5)
    error = (whole * (m - found) ** 2).sum()
    left, right = np.asarray(form.left, np.float64), np.asarray(form.right, np.float64)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            moved = (left + size * RNG.normal(size=left.shape)) @ (right + size * RNG.normal(size=right.shape))
            assert (whole * (m - moved) ** 2).sum() >= error * (1 - 1e-6)


def test_weights_of_inputs_that_all_positions_of_a_kernel_see():
    x, h = normal(3, 2, 4, 5), np.array([1, 0, 4, 9], np.float32).reshape(4, 1)
    form = lcq.LowRank(2).project(jnp.asarray(x), importance=jnp.asarray(h))
    root = np.sqrt(np.tile(h, (6, 1)).astype(np.float64))
    np.testing.assert_allclose(root * matrix(np.asarray(form.dense())), truncated(root * matrix(x), 2), atol=1e-5)
    assert not form.dense()[:, :, 1].any()


@pytest.mark.parametrize(
    ("shape", "separable", "h"),
    [
        ((7, 5), False, (7, 5)),
        ((7, 5), False, (1, 5)),
        ((3, 2, 4, 5), True, (3, 2, 4, 1)),
        ((3, 2, 4, 5), True, (2, 1, 1)),
    ],
    ids=str,
)
def test_weights_along_a_row_are_refused(shape, separable, h):
    with pytest.raises(ValueError, match="expected an importance that is equal along a row of its matrix"):
        lcq.LowRank(1, separable=separable).project(jnp.ones(shape), importance=jnp.ones(h))


# The rank that is worth its cost


def objective(s, r, shape, price):
    """(2/mu) alpha C(r) + sum_{i > r} s_i^2,  price = 2 alpha unit / mu."""
    return price * min(r * sum(shape), shape[0] * shape[1]) + (s[r:] ** 2).sum()


@pytest.mark.parametrize("shape", [(6, 9), (8, 8), (12, 2)])
def test_the_rank_is_the_best_of_all(shape):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, *shape)).astype(np.float32) @ np.diag(rng.lognormal(sigma=1.5, size=shape[1]))
    x = x.astype(np.float32)
    x[0, :, 1] = x[0, :, 0]
    x[1] = np.outer(x[1, :, 0], x[1, 0])
    x[2] = 0
    scheme, chosen = lcq.LowRank(penalty=0.3, unit=2.0), set()
    forms = jax.jit(jax.vmap(lambda mu: jax.vmap(lambda x: scheme.project(x, mu=mu))(jnp.asarray(x))))
    mus = np.geomspace(1e-4, 1e5, 25)
    ranks = np.asarray(forms(jnp.asarray(mus, jnp.float32)).rank)
    for i, one in enumerate(x):
        s = np.linalg.svd(one.astype(np.float64), compute_uv=False)
        for mu, r in zip(mus, ranks[:, i], strict=True):
            all_ranks = np.array([objective(s, k, shape, 2 * 0.3 * 2 / mu) for k in range(len(s) + 1)])
            assert objective(s, r, shape, 2 * 0.3 * 2 / mu) <= all_ranks.min() * (1 + 1e-6) + 1e-6 * s[0] ** 2
            chosen.add(int(r))
        assert (np.diff(ranks[:, i]) >= 0).all() and ranks[0, i] == 0
    assert {0, 1, min(shape)} <= chosen


@pytest.mark.parametrize(("penalty", "mu", "rank"), [(0.0, 1.0, 3), (1.0, np.inf, 3), (1e30, 1.0, 0), (1e-30, 1.0, 3)])
def test_from_no_penalty_to_a_huge_one(penalty, mu, rank):
    x = normal(3, 40)
    for size in (1, 1e-25, 1e25) if penalty == 0 or mu == np.inf else (1,):
        form = lcq.LowRank(penalty=penalty).project(jnp.asarray(x * np.float32(size)), mu=mu)
        assert form.rank == rank
        np.testing.assert_allclose(form.dense() / np.float32(size), x if rank else 0 * x, atol=2e-6)


def test_of_equally_good_ranks_the_smallest():
    x = jnp.diag(jnp.array([2.0, 2.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]))
    for mu, rank in ((7.9, 0), (8.0, 0), (8.1, 3)):  # a rank costs 2/mu 0.5 2 16 = 32/mu and gains 4
        assert lcq.LowRank(penalty=0.5, unit=2.0).project(x, mu=mu).rank == rank
    assert lcq.LowRank(penalty=0.0).project(x, mu=1.0).rank == 3


def test_a_rank_that_saves_nothing_costs_what_the_matrix_does_and_is_stored_as_it():
    x, scheme = jnp.asarray(normal(6, 4)), lcq.LowRank(penalty=0.01, unit=32.0)
    for mu in (0.2, 1e4):
        form = scheme.project(x, mu=mu)
        r = int(form.rank)
        assert float(scheme.cost((form, form))) == pytest.approx(2 * 0.01 * 32 * min(10 * r, 24))
        assert form.bits == 32 * min(10 * r, 24)
    assert r == 4 and form.pack().right is None


def test_leaves_of_a_joint_task_are_projected_one_by_one():
    xs = (jnp.asarray(normal(6, 4)), jnp.asarray(normal(3, 5)))
    for form, x in zip(lcq.LowRank(2).project(xs), xs, strict=True):
        np.testing.assert_allclose(form.dense(), truncated(x, 2), atol=2e-6)


def test_stacked_leaves_have_ranks_of_their_own():
    x = jnp.asarray(np.stack([truncated(normal(8, 7, seed=i), r) for i, r in enumerate((1, 0, 3))]), jnp.float32)
    scheme = lcq.LowRank(penalty=1e-4)
    form = Task(("w",), scheme, 1).project((x,), mu=1.0)[0]
    assert form.rank.tolist() == [1, 0, 3]
    np.testing.assert_allclose(form.dense(), x, atol=2e-6)
    stored = form.pack()
    assert stored.left.shape == (3, 8, 3) and stored.bits == form.bits == 3 * 3 * 15 * 32
    np.testing.assert_allclose(stored.dense(), x, atol=2e-6)


def test_bfloat16_leaves_are_decomposed_in_float32():
    x = jnp.asarray(normal(6, 4), jnp.bfloat16)
    form = lcq.LowRank(2).project(x)
    assert form.dense().dtype == jnp.bfloat16 and form.left.dtype == jnp.float32
    np.testing.assert_array_equal(form.dense(), truncated(x.astype(jnp.float32), 2).astype(jnp.bfloat16))


@pytest.mark.parametrize("size", [1e37, 1e19, 1e-15])
def test_huge_and_tiny_matrices(size):
    x = normal(6, 4) * np.float32(size)
    form = lcq.LowRank(2).project(jnp.asarray(x))
    np.testing.assert_allclose(np.asarray(form.dense(), np.float64) / size, truncated(x / size, 2), atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lcq.LowRank(), "expected either rank= or penalty=, got None and None"),
        (lambda: lcq.LowRank(1, penalty=1.0), "expected either rank= or penalty=, got 1 and 1.0"),
        (lambda: lcq.LowRank(-1), "expected rank= an int >= 0, got -1"),
        (lambda: lcq.LowRank(True), "expected rank= an int >= 0, got True"),
        (lambda: lcq.LowRank(penalty=-1.0), "expected penalty >= 0 and finite, got -1.0"),
        (lambda: lcq.LowRank(penalty=np.nan), "expected penalty >= 0 and finite"),
        (lambda: lcq.LowRank(1, unit=np.inf), "expected unit >= 0 and finite"),
        (lambda: lcq.LowRank(1).project(jnp.ones(6)), r"expected at least two axes, got shape \(6,\)"),
        (lambda: lcq.LowRank(1).project(jnp.ones(())), "expected at least two axes"),
        (lambda: lcq.LowRank(1, separable=True).project(jnp.ones((6, 4))), "expected a convolution's kernel"),
        (lambda: lcq.LowRank(penalty=1.0).project(jnp.ones((6, 4))), "has a cost: pass mu="),
    ],
)
def test_bad_settings_and_leaves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
