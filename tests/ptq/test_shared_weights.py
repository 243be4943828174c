"""`lcq.quantize` where weights are used more than once: tied, in branches, in recurrence, and by experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import lcq
from lcq.ptq.rounding import ROUNDING_METHODS
from tests.ptq.small_net import RULES, SIZE, UNIFORM, bare, dense, draw, net, problem, quantize, statistics


def test_all_uses_choose_the_codes():
    """Of weights that are used again on their own results; both nets have the original ones until all are seen."""
    params, batches = problem()

    def fn(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w1"]

    done = quantize(fn, {"w1": params["w1"]}, batches, RULES)
    (record,) = done.records
    assert (record.path, record.uses, record.others, record.rows) == ("w1", 2, 0, 120)
    x, w = np.concatenate(batches), params["w1"]
    rows = np.concatenate([x, np.tanh(x @ w)])
    wanted = ROUNDING_METHODS["gpfq"]().codes(
        jnp.asarray(w), statistics(rows, rows, False), UNIFORM.project(jnp.asarray(w))
    )
    np.testing.assert_array_equal(done.forms["w1"].codes, wanted.codes)
    q = np.asarray(wanted.dense(), np.float64)
    results = [x @ w, np.tanh(x @ w) @ w], [x @ q, np.tanh(x @ q) @ q]
    error = sum(((a - b) ** 2).sum() for a, b in zip(*results, strict=True)) / sum((a**2).sum() for a in results[0])
    np.testing.assert_allclose(record.error, error, rtol=1e-4)


def test_a_transposed_use_sees_the_codes():
    params, batches = problem()

    def fn(p, x):
        return jnp.tanh(x @ p["w1"]) @ p["w1"].T

    done = quantize(fn, {"w1": params["w1"]}, batches, RULES)
    alone = quantize(lambda p, x: x @ p["w1"], {"w1": params["w1"]}, batches, RULES)
    assert [(record.uses, record.others) for record in done.records] == [(1, 1)]
    np.testing.assert_array_equal(done.forms["w1"].codes, alone.forms["w1"].codes)


def test_branches_that_share_weights_are_one_batch():
    """Siamese: codes, bias and errors are those of the branches' inputs one after another, layer by layer."""
    params, (one, two) = problem()

    def branches(p, b):
        return (net(p, b[0]) * net(p, b[1])).sum()

    plain = {name: params[name] for name in ("w1", "w2")} | {"b1": jnp.zeros(SIZE)}
    done = quantize(branches, plain, [(one, two)], RULES, bias_correction=False)
    both = quantize(net, plain, [np.concatenate([one, two])], RULES, bias_correction=False)
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(done.forms[name].codes, both.forms[name].codes)
    assert [(record.path, record.uses) for record in done.records] == [("w1", 2), ("w2", 2)]
    np.testing.assert_allclose([r.error for r in done.records], [r.error for r in both.records], rtol=1e-4)


def test_recurrence_by_its_definition():
    """Two kernels of a cell, each with the other's part in its inputs: numpy runs the two passes, step by step."""
    params, _ = problem()
    xs = (draw(20, 5, SIZE, seed=8) + 0.5) / 2

    def fn(p, x):
        def step(h, x):
            return (jnp.tanh(x @ p["w1"] + h @ p["w2"]), None)

        return lax.scan(step, jnp.zeros((len(x), SIZE)), x.swapaxes(0, 1))[0]

    def states(w1, w2):
        found = [np.zeros((20, SIZE))]
        for t in range(5):
            found.append(np.tanh(xs[:, t] @ w1 + found[-1] @ w2))
        return np.concatenate(found[:-1])  # what w2 multiplies in each step

    done = quantize(fn, {name: params[name] for name in ("w1", "w2")}, [xs], RULES)
    w1, w2 = (params[name].astype(np.float64) for name in ("w1", "w2"))
    inputs = xs.swapaxes(0, 1).reshape(-1, SIZE)
    q1 = ROUNDING_METHODS["gpfq"]().codes(
        jnp.asarray(params["w1"]), statistics(inputs, inputs, False), UNIFORM.project(jnp.asarray(params["w1"]))
    )
    np.testing.assert_array_equal(done.forms["w1"].codes, q1.codes)
    x, y = states(w1, w2), states(np.asarray(q1.dense(), np.float64), w2)
    q2 = ROUNDING_METHODS["gpfq"]().codes(
        jnp.asarray(params["w2"]), statistics(x, y, False), UNIFORM.project(jnp.asarray(params["w2"]))
    )
    np.testing.assert_array_equal(done.forms["w2"].codes, q2.codes)
    q1, q2 = (np.asarray(q.dense(), np.float64) for q in (q1, q2))
    error = ((x @ w2 - states(q1, q2) @ q2) ** 2).sum() / ((x @ w2) ** 2).sum()
    np.testing.assert_allclose(done.records[1].error, error, rtol=1e-4)
    assert [(r.path, r.uses, r.rows, r.dead) for r in done.records] == [("w1", 5, 100, 0), ("w2", 5, 100, 0)]


