"""Statistics of a product's uses against sums in float64 numpy, expert by expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.ptq.gathering import matrices, squares
from lcq.ptq.rounding.gpfq import GPFQ
from lcq.ptq.sums import Sums
from lcq.ptq.two_stream import Use, walk
from lcq.tracing.contraction import Operand
from lcq.tracing.param_flow import trace


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def ragged(p, batch):
    return lax.ragged_dot(batch[0], p["w"], batch[1])


def statistics(uses, centred, w):
    """The sums over all folds, nothing of them shrunk."""
    return Sums.of(uses, GPFQ(), jnp.asarray(w), centred).settled(np.zeros((len(w), 2)), careful=False).statistics


SIZES = [np.array(sizes, np.int32) for sizes in ([4, 0, 5, 3], [4, 2, 3, 3], [0, 0, 12, 0])]


def uses_of(pairs):
    """Uses of one ragged product: for each batch (x, its sizes, y, its sizes, which rows count)."""
    (product,) = trace(ragged, {"w": draw(4, 3, 2)}, (pairs[0][0], pairs[0][1]), ["w"]).products
    inputs = []
    for x, of_x, y, of_y, counts in pairs:
        mask = None if counts is None else jnp.asarray(counts)[:, None]
        one, two = (Operand(jnp.asarray(a), jnp.asarray(sizes), mask) for a, sizes in ((x, of_x), (y, of_y)))
        inputs.append((one, two))
    return [Use(product, tuple(range(len(pairs))), inputs)]


def rows_of(pairs, expert):
    """X and Y of one expert: X is Y where its rows in the two nets are others."""
    xs, ys = [], []
    for x, of_x, y, of_y, counts in pairs:
        places = [np.arange(12)[sizes[:expert].sum() : sizes[: expert + 1].sum()] for sizes in (of_x, of_y)]
        here = [i for i in places[1] if counts is None or counts[i]]
        ys.append(y[here])
        xs.append((x if np.array_equal(*places) else y)[here])
    return np.concatenate(xs).astype(np.float64), np.concatenate(ys).astype(np.float64)


@pytest.mark.parametrize("masked", [False, True])
def test_experts_whose_rows_are_others_in_the_quantized_net(masked):
    counts = np.random.default_rng(3).random(12) < 0.6 if masked else None
    pairs = [
        (draw(12, 3, seed=i), SIZES[a], draw(12, 3, seed=i + 9), SIZES[b], counts)
        for i, (a, b) in enumerate([(0, 0), (0, 1), (2, 1)])
    ]
    uses = uses_of(pairs)
    found, (xs, ys, there, _) = statistics(uses, False, draw(4, 3, 2)), matrices(uses, 2)
    for e in range(4):
        x, y = rows_of(pairs, e)
        np.testing.assert_allclose(found.gram[e], y.T @ y, atol=1e-4)
        np.testing.assert_allclose(found.drift[e], y.T @ (x - y), atol=1e-4)
        np.testing.assert_allclose(found.mean_x[e], x.mean(0) if len(x) else 0, atol=1e-5)
        assert found.count[e] == len(y) == there[e].sum()
        np.testing.assert_array_equal(ys[e][there[e]], y.astype(np.float32))
        np.testing.assert_array_equal(xs[e][there[e]], x.astype(np.float32))


def test_sizes_in_a_small_type_of_more_rows():
    """Rows are counted past 255 though sizes are not; those behind the last expert are nobody's."""
    x, sizes = jnp.ones((300, 3)), jnp.array([100, 60, 30, 20], jnp.uint8)
    (product,) = trace(ragged, {"w": draw(4, 3, 2)}, (x, sizes), ["w"]).products
    assert product.members(Operand(x, sizes, None)).sum(1).tolist() == [100, 60, 30, 20]


