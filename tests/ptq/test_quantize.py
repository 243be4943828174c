"""`lcq.quantize` against its parts: statistics of the nets' own activations in float64 numpy, rounded by the method."""

import copy
import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.ptq import gathering
from lcq.ptq.batches import checked_batches
from lcq.ptq.leaf_assembly import Assembly
from lcq.ptq.quantize import METHODS
from lcq.ptq.statistics import Statistics
from lcq.tracing.param_flow import trace
from lcq.tree.paths import flatten

SIZE = 8
UNIFORM = lcq.Uniform(3, per="channel")
RULES = [lcq.Rule("w.", UNIFORM)]


def draw(*shape, seed=0):
    return np.random.default_rng(seed + sum(shape)).normal(size=shape).astype(np.float32)


def net(p, x):
    """Two layers of eight, the first with a bias."""
    return jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]


def problem():
    """Parameters, and two batches of correlated inputs off zero."""
    params = {"w1": draw(SIZE, SIZE, seed=1), "b1": draw(SIZE), "w2": draw(SIZE, SIZE, seed=2)}
    mix = draw(SIZE, SIZE, seed=3) + 1
    return params, [(draw(30, SIZE, seed=i) + 0.5) @ mix / 4 for i in (4, 5)]


def quantize(fn=net, params=None, batches=None, rules=RULES, method="gpfq", search=False, shrink=0.0, **settings):
    """Without the search, whose compilation is long, and without the choice of how far statistics are believed."""
    whole = problem()
    params, batches = params or whole[0], whole[1] if batches is None else batches
    return lcq.quantize(fn, params, batches, rules, method, search=search, shrink=shrink, **settings)


@functools.cache
def standard():
    return quantize()


def dense(done):
    return jax.tree.map(np.asarray, lcq.decompress(done.forms))


def statistics(x, y, centred):
    x, y = x.astype(np.float64), y.astype(np.float64)
    means = x.mean(0), y.mean(0)
    if centred:
        x, y = x - means[0], y - means[1]
    drift = y.T @ (x - y)
    return jax.tree.map(jnp.float32, Statistics(y.T @ y, drift if drift.any() else None, None, *means, len(x)))


# Codes


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("method", ["gpfq", "qronos"])
def test_codes_are_those_of_the_method_on_plain_statistics(method, centred):
    """Both layers; the inputs of the second are those of each net. The bias takes up what its mean has moved."""
    params, batches = problem()
    done = standard() if (method, centred) == ("gpfq", True) else quantize(method=method, centred=centred)
    x = y = np.concatenate(batches)
    for name in ("w1", "w2"):
        takes = centred and name == "w1"
        form = UNIFORM.project(jnp.asarray(params[name]))
        wanted = METHODS[method].codes(jnp.asarray(params[name]), statistics(x, y, takes), form)
        got = done.forms[name]
        np.testing.assert_array_equal(got.codes, wanted.codes)
        np.testing.assert_array_equal(got.dense(), wanted.dense())
        bias = params["b1"] + (x.mean(0) @ params[name] - y.mean(0) @ got.dense() if takes else 0)
        if name == "w1":
            np.testing.assert_allclose(done.forms["b1"], bias, atol=1e-5)
            x, y = np.tanh(x @ params[name] + params["b1"]), np.tanh(y @ got.dense() + bias)
    assert [record.centred for record in done.records] == [centred, False]


def test_following_the_inputs_gives_the_same_codes():
    blocked, followed = standard(), quantize(recursion="follow")
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(followed.forms[name].codes, blocked.forms[name].codes)
    np.testing.assert_allclose(followed.forms["b1"], blocked.forms["b1"], atol=1e-5)
    assert [record.recursion for record in (*blocked.records, *followed.records)] == ["blocked"] * 2 + ["follow"] * 2


def test_search_finds_a_better_scale_and_gpfq_is_better_than_nearest():
    found = {method: quantize(method=method, search=True).records for method in ("gpfq", "nearest")}
    fixed = standard().records
    assert all(record.factor != 1 for record in found["gpfq"]) and all(record.factor == 1 for record in fixed)
    assert found["gpfq"][0].error < fixed[0].error and found["gpfq"][1].error < fixed[1].error
    params = {"w1": draw(24, 24, seed=1) / 2, "b1": draw(24), "w2": draw(24, 24, seed=2)}
    batches = [(draw(60, 4, seed=i) @ draw(4, 24, seed=3) + 0.3 * draw(60, 24, seed=i)) / 5 for i in (4, 5)]
    found = {m: quantize(net, params, batches, method=m, search=True).records for m in ("gpfq", "nearest")}
    assert found["gpfq"][1].error < 0.7 * found["nearest"][1].error, found


