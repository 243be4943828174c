"""Rounding to bfloat16 at random, and a run of `lc` whose multipliers are kept so."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.training.stochastic_rounding import stochastic_bfloat16

RNG = np.random.default_rng(0)


def neighbours(x):
    """The numbers of bfloat16 below and above in magnitude, in float64."""
    low = (x.view(np.uint32) & 0xFFFF0000).view(np.float32)
    high = ((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32)
    return low.astype(np.float64), high.astype(np.float64)


def test_results_are_neighbours_and_their_mean_is_the_number():
    x = (RNG.normal(size=(37, 11)) * 10.0 ** RNG.integers(-20, 20, (37, 11))).astype(np.float32)
    turns = 400
    found = jax.jit(jax.vmap(stochastic_bfloat16, (None, 0)))(x, jnp.arange(turns))
    found, (low, high) = np.asarray(found, np.float64), neighbours(x)
    assert ((found == low) | (found == high)).all()
    off = (found.mean(0) - x) / (high - low)  # of mean 0 and variance p (1 - p) / turns
    assert abs(off).max() < 4.5 * 0.5 / turns**0.5 and abs(off.mean()) < 4 * 0.5 / (turns * x.size) ** 0.5


def test_draws_differ_between_places_and_turns():
    x = jnp.full((64, 64), 1 + 2.0**-8)
    a, b = (np.asarray(stochastic_bfloat16(x, jnp.int32(turn))) > 1 for turn in (0, 1))
    assert 0.4 < a.mean() < 0.6 and 0.4 < (a == b).mean() < 0.6
    for one in (a, a.T):
        assert abs(np.corrcoef(one[:-1].ravel(), one[1:].ravel())[0, 1]) < 0.08


def test_numbers_of_the_format_stay_and_what_is_beyond_becomes_its_largest():
    x = jnp.array([0.0, -0.0, 1.5, -3.0, 3.4e38, -3.4e38, jnp.inf, -jnp.inf, jnp.nan])
    found = stochastic_bfloat16(x, jnp.int32(3))
    most = float(jnp.finfo(jnp.bfloat16).max)
    expected = np.array([0.0, -0.0, 1.5, -3.0, most, -most, most, -most, np.nan])
    np.testing.assert_array_equal(np.asarray(found, np.float64), expected)


CURVES = jnp.asarray(np.diag(1 + 9 * RNG.random(40)) + np.ones((40, 40)) / 8, jnp.float32)
BEST = jnp.asarray(RNG.normal(size=(40, 3)), jnp.float32)


def loss(w):
    away = w["w"] - BEST
    return 0.5 * jnp.sum(away * jnp.dot(CURVES, away, precision="highest"))


def run(scheme, dtype):
    tx = lcq.lc(
        optax.sgd,
        [lcq.Rule("w", scheme)],
        mu=lcq.geometric(0.1, 1.15, steps=50),
        every=20,
        learning_rate=0.05,
        multipliers_dtype=dtype,
    )

    def step(carry, _):
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return (optax.apply_updates(w, updates), state), None

    start = {"w": BEST}
    (w, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((start, tx.init(start)))
    return float(loss(lcq.decompress(lcq.extract(state, w)))), float(state.lagrangian.info.gap), state


@pytest.mark.parametrize("scheme", [lcq.KMeans(3), lcq.Ternary(per="channel"), lcq.Prune(fraction=0.3)], ids=str)
def test_a_run_with_short_multipliers_converges_as_one_with_long_ones(scheme):
    direct = float(loss(lcq.decompress(lcq.compress({"w": BEST}, [lcq.Rule("w", scheme)]))))
    (long, gap, _), (short, short_gap, state) = run(scheme, None), run(scheme, "bfloat16")
    assert state.lagrangian.multipliers["w"].dtype == jnp.bfloat16
    assert gap < 1e-3 and short_gap < 1e-3
    assert long < 0.99 * direct and abs(short - long) < 0.02 * long, (direct, long, short)


def test_other_formats_of_multipliers_are_refused():
    for settings in ({"multipliers_dtype": "float16"}, {"multipliers_dtype": "bfloat16", "multipliers": False}):
        with pytest.raises(ValueError, match="expected multipliers_dtype='bfloat16' or 'float32'"):
            lcq.lc(optax.sgd(0.1), [lcq.Rule("w", lcq.Ternary())], mu=1.0, every=1, **settings)
