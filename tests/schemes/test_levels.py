"""Fixed codebooks against brute force, a sort, and a fine grid of scales; all oracles in float64 numpy."""

import dataclasses
import itertools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.schemes.exact_scale import exact_scale
from lcq.schemes.nearest import thresholds

CODEBOOKS = [(-1, 1), (-1, 0, 1), (0, 1), (-2, 1, 3), (1, 2), (-4, -1), (0.125, 0.25, 0.5, 1), (-1, 0.25)]
weights = hnp.arrays(np.float32, 17, elements=st.floats(-8, 8, width=16))


def error(x, values, a):
    """min over codes of sum (x - a c)^2."""
    x = np.asarray(x, np.float64).reshape(-1, 1)
    return ((x - a * np.asarray(values, np.float64)) ** 2).min(1).sum()


def distortion(form, x):
    return ((np.asarray(form.dense(), np.float64) - np.asarray(x, np.float64)) ** 2).sum()


@pytest.mark.parametrize("values", CODEBOOKS)
def test_exact_scale_is_the_minimum_over_all_codes(values):
    rng = np.random.default_rng(0)
    for n in (1, 2, 5):
        x = rng.normal(size=n) + 0.3
        best = (x**2).sum()
        for codes in itertools.product(values, repeat=n):
            c = np.asarray(codes, np.float64)
            if c @ x:
                best = min(best, (x**2).sum() - (c @ x) ** 2 / (c @ c))
        assert error(x, values, exact_scale(x, values)) == pytest.approx(best, rel=1e-12, abs=1e-12)


def least(x, values, h):
    """min over codes and scales a of sum h (x - a c)^2, all codes being tried."""
    c = np.array(list(itertools.product(values, repeat=len(x))), np.float64)
    a = c @ (h * x) / np.maximum(c**2 @ h, 1e-300)
    return (h * (x - a[:, None] * c) ** 2).sum(1).min()


@pytest.mark.parametrize("values", [*CODEBOOKS, (-1, 0.25, 2), (-1, 2)])
def test_weighted_scales_are_the_minimum_over_all_codes(values):
    rng = np.random.default_rng(11)
    x = (rng.standard_t(2, size=(40, 6)) + 0.3).astype(np.float32)
    h = rng.lognormal(sigma=4, size=(40, 6)).astype(np.float32)
    h[rng.random((40, 6)) < 0.2] = 0
    h[0], x[1] = 0, 0
    best = [
        least(row, values, w if w.any() else np.ones(6))
        for row, w in zip(x.astype(float), h.astype(float), strict=True)
    ]
    scheme = lcq.Levels(values, scale=True, per=(1, 0))
    for found in (scheme, dataclasses.replace(scheme, exact=True)):
        rest = x - np.asarray(found.project(jnp.asarray(x), importance=jnp.asarray(h)).dense(), np.float64)
        error = (np.where(h.any(1, keepdims=True), h, 1) * rest**2).sum(1)
        bound = (h * x.astype(float) ** 2).sum(1)
        np.testing.assert_allclose(error, best, rtol=1e-5, atol=1e-10 + 1e-10 * bound.max())


def test_a_searched_scale_finds_the_few_that_weigh_most():
    x = np.random.default_rng(12).laplace(size=(500, 400)).astype(np.float32)
    h = np.full((500, 1), 1e-9, np.float32)
    h[137], x[137] = 1, x[137] / 50
    form = lcq.Ternary().project(jnp.asarray(x), importance=jnp.asarray(h))
    wide, often = x.astype(np.float64).ravel(), np.broadcast_to(h, x.shape).astype(np.float64).ravel()
    a = exact_scale(wide, (-1, 0, 1), often)
    best = (often[:, None] * (wide[:, None] - a * np.array([-1, 0, 1])) ** 2).min(1).sum()
    assert (h * (np.asarray(form.dense(), np.float64) - x) ** 2).sum() <= best * (1 + 1e-5)


@pytest.mark.parametrize("values", CODEBOOKS)
def test_exact_scale_beats_a_fine_grid(values):
    x = np.random.default_rng(1).laplace(size=500)
    grid = min(error(x, values, a) for a in np.linspace(-12, 12, 6001))
    found = error(x, values, exact_scale(x, values))
    assert found <= grid * (1 + 1e-12)
    assert found >= grid * 0.999


@pytest.mark.parametrize("values", CODEBOOKS)
@pytest.mark.parametrize("law", ["normal", "laplace", "exponential"])
def test_searched_scale_is_the_global_optimum(values, law):
    x = np.asarray(getattr(np.random.default_rng(2), law)(size=4000), np.float32)
    form = lcq.Levels(values, scale=True).project(jnp.asarray(x))
    best = error(x, values, exact_scale(x.astype(np.float64), values))
    assert distortion(form, x) <= best * (1 + 1e-5) + 1e-4


