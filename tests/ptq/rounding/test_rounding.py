"""GPFQ and its family against their definitions, in float64 numpy: literal recursions, least squares re-solved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.ptq.quantize import METHODS
from lcq.ptq.rounding import base
from lcq.ptq.rounding.codebook import choose, draw, scaled
from lcq.ptq.rounding.gpfq import GPFQ, SparseGPFQ
from lcq.ptq.rounding.gptq import GPTQ
from lcq.ptq.rounding.qronos import Qronos
from lcq.ptq.rounding.rtn import Nearest
from lcq.ptq.rounding.sequential import cheaper, follow
from lcq.ptq.rounding.spfq import SPFQ
from lcq.ptq.statistics import Statistics, finish, gather

M, N, n = 220, 140, 6  # two blocks of 128, the second one padded


def problem(m=M, size=N, neurons=n, offset=0.0, seed=0):
    """Correlated inputs after a ReLU, the same with noise, and weights."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(m, size)) @ rng.normal(size=(size, size)) / size**0.5 + 0.3, 0) + offset
    y = np.maximum(x + 0.15 * rng.normal(size=x.shape), 0)
    return tuple(a.astype(np.float32) for a in (rng.normal(size=(size, neurons)), x, y))


@functools.cache
def standard():
    """(w, X, Y), and plain statistics."""
    w, x, y = problem()
    return (w, x, y), finish(gather(jnp.asarray(y), jnp.asarray(x), gap=True))


# Oracles, in float64 and without lcq