def test_fixed_tables_are_not_searched():
    done = quantize(rules=[lcq.Rule("w.", lcq.Levels((-1.0, 0.0, 1.0)))], method="nearest", search=True)
    np.testing.assert_array_equal(done.forms["w1"].dense(), np.clip(np.round(problem()[0]["w1"]), -1, 1))
    assert [(record.factor, record.scale) for record in done.records] == [(1, 1)] * 2


def test_methods_that_draw_need_a_key():
    key = jax.random.key(1)
    one, two, other = (quantize(method="spfq", key=k).forms for k in (key, key, jax.random.key(2)))
    np.testing.assert_array_equal(one["w2"].codes, two["w2"].codes)
    assert (one["w2"].codes != other["w2"].codes).any() and (one["w1"].codes != other["w1"].codes).any()
    with pytest.raises(ValueError, match="key"):
        quantize(method="spfq")


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
    wanted = METHODS["gpfq"].codes(jnp.asarray(w), statistics(rows, rows, False), UNIFORM.project(jnp.asarray(w)))
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
    done = quantize(branches, plain, [(one, two)], RULES, centred=False)
    both = quantize(net, plain, [np.concatenate([one, two])], RULES, centred=False)
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
    q1 = METHODS["gpfq"].codes(
        jnp.asarray(params["w1"]), statistics(inputs, inputs, False), UNIFORM.project(jnp.asarray(params["w1"]))
    )
    np.testing.assert_array_equal(done.forms["w1"].codes, q1.codes)
    x, y = states(w1, w2), states(np.asarray(q1.dense(), np.float64), w2)
    q2 = METHODS["gpfq"].codes(
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
    wanted = METHODS["gpfq"].codes(
        jnp.asarray(params["w1"]), statistics(inputs, inputs, False), UNIFORM.project(jnp.asarray(params["w1"]))
    )
    np.testing.assert_array_equal(done.forms["w1"].codes, wanted.codes)


# Experts


def test_experts_by_ragged_dot():
    """Each as if it were alone; one without rows keeps its scale and has the nearest codes."""
    r = np.random.default_rng(0)
    w, x, sizes = r.normal(size=(5, 8, 6)).astype("f4"), r.normal(size=(64, 8)).astype("f4"), [10, 30, 0, 4, 20]
    rule = [lcq.Rule("w", lcq.Uniform(4, per="channel"))]

    def fn(p, b):
        return lax.ragged_dot(b[0], p["w"], b[1])

    done = lcq.quantize(fn, {"w": jnp.asarray(w)}, [(x, jnp.array(sizes))], rule)
    codes = done.forms["w"].dense()
    for e, (a, n) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        if n:
            each = lcq.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w[e])}, [x[a : a + n]], rule)
            np.testing.assert_allclose(codes[e], each.forms["w"].dense(), atol=1e-5)
    got, wanted = (lax.ragged_dot(jnp.asarray(x), jnp.asarray(v), jnp.array(sizes)) for v in (codes, w))
    np.testing.assert_allclose(done.records[0].error, ((got - wanted) ** 2).sum() / (wanted**2).sum(), rtol=1e-4)
    assert done.records[0].shape == (5, 64, 8, 6) and done.records[0].rows == 30


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
    one, two = (quantize(fn, params, batches, rules, recursion=recursion) for fn in (ragged, plain))
    for name in params:
        np.testing.assert_array_equal(one.forms[name].codes, two.forms[name].codes)
    np.testing.assert_allclose([r.error for r in one.records], [r.error for r in two.records], rtol=1e-4)


# What comes out


def test_records():
    """Of a net with an input that is always zero."""
    params, batches = problem()
    for batch in batches:
        batch[:, 3] = 0
    done = quantize(batches=batches)
    first, second = done.records
    assert (first.path, first.shape, second.path) == ("w1", (1, 30, SIZE, SIZE), "w2")
    assert (first.method, first.recursion, first.dead, second.dead) == (str(lcq.GPFQ()), "blocked", 1, 0)
    np.testing.assert_allclose(first.scale, np.median(done.forms["w1"].scale), rtol=1e-6)
    x = np.concatenate(batches)
    y, got = net(params, x), net(dense(done), x)
    np.testing.assert_allclose(second.error, ((y - got) ** 2).sum() / (y**2).sum(), rtol=1e-4)
    assert all(record.seconds > 0 and isinstance(record.error, float) for record in done.records)


