"""The LC loop against an oracle in float64 that shares nothing with it; timing, signs, guards, settings."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis.extra.numpy import arrays

import lcq
from lcq.training.augmented_lagrangian import theta
from lcq.training.lc import _periods
from lcq.training.schedules import as_schedule

pytestmark = pytest.mark.filterwarnings("ignore:the weights are")

RNG = np.random.default_rng(0)
TWO_HEAPS = np.where(np.arange(12) < 5, 1.0, -0.6) + RNG.normal(size=12) / 4
A, W0 = RNG.normal(size=(30, 12)) / 5, TWO_HEAPS + RNG.normal(size=12) / 10
B = A @ TWO_HEAPS + RNG.normal(size=30) / 5


# The oracle


def two_means(x, previous=None):
    """Lloyd's algorithm from the previous levels, the best split at first."""
    splits = [(np.sort(x)[:i], np.sort(x)[i:]) for i in range(1, len(x))]
    low, high = min(splits, key=lambda s: s[0].var() * len(s[0]) + s[1].var() * len(s[1]))
    levels = np.array([low.mean(), high.mean()]) if previous is None else np.unique(previous)
    for _ in range(20):
        above = x > levels.mean()
        levels = np.array([x[~above].mean(), x[above].mean()])
    return levels[above.astype(int)]


def scaled_ternary(x, previous=None):
    sums = np.cumsum(np.sort(abs(x))[::-1])
    j = np.argmax(sums / np.sqrt(np.arange(1, len(x) + 1)))
    a = sums[j] / (j + 1)
    return np.where(abs(x) >= a / 2, a * np.sign(x), 0)


def oracle(project, multipliers, eta=0.4, mu0=0.02, factor=1.3, c_steps=12, first=20, rest=7):
    w, delta, lagrange = W0, project(W0), 0 * W0
    for k in range(c_steps):
        mu = mu0 * factor**k
        for _ in range(rest if k else first):
            w = w - eta * (A.T @ (A @ w - B) + mu * (w - delta) - lagrange)
        delta = project(w - lagrange / mu, delta)
        lagrange = multipliers * (lagrange - mu * (w - delta))
    return w, delta, lagrange


def run_lc(scheme, multipliers, steps=20 + 11 * 7, **settings):
    rules = [lcq.Rule("w", scheme)]
    mu = lcq.geometric(0.02, 1.3, steps=40)
    tx = lcq.lc(settings.pop("inner", optax.sgd(0.4)), rules, mu=mu, every=(20, 7), multipliers=multipliers, **settings)
    a, b = jnp.asarray(A, jnp.float32), jnp.asarray(B, jnp.float32)

    def step(_, carry):
        params, state = carry
        grads = {"w": jnp.dot(a.T, jnp.dot(a, params["w"], precision="highest") - b, precision="highest")}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.asarray(W0, jnp.float32)}
    return jax.jit(lambda c: jax.lax.fori_loop(0, steps, step, c))((params, tx.init(params)))


CASES = {
    "k-means": (lcq.KMeans(2), two_means, True),
    "ternary": (lcq.Ternary(), scaled_ternary, True),
    "quadratic penalty": (lcq.Ternary(), scaled_ternary, False),
}