def test_recurrent_kernels_use_all_steps():
    h, length = 32, 24
    net, mix = nn.RNN(nn.SimpleCell(h)), np.random.default_rng(0).normal(size=(6, h)).astype("f")

    def make(seed):
        return jnp.asarray(np.random.default_rng(seed).normal(size=(16, length, 6)).astype("f") @ mix)

    v = net.init(jax.random.key(0), make(3))
    rules = [lcq.Rule("(.*/)?kernel", lcq.Uniform(3, per="channel"))]
    done = lcq.quantize(net.apply, v, [make(1), make(2)], rules)
    y, wanted = (np.asarray(net.apply(p, make(3)), np.float64) for p in (lcq.decompress(done.forms), v))
    assert (((y - wanted) ** 2).sum() / (wanted**2).sum()) ** 0.5 < 0.12
    assert [record.uses for record in done.records] == [length] * 2 and not any(r.dead for r in done.records)


def test_a_block_that_is_applied_again():
    """Its layers see each other's errors, and those after the block see all; one record each."""
    params, batches = problem()

    def fn(p, x):
        for _ in range(3):
            x = net(p, x)
        return x @ p["w3"]

    told = []
    rules = [lcq.Rule("w.", UNIFORM)]
    done = quantize(
        fn, params | {"w3": draw(SIZE, SIZE)}, batches, rules, progress=lambda i, n, record: told.append((i, n, record))
    )
    assert [(record.path, record.uses) for record in done.records] == [("w1", 3), ("w2", 3), ("w3", 1)]
    assert told == [(i + 1, 3, record) for i, record in enumerate(done.records)]
    x = np.concatenate(batches)
    y, got = (fn(p, x) for p in (params | {"w3": draw(SIZE, SIZE)}, dense(done)))
    np.testing.assert_allclose(done.records[-1].error, ((y - got) ** 2).sum() / (y**2).sum(), rtol=1e-3)


# Batches


def test_batches_of_unequal_length():
    """Of rows, and of the axis that a scan or a convolution runs over: sums over all of them."""
    _params, (one, two) = problem()
    whole, parts = quantize(batches=[np.concatenate([one, two])]), quantize(batches=[one[:9], one[9:], two])
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(whole.forms[name].codes, parts.forms[name].codes)
        np.testing.assert_allclose(whole.forms[name].dense(), parts.forms[name].dense(), atol=1e-6)
    np.testing.assert_allclose(whole.forms["b1"], parts.forms["b1"], atol=1e-5)
    np.testing.assert_allclose([r.error for r in whole.records], [r.error for r in parts.records], rtol=1e-4)
    assert [record.rows for record in parts.records] == [60, 60]