def test_forms_are_what_the_walk_has_used(monkeypatch):
    """Bit for bit: a stack, a left operand and slices."""
    used = {}

    class Seen(Assembly):
        def put(self, product, form):
            super().put(product, form)
            used[product.path] = np.array(self.dense)

    monkeypatch.setattr(sys.modules["lcq.ptq.quantize"], "Assembly", Seen)

    def fn(p, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]
        x = (p["left"] @ x.T).T + p["bias"]
        return (x @ p["slices"][:, :SIZE]) * (x @ p["slices"][:, SIZE:])

    square = (SIZE, SIZE)
    params = {"stack": draw(2, *square), "left": draw(*square), "bias": draw(SIZE), "slices": draw(SIZE, 2 * SIZE)}
    done = quantize(fn, params, [draw(30, SIZE)], [lcq.Rule("bias", None), lcq.Rule(".*", UNIFORM)])
    assert [record.path for record in done.records] == [
        "stack[0]",
        "stack[1]",
        "left",
        "slices[:, 0:8]",
        "slices[:, 8:16]",
    ]
    for path, leaf in used.items():
        np.testing.assert_array_equal(done.forms[path].dense(), leaf)
    assert len(used) == 3 and (done.forms["bias"] != params["bias"]).all()


def test_saved_and_loaded(tmp_path):
    forms = standard().forms
    lcq.save(tmp_path / "net.lcq", forms)
    loaded = lcq.decompress(lcq.load(tmp_path / "net.lcq"))
    for name, leaf in dense(standard()).items():
        np.testing.assert_array_equal(loaded[name], leaf)


def test_nothing_given_is_changed_and_progress_is_told():
    params, batches = problem()
    before = copy.deepcopy((params, batches))
    calls = []
    done = quantize(params=params, batches=batches, progress=lambda *call: calls.append(call))
    jax.tree.map(np.testing.assert_array_equal, (params, batches), before)
    assert [call[:2] for call in calls] == [(1, 2), (2, 2)]
    assert tuple(call[2] for call in calls) == done.records


# What shares an alphabet


@pytest.mark.parametrize(("per", "blocks"), [(None, (1, 1)), ("channel", (6, 1)), (4, (6, 2))])
def test_alphabets_are_the_products(per, blocks):
    """Of a weight on the left: a row is a neuron."""
    scheme, w = lcq.Uniform(3, per=per), draw(6, 8)
    done = quantize(lambda p, x: p["w"] @ x.T, {"w": w}, [draw(5, 8)], [lcq.Rule("w", scheme)], "nearest")
    np.testing.assert_array_equal(done.forms["w"].dense(), scheme.project(jnp.asarray(w.T)).dense().T)
    assert done.forms["w"].scale.shape == blocks


@pytest.mark.parametrize(
    ("per", "stacked", "blocks"), [(None, 0, (1, 1, 1)), (None, 1, (3, 1, 1)), ("channel", 0, (3, 1, 4))]
)
def test_alphabets_of_experts(per, stacked, blocks):
    """One product of three experts: one alphabet for all, one each, one for each neuron."""
    w, scheme = draw(3, 8, 4), lcq.Uniform(3, per=per)
    rule = lcq.Rule("w", scheme, stacked=stacked)
    done = quantize(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), {"w": w}, [draw(3, 5, 8)], [rule], "nearest")
    assert done.forms["w"].scale.shape == blocks
    alone = lcq.compress({"w": w}, [lcq.Rule("w", scheme, stacked=1 if per else stacked)])["w"]
    np.testing.assert_allclose(done.forms["w"].dense(), alone.dense(), rtol=1e-6)


# Leaves beside


def test_biases_are_cast_after_they_have_moved():
    done = quantize(rules=[*RULES, lcq.Rule("b1", lcq.Cast("bfloat16"))])
    moved = standard().forms["b1"]
    assert (
        done.forms["b1"].values.dtype == jnp.bfloat16 and (done.forms["w1"].codes == standard().forms["w1"].codes).all()
    )
    np.testing.assert_array_equal(done.forms["b1"].values, np.asarray(moved).astype(jnp.bfloat16))


