"""How far statistics of few rows are believed, against float64 numpy: shrinking, noise, errors on rows held back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq import inputs, shrinkage
from lcq.ptq.rounding.base import residual
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.rounding.sequential import follow
from lcq.ptq.shrinkage import Folds
from lcq.ptq.statistics import Statistics, about

K, SIZE, NEURONS = 4, 6, 3
FORM = lcq.Uniform(3, per="channel")


def rows(many=22, offset=2.0, seed=0):
    """w, X and Y, correlated and off zero, one input that does not vary, and folds of unequal length."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(many, SIZE)) @ rng.normal(size=(SIZE, SIZE)) + offset
    x[:, 4] = 1.5
    y = x + 0.2 * rng.normal(size=x.shape)
    y[:, 4] = 1.5
    fold = np.repeat(np.arange(K), [7, 5, 4, many - 16])
    return tuple(a.astype(np.float32) for a in (rng.normal(size=(SIZE, NEURONS)), x, y)), fold


def folds():
    return folds_of(*rows()[0], rows()[1])


def folds_of(w, x, y, fold):
    w, x, y = (np.asarray(a) for a in (w, x, y))
    shift = jnp.asarray(y[fold == 0].mean(0))
    parts = [about(shift, jnp.asarray(y[fold == k]), jnp.asarray(x[fold == k])) for k in range(K)]
    differences = jnp.stack([(((x - y) @ w)[fold == k] ** 2).sum(0) for k in range(K)])
    return Folds(jax.tree.map(lambda *a: jnp.stack(a), *parts), differences)


def off(a):
    return a - np.diag(np.diag(a))