@pytest.mark.parametrize("scheme", [lcq.Ternary(), lcq.PowersOfTwo(3, scale=True), lcq.Levels((0, 1, 5), scale=True)])
def test_searched_scale_of_a_leaf_too_large_to_search_whole(scheme):
    x = np.random.default_rng(10).laplace(size=(400, 500)).astype(np.float32)
    best = error(x, scheme.values, exact_scale(x.astype(np.float64).ravel(), scheme.values))
    assert distortion(scheme.project(jnp.asarray(x)), x) <= best * (1 + 1e-5)
    parts = jnp.asarray(x[:300]), jnp.asarray(x[300:])
    joint = sum(distortion(form, part) for form, part in zip(scheme.project(parts), parts, strict=True))
    assert joint <= best * (1 + 1e-5)


@pytest.mark.parametrize(("size", "place"), [(3000.0, 1), (300.0, 0)])
@pytest.mark.parametrize("scheme", [lcq.Ternary(), lcq.PowersOfTwo(3, scale=True)], ids=repr)
def test_a_single_large_weight_counts_once_whether_the_sample_has_it_or_not(scheme, size, place):
    x = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
    x[place] = size  # every eighth weight is in the sample, the first among them
    exact = dataclasses.replace(lcq.Levels(scheme.values, scale=True), exact=True)
    found, best = (
        ((x - np.asarray(s.project(jnp.asarray(x)).dense(), np.float64)) ** 2).sum() for s in (scheme, exact)
    )
    assert found <= best * 1.001


def test_binary_scale_is_the_mean_magnitude():
    x = np.random.default_rng(3).normal(size=(7, 5)).astype(np.float32)
    form = lcq.Binary().project(jnp.asarray(x))
    np.testing.assert_allclose(form.scale, np.abs(x).mean(dtype=np.float64), rtol=1e-6)
    np.testing.assert_array_equal(np.asarray(form.dense()) > 0, x >= 0)


def test_ternary_scale_is_the_published_one():
    x = np.random.default_rng(4).normal(size=10_000).astype(np.float32)
    u = np.sort(np.abs(x.astype(np.float64)))[::-1]
    j = 1 + np.argmax(np.cumsum(u) / np.sqrt(np.arange(1, u.size + 1)))
    for exact in (True, False):
        form = lcq.Levels((-1, 0, 1), scale=True, exact=exact).project(jnp.asarray(x))
        best = (x.astype(np.float64) ** 2).sum() - u[:j].sum() ** 2 / j
        assert distortion(form, x) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("values", [*CODEBOOKS, tuple(range(-50, 51)), (0.1, 0.2, 0.30000001)])
def test_nearest_level_and_thresholds_are_exact(values):
    values = [float(np.float32(v)) for v in values]
    middles = (np.asarray(values[1:]) + np.asarray(values[:-1])) / 2
    at = np.concatenate([middles.astype(np.float32), np.linspace(-3, 3, 101, dtype=np.float32)])
    x = np.concatenate([at, np.nextafter(at, np.float32(9)), np.nextafter(at, np.float32(-9))])
    form = lcq.Levels(tuple(values)).project(jnp.asarray(x))
    assert distortion(form, x) == pytest.approx(error(x, values, 1.0), rel=1e-12, abs=0)


def test_ties():
    def of(scheme, *x):
        return lcq.Levels(scheme).project(jnp.asarray(x, jnp.float32)).dense().tolist()

    assert of((-1, 1), 0.0, -0.0) == [1, 1]
    assert of((-1, 0, 1), 0.5, -0.5) == [1, -1]
    powers = lcq.PowersOfTwo(2)
    x = jnp.asarray([0.75, -0.75, 0.375, 0.125, -0.125, 0.1249])
    assert powers.project(x).dense().tolist() == [0.5, -0.5, 0.25, 0.25, -0.25, 0]


def test_powers_of_two_are_the_published_closed_form():
    x = np.random.default_rng(5).normal(size=3000).astype(np.float32)
    x = x[np.abs(np.abs(x.astype(np.float64)) % 2.0**-6) > 1e-6]  # away from ties
    f = -np.log2(np.abs(x.astype(np.float64)))
    c = 4
    size = np.where(f > c + 1, 0, np.where(f <= 0, 1, np.where(f > c, 2.0**-c, 2.0 ** -np.floor(f + np.log2(1.5)))))
    np.testing.assert_array_equal(lcq.PowersOfTwo(c).project(jnp.asarray(x)).dense(), np.sign(x) * size)