def test_forms_that_are_given_stay():
    """And their dense arrays are the net that is kept close to."""
    params, batches = problem()
    forms = lcq.compress(params, [lcq.Rule("w1", lcq.KMeans(4)), lcq.Rule("b1", lcq.Cast())])
    done = quantize(params=forms, batches=batches, rules=[lcq.Rule("w2", UNIFORM)])
    assert done.forms["w1"] is forms["w1"] and done.forms["b1"] is forms["b1"]
    expected = quantize(params=lcq.decompress(forms), batches=batches, rules=[lcq.Rule("w2", UNIFORM)])
    np.testing.assert_array_equal(done.forms["w2"].codes, expected.forms["w2"].codes)
    with pytest.raises(ValueError, match="earlier rules take w1"):
        quantize(params=forms, rules=[lcq.Rule("w1", UNIFORM), lcq.Rule("w2", UNIFORM)])


def test_a_bias_that_is_given_as_a_form_does_not_move():
    forms = lcq.compress(problem()[0], [lcq.Rule("b1", lcq.Cast())])
    done = quantize(params=forms)
    assert done.forms["b1"] is forms["b1"] and not any(record.centred for record in done.records)


def test_tied_embedding():
    """A lookup cannot be followed; it is rounded to nearest before, or left out, or is an error."""

    def fn(p, tokens):
        return jnp.tanh(p["embed"][tokens] @ p["w"]) @ p["embed"].T

    params = {"embed": draw(6, SIZE), "w": draw(SIZE, SIZE, seed=1)}
    batches = [np.random.default_rng(i).integers(6, size=40) for i in range(2)]
    rows, w = lcq.Rule("embed", lcq.Uniform(4, per=(1, 0))), lcq.Rule("w", UNIFORM)
    with pytest.raises(ValueError, match=r"embed: .* -> gather at .*nearest"):
        quantize(fn, params, batches, [w, lcq.Rule("embed", UNIFORM)])
    done = quantize(fn, params, batches, [w], nearest=[rows])
    assert [record.path for record in done.records] == ["w"]
    np.testing.assert_array_equal(done.forms["embed"].codes, lcq.compress(params, [rows, w])["embed"].codes)
    y, got = (np.concatenate([embed[b] for b in batches]) for embed in (params["embed"], done.forms["embed"].dense()))
    wanted = lcq.GPFQ().codes(
        jnp.asarray(params["w"]), statistics(y, got, False), UNIFORM.project(jnp.asarray(params["w"]))
    )
    np.testing.assert_array_equal(done.forms["w"].codes, wanted.codes)
    left_out = quantize(fn, params, batches, [lcq.Rule("embed", None), lcq.Rule(".*", UNIFORM)])
    np.testing.assert_array_equal(left_out.forms["embed"], params["embed"])


class ConvNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(SIZE, (1, 1), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        return nn.Dense(SIZE, dtype=jnp.bfloat16)(x)


def test_concatenated_kernels():
    """flax's own LSTM concatenates its kernels in the step; each is rounded by what it sees."""
    cell = nn.RNN(nn.OptimizedLSTMCell(8))
    x = jnp.asarray(draw(4, 6, 5))
    params = cell.init(jax.random.key(0), x)
    done = lcq.quantize(cell.apply, params, [x], [lcq.Rule("(.*/)?kernel", lcq.Uniform(4, per="channel"))])
    y, z = cell.apply(params, x), cell.apply(lcq.decompress(done.forms), x)
    assert ((y - z) ** 2).sum() / (y**2).sum() < 0.05
    assert sum(isinstance(leaf, lcq.forms.Form) for leaf in flatten(done.forms)[0].values()) == 8


def test_concatenated_kernels_are_rounded_as_one():
    """Columns are rounded one by one: [W1 W2] as W1 and W2 give the same codes as the leaf that holds both."""
    params, batches = problem()
    apart = {"w1": params["w1"][:, :3], "w2": params["w1"][:, 3:]}
    done = quantize(lambda p, x: x @ jnp.concatenate([p["w1"], p["w2"]], 1), apart, batches)
    whole = quantize(lambda p, x: x @ p["w"], {"w": params["w1"]}, batches, [lcq.Rule("w", UNIFORM)])
    both = dense(done)
    np.testing.assert_array_equal(np.concatenate([both["w1"], both["w2"]], 1), dense(whole)["w"])


def test_flax_variables():
    """A batch norm's mean moves against the result; the dense layer computes in bfloat16."""
    model, x = ConvNorm(), draw(12, 2, 2, SIZE) + 1
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda a: 0.5 + 0.2 * draw(*a.shape), shapes)
    done = quantize(model.apply, variables, [x[:6], x[6:]], [lcq.Rule(".*kernel", UNIFORM)])
    rows = x.reshape(-1, SIZE)
    old, new = (tree["params"]["Conv_0"]["kernel"][0, 0] for tree in (variables, lcq.decompress(done.forms)))
    mean = variables["batch_stats"]["BatchNorm_0"]["mean"] - (rows.mean(0) @ old - rows.mean(0) @ new)
    np.testing.assert_allclose(done.forms["batch_stats"]["BatchNorm_0"]["mean"], mean, atol=1e-5)
    y, got = (np.asarray(model.apply(v, x), np.float32) for v in (variables, lcq.decompress(done.forms)))
    assert ((y - got) ** 2).mean() < 0.1 * (y**2).mean()
    assert jax.tree.structure(lcq.decompress(done.forms)) == jax.tree.structure(variables)