def plainly(x, y, share, centred):
    """Shrunk H and D by their definition."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    mean, away = y.mean(0), (x - y).mean(0)
    c = y - mean
    h, d = c.T @ c, c.T @ (x - y - away)
    flat = [len(y) * np.outer(mean, mean), len(y) * np.outer(mean, away)]
    made = [a - share[0] * off(a) for a in (h, d)]
    return made if centred else [a + b - share[1] * off(b) for a, b in zip(made, flat, strict=True)]


@pytest.mark.parametrize("centred", [True, False])
def test_shrunk(centred):
    (_, x, y), _ = rows()
    share = np.array([0.3, 0.6], np.float32)
    got = shrinkage.shrunk(shrinkage.together(folds().moments), jnp.asarray(share), centred)
    expected = plainly(x, y, share, centred)
    for a, b in zip((got.gram, got.drift), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    if centred:  # exactly nothing, not what rounding leaves
        assert not got.gram[4].any() and not got.gram[:, 4].any()


def noise(y, fold):
    y = y.astype(np.float64)
    c = y - y.mean(0)
    s = np.sqrt((c**2).sum(0))
    unit = np.where(s > 1e-3, 1 / np.maximum(s, 1e-3), 0)
    whole, spread, away = off((c * unit).T @ (c * unit)), 0, 0
    for k in range(K):
        part, share = (c * unit)[fold == k], (fold == k).mean()
        spread += ((off(part.T @ part) - share * whole) ** 2).sum()
        away += (part.sum(0) ** 2).sum()
    lives = (unit > 0).sum()
    least = lives * (lives - 1) / len(y), lives
    sizes = (whole**2).sum(), ((len(y) * y.mean(0) * unit) ** 2).sum()
    return [min(max(a * K / (K - 1), b) / s, 0.999) for a, b, s in zip((spread, away), least, sizes, strict=True)]


def test_noise_between_folds():
    (_, _, y), fold = rows()
    expected = noise(y, fold)
    np.testing.assert_allclose(shrinkage.noise(folds().moments), expected, rtol=1e-3)
    every = jnp.ones(len(y), bool)
    np.testing.assert_allclose(inputs.noise(jnp.asarray(y), every, jnp.asarray(fold), K), expected, rtol=1e-3)


def test_following_on_shrunk_statistics():
    """The codes and the residual of GPFQ on shrunk H and D, with some rows left out."""
    (w, x, y), fold = rows()
    use, share, form = fold != 1, jnp.array([0.3, 0.6]), FORM.project(jnp.asarray(w))
    h, d = plainly(x[use], y[use], share, False)
    statistics = Statistics(jnp.float32(h), jnp.float32(d), None, None, None, None)
    expected = GPFQ().codes(jnp.asarray(w), statistics, form)
    a, b = (jnp.asarray(np.where(use[:, None], each, 0)) for each in (x, y))
    got, error = follow(jnp.asarray(w), a, b, form, False, share, jnp.asarray(use))
    np.testing.assert_array_equal(got.codes, expected.codes)
    difference = (x - y)[use].astype(np.float64)
    flat = len(difference) * np.outer(difference.mean(0), difference.mean(0))
    k = difference.T @ difference - flat
    k = k - 0.3 * off(k) + flat - 0.6 * off(flat)
    np.testing.assert_allclose(
        error, np.asarray(residual(jnp.asarray(w), statistics, got)) + (w * (k @ w)).sum(0), rtol=2e-3
    )


@pytest.mark.parametrize("centred", [True, False])
def test_errors_on_rows_held_back(centred):
    """By a loop: codes from three folds on shrunk statistics, the error on the fourth after the bias has followed."""
    (w, x, y), fold = rows()
    form, part = FORM.project(jnp.asarray(w)), jnp.array([0.4, 0.7])
    tried = jnp.array([0.0, 1.0])
    sums = folds()

    def judged(c, k):
        rest, share = shrinkage.together(sums.moments, jnp.arange(K) != k), shrinkage.shares(part, c, K / (K - 1))
        codes = GPFQ().codes(jnp.asarray(w), shrinkage.shrunk(rest, share, centred), form)
        return np.stack(shrinkage.judged(jnp.asarray(w), sums, codes, k, centred))

    pairs = [sum(judged(c, k) for k in range(K)) for c in tried]
    got, (size, _) = [error for error, _ in pairs], [size for _, size in pairs]
    every = jnp.ones(len(y), bool)
    given = (jnp.asarray(w), jnp.asarray(x), jnp.asarray(y), every, form, jnp.asarray(fold))
    other, other_size = inputs.held(*given, K, part, tried, False, centred)
    wide, alike = w.astype(np.float64), np.array([1, 8])
    for c, here, there in zip(tried, got, other, strict=True):
        v = np.asarray(c * K / (K - 1) * part / (1 - part), np.float64) * alike
        total = 0.0
        for k in range(K):
            use = fold != k
            h, d = (jnp.float32(a) for a in plainly(x[use], y[use], v / (1 + v), centred))
            q = np.asarray(GPFQ().codes(jnp.asarray(w), Statistics(h, d, None, None, None, None), form).dense())
            left = x.astype(np.float64) @ wide - y.astype(np.float64) @ q
            shift = 0
            if centred:
                each = np.stack([left[fold == j].sum(0) for j in range(K) if j != k])
                counts = np.array([(fold == j).sum() for j in range(K) if j != k])
                away = ((each - counts[:, None] / counts.sum() * each.sum(0)) ** 2).sum() * 1.5
                own = (
                    (y[use].var(0, dtype=np.float64)[:, None] * (wide - q) ** 2).sum()
                    * use.sum() ** 2
                    / (use.sum() - 1)
                )
                noise, seen = max(away, own), (each.sum(0) ** 2).sum()
                shift = max(seen - noise, 0) / (seen + 7 * noise) * each.sum(0) / counts.sum()
            total += ((left - shift)[~use] ** 2).sum()
        np.testing.assert_allclose([here, there], total, rtol=2e-3)
    np.testing.assert_allclose([size, other_size], ((x.astype(np.float64) @ wide) ** 2).sum(), rtol=1e-4)


def test_the_choice():
    """Near the least error: from 0 up where there is little noise, from the largest down, and never 0, where there is
    much. Where there is some, it must be clearly better not to be 0."""
    quiet, some, noisy, loud = 0.1, 0.4, 0.6, 0.9
    assert shrinkage.pick(quiet, [1.0, 0.99, 1.0, 1.2]) == 0
    assert shrinkage.pick(noisy, [1.2, 1.0, 0.99]) == 1
    assert shrinkage.pick(quiet, [2.0, 0.99, 1.0, 1.2]) == 1
    overstated = [1.0, 0.95, 0.96, 1.1]
    assert shrinkage.pick(some, overstated) == 0 and shrinkage.pick(quiet, overstated) == 1
    tried = [shrinkage.parts(noise) for noise in (0.001, quiet, some, noisy, loud)]
    assert tried == [(0.0,), (0.0, 0.1, 0.3, 1.0), (0.0, 0.1, 0.3, 1.0), (1.0, 0.3, 0.1), (3.0, 1.0, 0.3)]


def test_groups_choose_alone_until_their_errors_rise():
    noise = np.array([[0.1, 0.1], [0.1, 0.1], [0.6, 0.1], [0.9, 0.1], [0.001, 0.1]])
    errors = [
        {0.0: 5, 0.1: 6, 0.3: 1, 1.0: 1},
        {0.0: 5, 0.1: 4, 0.3: 3, 1.0: 4},
        {1.0: 9, 0.3: 7, 0.1: 8},
        {3.0: 2, 1.0: 3, 0.3: 1},
        {0.0: 8},
    ]
    seen = []

    def held(c):
        seen.append(c)
        return np.array([each[one] for each, one in zip(errors, c, strict=True)], np.float64)

    c, least = shrinkage.chosen(noise, held)
    assert c.tolist() == [0.0, 0.3, 0.3, 3.0, 0.0] and least.tolist() == [5, 3, 7, 2, 8] and len(seen) == 4
    for g in range(len(noise)):
        alone = shrinkage.chosen(noise[g : g + 1], lambda one, g=g: np.array([float(errors[g][one[0]])]))
        assert [each.tolist() for each in alone] == [[c[g]], [least[g]]]


def new_rows(many, seed=11):
    rng = np.random.default_rng(seed)
    mix, w = rng.normal(size=(64, 64)) * 0.4 + np.eye(64), rng.normal(size=(64, 24)).astype("f4")
    return w, *((rng.normal(size=(m, 64)) @ mix).astype("f4") for m in (many, 2000))


def square(a, b):
    return float(((a - b) ** 2).sum() / (b**2).sum())


def tokens(size, many, seed):
    """w, X and new rows: eight after each other share a part, and inputs are of very different size."""
    rng = np.random.default_rng(seed)
    mix, scale = rng.normal(size=(size, size)) / size**0.5, np.exp(0.8 * rng.normal(size=size))

    def draw(many):
        shared = np.repeat(rng.normal(size=(many // 8, size)), 8, 0)
        return ((shared + rng.normal(size=(many, size))) @ mix * scale).astype("f4")

    return rng.normal(size=(size, 24)).astype("f4"), draw(many), draw(2000)


def on_new_rows(w, x, new, method, bias):
    """The error of a quantized layer over that of `lcq.compress`."""
    params = {"w": jnp.asarray(w)} | ({"b": jnp.zeros(24)} if bias else {})
    rule = [lcq.Rule("w", FORM)]
    done = lcq.quantize(lambda p, x: x @ p["w"] + p.get("b", 0), params, [x], rule, method).forms
    errors = [
        square(new @ np.asarray(f["w"].dense()) + np.asarray(f.get("b", 0)), new @ w)
        for f in (done, lcq.compress(params, rule))
    ]
    return errors[0] / errors[1]


@pytest.mark.parametrize(("method", "bias"), [("gpfq", False), ("descent", True)])
def test_eight_rows_that_share_a_part(method, bias):
    """Folds of them agree on a mean that new rows do not have: neither the bias nor the codes may follow it."""
    assert on_new_rows(*tokens(64, 8, seed=12), method, bias) < 1.15


def test_with_four_rows_an_input_nothing_is_lost():
    """Codes of fewer rows ask for a shrinking that those of all do not need."""
    case = tokens(64, 256, seed=16)
    assert on_new_rows(*case, "descent", False) < 1.02 * on_new_rows(*case, lcq.Descent(shrink=0.0), False)


def test_a_bias_does_not_follow_noise():
    """With 8 rows, inputs of mean 0 and a bias that is free; and with many, a bias that has something to follow."""
    w, x, new = new_rows(8)
    params, rule = {"w": jnp.asarray(w), "b": jnp.zeros(24)}, [lcq.Rule("w", FORM)]
    done = lcq.quantize(lambda p, x: x @ p["w"] + p["b"], params, [x], rule, "rtn")
    error = square(new @ np.asarray(done.forms["w"].dense()) + done.forms["b"], new @ w)
    plain = square(new @ np.asarray(lcq.compress(params, rule)["w"].dense()), new @ w)
    assert done.records[0].bias_correction and error < 1.15 * plain, (error, plain)
