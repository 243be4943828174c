"""Pruning to a number of weights or groups, against all subsets in float64 numpy."""

import itertools

import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import lcq
from tests.schemes.sparse_problems import DEGENERATE, all_masks, check_best_of, degenerate, groups, problems

SUBSETS = [
    lcq.Prune(count=3),
    lcq.NofM(1, 2),
    lcq.PruneGroups("channel", count=1),
    lcq.PruneGroups(2, fraction=0.5),
]


def allowed(scheme):
    """Every mask that a scheme allows."""
    masks, touched = all_masks(scheme)
    if isinstance(scheme, lcq.NofM):
        return masks[(masks.reshape(-1, 2, 2, 2).sum(2) <= 1).all((1, 2))]  # one of every two along the first axis
    most = round(scheme.fraction * np.unique(groups(scheme)).size) if scheme.count is None else scheme.count
    return masks[touched <= most]


@pytest.mark.parametrize("scheme", SUBSETS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_best_of_all_subsets_is_kept(scheme, weighted):
    masks = allowed(scheme)
    mask = check_best_of(masks, np.zeros(len(masks)), scheme, weighted)
    np.testing.assert_array_equal(mask.sum(1), masks.sum(1).max())


@pytest.mark.parametrize(
    ("scheme", "chosen"),
    [
        (lcq.Prune(count=0), 0),
        (lcq.Prune(fraction=0.0), 0),
        (lcq.Prune(count=1), 1),
        (lcq.Prune(fraction=1), 15),
        (lcq.Prune(fraction=0.19), 3),
        (lcq.Prune(count=15), 15),
        (lcq.Prune(count=99), 15),
    ],
    ids=str,
)
def test_exactly_as_many_are_kept_ties_by_position(scheme, chosen):
    form = scheme.project(jnp.ones((5, 3)))
    assert np.flatnonzero(form.mask).tolist() == list(range(chosen))
    assert lcq.Prune(count=1) != lcq.Prune(fraction=1)  # one, and all; equal schemes share a program


def test_runs_go_along_the_input_axis():
    x = problems(2, (12, 3))[0].reshape(2, 12, 3)
    mask = np.asarray(lcq.NofM(2, 4).project(jnp.asarray(x)).mask)
    for i, first, j in itertools.product(range(2), (0, 4, 8), range(3)):
        run = (i, slice(first, first + 4), j)
        assert sorted(np.flatnonzero(mask[run])) == sorted(np.argsort(-abs(x[run]), kind="stable")[:2])


def test_joint_leaves_have_one_budget():
    rng = np.random.default_rng(1)
    xs = [rng.normal(size=(3, 4)), 3 * rng.normal(size=5), np.array(0.3), rng.normal(size=(2, 1, 2)) / 9]
    xs = [x.astype(np.float32) for x in xs]
    whole = np.concatenate([x.ravel() for x in xs])
    forms = lcq.Prune(count=6).project(tuple(map(jnp.asarray, xs)))
    assert [form.shape for form in forms] == [x.shape for x in xs]
    mask = np.concatenate([np.ravel(form.mask) for form in forms])
    np.testing.assert_array_equal(mask, np.isin(np.arange(whole.size), np.argsort(-abs(whole))[:6]))


def test_joint_leaves_have_one_budget_of_groups():
    xs = [np.diag([3.0, 1.0, 9.0]), np.ones((5, 2)) * [2.0, 4.0]]
    forms = lcq.PruneGroups("channel", fraction=0.4).project(tuple(jnp.asarray(x, jnp.float32) for x in xs))
    np.testing.assert_array_equal(forms[0].dense(), np.diag([0.0, 0.0, 9.0]))
    np.testing.assert_array_equal(forms[1].dense(), np.ones((5, 2)) * [0.0, 4.0])


# Inputs at the edge


@pytest.mark.parametrize("x", DEGENERATE, ids=str)
def test_degenerate_inputs(x):
    x, _, form = degenerate(lcq.Prune(count=2), x)
    assert form.mask.sum() == min(2, x.size)


@pytest.mark.parametrize("size", [1e38, 1e-38, 1e25, 1e-25])
def test_norms_of_huge_and_tiny_groups(size):
    x = np.array([[1, 2], [1, 0], [1, 0.5]], np.float32) * np.float32(size)
    form = lcq.PruneGroups("channel", count=1).project(jnp.asarray(x))
    np.testing.assert_array_equal(form.dense(), x * [0, 1])


def test_huge_weights_choose_as_small_ones_do():
    x, h = np.array([1.0, 2, 3, 4], np.float32), np.array([5.0, 3, 1, 0.1], np.float32)
    for scale in (1e-30, 1.0, 1e30, 1.6e37):
        chosen = lcq.Prune(count=2).project(jnp.asarray(x), importance=jnp.asarray(h * np.float32(scale))).mask
        assert chosen.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lcq.Prune(), "expected either count= or fraction=, got None and None"),
        (lambda: lcq.Prune(count=1, fraction=1.0), "got 1 and 1.0"),
        (lambda: lcq.Prune(count=-1), "expected count= an int >= 0, got -1"),
        (lambda: lcq.Prune(count=True), "expected count= an int >= 0, got True"),
        (lambda: lcq.Prune(count=0.05), "expected count= an int >= 0, got 0.05; a part of all is fraction="),
        (lambda: lcq.Prune(fraction=1.5), "a part of all from 0 to 1, got 1.5; a number of them is count="),
        (lambda: lcq.Prune(fraction=np.nan), "a part of all from 0 to 1, got nan"),
        (lambda: lcq.Prune(fraction=True), "a part of all from 0 to 1, got True"),
        (lambda: lcq.PruneGroups(None, count=1), "expected group= 'channel', .* got None; Prune keeps single weights"),
        (lambda: lcq.PruneGroups("channel"), "expected either count= or fraction=, got None and None"),
        (lambda: lcq.PruneGroups(2, count=1, fraction=0.5), "got 1 and 0.5"),
        (lambda: lcq.PruneGroups(2, fraction=-0.1), "a part of all from 0 to 1, got -0.1"),
        (lambda: lcq.NofM(3, 2), "expected ints 1 <= n <= m <= 1024, got n=3 and m=2"),
        (lambda: lcq.NofM(0, 2), "got n=0 and m=2"),
        (lambda: lcq.NofM(2, 1025), "got n=2 and m=1025"),
        (lambda: lcq.NofM(True, 2), "got n=True and m=2"),
        (lambda: lcq.NofM(0.5, 4), "got n=0.5 and m=4"),
        (lambda: lcq.NofM(1, 2, axis=0), "expected axis= a number below 0, counted from the last axis, got 0"),
        (lambda: lcq.NofM(2, 4).project(jnp.ones((6, 4))), r"that 4 divides, got \(6, 4\); .* such as NofM\(2, 6\)"),
        (lambda: lcq.NofM(2, 4).project(jnp.ones((7, 4))), r"that does, such as NofM\(2, 7\), or a part of all"),
        (lambda: lcq.NofM(2, 4).project(jnp.ones(8)), "the last but one"),
        (lambda: lcq.PruneGroups(5, count=1).project(jnp.ones((6, 4))), "do not divide 6"),
        (lambda: lcq.PruneGroups("channel", count=1).project(jnp.ones(())), "needs at least 1 axes"),
    ],
)
def test_bad_settings_and_leaves_are_refused(make, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        make()