# On a mesh


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batches_and_kernels(kind):
    """Rows over one axis of a mesh, neurons over the other: the same codes, and leaves where they were."""
    params, batches = problem()
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    specs = {"w1": P(None, "model"), "b1": P("model"), "w2": P(None, None)}
    if kind is AxisType.Auto:
        specs["w2"] = P("model", None)
    params = {path: jax.device_put(leaf, NamedSharding(mesh, specs[path])) for path, leaf in params.items()}
    batches = [jax.device_put(batch, NamedSharding(mesh, P("data"))) for batch in batches]
    with jax.set_mesh(mesh):
        done = quantize(params=params, batches=batches)
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(done.forms[name].codes, standard().forms[name].codes)
    np.testing.assert_allclose(done.forms["b1"], standard().forms["b1"], atol=1e-5)
    assert done.forms["b1"].sharding == params["b1"].sharding


def test_sharded_experts():
    """Experts over one axis of a mesh, rows over the other; explicit axes, of which not everything can be reshaped."""
    params, batch, rules = {"w1": draw(4, SIZE, SIZE)}, draw(4, 16, SIZE), [lcq.Rule("w1", lcq.Uniform(3))]

    def fn(p, x):
        return jnp.einsum("ecd,edf->ecf", x, p["w1"])

    expected = quantize(fn, params, [batch], rules, "nearest")
    mesh = jax.make_mesh((4, 2), ("model", "data"), axis_types=(AxisType.Explicit,) * 2)
    params = {"w1": jax.device_put(params["w1"], NamedSharding(mesh, P("model", None, None)))}
    done = quantize(fn, params, [jax.device_put(batch, NamedSharding(mesh, P("model", "data")))], rules, "nearest")
    np.testing.assert_array_equal(done.forms["w1"].codes, expected.forms["w1"].codes)
    np.testing.assert_allclose(done.forms["w1"].scale, expected.forms["w1"].scale, rtol=1e-5)


# Errors


def changed(**leaves):
    return {**problem()[0], **leaves}


NAN = np.full((30, SIZE), np.nan, np.float32)