@pytest.mark.parametrize("case", CASES)
def test_lc_is_the_oracle(case):
    scheme, project, multipliers = CASES[case]
    params, state = run_lc(scheme, multipliers)
    w, delta, lagrange = oracle(project, multipliers)
    np.testing.assert_allclose(params["w"], w, atol=2e-5)
    np.testing.assert_allclose(lcq.extract(state, params)["w"].dense(), delta, atol=2e-5)
    after = lcq.training.c_step(state, params)
    np.testing.assert_allclose(theta(after.lagrangian)[0][0].dense(), delta, atol=2e-5)
    found = after.lagrangian.multipliers["w"]
    if multipliers:
        np.testing.assert_allclose(found, lagrange, atol=2e-5)
        assert np.linalg.norm(lagrange) > 0.05
        if case == "k-means":  # every level is the mean of its cell
            for level in np.unique(delta):
                assert abs(found[delta == level].sum()) < 1e-5
    else:
        assert found == optax.MaskedNode()
    metrics = lcq.metrics(after)
    np.testing.assert_allclose(metrics["gap"], np.sum((w - delta) ** 2) / np.sum(w**2), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(metrics["multiplier_norm"], np.linalg.norm(lagrange), rtol=1e-4)
    np.testing.assert_allclose(metrics["penalty_weight"], 0.02 * 1.3**12, rtol=1e-5)
    assert metrics["c_steps"] == 12 and metrics["kept_back"] == metrics["skipped"] == 0


# Which update makes the C step, on which parameters, at which mu


def mean_scale(x):
    return np.mean(np.abs(x)) * np.where(x >= 0, 1, -1)


@pytest.mark.parametrize("every, due", [((3, 2), {3, 5, 7}), (2, {2, 4, 6}), (1, set(range(1, 8))), (None, set())])
def test_c_steps_come_at_the_start_of_the_update_after_an_l_step(every, due):
    tx = lcq.lc(optax.sgd(0.5), [lcq.Rule("w", lcq.Binary())], mu=lcq.geometric(0.5, 2.0, steps=3), every=every)
    given_params = [{"w": jnp.asarray(RNG.normal(size=5), jnp.float32)} for _ in range(8)]
    state, update = tx.init(given_params[0]), jax.jit(tx.update)
    x = np.asarray(given_params[0]["w"])
    delta, lagrange, mus = mean_scale(x), np.zeros(5), [0.5, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 4.0]
    done = 0
    for i, params in enumerate(given_params):
        updates, state = update({"w": jnp.zeros(5)}, state, params)
        w = np.asarray(params["w"])
        if i in due:
            x = w - lagrange / mus[done]
            delta = mean_scale(x)
            lagrange = mus[done] * (delta - x)
            done += 1
        np.testing.assert_allclose(updates["w"], -0.5 * (mus[done] * (w - delta) - lagrange), rtol=1e-4, atol=1e-5)
    assert lcq.metrics(state)["c_steps"] == done == len(due)


def test_extract_is_a_c_step_at_any_parameters_and_leaves_the_state():
    params, state = run_lc(lcq.Ternary(), True, steps=60)
    before = jax.tree.map(jnp.copy, state)
    averaged = {"w": params["w"] * 0.9 + 0.05}
    x = averaged["w"] - state.lagrangian.multipliers["w"] / lcq.metrics(state)["penalty_weight"]
    with pytest.warns(UserWarning, match=r"weights are [\d.]+% \(squared\) away"):
        forms = lcq.extract(state, averaged)
    np.testing.assert_allclose(forms["w"].dense(), scaled_ternary(np.asarray(x)), atol=1e-5)
    assert forms["w"].packed == (12,)
    jax.tree.map(np.testing.assert_array_equal, state, before)


# The clipped learning rate


def quadratic_run(tx, steps=60):
    """0.25 ||w - (1, -2)||^2 by the given optimizer."""
    params = {"w": jnp.array([2.0, 3.0])}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update({"w": 0.5 * (params["w"] - jnp.array([1.0, -2.0]))}, state, params)
        params = optax.apply_updates(params, updates)
    return params["w"], updates["w"], state


def test_clipped_rate_stays_stable_where_the_fixed_one_diverges():
    settings = {"rules": [lcq.Rule("w", lcq.Binary())], "mu": lcq.geometric(0.1, 2.0, steps=12), "every": 5}
    w, _, state = quadratic_run(lcq.lc(optax.sgd, learning_rate=1.0, **settings))
    assert lcq.metrics(state)["gap"] < 1e-5
    np.testing.assert_allclose(w, [1.5, -1.5], atol=0.05)
    wild, _, _ = quadratic_run(lcq.lc(optax.sgd(1.0), **settings))
    assert not np.all(abs(wild) < 1e3)


@pytest.mark.parametrize("eta, mu", [(1.0, 10.0), (0.05, 10.0)])
def test_clipped_rate_is_sgd_at_the_smaller_of_eta_and_one_over_mu(eta, mu):
    settings = {"rules": [lcq.Rule("w", lcq.Binary())], "mu": mu, "every": 3}
    clipped = lcq.lc(lambda e: optax.sgd(e, momentum=0.5), learning_rate=eta, **settings)
    plain = lcq.lc(optax.sgd(min(eta, 1 / mu), momentum=0.5), **settings)
    np.testing.assert_allclose(quadratic_run(clipped)[0], quadratic_run(plain)[0], rtol=1e-6)


def test_learning_rate_schedule_counts_updates():
    tx = lcq.lc(optax.sgd, [lcq.Rule("w", lcq.Binary())], mu=1e-3, every=None, learning_rate=lambda n: 0.1 / (n + 1))
    params = {"w": jnp.array([1.0, -1.0])}
    state = tx.init(params)
    for n in range(3):
        updates, state = tx.update({"w": jnp.ones(2)}, state, params)
        np.testing.assert_allclose(updates["w"], -0.1 / (n + 1), rtol=1e-5)


# Guards


LEAF = arrays(np.float32, 16, elements=st.floats(-10, 10, width=32))


@pytest.mark.parametrize("scheme", [lcq.KMeans(3), lcq.Ternary()], ids=["k-means", "ternary"])
def test_a_c_step_never_raises_its_objective(scheme):
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("w", scheme)], mu=0.5, every=None)

    @jax.jit
    def objectives(first, second):
        """||x - Delta||^2 before and after the second C step, and how many projections were dropped."""
        state = lcq.training.c_step(tx.init({"w": first}), {"w": first[::-1]})
        x = second - state.lagrangian.multipliers["w"] / 0.5
        after = lcq.training.c_step(state, {"w": second})
        distances = [jnp.sum((x - theta(s.lagrangian)[0][0].dense()) ** 2) for s in (state, after)]
        return *distances, lcq.metrics(after)["kept_back"]

    @given(LEAF, LEAF)
    def check(first, second):
        before, after, kept_back = objectives(first, second)
        assert after <= before * (1 + 1e-5) + 1e-9
        assert kept_back == 0

    check()


