"""The scale of each neuron: a few tries against the whole search in float64 numpy, and what repeated calls hold."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq import gathering, pieces, scale_search, sums, two_stream
from tests.ptq.small_net import draw, problem, quantize

INPUTS, NEURONS, ROWS, HALF = 384, 96, 1200, 8
COARSE, FINE = 1.15 ** np.arange(-4, 5), 1.018 ** np.arange(-4, 5)


def layer(massive=False):
    """Weights, correlated inputs after a ReLU, their H, and the scheme's scales; massive weights are those of a neuron
    that stands for no other, and of an input that hardly varies."""
    rng = np.random.default_rng(5)
    mix = rng.normal(size=(INPUTS, INPUTS)) * np.arange(1, INPUTS + 1) ** -0.5
    x = np.maximum(rng.normal(size=(ROWS, INPUTS)) @ mix.T / 4, 0).astype(np.float32)
    w = rng.normal(size=(INPUTS, NEURONS)).astype(np.float32)
    if massive:
        alone = next(n for n in range(NEURONS) if n not in scale_search.sample(INPUTS, NEURONS))
        x[:, 7] *= 0.01
        w[:, alone] *= 30
        w[7, alone] = 3000
    gram = x.T.astype(np.float64) @ x
    return w, x, gram, np.asarray(lcq.Uniform(4, per="channel").project(jnp.asarray(w)).scale, np.float64)


def rounded(z, a):
    return a * np.clip(np.round(z / a), -HALF, HALF - 1)


def nearest(w, gram, a):
    return rounded(w, a)


def gptq(w, gram, a):
    """By its paper: each weight as it stands, the rest by the inverse of H + delta I."""
    inverse = np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(INPUTS))
    upper, left, q = np.linalg.cholesky(inverse).T, w.astype(np.float64).copy(), np.zeros(w.shape)
    for t in range(INPUTS):
        q[t] = rounded(left[t], a)
        left[t + 1 :] -= upper[t, t + 1 :, None] * (left[t] - q[t]) / upper[t, t]
    return q


def losses(method, w, gram, a):
    e = w - method(w, gram, a)
    return (e * (gram @ e)).sum(0)


@pytest.mark.parametrize("massive", [False, True])
@pytest.mark.parametrize(("name", "method"), [("gptq", gptq), ("rtn", nearest)])
def test_few_tries_find_what_the_whole_search_finds(name, method, massive):
    """Within one part in a hundred of all errors together, and better than the scheme's own scales."""
    w, x, gram, own = layer(massive)
    plain = losses(method, w, gram, own)
    coarse = {f: losses(method, w, gram, f * own) for f in (*COARSE, *-COARSE)}
    factors = np.array(list(coarse))[np.stack(list(coarse.values())).argmin(0)]
    whole = np.min([losses(method, w, gram, f * factors * own) for f in FINE], 0)
    settings = {} if name == "rtn" else {"damping": 0.01}
    done = lcq.quantize(
        lambda p, x: x @ p["w"],
        {"w": jnp.asarray(w)},
        [x],
        [lcq.Rule("w", lcq.Uniform(4, per="channel"))],
        lcq.ptq.ROUNDING_METHODS[name](shrink=0.0, **settings),
    )
    errors = w - np.asarray(done.forms["w"].dense(), np.float64)
    found = (errors * (gram @ errors)).sum(0)
    assert found.sum() < 1.01 * whole.sum() < 1.01 * plain.sum(), (found.sum(), whole.sum(), plain.sum())
    assert (found <= plain * (1 + 1e-3)).all()


def test_a_sketch_of_few_directions_is_the_matrix():
    rng = np.random.default_rng(1)
    gram = (rng.normal(size=(60, 12)) * 3 ** -np.arange(12.0)).astype(np.float32)
    gram = gram @ gram.T + np.diag(rng.uniform(1e-4, 2e-4, size=60)).astype(np.float32)
    directions, rest = scale_search.sketch(gram)
    np.testing.assert_allclose((directions**2).sum(0) + rest, np.diag(gram), rtol=1e-4)
    np.testing.assert_allclose(directions.T @ directions + np.diag(rest), gram, atol=1e-3)
    directions, rest = scale_search.sketch(np.zeros((20, 20), np.float32))
    assert not directions.any() and not rest.any()


def held():
    """Programs and arrays that are alive."""
    gc.collect()
    jits = [sums._looked, sums._statistics, sums._prepared, sums._tried, sums._judged]
    caches = [gathering._gather, pieces._compiled, two_stream._multiplier]
    return [j._cache_size() for j in jits], [c.cache_info().currsize for c in caches], len(jax.live_arrays())


def test_another_call_compiles_nothing_and_holds_nothing():
    """Of another function object with the same equations, on other numbers, with other settings of the search."""
    params, batches = problem()
    seen = []
    for seed, settings in enumerate([{}, {}, {"search": False}, {"shrink": 0.0}]):

        def fn(p, x):
            return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]

        moved = [batch + 0.1 * draw(*batch.shape, seed=seed) for batch in batches]
        quantize(fn, params, moved, method=lcq.GPTQ(**settings))
        seen.append(held())
    assert seen[1:] == seen[:1] * 3, seen
