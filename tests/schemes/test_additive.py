"""Sums of schemes against all choices on tiny problems, and against the same sweeps made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.tree.rules import Task

X = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
H = np.random.default_rng(1).lognormal(size=(50, 8)).astype(np.float32)
Y = jnp.asarray(np.random.default_rng(2).standard_t(3, size=(8, 6)), jnp.float32)
MU = 2.0


def distortion(form, x):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


def errors(scheme, h=None):
    """h (x - Delta)^2 + (2/mu) C of fifty problems of eight weights."""
    importance = {} if h is None else {"importance": jnp.asarray(h)}
    forms = jax.jit(jax.vmap(lambda x, w: scheme.project(x, mu=MU, **w)))(jnp.asarray(X), importance)
    costs = np.asarray(jax.vmap(lambda form: jnp.asarray(scheme.cost((form,)), jnp.float32))(forms), np.float64)
    h = np.ones_like(X) if h is None else h
    return (h * (np.asarray(forms.dense(), np.float64) - X) ** 2).sum(1) + 2 / MU * costs


# All choices


def binary(x, h):
    """min over a and signs of sum h (x - a s)^2."""
    return (h * x**2).sum() - (h * abs(x)).sum() ** 2 / h.sum()


def two_means(x, h):
    del h
    x = np.sort(x)
    return min(((x[:i] - x[:i].mean()) ** 2).sum() + ((x[i:] - x[i:].mean()) ** 2).sum() for i in range(1, len(x)))


def with_one_kept(least, h):
    """One weight, whichever is best, is kept as it is; the others are left to a codebook."""
    rows = zip(X.astype(np.float64), h.astype(np.float64), strict=True)
    return np.array([min(least(np.delete(x, i), np.delete(w, i)) for i in range(8)) for x, w in rows])


BINARY, TWO, ONE = lcq.Binary(), lcq.KMeans(2), lcq.Prune(count=1)
CASES = {
    "binary, one kept": (lcq.Additive(BINARY, ONE), binary, None, 1.0),
    "weighted": (lcq.Additive(BINARY, ONE), binary, H, 0.9),
    "one kept, binary": (lcq.Additive(ONE, BINARY), binary, None, 0.8),
    "two levels, one kept": (lcq.Additive(TWO, ONE), two_means, None, 0.6),
}


@pytest.mark.parametrize("case", CASES)
def test_the_minimum_is_local_and_often_the_best_of_all(case):
    scheme, least, h, share = CASES[case]
    found, best = errors(scheme, h), with_one_kept(least, np.ones_like(X) if h is None else h)
    reached = np.mean(found <= best * 1.001)  # descent ends where a sweep gains less
    assert (found >= best * (1 - 1e-5)).all() and reached >= share
    assert (found <= errors(scheme.parts[0], h) * (1 + 1e-6)).all()
    if least is binary:
        assert (found <= errors(scheme.parts[1], h) * (1 + 1e-6)).all()


def test_costs_are_traded_against_the_distortion():
    scheme, price = lcq.Additive(BINARY, lcq.L0Penalty(0.4)), 2 / MU * 0.4
    subsets = [np.array([i >> j & 1 for j in range(8)], bool) for i in range(255)]
    rows, one = X.astype(np.float64), np.ones(8)
    best = np.array([min(binary(x[~s], one[~s]) + price * s.sum() for s in subsets) for x in rows])
    found = errors(scheme)
    assert (found >= best * (1 - 1e-5)).all()
    assert np.mean(found <= best * 1.001) >= 0.6 and (found / best).max() < 1.5
    with pytest.raises(ValueError, match="has a cost: pass mu="):
        scheme.project(Y)


# The descent


@pytest.mark.parametrize(
    "parts",
    [(BINARY, lcq.Prune(count=5), lcq.LowRank(1)), (lcq.LowRank(1), lcq.L0Penalty(0.5))],
    ids=["three", "cost"],
)
def test_the_sweeps_are_those_made_by_hand(parts):
    scheme, forms = lcq.Additive(*parts), [None] * len(parts)
    history = []

    def objective():
        left = np.asarray(Y, np.float64) - sum(np.asarray(f.dense(), np.float64) for f in forms if f is not None)
        paid = sum(float(part.cost((form,))) for part, form in zip(parts, forms, strict=True) if form is not None)
        return (left**2).sum() + 2 / MU * paid

    for sweep in range(30):
        for j, part in enumerate(parts):
            others = [f.dense() for i, f in enumerate(forms) if i != j and f is not None]
            forms[j] = part.project(Y - sum(others), forms[j], mu=MU)
            history.append(objective())
        if sweep and history[-1] >= history[-1 - len(parts)] * (1 - 1e-3):
            break
    if not scheme.costly:
        assert (np.diff(history) <= 1e-6 * history[0]).all()
    assert (np.diff(history[len(parts) - 1 :]) <= 1e-6 * history[0]).all() and sweep < 29
    form = scheme.project(Y, mu=MU)
    assert distortion(form, Y) + 2 / MU * float(scheme.cost((form,))) == pytest.approx(history[-1], rel=1e-4)
    assert [type(part) for part in form.parts] == [type(part) for part in forms]


def test_a_warm_start_has_the_structure_of_the_first_and_never_raises_the_distortion():
    scheme = lcq.Additive(BINARY, lcq.Prune(count=5))
    first = scheme.project(Y)
    steps = jax.lax.fori_loop(0, 3, lambda i, form: scheme.project(Y + 0.1 * i, form), first)
    assert jax.tree.structure(steps) == jax.tree.structure(first)
    for x in (Y, 1.1 * Y, Y[::-1]):
        warm = scheme.project(x, first)
        assert jax.tree.structure(warm) == jax.tree.structure(first)
        assert distortion(warm, x) <= distortion(first, x) * (1 + 1e-6)


def test_a_warm_start_stays_in_a_better_minimum():
    better, scheme = lcq.Additive(BINARY, ONE), lcq.Additive(ONE, BINARY)
    first = jax.vmap(better.project)(jnp.asarray(X))
    start = dataclasses.replace(first, parts=first.parts[::-1])
    warm = jax.vmap(scheme.project)(jnp.asarray(X), start).dense()
    before, after = (((np.asarray(a, np.float64) - X) ** 2).sum(1) for a in (start.dense(), warm))
    assert (after <= before * (1 + 1e-5)).all() and (before < errors(scheme) * 0.999).any()


def test_a_joint_task_starts_from_its_forms():
    task = Task(("a", "b"), lcq.Additive(BINARY, lcq.Prune(count=4)))
    first = task.project((Y[:3], Y[3:]))
    again = task.project((Y[:3], Y[3:]), first)
    assert jax.tree.structure(first) == jax.tree.structure(again) and first[1].parts[0].shared == "a"
    assert sum(map(distortion, again, (Y[:3], Y[3:]))) <= sum(map(distortion, first, (Y[:3], Y[3:]))) * (1 + 1e-6)


def test_joint_leaves_share_the_scale_and_the_budget():
    xs = (Y[:3], 3 * Y[3:].ravel())
    scheme = lcq.Additive(BINARY, lcq.Prune(count=4))
    form, other = scheme.project(xs)
    np.testing.assert_array_equal(form.parts[0].scale.ravel(), other.parts[0].scale.ravel())
    kept = [int(f.parts[1].mask.sum()) for f in (form, other)]
    assert sum(kept) == 4 and kept[1] > kept[0]
    both = np.concatenate([np.ravel(x) for x in xs])
    alone = scheme.project(jnp.asarray(both))
    assert distortion(form, xs[0]) + distortion(other, xs[1]) == pytest.approx(distortion(alone, both), rel=1e-3)


def test_parts_solved_on_the_host():
    exact, rest = lcq.Additive(lcq.KMeans(2, exact=True), lcq.Prune(count=5)), np.ravel(Y).astype(np.float64)
    assert exact.host and not lcq.Additive(TWO, ONE).host
    form = exact.project(Y)
    kept = np.ravel(form.parts[1].mask)
    best = two_means(rest[~kept], None)
    assert distortion(form, Y) == pytest.approx(best, rel=1e-3) and best < two_means(rest, None)
    assert distortion(exact.project(Y + 0.1, form), Y + 0.1) <= distortion(form, Y + 0.1)
    stacked = lcq.compress({"w": jnp.stack([Y, 2 * Y])}, [lcq.Rule("w", exact, stacked=1)])["w"]
    np.testing.assert_allclose(stacked.dense()[0], form.dense(), rtol=1e-6)
    np.testing.assert_allclose(stacked.dense()[1], 2 * form.dense(), rtol=1e-5)
    with pytest.raises(ValueError, match="cannot run under jit"):
        jax.jit(exact.project)(Y)


def test_what_is_such_a_sum_is_returned_if_corrections_come_first():
    x = jnp.where(jnp.arange(48).reshape(8, 6) % 2 == 0, 1.0, -1.0).at[3, jnp.arange(5)].add(9.0)
    scheme = lcq.Additive(lcq.Prune(count=5), BINARY)
    np.testing.assert_allclose(scheme.project(x).dense(), x, atol=1e-6)
    half = scheme.project(x.astype(jnp.bfloat16))
    assert half.dense().dtype == jnp.bfloat16 and half.parts[1].scale.dtype == jnp.float32
    np.testing.assert_array_equal(half.dense(), x.astype(jnp.bfloat16))
    np.testing.assert_array_equal(scheme.project(jnp.zeros((8, 6))).dense(), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lcq.Additive(), r"expected two or more schemes, .*, got \(\)"),
        (lambda: lcq.Additive(TWO), "expected two or more schemes"),
        (lambda: lcq.Additive(TWO, lcq.LowRank(1)).project(jnp.ones(5)), "expected at least two axes"),
        (
            lambda: lcq.Additive(TWO, lcq.LowRank(1)).project(Y, importance=jnp.ones((8, 6))),
            "equal along a row of its matrix",
        ),
    ],
)
def test_bad_settings_and_leaves_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_hash():
    one = lcq.Additive(TWO, ONE)
    assert one == lcq.Additive(lcq.KMeans(2), lcq.Prune(count=1)) and hash(one) == hash(lcq.Additive(TWO, ONE))
    assert one != lcq.Additive(ONE, TWO) and one.leaf_arrays == 3
    assert lcq.Additive(TWO, lcq.LowRank(penalty=1.0)).costly and not one.costly