ERRORS = {  # settings, what the message says
    "no batch": ({"batches": []}, "at least one batch"),
    "batches of different structure": ({"batches": [(draw(4, SIZE),), draw(4, SIZE)]}, "batch 1: .*structure; .*drop"),
    "an empty batch": ({"batches": [draw(0, SIZE)]}, "batch 0: expected at least one example"),
    "a text for batches": ({"batches": "text"}, r"an iterable of batches, got str 'text'; pass \[batch\]"),
    "a dict for batches": ({"batches": {"x": draw(4, SIZE)}}, r"an iterable of batches, got dict .*; pass \[batch\]"),
    "a text in a batch": (
        {"batches": [draw(4, SIZE), {"x": draw(4, SIZE), "name": "dog"}]},
        "batch 1, leaf name: expected an array, got str 'dog'; leave it out",
    ),
    "a batch of texts": ({"batches": [np.array(["a", "b"])]}, "batch 0: expected an array, got ndarray"),
    "None for a batch": ({"batches": [draw(4, SIZE), None]}, "batch 1: expected a tree of arrays, got None"),
    "a shape for a batch": (
        {"batches": [jax.ShapeDtypeStruct((4, SIZE), "f4")]},
        "batch 0: expected an array, got ShapeD",
    ),
    "a function among the parameters": (
        {"params": changed(act=jax.nn.relu)},
        "^act: expected an array, .* close over it",
    ),
    "a text among the parameters": (
        {"params": changed(name="net")},
        "^name: expected an array, .* got str; leave it out",
    ),
    "a shape among the parameters": (
        {"params": changed(w1=jax.ShapeDtypeStruct((SIZE, SIZE), "f4"))},
        "^w1: expected an array, whose values are rounded, got ShapeDtypeStruct",
    ),
    "an array for batches": ({"batches": draw(4, SIZE)}, r"got one array \[4, 8\]; pass \[batch\]"),
    "a batch that is not a number": (
        {"batches": [draw(30, SIZE), NAN]},
        r"w1: .*in the original net, batch 1, at .*test_quantize\.py.*look at",
    ),
    "inputs that are too large": ({"batches": [draw(30, SIZE) * 1e25]}, "w1: .*too large to square"),
    "a weight that is not a number": ({"params": changed(w2=NAN[:SIZE])}, "w2: expected finite weights"),
    "a bias that is not a number": ({"params": changed(b1=NAN[0])}, "w2: .*in the original net, batch 0"),
    "an overflow in the original net alone": (
        {
            "fn": lambda p, x: (x * (jnp.exp(p["s"]) * 1e-30)) @ p["w1"],
            "params": {"w1": draw(SIZE, SIZE), "s": np.float32(88.74)},
            "rules": [lcq.Rule("w1", UNIFORM), lcq.Rule("s", lcq.Cast("bfloat16"))],
        },
        "w1: .*in the original net, batch 0",
    ),
    "follow what needs statistics": ({"method": "gptq", "recursion": "follow"}, "only GPFQ follows inputs"),
    "joint": ({"rules": [lcq.Rule("w.", UNIFORM, joint=True)]}, "w1, w2: .*drop joint=True"),
    "a tuple of block lengths": ({"rules": [lcq.Rule("w.", lcq.Uniform(3, per=(1, 0)))]}, r"per=\(1, 0\)"),
    "groups that do not divide": ({"rules": [lcq.Rule("w1", lcq.Uniform(3, per=3))]}, "w1: .*do not divide 8"),
    "two stacked axes": (
        {"rules": [lcq.Rule("w.", lcq.Uniform(3), stacked=2)]},
        "w1: expected stacked=0 or 1",
    ),
    "an unknown method": ({"method": "magic"}, "gpfq, .*got 'magic'"),
    "a rule for nothing": ({"rules": [lcq.Rule("v", UNIFORM)]}, "matches no leaf"),
    "a bias": ({"rules": [lcq.Rule(".*", UNIFORM)]}, "b1: .* -> add at"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    settings, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        quantize(**settings)


def test_leaves_that_are_no_arrays():
    params, (x, _) = problem()
    with pytest.raises(ValueError, match=r"^act: expected an array, a form or a number, got .* close over"):
        quantize(lambda p, x: p["act"](x @ p["w1"]), {"w1": params["w1"], "act": jax.nn.relu}, [x], RULES)


def test_arrays_of_the_other_byte_order_are_batches():
    _params, batches = problem()
    swapped = quantize(batches=[batch.astype(">f4") for batch in batches])
    np.testing.assert_array_equal(swapped.forms["w2"].codes, standard().forms["w2"].codes)


def test_records_name_the_layer():
    """Stacked on any axis, and slices of a fused kernel; each name is the index of its part."""
    stack = draw(SIZE, 3, SIZE)

    def fn(p, x):
        return lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, jnp.moveaxis(p["kernel"], 1, 0))[0]

    rules = [lcq.Rule("kernel", UNIFORM)]
    records = quantize(fn, {"kernel": stack}, [draw(30, SIZE)], rules).records
    assert [record.path for record in records] == [f"kernel[:, {i}]" for i in range(3)]

    def fused(p, x):
        q, k, v = jnp.split(p["kernel"], [2, 10], 1)
        return (x @ q).sum() + (x @ k[:, ::2]).sum() + (x @ k[:, 1::2]).sum() + (x @ v).sum()

    records = quantize(fused, {"kernel": draw(SIZE, 12)}, [draw(30, SIZE)], rules).records
    assert [r.path for r in records] == [f"kernel[:, {part}]" for part in ("0:2", "2:9:2", "3:10:2", "10:12")]


def test_none_for_batches():
    with pytest.raises(ValueError, match=r"an iterable of batches, got None; pass \[batch\]"):
        checked_batches(None)


def test_paths_of_params_in_lists():
    done = quantize(lambda p, x: x @ p[0], [draw(SIZE, SIZE)], rules=[lcq.Rule("0", UNIFORM)])
    assert isinstance(done.forms, list) and list(flatten(done.forms)[0]) == ["0"]


def test_images_taken_part_by_part_make_no_difference(monkeypatch):
    rng = np.random.default_rng(5)
    params = {"a": jnp.asarray(rng.normal(size=(3, 3, 2, 8)), jnp.float32), "b": jnp.zeros(8)}
    params["c"] = jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)
    batches = list(jnp.asarray(rng.normal(size=(2, 12, 7, 7, 2)) + 3, jnp.float32))

    def net(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        x = jax.nn.relu(jax.lax.conv_general_dilated(x, params["a"], (1, 1), "SAME", dimension_numbers=numbers))
        x = x + params["b"]
        two = {"dimension_numbers": numbers, "feature_group_count": 2}
        return jax.lax.conv_general_dilated(x, params["c"], (2, 2), "VALID", **two)

    done = []
    for rows in (1 << 30, 100):
        monkeypatch.setattr(gathering, "_ROWS", rows)
        done.append(lcq.quantize(net, params, batches, [lcq.Rule("a|c", lcq.Uniform(3, per="channel"))], "qronos"))
    for one, two in zip(*(jax.tree.leaves(d.forms) for d in done), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    products = trace(net, params, batches[0], ["a", "c"]).products
    assert [p.parts(100) for p in products] == [4, 1]  # 12 x 49 rows; 12 x 9
    assert products[0].cut(batches[0], 4).shape == (4, 3, 7, 7, 2)


def test_the_search_tries_the_scale_of_the_scheme_too():
    params, rules = {"w": jnp.ones((1, 1))}, [lcq.Rule("w", lcq.Binary())]
    done = lcq.quantize(lambda p, x: x @ p["w"], params, [jnp.ones((4, 1))], rules)
    assert done.forms["w"].dense() == 1.0 and done.records[0].factor == 1.0
    rng = np.random.default_rng(6)
    params = {"w": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)), jnp.float32)
    rules = [lcq.Rule("w", lcq.Ternary(per="channel"))]
    errors = [
        lcq.quantize(lambda p, x: x @ p["w"], params, [x], rules, search=search).records[0].error
        for search in (True, False)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("size", [1e-15, 1e18])
def test_errors_of_huge_and_tiny_results_are_finite(size):
    rng = np.random.default_rng(7)
    w, x = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(20, 6)).astype(np.float32)
    rules = [lcq.Rule("w", lcq.Uniform(3, per="channel"))]
    one, other = (
        lcq.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w * s)}, [jnp.asarray(x)], rules).records[0].error
        for s in (1, size)
    )
    assert other == pytest.approx(one, rel=0.2) and one > 0


