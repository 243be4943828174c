"""Sparsity by norms, against all subsets, the conditions of the optimum, and closed forms in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from tests.schemes.sparse_problems import DEGENERATE, MU, all_masks, ball, check_best_of, degenerate, groups, problems


@pytest.mark.parametrize("scheme", [lcq.L0Penalty(0.7), lcq.L0Penalty(1.5, group=(2, 0))], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_l0_penalty_is_the_best_of_all_subsets(scheme, weighted):
    masks, touched = all_masks(scheme)
    check_best_of(masks, 2 / MU * scheme.alpha * touched, scheme, weighted)


def test_joint_leaves_have_one_radius():
    rng = np.random.default_rng(1)
    xs = [rng.normal(size=(3, 4)), 3 * rng.normal(size=5), np.array(0.3), rng.normal(size=(2, 1, 2)) / 9]
    xs = [x.astype(np.float32) for x in xs]
    whole = np.concatenate([x.ravel() for x in xs])
    shrunk = lcq.L1Ball(4.0).project(tuple(map(jnp.asarray, xs)))
    ball(whole, np.concatenate([np.ravel(form.dense()) for form in shrunk]), 4.0)


def test_the_l1_ball():
    x, _ = problems(60)
    x *= np.geomspace(1e-2, 1e2, 60, dtype=np.float32)[:, None, None]
    theta = np.asarray(jax.vmap(lcq.L1Ball(3.0).project)(jnp.asarray(x)).dense())
    assert (theta * x >= 0).all()
    for one, of_one in zip(x, theta, strict=True):
        ball(one, of_one, 3.0)
        if abs(one).sum() <= 3:
            np.testing.assert_array_equal(of_one, one)


def test_the_weighted_l1_ball():
    x, h = problems(60)
    importance = jnp.asarray(h)
    theta = np.asarray(jax.vmap(lambda x, h: lcq.L1Ball(3.0).project(x, importance=h))(x, importance).dense())
    for one, of_one, each in zip(x, theta, h, strict=True):
        ball(one, of_one, 3.0, each)


def test_what_has_no_weight_takes_nothing_of_the_radius():
    x, h = jnp.array([3.0, -5.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(lcq.L1Ball(3.0).project(x, importance=h).dense(), [2, 0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("group", ["channel", 2])
def test_the_ball_of_norms(group):
    scheme = lcq.L1Ball(2.5, group=group)
    x, _ = problems(40)
    theta = np.asarray(jax.vmap(scheme.project)(jnp.asarray(x)).dense(), np.float64).reshape(-1, 8)
    x = x.astype(np.float64).reshape(-1, 8)
    places = [groups(scheme) == g for g in np.unique(groups(scheme))]
    norms, left = (np.stack([np.linalg.norm(a[:, p], axis=1) for p in places], 1) for a in (x, theta))
    for i in range(len(x)):
        ball(norms[i], left[i], 2.5)
        for p, n, m in zip(places, norms[i], left[i], strict=True):
            np.testing.assert_allclose(theta[i, p], x[i, p] * (m / n if n else 0), atol=1e-5)


@pytest.mark.parametrize("group", [None, "channel"])
def test_radius_zero_keeps_nothing(group):
    x = np.random.default_rng(5).normal(size=(40, 1, 1)).astype(np.float32) * np.ones((40, 7, 3), np.float32)
    forms = jax.vmap(lcq.L1Ball(0, group=group).project)(jnp.asarray(x))
    assert not forms.mask.any() and not forms.dense().any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_l1_penalty_is_the_best_of_a_grid(weighted):
    x, h = problems(4)
    importance = jnp.asarray(h) if weighted else None
    theta = np.asarray(lcq.L1Penalty(0.9).project(jnp.asarray(x), mu=MU, importance=importance).dense())
    h = h if weighted else np.ones_like(h)
    grid = np.linspace(-1, 1, 4001).reshape(-1, 1, 1, 1) * abs(x)

    def objective(theta):
        return h * (x - theta.astype(np.float64)) ** 2 + 2 / MU * 0.9 * abs(theta)

    assert (objective(theta) <= objective(grid).min(0) * (1 + 1e-5) + 1e-9).all()
    np.testing.assert_allclose(theta, np.sign(x) * np.maximum(abs(x) - 0.9 / (MU * h), 0), rtol=1e-5, atol=1e-6)


def test_the_l1_penalty_of_groups_shrinks_their_norms():
    x = problems(1)[0][0]
    theta = lcq.L1Penalty(6.26, group="channel").project(jnp.asarray(x), mu=MU).dense()
    norms = np.linalg.norm(x.astype(np.float64), axis=0)
    assert (norms > 3.13).any() and (norms <= 3.13).any()
    np.testing.assert_allclose(theta, x * np.maximum(1 - 3.13 / norms, 0), rtol=1e-5, atol=1e-6)


COSTS = [
    (lcq.L0Penalty(0.5), 0.5 * 5),
    (lcq.L0Penalty(0.5, group="channel"), 0.5 * 2),
    (lcq.L0Penalty(0.5, group=2), 0.5 * 3),
    (lcq.L1Penalty(0.5), 0.5 * (1 + 2 + 2 + 6 + 3)),
    (lcq.L1Penalty(0.5, group="channel"), 0.5 * (3 + np.sqrt(45))),
    (lcq.L1Ball(99.0), 0),
    (lcq.Prune(count=5), 0),
    (lcq.PruneGroups(2, count=1), 0),
    (lcq.NofM(1, 2), 0),
]


@pytest.mark.parametrize(("scheme", "cost"), COSTS, ids=lambda value: str(value))
def test_costs(scheme, cost):
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [-2.0, 6.0], [0.0, -3.0]])
    forms = scheme.project((x, x), mu=1e9)
    assert float(scheme.cost(forms)) == pytest.approx(2 * cost, rel=1e-6)


@pytest.mark.parametrize("scheme", [lcq.L0Penalty(0.5), lcq.L1Penalty(0.5)], ids=str)
def test_an_infinite_mu_keeps_everything(scheme):
    x = problems(1)[0][0]
    np.testing.assert_array_equal(scheme.project(jnp.asarray(x), mu=np.inf).dense(), x)


# Inputs at the edge


@pytest.mark.parametrize("x", DEGENERATE, ids=str)
def test_degenerate_inputs_and_a_ball(x):
    x, dense, _ = degenerate(lcq.L1Ball(1.5), x)
    assert abs(dense).sum() <= 1.5 * (1 + 1e-6) or abs(x).max() > 1e30
    ball(x, dense, 1.5) if abs(x).max() < 1e30 else None


@pytest.mark.parametrize("x", DEGENERATE, ids=str)
def test_degenerate_inputs_and_a_price(x):
    x, _, form = degenerate(lcq.L0Penalty(0.5), x)
    np.testing.assert_array_equal(form.mask, x**2 > 2 * 0.5 / MU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lcq.L1Ball(-1.0), "expected radius >= 0 and finite, got -1.0"),
        (lambda: lcq.L0Penalty(np.inf), "expected alpha >= 0 and finite, got inf"),
        (lambda: lcq.L1Penalty(np.nan), "expected alpha >= 0 and finite, got nan"),
        (
            lambda: lcq.L1Ball(1.0, group=2).project(jnp.ones((4, 2)), importance=jnp.ones((4, 2))),
            "groups shrink by one factor: expected no importance",
        ),
        (
            lambda: lcq.L1Penalty(1.0, group=2).project(jnp.ones((4, 2)), mu=1.0, importance=jnp.ones((4, 2))),
            "groups shrink by one factor: expected no importance",
        ),
        (lambda: lcq.L0Penalty(1.0, group=5).project(jnp.ones((6, 4)), mu=1.0), "do not divide 6"),
    ],
)
def test_bad_settings_and_leaves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