@dataclasses.dataclass(frozen=True)
class Careless(lcq.schemes.Scheme):
    """Binary at first, then whatever comes."""

    def check(self, shape):
        pass

    def solve(self, xs, previous, mu):
        return tuple(
            form if previous is None else dataclasses.replace(form, scale=form.scale * 7)
            for form in lcq.Binary().solve(xs, previous, mu)
        )


def test_a_projection_that_got_worse_is_dropped_and_counted():
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("w", Careless())], mu=1.0, every=None)
    params = {"w": jnp.asarray(np.linspace(-2, 3, 16), jnp.float32)}
    state = tx.init(params)
    after = lcq.training.c_step(state, {"w": -params["w"]})
    assert lcq.metrics(after)["kept_back"] == 1 and lcq.metrics(after)["c_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, theta(after.lagrangian), theta(state.lagrangian))


@pytest.mark.parametrize("bad, jit", [(np.nan, True), (np.inf, True), (np.nan, False)])
def test_weights_that_are_not_finite_keep_theta_and_multipliers(bad, jit):
    rules = [lcq.Rule("a|b", lcq.Binary())]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=lcq.geometric(1.0, 2.0, steps=9), every=1)
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, -4.0])}
    update = jax.jit(tx.update) if jit else tx.update
    state = tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    _, after = update(params, state, params | {"b": jnp.array([bad, 1.0])})
    for field in ("multipliers", "codes", "codebooks", "c_steps"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after.lagrangian, field), getattr(state.lagrangian, field))
    assert lcq.metrics(after) | {"skipped": 0} == lcq.metrics(state)
    assert lcq.metrics(after)["skipped"] == 1
    with pytest.raises(ValueError, match=r"1 were skipped.*smaller learning rate"):
        lcq.extract(after, params)
    with pytest.raises(ValueError, match="b: expected finite weights, got 1"):
        lcq.extract(state, params | {"b": jnp.array([bad, 1.0])})
    with pytest.raises(ValueError, match="b: expected finite weights, got 1"):
        tx.init(params | {"b": jnp.array([bad, 1.0])})


# Finding the state, bad settings