@hypothesis.given(weights, st.sampled_from(CODEBOOKS[:4]), st.floats(0.01, 4))
def test_a_warm_start_is_never_worse(x, values, start):
    scheme = lcq.Levels(values, scale=True)
    x = jnp.asarray(x)
    previous = scheme.project(x)
    previous = type(previous)(previous.codes, scale=jnp.full_like(previous.scale, start), values=previous.values)
    warm = scheme.project(x, previous)
    bound = error(x, scheme.values, np.float64(np.float32(start)))
    assert distortion(warm, x) <= bound * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("scheme", [lcq.Binary(), lcq.Ternary(), lcq.Ternary(scale=False), lcq.PowersOfTwo(3)])
@pytest.mark.parametrize("x", [np.zeros((3, 2)), np.full((4,), -2.0), np.ones(()), np.full((1, 1), 1e-30)])
def test_degenerate_inputs(scheme, x):
    x = jnp.asarray(x, jnp.float32)
    form = scheme.project(x)
    assert form.shape == x.shape and bool(jnp.isfinite(form.dense()).all())
    again = scheme.project(form.dense(), form)
    np.testing.assert_array_equal(again.dense(), form.dense())
    if scheme.scale:
        np.testing.assert_allclose(form.dense(), x, rtol=1e-6)


@pytest.mark.parametrize("per", ["channel", 4, (2, 0), (1, 0)])
def test_blocks_are_projected_alone(per):
    x = np.random.default_rng(6).normal(size=(8, 6)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)
    form = lcq.Ternary(per=per, scale_dtype="float32").project(jnp.asarray(x))
    rows, columns = {"channel": (8, 1), 4: (4, 1), (2, 0): (2, 6), (1, 0): (1, 6)}[per]
    for i, j in itertools.product(range(0, 8, rows), range(0, 6, columns)):
        part = (slice(i, i + rows), slice(j, j + columns))
        alone = lcq.Ternary().project(jnp.asarray(x[part]))
        np.testing.assert_allclose(form.dense()[part], alone.dense(), rtol=1e-6)