def test_the_search_of_scales_tries_the_mirrored_table():
    """A neuron whose data ask for the other sign gets it, against the exact residual of both signs."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(256, 24)) * np.exp(-np.arange(24) / 4)).astype(np.float32)
    w, scheme = rng.normal(size=(24, 12)).astype(np.float32), lcq.Uniform(2, per="channel")
    done = lcq.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, [x], [lcq.Rule("w", scheme)], "nearest")
    plain = np.asarray(scheme.project(jnp.asarray(w)).scale)[0]
    found = np.asarray(done.forms["w"].scale)[0]
    assert (plain * found < 0).any() and 0.5 < done.records[0].factor < 2
    wide = x.astype(np.float64) - x.astype(np.float64).mean(0)
    for j in range(12):
        losses = {}
        for a in np.outer([1, -1], 1.15 ** np.arange(-4, 5)).ravel() * plain[j]:
            q = a * np.clip(np.round(w[:, j] / a), -2, 1)
            losses[a] = ((wide @ (w[:, j] - q)) ** 2).sum()
        best = min(losses, key=losses.get)
        assert best * found[j] > 0 or min(losses.values()) > 0.98 * min(
            v for a, v in losses.items() if a * found[j] > 0
        )


def square(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())


def test_an_expert_that_sees_no_token():
    """Its scale is the scheme's, and the record says that it had no data."""
    r = np.random.default_rng(1)
    w, x, route = r.normal(size=(4, 16, 24)).astype("f4"), r.normal(size=(64, 16)).astype("f4"), r.integers(0, 3, 64)

    def moe(p, b):
        return jnp.einsum("etd,edh->eth", jnp.einsum("te,td->etd", jax.nn.one_hot(b[1], 4), b[0]), p["w"]).sum(0)

    s = lcq.Uniform(4, per="channel")
    done = lcq.quantize(moe, {"w": jnp.asarray(w)}, [(x, route)], [lcq.Rule("w", s)], "gpfq")
    plain = lcq.compress({"w": jnp.asarray(w)}, [lcq.Rule("w", s, stacked=1)])["w"].dense()
    np.testing.assert_allclose(done.forms["w"].dense()[3], plain[3], rtol=1e-6)
    assert done.records[0].silent == (3,) and done.records[0].dead == 16


