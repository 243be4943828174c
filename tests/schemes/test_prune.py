"""Pruning against all subsets, the conditions of its optimum, and closed forms; all oracles in float64 numpy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq

MU = 2.0
SHAPE = (4, 2)
RNG = np.random.default_rng(0)


def problems(n=24, shape=SHAPE, seed=0):
    """Arrays with ties and zeros, and weights over many magnitudes."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(3, size=(n, *shape)).astype(np.float32)
    x[: n // 4] = rng.integers(-3, 4, (n // 4, *shape))
    return x, rng.lognormal(sigma=2, size=x.shape).astype(np.float32)


def groups(scheme):
    """The group of every weight of `SHAPE`."""
    rows, columns = np.indices(SHAPE)
    places = {None: 2 * rows + columns, "channel": columns, 2: 2 * (rows // 2) + columns, (2, 0): rows // 2}
    return places[scheme.group].ravel()


def all_masks(scheme):
    """Every mask that a scheme allows, and the number of groups in it."""
    masks = np.array(list(itertools.product([False, True], repeat=8)))
    touched = np.stack([masks[:, groups(scheme) == g].any(1) for g in np.unique(groups(scheme))], 1).sum(1)
    if isinstance(scheme.kept, str):
        runs = masks.reshape(-1, 2, 2, 2).sum(2)  # two of every two along the first axis
        return masks[(runs <= 1).all((1, 2))], None
    if scheme.kept is not None:
        most = scheme.kept if isinstance(scheme.kept, int) else round(scheme.kept * np.unique(groups(scheme)).size)
        return masks[touched <= most], None
    return masks, touched


L0 = [
    lcq.Prune(kept=3),
    lcq.Prune(kept="1:2"),
    lcq.Prune(kept=1, group="channel"),
    lcq.Prune(kept=0.5, group=2),
    lcq.Prune(penalty=0.7),
    lcq.Prune(penalty=1.5, group=(2, 0)),
]


@pytest.mark.parametrize("scheme", L0, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_l0_is_the_best_of_all_subsets(scheme, weighted):
    x, h = problems()
    importance = {"importance": jnp.asarray(h)} if weighted else {}
    forms = jax.vmap(lambda x, w: scheme.project(x, mu=MU, **w))(jnp.asarray(x), importance)
    h = (h if weighted else np.ones_like(h)).reshape(-1, 8).astype(np.float64)
    wide, dense, mask = (np.asarray(a).reshape(-1, 8) for a in (x.astype(float), forms.dense(), forms.mask))
    masks, number = all_masks(scheme)
    price = 0 if number is None else 2 / MU * scheme.penalty * number
    best = ((h * wide**2)[:, None] * ~masks).sum(-1) + price
    np.testing.assert_array_equal(dense, np.where(mask, x.reshape(-1, 8), 0))
    for i in range(len(x)):
        assert (masks == mask[i]).all(1).any()
        paid = 0 if number is None else price[(masks == mask[i]).all(1)].item()
        assert (h[i] * (wide[i] - dense[i]) ** 2).sum() + paid == pytest.approx(best[i].min(), rel=1e-6)
    if number is None:
        np.testing.assert_array_equal(mask.sum(1), masks.sum(1).max())


@pytest.mark.parametrize(("kept", "chosen"), [(0, 0), (0.0, 0), (1, 1), (1.0, 15), (0.19, 3), (15, 15), (99, 15)])
def test_exactly_as_many_are_kept_ties_by_position(kept, chosen):
    form = lcq.Prune(kept=kept).project(jnp.ones((5, 3)))
    assert np.flatnonzero(form.mask).tolist() == list(range(chosen))
    assert lcq.Prune(kept=1) != lcq.Prune(kept=1.0)  # one, and all; equal schemes share a program


def test_runs_go_along_the_input_axis():
    x = problems(2, (12, 3))[0].reshape(2, 12, 3)
    mask = np.asarray(lcq.Prune(kept="2:4").project(jnp.asarray(x)).mask)
    for i, first, j in itertools.product(range(2), (0, 4, 8), range(3)):
        run = (i, slice(first, first + 4), j)
        assert sorted(np.flatnonzero(mask[run])) == sorted(np.argsort(-abs(x[run]), kind="stable")[:2])


def test_joint_leaves_have_one_budget():
    rng = np.random.default_rng(1)
    xs = [rng.normal(size=(3, 4)), 3 * rng.normal(size=5), np.array(0.3), rng.normal(size=(2, 1, 2)) / 9]
    xs = [x.astype(np.float32) for x in xs]
    whole = np.concatenate([x.ravel() for x in xs])
    forms = lcq.Prune(kept=6).project(tuple(map(jnp.asarray, xs)))
    assert [form.shape for form in forms] == [x.shape for x in xs]
    mask = np.concatenate([np.ravel(form.mask) for form in forms])
    np.testing.assert_array_equal(mask, np.isin(np.arange(whole.size), np.argsort(-abs(whole))[:6]))
    shrunk = lcq.Prune(radius=4.0).project(tuple(map(jnp.asarray, xs)))
    ball(whole, np.concatenate([np.ravel(form.dense()) for form in shrunk]), 4.0)


# Norms: the conditions of the optimum


def ball(norms, left, radius, h=1.0):
    """Theta is the projection on sum |theta| <= radius iff h (|x| - |theta|) = tau >= 0 where theta is not zero and at
    most tau elsewhere, and tau = 0 or the sum is the radius. Returns tau."""
    norms, left, h = (np.asarray(abs(a), np.float64) for a in (norms, left, h * np.ones_like(norms)))
    fall = h * (norms - left)
    tau = fall[left > 0].max(initial=0.0) if left.any() else fall.max()
    near = 1e-5 * (h * norms).max()
    np.testing.assert_allclose(fall[left > 0], tau, rtol=1e-5, atol=near)
    assert (fall[left == 0] <= tau + near).all() and (left >= 0).all()
    assert left.sum() <= radius * (1 + 1e-5)
    assert tau <= near or left.sum() == pytest.approx(radius, rel=1e-5)
    return tau


def test_the_l1_ball():
    x, _ = problems(60)
    x *= np.geomspace(1e-2, 1e2, 60, dtype=np.float32)[:, None, None]
    theta = np.asarray(jax.vmap(lcq.Prune(radius=3.0).project)(jnp.asarray(x)).dense())
    assert (theta * x >= 0).all()
    for one, of_one in zip(x, theta, strict=True):
        ball(one, of_one, 3.0)
        if abs(one).sum() <= 3:
            np.testing.assert_array_equal(of_one, one)


def test_the_weighted_l1_ball():
    x, h = problems(60)
    importance = jnp.asarray(h)
    theta = np.asarray(jax.vmap(lambda x, h: lcq.Prune(radius=3.0).project(x, importance=h))(x, importance).dense())
    for one, of_one, each in zip(x, theta, h, strict=True):
        ball(one, of_one, 3.0, each)


def test_what_has_no_weight_takes_nothing_of_the_radius():
    x, h = jnp.array([3.0, -5.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(lcq.Prune(radius=3.0).project(x, importance=h).dense(), [2, 0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("group", ["channel", 2])
def test_the_ball_of_norms(group):
    scheme = lcq.Prune(radius=2.5, group=group)
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
    forms = jax.vmap(lcq.Prune(radius=0, group=group).project)(jnp.asarray(x))
    assert not forms.mask.any() and not forms.dense().any()


@pytest.mark.parametrize("weighted", [False, True])
def test_the_l1_penalty_is_the_best_of_a_grid(weighted):
    x, h = problems(4)
    importance = jnp.asarray(h) if weighted else None
    theta = np.asarray(lcq.Prune(penalty=0.9, norm="l1").project(jnp.asarray(x), mu=MU, importance=importance).dense())
    h = h if weighted else np.ones_like(h)
    grid = np.linspace(-1, 1, 4001).reshape(-1, 1, 1, 1) * abs(x)

    def objective(theta):
        return h * (x - theta.astype(np.float64)) ** 2 + 2 / MU * 0.9 * abs(theta)

    assert (objective(theta) <= objective(grid).min(0) * (1 + 1e-5) + 1e-9).all()
    np.testing.assert_allclose(theta, np.sign(x) * np.maximum(abs(x) - 0.9 / (MU * h), 0), rtol=1e-5, atol=1e-6)


def test_the_l1_penalty_of_groups_shrinks_their_norms():
    x = problems(1)[0][0]
    theta = lcq.Prune(penalty=6.26, norm="l1", group="channel").project(jnp.asarray(x), mu=MU).dense()
    norms = np.linalg.norm(x.astype(np.float64), axis=0)
    assert (norms > 3.13).any() and (norms <= 3.13).any()
    np.testing.assert_allclose(theta, x * np.maximum(1 - 3.13 / norms, 0), rtol=1e-5, atol=1e-6)


COSTS = [
    (lcq.Prune(penalty=0.5), 0.5 * 5),
    (lcq.Prune(penalty=0.5, group="channel"), 0.5 * 2),
    (lcq.Prune(penalty=0.5, group=2), 0.5 * 3),
    (lcq.Prune(penalty=0.5, norm="l1"), 0.5 * (1 + 2 + 2 + 6 + 3)),
    (lcq.Prune(penalty=0.5, norm="l1", group="channel"), 0.5 * (3 + np.sqrt(45))),
    (lcq.Prune(kept=5), 0),
    (lcq.Prune(radius=99.0), 0),
]


@pytest.mark.parametrize(("scheme", "cost"), COSTS, ids=lambda value: str(value))
def test_costs(scheme, cost):
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [-2.0, 6.0], [0.0, -3.0]])
    forms = scheme.project((x, x), mu=1e9)
    assert float(scheme.cost(forms)) == pytest.approx(2 * cost, rel=1e-6)


@pytest.mark.parametrize("norm", ["l0", "l1"])
def test_an_infinite_mu_keeps_everything(norm):
    x = problems(1)[0][0]
    np.testing.assert_array_equal(lcq.Prune(penalty=0.5, norm=norm).project(jnp.asarray(x), mu=np.inf).dense(), x)


# Stored values


@pytest.mark.parametrize(("exact", "joint"), [(False, True), (True, False)])
def test_a_codebook_is_fitted_to_what_is_kept(exact, joint):
    rng = np.random.default_rng(2)
    around = np.repeat([-7, 4, 9, 0], [5, 6, 3, 34])
    x = rng.permutation(around + rng.normal(size=48) / 9).astype(np.float32).reshape(8, 6)
    heaps = [(-8, -6), (3, 5), (8, 10)]
    scheme = lcq.Prune(kept=14, values=lcq.KMeans(3, exact=exact))
    xs = (x[:3], x[3:].ravel()) if joint else (x,)
    means = [x[(a < x) & (x < b)].astype(np.float64).mean() for a, b in heaps]
    for one, form in zip(xs, scheme.project(tuple(map(jnp.asarray, xs))), strict=True):
        np.testing.assert_allclose(form.levels.ravel(), means, rtol=1e-6)
        assert form.levels.shape == (1,) * one.ndim + (3,)
        expected = sum(np.where((a < one) & (one < b), mean, 0) for (a, b), mean in zip(heaps, means, strict=True))
        np.testing.assert_allclose(form.dense(), expected, rtol=1e-6)


def test_a_weighted_codebook_is_fitted_to_the_weights_of_what_is_kept():
    x, h = np.array([5.0, 6, 9, 0.1, -4, 2], np.float32), np.array([1.0, 3, 1, 90, 2, 0.01], np.float32)
    form = lcq.Prune(kept=4, values=lcq.KMeans(2)).project(jnp.asarray(x), importance=jnp.asarray(h))
    np.testing.assert_allclose(form.dense(), [6.4, 6.4, 6.4, 0, -4, 0], rtol=1e-6)


def test_shorter_values():
    x = problems(1)[0][0]
    form = lcq.Prune(kept=3, values="bfloat16").project(jnp.asarray(x))
    mask = np.asarray(form.mask)
    np.testing.assert_array_equal(form.dense(), np.where(mask, x.astype(jnp.bfloat16).astype(np.float32), 0))
    assert form.dtype == "float32" and form.bits == 32 + 3 * 16


def test_values_of_a_bfloat16_leaf_are_kept_as_they_are():
    x = jnp.asarray(problems(1)[0][0], jnp.bfloat16)
    form = lcq.Prune(kept=3).project(x)
    np.testing.assert_array_equal(form.dense(), jnp.where(form.mask, x, 0))
    assert form.dense().dtype == jnp.bfloat16 and form.bits == 32 + 3 * 16


# Inputs at the edge


@pytest.mark.parametrize("scheme", [lcq.Prune(kept=2), lcq.Prune(radius=1.5), lcq.Prune(penalty=0.5)], ids=str)
@pytest.mark.parametrize(
    "x", [np.ones(6), np.zeros(6), np.array([3.0]), np.array(-0.25), [1e38, -1e38, 0], [2e-38, 0, -3e-38]], ids=str
)
def test_degenerate_inputs(scheme, x):
    x = np.asarray(x, np.float32)
    form = scheme.project(jnp.asarray(x), mu=MU)
    dense = np.asarray(form.dense(), np.float64)
    assert form.shape == x.shape and np.isfinite(dense).all() and not dense[~np.asarray(form.mask)].any()
    if scheme.kept:
        assert form.mask.sum() == min(2, x.size)
    if scheme.radius:
        assert abs(dense).sum() <= 1.5 * (1 + 1e-6) or abs(x).max() > 1e30
        ball(x, dense, 1.5) if abs(x).max() < 1e30 else None
    if scheme.penalty:
        np.testing.assert_array_equal(form.mask, x.astype(np.float64) ** 2 > 2 * 0.5 / MU)
    np.testing.assert_array_equal(form.pack().dense(), form.dense())


@pytest.mark.parametrize("size", [1e38, 1e-38, 1e25, 1e-25])
def test_norms_of_huge_and_tiny_groups(size):
    x = np.array([[1, 2], [1, 0], [1, 0.5]], np.float32) * np.float32(size)
    form = lcq.Prune(kept=1, group="channel").project(jnp.asarray(x))
    np.testing.assert_array_equal(form.dense(), x * [0, 1])


def test_huge_weights_choose_as_small_ones_do():
    x, h = np.array([1.0, 2, 3, 4], np.float32), np.array([5.0, 3, 1, 0.1], np.float32)
    for scale in (1e-30, 1.0, 1e30, 1.6e37):
        chosen = lcq.Prune(kept=2).project(jnp.asarray(x), importance=jnp.asarray(h * np.float32(scale))).mask
        assert chosen.tolist() == [False, True, True, False]


def test_stacked_leaves_are_projected_one_by_one():
    x = np.random.default_rng(3).normal(size=(3, 4, 2)).astype(np.float32) * [[[1]], [[9]], [[0.1]]]
    x = jnp.asarray(x, jnp.float32)
    for scheme in (lcq.Prune(kept=3), lcq.Prune(radius=2.0)):
        form = lcq.compress({"w": x}, [lcq.Rule("w", scheme, stacked=1)])["w"]
        alone = jnp.stack([scheme.project(one).dense() for one in x])
        np.testing.assert_allclose(form.dense(), alone, rtol=1e-6)
        np.testing.assert_array_equal(form.pack().dense(), form.dense())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lcq.Prune(), "expected one of kept=, radius=, penalty=, got none"),
        (lambda: lcq.Prune(kept=1, radius=1.0), "got kept and radius"),
        (lambda: lcq.Prune(kept=-1), "expected kept= a number >= 0"),
        (lambda: lcq.Prune(kept=True), "expected kept= a number >= 0"),
        (lambda: lcq.Prune(kept=1.5), "a part of all between 0.0 and 1.0, or a number as an int, got 1.5"),
        (lambda: lcq.Prune(kept=np.nan), "a part of all between"),
        (lambda: lcq.Prune(kept="3:2"), "'n:m' with n <= m <= 1024, without group=, got '3:2'"),
        (lambda: lcq.Prune(kept="2"), "'n:m'"),
        (lambda: lcq.Prune(kept="1:2", group=2), "without group="),
        (lambda: lcq.Prune(kept=2, norm="l1"), "expected norm='l0', or 'l1' with radius= or penalty=, got 'l1'"),
        (lambda: lcq.Prune(penalty=1.0, norm="l2"), "got 'l2'"),
        (lambda: lcq.Prune(radius=-1.0), "expected radius >= 0 and finite, got -1.0"),
        (lambda: lcq.Prune(penalty=np.inf), "expected penalty >= 0 and finite"),
        (lambda: lcq.Prune(kept=1, values="int8"), r"a floating-point format, .*, or KMeans\(\.\.\.\), got 'int8'"),
        (lambda: lcq.Prune(kept=1, values=lcq.KMeans(2, per="channel")), r"or KMeans\(...\) without per="),
        (lambda: lcq.Prune(kept="2:4").project(jnp.ones((6, 4))), r"that 4 divides, got \(6, 4\)"),
        (lambda: lcq.Prune(kept="2:4").project(jnp.ones(8)), "the last but one"),
        (lambda: lcq.Prune(kept=1, group=5).project(jnp.ones((6, 4))), "do not divide 6"),
        (lambda: lcq.Prune(kept=1, group="channel").project(jnp.ones(())), "needs at least 1 axes"),
        (
            lambda: lcq.Prune(radius=1.0, group=2).project(jnp.ones((4, 2)), importance=jnp.ones((4, 2))),
            "groups shrink by one factor: expected no importance",
        ),
    ],
)
def test_bad_settings_and_leaves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