def tables(form, w):
    """The levels of every weight, [N, n, K], from the arrays of a form."""
    part = (len(w), w.shape[1], 1)

    def spread(a):
        a = np.asarray(a, np.float64)
        return np.broadcast_to(np.repeat(a, len(w) // len(a), 0), (*part[:2], a.shape[-1]))

    levels = np.asarray(form.values, np.float64) if form.levels is None else spread(form.levels)
    zero = 0 if form.zero is None else spread(np.asarray(form.zero)[..., None])
    scale = 1 if form.scale is None else spread(np.asarray(form.scale)[..., None])
    return np.broadcast_to((levels - zero) * scale, (*part[:2], levels.shape[-1]))


def nearest(z, table):
    """Index, level and distance to the next midpoint, for each neuron."""
    gap = np.abs(z[:, None] - table)
    two = np.sort(gap, 1)[:, :2]
    k = gap.argmin(1)
    return k, np.take_along_axis(table, k[:, None], 1)[:, 0], two[:, 1] - two[:, 0]


def literal(w, x, y, table, order=None, shrink=lambda z: z):
    """u_t = u_{t-1} + w_t X_t - q_t Y_t. Codes, margins, u_N."""
    w, x, y = (a.astype(np.float64) for a in (w, x, y))
    u, codes, margins = np.zeros((len(x), w.shape[1])), np.zeros(w.shape, int), np.zeros(w.shape)
    for t in range(len(w)) if order is None else order:
        u = u + np.outer(x[:, t], w[t])
        norm = y[:, t] @ y[:, t]
        z = y[:, t] @ u / norm if norm > 0 else w[t]
        codes[t], q, margins[t] = nearest(shrink(z), table[t])
        u = u - np.outer(y[:, t], q)
    return codes, margins, u


def error_form(w, gram, drift, table):
    """z_t = w_t + (sum_{s<=t} D_ts w_s + sum_{s<t} H_ts e_s) / H_tt. Codes and margins."""
    w, errors, codes, margins = w.astype(np.float64), np.zeros(w.shape), np.zeros(w.shape, int), np.zeros(w.shape)
    for t in range(len(w)):
        z = w[t] + (drift[t, : t + 1] @ w[: t + 1] + gram[t, :t] @ errors[:t]) / gram[t, t]
        codes[t], q, margins[t] = nearest(z, table[t])
        errors[t] = w[t] - q
    return codes, margins


def resolved(w, y, damping, table, start=0):
    """GPTQ by definition: after each level the rest v minimises ||Y (w - v)||^2 + damping ||w - v||^2."""
    rows = np.concatenate([y, damping**0.5 * np.eye(len(w))])
    v, codes = w.copy(), np.zeros(w.shape, int)
    for t in range(start, len(w)):
        codes[t], v[t], _ = nearest(v[t], table[t])
        fixed = rows[:, start : t + 1] @ (w - v)[start : t + 1]
        v[t + 1 :] = w[t + 1 :] + np.linalg.lstsq(rows[:, t + 1 :], fixed, rcond=None)[0]
    return codes


def qronos(w, x, y, damping, table):
    """The first weight, the others by least squares, and then GPTQ on these."""
    first = np.linalg.lstsq(y[:, :1], x @ w - y[:, 1:] @ w[1:], rcond=None)[0][0]
    code, q, _ = nearest(first, table[0])
    rows = np.concatenate([y[:, 1:], damping**0.5 * np.eye(len(w) - 1)])
    wanted = np.concatenate([x @ w - np.outer(y[:, 0], q), damping**0.5 * w[1:]])
    rest = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    codes = resolved(np.concatenate([w[:1], rest]), y, damping, table, start=1)
    codes[0] = code
    return codes


def assert_codes(got, expected, margins=None):
    """All codes alike; with margins, neurons may differ from a weight on whose z is within 1e-6 of a midpoint."""
    wrong = np.asarray(got.codes) != expected
    for neuron in np.flatnonzero(wrong.any(0)):
        t = np.flatnonzero(wrong[:, neuron])[0]
        assert margins is not None and margins[t, neuron] < 1e-6, (t, neuron, wrong.sum())


def correct(w, statistics, form):
    return base.correction(w, statistics.mean_x, statistics.mean_y, form)


def path_error(w, x, y, form):
    w, x, y, q = (np.asarray(a, np.float64) for a in (w, x, y, form.dense()))
    return ((x @ w - y @ q) ** 2).sum(0)


# The oracles agree with each other


def test_error_form_is_the_literal_recursion():
    for seed in range(5):
        w, x, y = (a.astype(np.float64) for a in problem(100, 40, 8, seed=seed))
        table = np.broadcast_to(np.linspace(-2, 2, 5), (*w.shape, 5))
        assert (literal(w, x, y, table)[0] == error_form(w, y.T @ y, y.T @ (x - y), table)[0]).all()


# The methods against the oracles

SCHEMES = {
    "grid": lcq.Uniform(4, per="channel"),
    "grid of one group for all": lcq.Uniform(3),
    "zero points in groups": lcq.Uniform(3, per=35, zero_point=True),
    "ternary": lcq.Ternary(per="channel"),
    "frozen": lcq.Levels((-1.5, -0.5, 0.25, 1.5)),
    "learned": lcq.KMeans(5, per="channel"),
    "learned in groups": lcq.KMeans(11, per=70),
    "long grid": lcq.Uniform(7, per=(70, 0)),
    "many powers": lcq.PowersOfTwo(4, scale=True),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_gpfq_is_the_literal_recursion(name):
    (w, x, y), statistics = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    expected, _, u = literal(w, x, y, tables(form, w))
    got = GPFQ().codes(jnp.asarray(w), statistics, form)
    assert_codes(got, expected)
    assert got.codes.dtype == form.codes.dtype
    np.testing.assert_allclose(base.residual(jnp.asarray(w), statistics, got), (u**2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("name", ["zero points in groups", "learned in groups"])
@pytest.mark.parametrize("order", ["natural", "falling"])
def test_follow_is_the_literal_recursion(name, order):
    (w, x, y), _ = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    by = np.argsort(-(y.astype(np.float64) ** 2).sum(0), kind="stable") if order == "falling" else None
    expected, _, u = literal(w, x, y, tables(form, w), by)
    got, error = follow(jnp.asarray(w), jnp.asarray(x), jnp.asarray(y), form, order)
    assert_codes(got, expected)
    np.testing.assert_allclose(error, (u**2).sum(0), rtol=1e-4)


@pytest.mark.parametrize("name", SCHEMES)
def test_nearest_is_the_projection(name):
    (w, _, _), statistics = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    again = Nearest().codes(jnp.asarray(w), statistics, dataclasses.replace(form, codes=form.codes * 0))
    np.testing.assert_array_equal(again.codes, form.codes)


@pytest.mark.parametrize("name", ["zero points in groups", "learned in groups"])
def test_falling_order(name):
    (w, x, y), statistics = standard()
    form = SCHEMES[name].project(jnp.asarray(w))
    order = np.argsort(-(y.astype(np.float64) ** 2).sum(0), kind="stable")
    expected = literal(w, x, y, tables(form, w), order)[0]
    assert_codes(GPFQ("falling").codes(jnp.asarray(w), statistics, form), expected)


def test_codes_in_float32_are_those_of_float64():
    w, x, y = problem(600, 300, 64, seed=1)
    form = lcq.Uniform(4, per="channel").project(jnp.asarray(w))
    wide = x.astype(np.float64), y.astype(np.float64)
    expected, margins = error_form(w, wide[1].T @ wide[1], wide[1].T @ (wide[0] - wide[1]), tables(form, w))
    got = GPFQ().codes(jnp.asarray(w), finish(gather(jnp.asarray(y), jnp.asarray(x))), form)
    assert (np.asarray(got.codes) == expected).mean() >= 0.9999
    assert_codes(got, expected, margins)


@pytest.mark.parametrize(
    ("scheme", "order"), [(lcq.Uniform(4, per="channel"), "natural"), (lcq.KMeans(6, per=10), "falling")]
)
@pytest.mark.parametrize("method", [GPTQ, Qronos])
def test_least_squares_re_solved(method, scheme, order):
    w, x, y = problem(90, 30)
    form = scheme.project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    wide = tuple(a.astype(np.float64) for a in (w, x, y))
    by = np.argsort(-(wide[2] ** 2).sum(0), kind="stable") if order == "falling" else np.arange(30)
    damping, table = 0.03 * (wide[2] ** 2).sum(0).mean(), tables(form, w)[by]
    expected = np.zeros(w.shape, int)
    if method is GPTQ:
        expected[by] = resolved(wide[0][by], wide[2][:, by], damping, table)
    else:
        expected[by] = qronos(wide[0][by], wide[1][:, by], wide[2][:, by], damping, table)
    assert_codes(method(0.03, order).codes(jnp.asarray(w), statistics, form), expected)


def test_equal_inputs_need_no_drift():
    w, _, y = problem(60, 12, 4)
    w, y = jnp.asarray(w), jnp.asarray(y)
    form = lcq.Uniform(3).project(w)
    for method in (GPFQ(), Qronos()):
        alone, both = (method.codes(w, finish(gather(*args)), form) for args in ((y,), (y, y)))
        np.testing.assert_array_equal(alone.codes, both.codes)


def test_one_input():
    (w, x, y), _ = standard()
    w, x, y = w[:1], x[:, :1], y[:, :1]
    form = lcq.Uniform(3).project(jnp.asarray(w))
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x)))
    expected = literal(w, x, y, tables(form, w))[0]
    assert_codes(Qronos().codes(jnp.asarray(w), statistics, form), expected)
    assert_codes(GPTQ().codes(jnp.asarray(w), statistics, form), np.asarray(form.codes))


@pytest.mark.parametrize("method", [GPTQ, Qronos])
def test_a_failed_factorisation_is_no_code(method):
    """Of rank 4: damping grows to what has a root; where it may not, an error, and in a trace the nearest levels."""
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.normal(size=(40, 4)) @ rng.normal(size=(4, 24)), jnp.float32)
    w, statistics = jnp.asarray(rng.normal(size=(24, 5)), jnp.float32), finish(gather(y))
    form = lcq.Uniform(4, per="channel").project(w)
    got, damp = base.solved(method(1e-9), w, statistics, form, None)
    again = method(float(damp)).codes(w, statistics, form)
    np.testing.assert_array_equal(got.codes, again.codes)
    assert 1e-7 < damp < 1e-3 and path_error(w, y, y, got).sum() < 0.1 * path_error(w, y, y, form).sum()
    assert base.solved(method(0.01), w, statistics, form, None)[1] == np.float32(0.01)
    with pytest.raises(ValueError, match="most="):
        method(1e-9, most=1e-9).codes(w, statistics, form)
    traced = jax.jit(method(1e-9, most=1e-9).codes)(w, statistics, form)
    np.testing.assert_array_equal(traced.codes, form.codes)


# Thresholds


def test_soft_threshold():
    (w, x, y), statistics = standard()
    form = SCHEMES["grid"].project(jnp.asarray(w))
    limit = 0.7 * np.abs(np.asarray(form.scale, np.float64)[0])

    def shrink(z):
        return np.sign(z) * np.maximum(np.abs(z) - limit, 0)

    expected = literal(w, x, y, tables(form, w), shrink=shrink)[0]
    assert_codes(SparseGPFQ(0.7).codes(jnp.asarray(w), statistics, form), expected)


def test_hard_threshold():
    (w, x, y), statistics = standard()
    form = SCHEMES["grid"].project(jnp.asarray(w))
    got = SparseGPFQ(1.6, "hard").codes(jnp.asarray(w), statistics, form)
    a, down = np.abs(np.asarray(form.scale, np.float64)[0]), np.asarray(form.scale[0] < 0)
    assert down.any() and not down.all()
    w, x, y = (b.astype(np.float64) for b in (w, x, y))
    u, qs = np.zeros((M, n)), []
    for t in range(N):
        u = u + np.outer(x[:, t], w[t])
        z = y[:, t] @ u / (y[:, t] @ y[:, t])
        steps = np.minimum(np.round((np.abs(z) - 1.6 * a) / a), np.where((z < 0) != down, 7, 6))
        qs.append(np.where(np.abs(z) <= 1.6 * a, 0, np.sign(z) * (1.6 * a + a * steps)))
        u = u - np.outer(y[:, t], qs[-1])
    np.testing.assert_allclose(got.dense(), qs, rtol=1e-6)
    assert got.size_of_table == form.size_of_table
    assert (np.asarray(qs) == 0).mean() > (np.asarray(form.dense()) == 0).mean()


def test_thresholds_that_make_no_sense():
    (w, _, _), statistics = standard()
    for name in ("learned", "zero points in groups", "frozen"):
        with pytest.raises(ValueError, match="integer grid around 0"):
            SparseGPFQ(1.0, "hard").codes(jnp.asarray(w), statistics, SCHEMES[name].project(jnp.asarray(w)))
    for make in (lambda: SparseGPFQ(-1.0), lambda: SparseGPFQ(0.0, "hard"), lambda: GPTQ(0.0), lambda: Qronos(-1.0)):
        with pytest.raises(ValueError, match="expected"):
            make()


# Stochastic rounding


@pytest.mark.parametrize("scheme", [lcq.Uniform(3), lcq.Uniform(2, zero_point=True), lcq.Levels((-2, 0, 0.5, 3))])
def test_spfq_is_unbiased(scheme):
    many = 40_000
    w = jnp.linspace(-2, 2, 4)[:, None] * jnp.ones(many)
    form = dataclasses.replace(scheme.project(w))
    statistics = Statistics(jnp.eye(4), None, None, jnp.zeros(4), jnp.zeros(4), 1)  # then z = w
    got = np.asarray(SPFQ().codes(w, statistics, form, jax.random.key(0)).dense(), np.float64)
    levels = tables(form, np.zeros((4, many)))[0, 0]
    inside = np.clip(np.asarray(w)[:, 0], levels[0], levels[-1])
    np.testing.assert_allclose(got.mean(1), inside, atol=5 * np.diff(levels).max() / 2 / many**0.5)
    for row, z in zip(got, inside, strict=True):
        around = {levels[levels <= z].max(), levels[levels >= z].min()}
        assert set(np.round(row, 4)) <= set(np.round(list(around), 4))


def test_spfq_follows_the_path():
    (w, x, y), statistics = standard()
    form = SCHEMES["learned in groups"].project(jnp.asarray(w))
    first, again, other = (SPFQ().codes(jnp.asarray(w), statistics, form, jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first.codes, again.codes)
    assert (np.asarray(first.codes) != np.asarray(other.codes)).mean() > 0.1
    table, q = tables(form, w), np.asarray(first.dense(), np.float64)
    u = np.zeros((M, n))
    for t in range(N):
        u = u + np.outer(x[:, t], w[t].astype(np.float64))
        z = y[:, t].astype(np.float64) @ u / (y[:, t].astype(np.float64) @ y[:, t])
        u = u - np.outer(y[:, t], q[t])
        between = (table[t] > np.minimum(z, q[t])[:, None] + 1e-4) & (table[t] < np.maximum(z, q[t])[:, None] - 1e-4)
        assert not between.any()
    with pytest.raises(ValueError, match="key"):
        SPFQ().codes(jnp.asarray(w), statistics, form)


# Statistics


def test_residual_is_the_norm():
    (w, x, y), statistics = standard()
    form = SCHEMES["grid"].project(jnp.asarray(w))
    direct = path_error(w, x, y, form)
    np.testing.assert_allclose(base.residual(jnp.asarray(w), statistics, form), direct, rtol=1e-5)
    unknown = base.residual(jnp.asarray(w), statistics._replace(gap=None), form)
    missing = (((x.astype(np.float64) - y) @ w) ** 2).sum(0)
    np.testing.assert_allclose(unknown, direct - missing, atol=1e-5 * direct.max())
    same = finish(gather(jnp.asarray(y)))
    np.testing.assert_allclose(base.residual(jnp.asarray(w), same, form), path_error(w, y, y, form), rtol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_centred(offset):
    w, x, y = problem(offset=offset)
    form = SCHEMES["grid"].project(jnp.asarray(w))
    halves = gather(jnp.asarray(y[:100]), jnp.asarray(x[:100]), gap=True)
    statistics = finish(gather(jnp.asarray(y[100:]), jnp.asarray(x[100:]), halves, gap=True), centred=True)
    centred = tuple(a.astype(np.float64) - a.mean(0, dtype=np.float64) for a in (x, y))
    expected = literal(w, *centred, tables(form, w))[0]
    got = GPFQ().codes(jnp.asarray(w), statistics, form)
    wrong = np.asarray(got.codes) != expected
    assert wrong.mean() < 1e-3
    if not offset:
        assert not wrong.any()
    bias = np.asarray(correct(jnp.asarray(w), statistics, got), np.float64)
    error = x.astype(np.float64) @ w - y.astype(np.float64) @ np.asarray(got.dense(), np.float64) - bias
    np.testing.assert_allclose(error.mean(0), 0, atol=1e-4 * (1 + offset))
    np.testing.assert_allclose(base.residual(jnp.asarray(w), statistics, got), (error**2).sum(0), rtol=1e-3)


@pytest.mark.parametrize(
    "method",
    [*METHODS.values(), SparseGPFQ(0.5), GPFQ("falling"), Qronos(order="falling")],
    ids=lambda method: f"{type(method).__name__}-{getattr(method, 'order', '')}",
)
def test_dead_columns_go_to_the_nearest_level(method):
    w, x, y = problem(60, 20, 4)
    x[:, 3] = y[:, 3] = 0
    y[:, 7] = 0
    y[:, 0] = 1e-8
    form = lcq.Uniform(3, per=5).project(jnp.asarray(w))
    for statistics in (
        finish(gather(jnp.asarray(y), jnp.asarray(x), gap=True)),
        finish(gather(jnp.asarray(0 * y), jnp.asarray(0 * x), gap=True), centred=True),
    ):
        got = method.codes(jnp.asarray(w), statistics, form, jax.random.key(0))
        if not isinstance(method, SPFQ | SparseGPFQ):
            dead = np.asarray(jnp.diagonal(statistics.gram)) < 1e-9
            assert dead.sum() in (3, 20)
            scale = np.repeat(np.asarray(got.scale, np.float64), 5, axis=0)  # which descent fits anew
            nearest = np.abs(w[..., None] - scale[..., None] * np.arange(-4.0, 4)).argmin(-1)
            np.testing.assert_array_equal(np.asarray(got.codes)[dead], nearest[dead])
        values = (
            base.residual(jnp.asarray(w), statistics, got),
            correct(jnp.asarray(w), statistics, got),
        )
        assert np.isfinite(np.stack([*values])).all() and int(got.codes.max()) < 8


def test_follow_passes_over_dead_columns():
    w, x, y = problem(60, 20, 4)
    y[:, 7] = 0
    form = lcq.Uniform(3).project(jnp.asarray(w))
    for by in ("natural", "falling"):
        got, error = follow(jnp.asarray(w), jnp.asarray(x), jnp.asarray(y), form, by)
        np.testing.assert_array_equal(got.codes[7], form.codes[7])
        np.testing.assert_allclose(error, path_error(w, x, y, got), rtol=1e-4)


def test_short_weights_use_what_dense_gives():
    (w, x, y), statistics = standard()
    short = jnp.asarray(w, jnp.bfloat16)
    form = lcq.Uniform(4, per="channel").project(short)
    exact, v = tables(form, w), np.asarray(short, np.float64)
    table = np.asarray(jnp.asarray(exact.astype(np.float32), jnp.bfloat16), np.float64)
    u, qs = np.zeros((M, n)), []
    for t in range(N):
        u = u + np.outer(x[:, t], v[t])
        k = nearest(y[:, t].astype(np.float64) @ u / (y[:, t].astype(np.float64) @ y[:, t]), exact[t])[0]
        qs.append(table[t, np.arange(n), k])
        u = u - np.outer(y[:, t], qs[-1])
    got = GPFQ().codes(short, statistics, form)
    assert got.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(got.dense(), np.float64), qs)


# Scales


def test_scaled():
    w = jnp.asarray(problem()[0])
    each = jnp.linspace(0.5, 2, n)
    for name in ("grid", "grid of one group for all", "zero points in groups", "learned", "long grid"):
        form = SCHEMES[name].project(w)
        if form.zero is not None and name == "zero points in groups":
            form = dataclasses.replace(form, scale=form.scale[:, :1], zero=form.zero[:, :1])
        for factor in (0.5, jnp.float32(2.0), each):
            got = scaled(form, factor)
            kept = None if form.scale is None else (form.scale * factor).astype(form.scale.dtype)  # bfloat16 in groups
            wanted = (
                form.dense() * factor if kept is None else dataclasses.replace(form, scale=kept, zero=got.zero).dense()
            )
            np.testing.assert_allclose(got.dense(), wanted, rtol=1e-6)
            got.pack().check_stored()
    learned = dataclasses.replace(SCHEMES["learned"].project(w), scale=jnp.ones((1, n)))
    np.testing.assert_allclose(scaled(learned, each).dense(), learned.dense() * each, rtol=1e-6)
    with pytest.raises(ValueError, match="fixed table"):
        scaled(SCHEMES["frozen"].project(w), 2.0)


@pytest.mark.parametrize("method", [GPFQ(), SPFQ(), Qronos(order="falling")])
def test_sweep_is_a_loop(method):
    w, x, y = problem(80, 24, 4)
    w, key = jnp.asarray(w), jax.random.key(0)
    statistics = finish(gather(jnp.asarray(y), jnp.asarray(x), gap=True))
    form = lcq.Uniform(3).project(w)
    factors = jnp.asarray([0.8, 1.0, 1.3])
    each = factors[:, None] * jnp.linspace(0.9, 1.1, 4)
    for chosen in (factors, each) if method == GPFQ() else (each,):
        got = base.sweep(method, w, statistics, form, chosen, key)
        for factor, errors in zip(chosen, got, strict=True):
            one = method.codes(w, statistics, scaled(form, factor), key)
            np.testing.assert_allclose(errors, path_error(w, x, y, one), rtol=1e-4)


def test_cheaper():
    assert cheaper(5000, 784, 500) == "blocked"
    assert cheaper(50_000, 9, 1, runs=1) == "follow"
    assert cheaper(50_000, 288, 32) == "follow"
    assert cheaper(50_000, 288, 64) == "blocked"
    assert cheaper(50_000, 288, 32, runs=16) == "blocked"
    assert cheaper(5000, 1024, 1024, limit=1 << 20) == "follow"


# Transformations


def test_vmap_over_groups_is_a_loop():
    groups = [problem(50, 9, 3, seed=g) for g in range(3)]
    ws, xs, ys = (jnp.asarray(np.stack(a)) for a in zip(*groups, strict=True))

    def run(w, x, y, key):
        form = lcq.Uniform(3, per="channel").project(w)
        statistics = finish(gather(y, x, gap=True), centred=True)
        forms = [method.codes(w, statistics, form, key) for method in (SPFQ(), Qronos(), SparseGPFQ(0.5, "hard"))]
        errors = base.residual(w, statistics, forms[1])
        sweep = base.sweep(GPFQ("falling"), w, statistics, form, jnp.asarray([1.0, 1.2]))
        return forms, follow(w, x, y, form), errors, sweep

    keys = jax.random.split(jax.random.key(0), 3)
    together = jax.jit(jax.vmap(run))(ws, xs, ys, keys)
    one = jax.jit(run)
    for g in range(3):
        for a, b in zip(jax.tree.leaves(one(ws[g], xs[g], ys[g], keys[g])), jax.tree.leaves(together), strict=True):
            np.testing.assert_allclose(a, b[g], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_on_a_mesh(kind):
    (w, x, y), _ = standard()
    x, y = x[:216], y[:216]
    form = SCHEMES["grid"].project(jnp.asarray(w))
    expected, margins, _ = literal(w, x, y, tables(form, w))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        statistics = jax.jit(lambda y, x: finish(gather(y, x)))(*jax.device_put((y, x), rows))
        got = GPFQ().codes(*jax.device_put((jnp.asarray(w), statistics, form), everywhere))
    assert_codes(got, expected, margins)


def equations(jaxpr):
    """All equations, at any depth."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def programs(size=300):
    """A jaxpr of everything with a product in it."""
    w, y = jnp.zeros((size, 4)), jnp.zeros((600, size))
    form = lcq.Uniform(3).project(w)
    key = jax.random.key(0)
    for method in (
        *METHODS.values(),
        SparseGPFQ(0.5),
        SparseGPFQ(0.5, "hard"),
        GPFQ("falling"),
        Qronos(1.0, "falling"),
    ):

        def run(w, x, y, method=method):
            statistics = finish(gather(y, x, gap=True), centred=True)
            new = method.codes(w, statistics, form, key)
            swept = base.sweep(method, w, statistics, form, jnp.ones(2), key)
            bias = correct(w, statistics, new)
            return new, swept, bias, base.residual(w, statistics, new), follow(w, x, y, form)

        yield jax.make_jaxpr(run)(w, y, y).jaxpr


def test_every_product_is_of_the_highest_precision():
    for program in programs():
        products = [e for e in equations(program) if e.primitive.name == "dot_general"]
        assert len(products) > 4
        for product in products:
            assert set(product.params["precision"]) == {jax.lax.Precision.HIGHEST}, product


def test_program_does_not_grow_with_the_inputs():
    lengths = {tuple(len(list(equations(p))) for p in programs(size)) for size in (1100, 2300)}
    assert len(lengths) == 1


def test_a_negative_scale_turns_levels_round():
    """Every choice on a form with a negative scale is that on the mirrored table."""
    rng = np.random.default_rng(3)
    z, u = rng.normal(size=(200, 3)).astype(np.float32), rng.random((200, 3)).astype(np.float32)
    for values in ((-2.0, -1.0, 0.0, 1.0), (-1.0, 0.25, 2.0), tuple(map(float, range(-20, 30)))):
        scale = np.array([[0.5, -0.5, -0.25]], np.float32)
        form = lcq.Levels(values, scale=True, per="channel").project(jnp.asarray(z))
        form = dataclasses.replace(form, scale=jnp.asarray(scale))
        table = scale[..., None] * np.asarray(values)
        gaps = np.abs(z[..., None].astype(np.float64) - table)
        got = np.asarray(choose(jnp.asarray(z), form))
        np.testing.assert_allclose(np.take_along_axis(gaps, got[..., None], -1)[..., 0], gaps.min(-1), atol=1e-6)
        drawn = np.asarray(draw(jnp.asarray(z), form, jnp.asarray(u))).astype(int)
        ascending = np.sort(table, -1)
        inside = np.clip(z, ascending[..., 0], ascending[..., -1])
        value = np.take_along_axis(np.broadcast_to(table, (*z.shape, len(values))), drawn[..., None], -1)[..., 0]
        low = np.where(ascending <= inside[..., None], ascending, -np.inf).max(-1)
        high = np.where(ascending >= inside[..., None], ascending, np.inf).min(-1)
        assert (np.isclose(value, low) | np.isclose(value, high)).all()
        values_of = [
            np.take_along_axis(
                np.broadcast_to(table, (*z.shape, len(values))),
                np.asarray(draw(jnp.asarray(z), form, jnp.full(z.shape, (i + 0.5) / 400)))[..., None].astype(int),
                -1,
            )[..., 0]
            for i in range(400)
        ]
        np.testing.assert_allclose(np.mean(values_of, 0), inside, atol=0.01 * np.abs(table).max())