def test_exact_equals_searched_per_block():
    x = jnp.asarray(np.random.default_rng(7).normal(size=(64, 3)), jnp.float32)
    for per in ("channel", 32):
        exact = lcq.Levels((-1, 0, 1), scale=True, per=per, exact=True, scale_dtype="float32").project(x)
        assert distortion(exact, x) <= distortion(lcq.Ternary(per=per).project(x), x) * (1 + 1e-6)
        for j in range(3):
            column = exact.scale[:, j].reshape(-1)
            assert float(column[0]) == pytest.approx(
                exact_scale(np.asarray(x[: 64 // column.size, j], np.float64), (-1, 0, 1)), rel=1e-6
            )


def test_joint_leaves_share_the_scale_of_their_concatenation():
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(6, 5)).astype(np.float32), rng.normal(size=7).astype(np.float32)
    for exact in (False, True):
        scheme = lcq.Levels((-1, 0, 1), scale=True, exact=exact)
        forms = scheme.project((jnp.asarray(a), jnp.asarray(b)))
        whole = scheme.project(jnp.asarray(np.concatenate([a.ravel(), b])))
        for form, x in zip(forms, (a, b), strict=True):
            assert form.shape == x.shape
            np.testing.assert_allclose(form.scale.reshape(()), whole.scale.reshape(()), rtol=1e-6)


def test_jit_vmap_and_bfloat16():
    x = jnp.asarray(np.random.default_rng(9).normal(size=(3, 16, 4)), jnp.float32)
    scheme = lcq.Ternary(per="channel")
    each = [scheme.project(one) for one in x]
    stacked = jax.jit(jax.vmap(scheme.project))(x)
    np.testing.assert_allclose(stacked.dense(), jnp.stack([f.dense() for f in each]), rtol=1e-6)
    half = scheme.project(x[0].astype(jnp.bfloat16))
    assert half.dense().dtype == jnp.bfloat16 and half.scale.dtype == jnp.float32
    with pytest.raises(ValueError, match="cannot run under jit"):
        jax.jit(lcq.Levels((-1, 1), scale=True, exact=True).project)(x)


@pytest.mark.parametrize("size", [3, 300, 70_000])
def test_long_codebooks(size):
    values = tuple(range(-size // 2, size - size // 2))
    if size > 65536:
        with pytest.raises(ValueError, match="65,536"):
            lcq.Levels(values)
        return
    form = lcq.Levels(values).project(jnp.arange(-200, 200, dtype=jnp.float32))
    np.testing.assert_array_equal(form.dense(), np.clip(np.arange(-200, 200), values[0], values[-1]))
    assert form.codes.dtype == (jnp.uint8 if size <= 256 else jnp.uint16)


@pytest.mark.parametrize(
    "make",
    [
        lambda: lcq.Levels(()),
        lambda: lcq.Levels((0.0, np.nan)),
        lambda: lcq.Levels((0.0,), scale=True),
        lambda: lcq.Levels((0.0, 1.0), per="channel"),
        lambda: lcq.PowersOfTwo(-1),
        lambda: lcq.Ternary(per=5).project(jnp.ones((6, 2))),
        lambda: lcq.Ternary(per="row").project(jnp.ones((6, 2))),
        lambda: lcq.Ternary(per=2).project(jnp.ones(6)),
        lambda: lcq.Ternary().project(jnp.ones((0, 2))),
        lambda: lcq.Ternary().project(jnp.ones(3, jnp.int32)),
        lambda: lcq.Ternary(per="channel").project((jnp.ones(3), jnp.ones(3))),
    ],
)
def test_bad_settings_and_leaves_are_refused(make):
    with pytest.raises(ValueError, match=r"expected|per="):
        make()


def test_thresholds_are_float32_and_ascending():
    t = thresholds((-1.0, 0.0, 0.5, 1.0))
    assert t.dtype == np.float32 and (np.diff(t) > 0).all()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scales_in_16_bits_are_the_best_there_are(dtype, exact):
    """Against all scales of the format, of both signs, and all codes, in float64."""
    values = (-2.0, -1.0, 0.0, 1.0)
    x = np.random.default_rng(13).normal(size=(16, 8)).astype(np.float32)
    form = lcq.Levels(values, scale=True, per=8, exact=exact, scale_dtype=dtype).project(jnp.asarray(x))
    assert form.scale.dtype == jnp.dtype(dtype) and form.shared_bits == 16 * form.scale.size
    with np.errstate(invalid="ignore"):
        every = np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype)).astype(np.float64)
    every = every[np.isfinite(every) & (np.abs(every) < 4) & (np.abs(every) > 0.1)][:: 1 if dtype == "bfloat16" else 7]
    for i, j in itertools.product(range(2), range(8)):
        part = x[8 * i : 8 * i + 8, j].astype(np.float64)
        best = min(error(part, values, a) for a in every)
        found = ((np.asarray(form.dense(), np.float64)[8 * i : 8 * i + 8, j] - part) ** 2).sum()
        assert found <= best * 1.002


def test_groups_have_scales_in_bfloat16_unless_another_format_is_given():
    x = jnp.ones((8, 2))
    for scheme, dtype in [
        (lcq.Ternary(per=4), "bfloat16"),
        (lcq.Uniform(4, per=4), "bfloat16"),
        (lcq.Uniform(4, per="channel"), "float32"),
        (lcq.Uniform(4), "float32"),
        (lcq.Uniform(4, per=4, scale_dtype="float32"), "float32"),
        (lcq.Uniform(4, per="channel", scale_dtype="float16"), "float16"),
        (lcq.Binary(per=4, scale_dtype="float16"), "float16"),
    ]:
        assert scheme.project(x).scale.dtype == jnp.dtype(dtype)
    with pytest.raises(ValueError, match="scale_dtype"):
        lcq.Uniform(4, scale_dtype="int8")
    with pytest.raises(ValueError, match="scale=True"):
        lcq.Ternary(scale=False, scale_dtype="bfloat16")


@pytest.mark.parametrize("size", [1e-30, 1e-7, 1e7, 1e30])
def test_weights_that_float16_cannot_scale_are_refused(size):
    x = jnp.asarray(np.random.default_rng(14).normal(size=(3, 8, 4)) * size, jnp.float32)
    for scheme in (lcq.Uniform(4, per=4), lcq.Uniform(4, per=4, zero_point=True)):
        narrow = dataclasses.replace(scheme, scale_dtype="float16")
        for stacked in (0, 1):
            with pytest.raises(ValueError, match=r"w: expected weights whose scales fit float16.*bfloat16"):
                lcq.compress({"w": x}, [lcq.Rule("w", narrow, stacked=stacked)])
        form = scheme.project(x)
        assert distortion(form, x) < 0.01 * (np.asarray(x, np.float64) ** 2).sum()


def test_single_blocks_below_float16_become_nothing_worse():
    x = np.random.default_rng(15).normal(size=(8, 4)).astype(np.float32)
    x[:4] *= 1e-12
    form = lcq.Uniform(4, per=4, scale_dtype="float16").project(jnp.asarray(x))
    assert np.isfinite(form.dense()).all() and distortion(form, x) < 0.01 * (x**2).sum()