def test_the_state_is_found_anywhere_and_must_be_one():
    params = {"w": jnp.array([1.0, 2.0])}
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("w", lcq.Binary())], mu=1.0, every=1)
    chained = optax.chain(optax.clip(1.0), optax.chain(tx, optax.scale(1.0))).init(params)
    assert lcq.metrics(chained)["c_steps"] == 0
    assert lcq.metrics(lcq.training.c_step(chained, params))["c_steps"] == 1
    for state, count in ((optax.sgd(0.1).init(params), 0), ((tx.init(params), tx.init(params)), 2)):
        one = f"expected one LC state in the optimizer state, got {count}"
        either = "expected a state of lc or hemp in the optimizer state, got none: .* lcq.lc or lcq.hemp"
        with pytest.raises(ValueError, match=one):
            lcq.training.c_step(state, params)
        with pytest.raises(ValueError, match=one if count else either):
            lcq.metrics(state)
        words = (
            "expected one LC state .* got 2"
            if count
            else r"expected a state of lc, hemp, .* got none: the order is extract\(state, params\); was the"
        )
        with pytest.raises(ValueError, match=words):
            lcq.extract(state, params)


RULES = [lcq.Rule("w", lcq.Binary())]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rules": []}, "wants a rule with a scheme"),
        ({"rules": [lcq.Rule("w", None)]}, "wants a rule with a scheme"),
        ({"every": 0}, r"every= a positive int, a pair.*static_args"),
        ({"every": (3, 0)}, r"every= a positive int, a pair"),
        ({"mu": -1.0}, "expected mu= a positive number, got -1.0"),
        ({"rules": [lcq.Rule("w", lcq.KMeans(2, exact=True))]}, "every=None, call lcq.training.c_step"),
        ({"coupling": "proximate"}, "'gradient', 'proximal' or a function"),
        ({"learning_rate": 0.1}, "pass optax.sgd or lambda eta"),
        ({"coupling": "proximal"}, "pass learning_rate="),
        ({"coupling": lcq.training.adam_step()}, "pass learning_rate="),
        ({"inner": optax.sgd}, "expected an optax optimizer, or a function"),
        ({"inner": optax.adam, "learning_rate": 0.1, "coupling": "proximal"}, "lcq.training.adam_step"),
    ],
)
def test_settings_that_do_not_fit_say_the_remedy(changes, message):
    settings = {"inner": optax.sgd(0.1), "rules": RULES, "mu": 1.0, "every": 1} | changes
    with pytest.raises(ValueError, match=message):
        lcq.lc(settings.pop("inner"), settings.pop("rules"), **settings)


def test_init_and_update_say_what_is_wrong():
    params = {"w": jnp.array([1.0, 2.0])}
    with pytest.raises(ValueError, match=r"matches no leaf.*kernel"):
        lcq.lc(optax.sgd(0.1), RULES, mu=1.0, every=1).init({"kernel": params["w"]})
    tx = lcq.lc(optax.sgd(0.1), RULES, mu=1.0, every=1)
    with pytest.raises(ValueError, match=r"update\(grads, state, params\)"):
        tx.update(params, tx.init(params))
    kept = lcq.lc(optax.inject_hyperparams(optax.sgd), RULES, mu=1.0, every=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="wrap lc instead"):
        kept.init(params)


def test_hyperparameters_that_were_traced_say_the_remedy():
    for check, value in ((as_schedule, jnp.float32(0.1)), (_periods, jnp.int32(3))):
        with pytest.raises(ValueError, match=r"under optax\.inject_hyperparams name it in static_args"):
            check(value)


def test_every_is_any_integral_number():
    assert _periods(np.int64(10)) == (10, 10) and _periods((np.uint8(3), 2)) == (3, 2)
    assert [type(n) for n in _periods(np.int64(10))] == [int, int]
    with pytest.raises(ValueError, match="expected every= a positive int"):
        _periods(np.float32(10))


def test_exact_schemes_run_in_c_steps_by_hand():
    params = {"w": jnp.asarray(W0, jnp.float32)}
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("w", lcq.KMeans(2, exact=True))], mu=1.0, every=None)
    state = lcq.training.c_step(tx.init(params), params)
    np.testing.assert_allclose(theta(state.lagrangian)[0][0].dense(), two_means(W0), rtol=1e-5)
    with pytest.raises(ValueError, match=r"w: .*solved on the host.*every=None"):
        jax.jit(lcq.training.c_step)(state, params)