def test_a_dead_channel_one_example_and_dead_groups_keep_their_scales():
    w = draw(SIZE, 3)
    for x in (draw(1, SIZE), np.ones((30, SIZE), np.float32) * 1.3):  # no variation beside a bias
        params = {"w": w, "b": np.zeros(3, np.float32)}
        done = lcq.quantize(lambda p, x: x @ p["w"] + p["b"], params, [x], [lcq.Rule("w", UNIFORM)], "nearest")
        np.testing.assert_allclose(done.forms["w"].scale, UNIFORM.project(jnp.asarray(w)).scale, rtol=1e-6)
        assert done.records[0].silent == (0,) and done.records[0].factor == 1
    x, scheme = draw(40, SIZE), lcq.Uniform(3, per=4)
    x[:, 4:] = 0
    done = lcq.quantize(lambda p, x: x @ p["w"], {"w": w}, [x], [lcq.Rule("w", scheme)], "descent")
    given, found = scheme.project(jnp.asarray(w)).scale, done.forms["w"].scale
    np.testing.assert_allclose(found[1], given[1], rtol=1e-6)
    assert (np.asarray(found[0]) != np.asarray(given[0])).any() and done.records[0].silent == ()


def test_damping_too_small_for_the_data():
    """More damping until there is a root, which the record says; an error that names leaf and remedy if not allowed."""
    r = np.random.default_rng(0)
    x = (r.normal(size=(40, 4)) @ r.normal(size=(4, 32))).astype("f4")
    params, rule = (
        {"w": jnp.asarray(r.normal(size=(32, 8)).astype("f4"))},
        [lcq.Rule("w", lcq.Uniform(4, per="channel"))],
    )

    def fn(p, x):
        return x @ p["w"]

    for method in (lcq.GPTQ(damp=1e-8), lcq.Qronos(damp=1e-8)):
        done = lcq.quantize(fn, params, [x], rule, method, search=False, shrink=0.0)
        assert done.records[0].error < 0.01 and 1e-6 < done.records[0].damp < 1e-2, done.records[0]
    with pytest.raises(ValueError, match=r"w: expected H \+ damp I with a root at .*test_quantize.*raise damp="):
        lcq.quantize(fn, params, [x], rule, lcq.GPTQ(1e-8, most=1e-8), search=False, shrink=0.0)


@pytest.mark.parametrize("method", ["gpfq", "descent"])
def test_fewer_samples_than_inputs(method):
    """On new data not much worse than plain compress, which the record does not deny; as the paper has it, worse."""
    r = np.random.default_rng(11)
    n, m = 64, 32
    a, w = r.normal(size=(n, n)) * 0.4 + np.eye(n), r.normal(size=(n, m)).astype("f4")
    x, new = ((r.normal(size=(k, n)) @ a).astype("f4") for k in (16, 2000))
    params, rule, fn = {"w": jnp.asarray(w)}, [lcq.Rule("w", lcq.Uniform(3, per="channel"))], lambda p, x: x @ p["w"]

    def held(forms):
        return square(new @ np.asarray(forms["w"].dense()), new @ w)

    plain, done = held(lcq.compress(params, rule)), lcq.quantize(fn, params, [x], rule, method, search=False)
    record = done.records[0]
    assert held(done.forms) < 1.15 * plain and record.held_out > 0.5 * plain, (held(done.forms), plain, record)
    assert record.shrink > 0.5
    bare = lcq.quantize(fn, params, [x], rule, method, search=False, shrink=0.0)
    assert held(bare.forms) > 1.3 * plain and bare.records[0].held_out is None


def test_following_inputs_chooses_the_same_shrinkage():
    """With a bias, and rows of two batches that do not make equal folds."""
    batches = [batch[:many] for batch, many in zip(problem()[1], (13, 9), strict=True)]
    one, two = (quantize(batches=batches, shrink=None, recursion=r) for r in ("blocked", "follow"))
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(one.forms[name].codes, two.forms[name].codes)
    np.testing.assert_allclose(one.forms["b1"], two.forms["b1"], atol=1e-5)
    for a, b in zip(one.records, two.records, strict=True):
        np.testing.assert_allclose([a.shrink, a.held_out], [b.shrink, b.held_out], rtol=1e-3)
    with pytest.raises(ValueError, match="shrink between 0 and 1"):
        quantize(shrink=1.5)


def test_the_default_is_descent():
    params, batches = problem()
    done = lcq.quantize(net, params, batches, RULES, search=False, shrink=0.0)
    assert done.records[0].method.startswith("Descent(")