def test_sequences_of_unequal_length():
    """A recurrent kernel has other numbers of uses; the last step of the longer ones has no pair among the others."""
    params, _ = problem()

    def fn(p, x):
        def step(h, x):
            return (jnp.tanh(x @ p["w1"] + h @ p["w2"]), None)

        return lax.scan(step, jnp.zeros((len(x), SIZE)), x.swapaxes(0, 1))[0]

    plain = {name: params[name] for name in ("w1", "w2")}
    batches = [draw(20, 1, SIZE, seed=8), draw(20, 4, SIZE, seed=9), draw(7, 3, SIZE, seed=10)]
    done = quantize(fn, plain, batches, RULES)
    assert [record.rows for record in done.records] == [20 + 80 + 21] * 2
    inputs = np.concatenate([batch.swapaxes(0, 1).reshape(-1, SIZE) for batch in batches])
    wanted = ROUNDING_METHODS["gpfq"]().codes(
        jnp.asarray(params["w1"]), statistics(inputs, inputs, False), UNIFORM.project(jnp.asarray(params["w1"]))
    )
    np.testing.assert_array_equal(done.forms["w1"].codes, wanted.codes)


# Experts


def test_experts_by_ragged_dot():
    """Each as if it were alone; one without rows keeps its scale and has the nearest codes."""
    r = np.random.default_rng(0)
    w, x, sizes = r.normal(size=(5, 8, 6)).astype("f4"), r.normal(size=(64, 8)).astype("f4"), [10, 30, 0, 4, 20]
    rule = [lcq.Rule("w", lcq.Uniform(4, per="channel"))]
    method = lcq.Descent(shrink=0.0)  # the rows of an expert are folded in turn, of a plain product in order

    def fn(p, b):
        return lax.ragged_dot(b[0], p["w"], b[1])

    done = lcq.quantize(fn, {"w": jnp.asarray(w)}, [(x, jnp.array(sizes))], rule, method)
    codes = done.forms["w"].dense()
    for e, (a, n) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        if n:
            each = lcq.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w[e])}, [x[a : a + n]], rule, method)
            np.testing.assert_allclose(codes[e], each.forms["w"].dense(), atol=1e-5)
    got, wanted = (lax.ragged_dot(jnp.asarray(x), jnp.asarray(v), jnp.array(sizes)) for v in (codes, w))
    np.testing.assert_allclose(done.records[0].error, ((got - wanted) ** 2).sum() / (wanted**2).sum(), rtol=1e-4)
    assert done.records[0].shape == (5, 64, 8, 6) and done.records[0].rows == 30


def test_experts_choose_how_far_they_believe_their_rows_alone():
    """The share of each is that without the others, and so are its codes."""
    r = np.random.default_rng(0)
    w, x, sizes = r.normal(size=(4, 8, 6)).astype("f4"), r.normal(size=(64, 8)).astype("f4"), [10, 30, 4, 20]
    rule = [lcq.Rule("w", lcq.Uniform(4, per="channel"))]
    batch = x, jnp.array(sizes)
    done = lcq.quantize(lambda p, b: lax.ragged_dot(b[0], p["w"], b[1]), {"w": jnp.asarray(w)}, [batch], rule)
    for e, (a, n) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        alone = lcq.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w[e])}, [x[a : a + n]], rule).forms["w"]
        np.testing.assert_allclose(done.forms["w"].dense()[e], alone.dense(), atol=1e-5)


@pytest.mark.parametrize("recursion", ["blocked", "follow"])
def test_ragged_layers_one_after_another(recursion):
    """Codes are those of the same experts by a product with batch axes, each with rows of its own."""
    params = {"up": draw(3, SIZE, SIZE), "down": draw(3, SIZE, SIZE, seed=1)}
    batches = [draw(3, 10, SIZE, seed=i) for i in (4, 5)]
    sizes = jnp.full(3, 10)

    def ragged(p, x):
        x = jnp.tanh(lax.ragged_dot(x.reshape(-1, SIZE), p["up"], sizes))
        return lax.ragged_dot(x, p["down"], sizes)

    def plain(p, x):
        return jnp.einsum("emk,ekn->emn", jnp.tanh(jnp.einsum("emk,ekn->emn", x, p["up"])), p["down"])

    rules = [lcq.Rule(".*", lcq.Uniform(3, per="channel"), stacked=1)]
    one, two = (quantize(fn, params, batches, rules, bare(recursion=recursion)) for fn in (ragged, plain))
    for name in params:
        np.testing.assert_array_equal(one.forms[name].codes, two.forms[name].codes)
    np.testing.assert_allclose([r.error for r in one.records], [r.error for r in two.records], rtol=1e-4)
