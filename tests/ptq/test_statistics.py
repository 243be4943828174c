"""Sums of products over batches against float64 numpy on all rows at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lcq.ptq import statistics
from lcq.ptq.statistics import finish, gather


def inputs(rows, size, offset=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(rows, size)) @ rng.normal(size=(size, size)) / size**0.5, 0) + offset
    y = x + 0.1 * rng.normal(size=x.shape) + 0.05
    return x.astype(np.float32), y.astype(np.float32)


def oracle(x, y, centred=False):
    x, y = x.astype(np.float64), y.astype(np.float64)
    means = x.mean(0), y.mean(0)
    if centred:
        x, y = x - means[0], y - means[1]
    return y.T @ y, y.T @ (x - y), (x - y).T @ (x - y), *means, len(y)


def assert_close(statistics, expected, tolerance=2e-6):
    for got, want in zip(statistics, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def gathered(x, y, edges, **settings):
    moments = None
    for low, high in zip([0, *edges], [*edges, len(y)], strict=True):
        moments = gather(jnp.asarray(y[low:high]), jnp.asarray(x[low:high]), moments, **settings)
    return moments


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_batches_sum_to_the_whole(centred, offset):
    x, y = inputs(90, 7, offset)
    statistics = finish(gathered(x, y, [40, 50], difference=True), centred)
    assert_close(statistics, oracle(x, y, centred))


def test_centred_at_an_offset_needs_the_shift():
    x, y = inputs(400, 7, 30.0)
    expected = oracle(x, y, centred=True)[0]
    shifted = gathered(x, y, [100, 200])
    plain = shifted._replace(shift=np.zeros(7, np.float32), sum_y=y.sum(0), gram=y.T @ y)
    errors = [np.abs(finish(m, centred=True).gram - expected).max() / expected.max() for m in (shifted, plain)]
    assert errors[0] < 1e-6 and errors[1] > 10 * errors[0], errors


def test_without_x():
    x, y = inputs(50, 5)
    alone = finish(gather(jnp.asarray(y), moments=gather(jnp.asarray(y))))
    assert alone.drift is None and alone.difference is None
    assert_close((alone.gram, alone.mean_x, alone.mean_y), (2 * oracle(y, y)[0], y.mean(0), y.mean(0)))
    assert gather(jnp.asarray(y), difference=True).difference is None
    assert gather(jnp.asarray(y), jnp.asarray(x)).difference is None
    assert int(alone.count) == 100


@pytest.mark.parametrize("centred", [False, True])
def test_rows_that_do_not_count(centred):
    """They are NaN here, and the first batch has no other; the shift is the mean of the first that do."""
    x, y = inputs(90, 7, 30.0)
    rows = np.random.default_rng(3).random(90) < 0.4
    rows[:20] = False
    x[~rows], y[~rows] = np.nan, np.inf
    moments = None
    for part in (slice(0, 20), slice(20, 50), slice(50, 90)):
        x_part, y_part, counts = (jnp.asarray(a[part]) for a in (x, y, rows))
        moments = gather(y_part, x_part, moments, difference=True, rows=counts)
    assert_close(finish(moments, centred), oracle(x[rows], y[rows], centred))
    whole = finish(gather(jnp.asarray(y), jnp.asarray(x), difference=True, rows=jnp.asarray(rows)), centred)
    assert_close(whole, oracle(x[rows], y[rows], centred))


@pytest.mark.parametrize("centred", [False, True])
def test_no_row_counts(centred):
    y = jnp.full((3, 2), jnp.nan)
    statistics = finish(gather(y, y, difference=True, rows=jnp.zeros(3, bool)), centred)
    assert all((np.asarray(a) == 0).all() for a in statistics)


@pytest.mark.parametrize("before", [{}, {"x": 1}, {"x": 1, "difference": True}])
@pytest.mark.parametrize("now", [{}, {"x": 1}, {"x": 1, "difference": True}])
def test_every_batch_is_gathered_alike(before, now):
    y = jnp.ones((3, 2))
    kinds = [{**kind, "x": y} if kind else {} for kind in (before, now)]
    first = gather(y, **kinds[0])
    if before == now:
        assert int(gather(y, moments=first, **kinds[1]).count) == 6
    else:
        with pytest.raises(ValueError, match="every batch"):
            gather(y, moments=first, **kinds[1])


def test_drift_is_summed_from_the_difference():
    x, y = inputs(200, 6, 30.0)
    x = (y + 1e-4 * np.random.default_rng(1).normal(size=y.shape)).astype(np.float32)
    want = oracle(x, y)[1]
    got = finish(gathered(x, y, [100])).drift
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_quadrants_of_a_large_gram(monkeypatch):
    monkeypatch.setattr(statistics, "_HALVES", 4)
    x, y = inputs(60, 19)
    assert_close(finish(gather(jnp.asarray(y), jnp.asarray(x), difference=True)), oracle(x, y))


def test_short_floats_are_summed_in_float32():
    x, y = (jnp.asarray(a, jnp.bfloat16) for a in inputs(300, 5, 3.0))
    statistics = finish(gather(y, x, difference=True), centred=True)
    assert statistics.gram.dtype == jnp.float32
    assert_close(statistics, oracle(np.asarray(x, np.float64), np.asarray(y, np.float64), centred=True))


def test_vmap_over_groups_is_a_loop():
    pairs = [inputs(30, 4, seed=g) for g in range(3)]
    xs, ys = (np.stack(a) for a in zip(*pairs, strict=True))

    def both(y, x):
        return finish(gather(y, x, gather(y, x, difference=True), difference=True), centred=True)

    together = jax.jit(jax.vmap(both))(ys, xs)
    for g, (x, y) in enumerate(pairs):
        one = jax.tree.map(lambda a, g=g: a[g], together)
        assert_close(one, oracle(np.concatenate([x, x]), np.concatenate([y, y]), centred=True))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_batch_on_a_mesh(kind):
    x, y = inputs(64, 6)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    rows = NamedSharding(mesh, P("data"))
    got = jax.jit(lambda y, x: finish(gather(y, x, difference=True), centred=True))(*jax.device_put((y, x), rows))
    assert got.gram.sharding.is_fully_replicated
    assert_close(got, oracle(x, y, centred=True))
