"""The search of scales for long blocks against a dense grid of scales in float64, and against its plain twin."""

import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.schemes import shifted_search
from lcq.schemes.grid_search import _search, search_grid
from lcq.schemes.grid_sums import Everywhere, Grid
from lcq.schemes.grouped import cut

LAWS = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "heavy": lambda rng, shape: rng.standard_t(3, size=shape),
    "sparse": lambda rng, shape: rng.normal(size=shape) * (rng.random(shape) < 0.1),
}


def errors(x, low, high, scales):
    """sum (x - a c)^2 over the first axis with the nearest codes, of every scale [T, n] of x [size, n]."""
    found = []
    for a in scales:
        code = np.clip(np.rint(x / np.where(a == 0, 1, a)), low, high)
        found.append(((x - a * code) ** 2).sum(0))
    return np.array(found)


def best(x, low, high, dtype):
    """The least error of 600 scales of both signs, of those that a format has."""
    top = np.abs(x).max(0) / min(-low, high)
    scales = top * np.linspace(0.05, 1.15, 300)[:, None]
    scales = np.concatenate([scales, -scales]).astype(jnp.dtype(dtype)).astype(np.float64)
    return errors(x, low, high, scales).min(0)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("bits", "per"), [(4, 32), (2, 32), (3, "channel"), (4, None), (5, "channel")])
def test_the_error_is_that_of_a_dense_grid_of_scales(law, bits, per):
    rng, low, high = np.random.default_rng(bits), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    x = LAWS[law](rng, (512, 24)).astype(jnp.bfloat16 if law == "normal" else np.float32)
    form = lcq.Uniform(bits, per=per).project(jnp.asarray(x))
    wide = x.astype(np.float64)
    blocks = {32: wide.reshape(16, 32, 24).swapaxes(0, 1).reshape(32, -1), "channel": wide, None: wide.reshape(-1, 1)}
    least = best(blocks[per], low, high, "bfloat16" if per == 32 else "float32").sum()
    codes = np.asarray(form.codes, np.float64) + low
    scale = np.asarray(form.scale, np.float64)
    found = ((wide - codes * np.repeat(scale, 512 // scale.shape[0], 0)) ** 2).sum()
    assert found <= least * 1.001


@pytest.mark.parametrize("per", [32, "channel", None, (1, 0)])
def test_rows_are_the_plain_twin(per):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(96, 70)), jnp.float32)
    whole, grid = cut((x,), per), Grid(-8.0, 7.0, "float32")
    start = 0.25 * jnp.ones(whole.blocks[0].stat)
    for warm in (None, start):
        rows, plain = search_grid(whole, grid, warm), _search(Everywhere(whole, grid), warm)
        assert rows.shape == plain.shape
        np.testing.assert_allclose(rows, plain, rtol=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_what_is_on_a_grid_is_found_exactly(bits):
    rng, half = np.random.default_rng(bits), 2 ** (bits - 1)
    codes = rng.integers(-half, half, size=(128, 6))
    codes[0] = -half
    x = (codes * rng.lognormal(size=6)).astype(np.float32)
    form = lcq.Uniform(bits, per="channel").project(jnp.asarray(x))
    np.testing.assert_allclose(form.dense(), x, rtol=1e-5)


@pytest.mark.parametrize("per", [32, "channel"])
def test_an_earlier_scale_is_a_start_and_no_bound(per):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(256, 16)).astype(np.float32)
    scheme = lcq.Uniform(4, per=per)
    earlier = scheme.project(jnp.asarray(x))
    for factor in (1.02, 0.3, 5.0):
        y = jnp.asarray(factor * x + 0.02 * rng.normal(size=x.shape).astype(np.float32))
        warm, cold = (np.asarray(f.dense(), np.float64) for f in (scheme.project(y, earlier), scheme.project(y)))
        assert ((warm - y) ** 2).sum() <= ((cold - y) ** 2).sum() * 1.02


LAWS_APART = LAWS | {
    "positive": lambda rng, shape: 5 + rng.random(shape),
    "negative": lambda rng, shape: -0.2 - rng.random(shape),
    "skew": lambda rng, shape: rng.lognormal(size=shape),
}


@pytest.mark.parametrize(
    ("law", "bits", "size"),
    [*((law, *grid) for law in LAWS_APART for grid in [(4, 32), (3, 512)]), ("normal", 2, 64), ("heavy", 8, 128)],
)
def test_the_error_of_a_shifted_grid_is_that_of_dense_grids_of_scales_and_zeros(law, bits, size):
    x, last = LAWS_APART[law](np.random.default_rng(bits), (size, 24)).astype(np.float32), 2**bits - 1
    form = lcq.Uniform(bits, per="channel", zero_point=True).project(jnp.asarray(x))
    wide = x.astype(np.float64)
    low, high = np.minimum(wide.min(0), 0), np.maximum(wide.max(0), 0)
    span = np.where(high > low, high - low, 1)
    middle, least = np.rint(-low / span * last), np.inf
    for zero in np.clip(middle + np.arange(-1, 2)[:, None], 0, last):
        for scale in span / last * np.linspace(0.03, 1.1, 200)[:, None]:
            q = np.clip(np.rint(wide / scale + zero), 0, last)
            least = np.minimum(least, ((wide - scale * (q - zero)) ** 2).sum(0))
    found = ((wide - np.asarray(form.dense(), np.float64)) ** 2).sum(0)
    assert found.sum() <= least.sum() * 1.02


@pytest.mark.parametrize("per", [32, "channel", None, (1, 0)])
def test_rows_of_shifted_grids_are_the_plain_twin(per):
    x = jnp.asarray(np.random.default_rng(3).normal(size=(96, 70)), jnp.float32)
    whole, grid = cut((x,), per), Grid(0.0, 15.0, "float32")
    start = 0.25 * jnp.ones(whole.blocks[0].stat), 7 * jnp.ones(whole.blocks[0].stat)
    for warm in (None, start):
        rows = shifted_search.search_shifted(whole, 15, warm, "float32")
        plain = shifted_search._search(Everywhere(whole, grid), warm)
        numbers = Everywhere(whole, grid)
        one, other = (numbers.errors(a[None], z[None]) for a, z in (rows, plain))
        np.testing.assert_allclose(one.sum(), other.sum(), rtol=1e-3)
        assert (jnp.abs(one - other) > 1e-4 * other).mean() < 0.02  # of candidates that are as good either may win


def test_a_warm_start_of_a_shifted_grid_is_never_worse():
    x = jnp.asarray(np.random.default_rng(5).standard_t(3, size=(64, 33)), jnp.float32)
    whole, grid = cut((x,), "channel"), Grid(0.0, 7.0, None)
    warm = jnp.full((1, 33), 0.9), jnp.tile(jnp.arange(8.0), 5)[None, :33]
    found = shifted_search.search_shifted(whole, 7, warm, None)
    before, after = (Everywhere(whole, grid).errors(a[None], z[None]) for a, z in (warm, found))
    assert (after <= before).all()