def test_a_joint_task_shares_one_theta():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, -4.0, 5.0])}
    tx = lcq.lc(optax.sgd(0.1), [lcq.Rule("a|b", lcq.Binary(), joint=True)], mu=1.0, every=1, multipliers=False)
    update = jax.jit(tx.update, donate_argnums=1)
    state = tx.init(params)
    for _ in range(2):
        _, state = update(params, state, params)
    with pytest.warns(UserWarning, match="away"):
        forms = lcq.extract(state, params)
    assert forms["a"].scale.item() == forms["b"].scale.item() == pytest.approx(3.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair(lcq.forms.Form):
    """A form made of forms, Delta = the sum of theirs."""

    parts: tuple

    dtype = "float32"
    shape = property(lambda self: self.parts[0].shape)
    bits = property(lambda self: sum(part.bits for part in self.parts))

    def dense(self):
        return sum(part.dense() for part in self.parts)

    def pack(self):
        return Pair(tuple(part.pack() for part in self.parts))

    def unpack(self):
        return Pair(tuple(part.unpack() for part in self.parts))

    def check_stored(self):
        pass


@dataclasses.dataclass(frozen=True)
class TwoBits(lcq.schemes.Scheme):
    """A scale and a sign, then the same for the rest."""

    leaf_arrays = 2

    def check(self, shape):
        pass

    def solve(self, xs, previous, mu):
        first = lcq.Binary().solve(xs, None, None)
        rest = tuple(x - form.dense() for x, form in zip(xs, first, strict=True))
        return tuple(map(Pair, zip(first, lcq.Binary().solve(rest, None, None), strict=True)))


def test_forms_of_forms_keep_a_tree_for_every_leafwise_array():
    params = {"a": jnp.array([1.0, 2.0, 5.0, -6.0]), "b": jnp.array([3.0, -4.0, 5.0])}
    rules = [lcq.Rule("a", TwoBits()), lcq.Rule("b", lcq.Binary())]
    tx = lcq.lc(optax.sgd(0.1), rules, mu=1.0, every=1)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        _, state = update(params, state, params)
    assert [sorted(tree) for tree in state.lagrangian.codes] == [["a", "b"]] * 2
    assert state.lagrangian.codes[1]["b"] == optax.MaskedNode()
    x = np.asarray(params["a"] - state.lagrangian.multipliers["a"])
    delta = mean_scale(x) + mean_scale(x - mean_scale(x))
    np.testing.assert_allclose(lcq.extract(state, params)["a"].dense(), delta, rtol=1e-5)


TIGHTER = {
    "prune": (lcq.Prune(count=12), lcq.Prune(count=3)),
    "a fraction": (lcq.Prune(fraction=0.5), lcq.Prune(fraction=0.125)),
    "a codebook": (lcq.Prune(count=12, values=lcq.KMeans(2)), lcq.Prune(count=3, values=lcq.KMeans(2))),
    "groups": (lcq.PruneGroups("channel", count=3), lcq.PruneGroups("channel", count=1)),
    "n of m": (lcq.NofM(2, 4), lcq.NofM(1, 4)),
    "ball": (lcq.L1Ball(9.0), lcq.L1Ball(2.0)),
    "sum": (
        lcq.Additive(lcq.Binary(), lcq.Prune(count=9)),
        lcq.Additive(lcq.Binary(), lcq.Prune(count=2)),
    ),
}


@pytest.mark.parametrize("name", TIGHTER)
@pytest.mark.parametrize("stacked", [0, 1])
def test_a_checkpoint_of_a_looser_constraint_does_not_stay(name, stacked):
    """Its Theta is nearer to w than any that the tighter one allows, and was kept for ever."""
    w = np.random.default_rng(0).normal(size=(2, 8, 4) if stacked else (8, 4)).astype(np.float32)
    params = {"w": jnp.asarray(w)}
    loose, tight = (
        lcq.lc(optax.sgd(0.0), [lcq.Rule("w", scheme, stacked=stacked)], mu=1.0, every=1, multipliers=False)
        for scheme in TIGHTER[name]
    )
    state, fresh = loose.init(params), tight.init(params)
    state = jax.tree.unflatten(jax.tree.structure(fresh), jax.tree.leaves(state))
    for _ in range(3):
        _, state = jax.jit(tight.update)({"w": jnp.zeros_like(w)}, state, params)
    found, wanted = (np.asarray(theta(s.lagrangian)[0][0].dense()) for s in (state, fresh))
    assert (found != 0).sum() == (wanted != 0).sum()
    assert ((found - w) ** 2).sum() <= 1.02 * ((wanted - w) ** 2).sum()
    assert not int(lcq.metrics(state)["kept_back"])