def test_errors_of_experts_whose_rows_are_others():
    """A router in the net: the error of such experts is ||Y w - Y q||^2."""
    params = {"a": draw(3, 3), "w": draw(4, 3, 2)}
    x = draw(40, 3)

    def fn(p, x):
        h = x @ p["a"]
        expert = jnp.argmax(jnp.concatenate([h, -h[:, :1]], 1), 1)
        return lax.ragged_dot(h[jnp.argsort(expert)], p["w"], jnp.bincount(expert, length=4))

    other = {"a": params["a"] + 0.8 * draw(3, 3, seed=5), "w": params["w"] + 0.1 * draw(4, 3, 2, seed=6)}
    sides = []
    for net in (params, other):
        h = x.astype(np.float64) @ net["a"]
        expert = np.argmax(np.concatenate([h, -h[:, :1]], 1), 1)
        sides.append((h[np.argsort(expert, kind="stable")], np.bincount(expert, minlength=4)))
    (xs, of_x), (ys, of_y) = sides
    error = norm = 0.0
    for e in range(4):
        places = [np.arange(sizes[:e].sum(), sizes[: e + 1].sum()) for sizes in (of_x, of_y)]
        wanted = (xs if np.array_equal(*places) else ys)[places[1]] @ params["w"][e]
        error += ((wanted - ys[places[1]] @ other["w"][e]) ** 2).sum()
        norm += (wanted**2).sum()
    assert not np.array_equal(of_x, of_y)
    program, current = trace(fn, params, x, ["a", "w"]), dict(params)
    for visit in walk(program, params, current, [jnp.asarray(x)]):
        current[visit.product.path] = other[visit.product.path]
        outcome = visit.finish()
    np.testing.assert_allclose(outcome.error, error / norm, rtol=1e-4)


def test_experts_of_a_batch():
    """A ragged product that is mapped over an axis has its experts for each index of it."""
    x, w = draw(2, 9, 3), draw(2, 4, 3, 5)
    sizes = np.array([[2, 3, 0, 4], [1, 1, 6, 1]], np.int32)

    def fn(p, x):
        return jax.vmap(lax.ragged_dot)(x, p["w"], jnp.asarray(sizes))

    (product,) = trace(fn, {"w": w}, x, ["w"]).products
    assert product.shape == (8, 9, 3, 5) and product.flops == 2 * 2 * 9 * 3 * 5
    operand = Operand(jnp.asarray(x), jnp.asarray(sizes))
    found = statistics([Use(product, (0,), [(operand, operand)])], False, draw(8, 3, 5))
    places = np.asarray(product.weights(jnp.asarray(product.weight.elements(w.shape))))
    np.testing.assert_array_equal(places, np.arange(w.size).reshape(8, 3, 5))
    sums, many = squares(Use(product, (0,), [(operand, operand)]))
    for b in range(2):
        for e in range(4):
            rows = x[b, sizes[b, :e].sum() : sizes[b, : e + 1].sum()].astype(np.float64)
            np.testing.assert_allclose(found.gram[4 * b + e], rows.T @ rows, atol=1e-4)
            np.testing.assert_allclose(sums[4 * b + e], (rows**2).sum(0), atol=1e-4)
            assert found.count[4 * b + e] == many[4 * b + e] == len(rows)


def test_uses_of_other_shapes_are_summed():
    """A convolution whose images are cut in parts, and one with other images, some of which do not count."""

    def fn(p, x):
        return lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC"))

    uses, rows = [], []
    for shape, counts in (((4, 9, 2), None), ((3, 5, 2), np.array([True, False, True]))):
        x = draw(*shape)
        (product,) = trace(fn, {"w": draw(3, 2, 4)}, x, ["w"]).products
        mask = None if counts is None else jnp.asarray(counts)[:, None, None]
        operand = Operand(jnp.asarray(x), None, mask)
        uses.append(Use(product, (0,), [(operand, operand)]))
        seen = x if counts is None else x[counts]
        windows = np.lib.stride_tricks.sliding_window_view(seen, 3, 1)  # [n, places, 2, 3]
        rows.append(windows.swapaxes(2, 3).reshape(-1, 6).astype(np.float64))
    y = np.concatenate(rows)
    found = statistics(uses, True, draw(1, 6, 4))
    away = y - y.mean(0)
    np.testing.assert_allclose(found.gram[0], away.T @ away, atol=1e-4)
    np.testing.assert_allclose(found.mean_y[0], y.mean(0), atol=1e-5)
    assert int(found.count[0]) == len(y) and found.drift is None
