"""`lcq.quantize` against its parts: statistics of the nets' own activations in float64 numpy, rounded by the method."""

import copy
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lcq
from lcq.methods import layerwise
from lcq.methods.assembly import Assembly
from lcq.methods.moments import Statistics
from lcq.methods.quantize import METHODS
from lcq.rules import flatten
from lcq.trace import trace

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


def quantize(fn=net, params=None, batches=None, rules=RULES, method="gpfq", search=False, **settings):
    """Without the search, whose compilation is long."""
    whole = problem()
    params, batches = params or whole[0], whole[1] if batches is None else batches
    return lcq.quantize(fn, params, batches, rules, method, search=search, **settings)


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


def test_the_first_product_chooses_the_codes():
    """The second one sees them: its inputs have no say."""
    params, batches = problem()
    first, twice = lambda p, x: x @ p["w1"], lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w1"]
    one, two = (quantize(fn, {"w1": params["w1"]}, batches, RULES) for fn in (first, twice))
    assert [record.path for record in two.records] == ["w1"]
    np.testing.assert_array_equal(one.forms["w1"].codes, two.forms["w1"].codes)


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

    monkeypatch.setattr("lcq.methods.quantize.Assembly", Seen)

    def fn(p, x):
        x = lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["stack"])[0]
        x = (p["left"] @ x.T).T + p["bias"]
        return (x @ p["slices"][:, :SIZE]) * (x @ p["slices"][:, SIZE:])

    square = (SIZE, SIZE)
    params = {"stack": draw(2, *square), "left": draw(*square), "bias": draw(SIZE), "slices": draw(SIZE, 2 * SIZE)}
    done = quantize(fn, params, [draw(30, SIZE)], [lcq.Rule("bias", None), lcq.Rule(".*", UNIFORM)])
    assert [record.path for record in done.records] == ["stack[0]", "stack[1]", "left", "slices", "slices"]
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
    assert sum(isinstance(leaf, lcq.Form) for leaf in flatten(done.forms)[0].values()) == 8


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
    "batches of different shapes": ({"batches": [draw(4, SIZE), draw(5, SIZE)]}, r"equal shapes; .*batch 1.*drop it"),
    "batches of different structure": ({"batches": [(draw(4, SIZE),), draw(4, SIZE)]}, "equal shapes"),
    "an empty batch": ({"batches": [draw(0, SIZE)]}, "at least one example"),
    "an array for batches": ({"batches": draw(4, SIZE)}, r"got one array \[4, 8\]; pass \[batch\]"),
    "a batch that is not a number": (
        {"batches": [draw(30, SIZE), NAN]},
        r"w1: .*in the original net, batch 1, at .*test_quantize\.py.*look at",
    ),
    "inputs that are too large": ({"batches": [draw(30, SIZE) * 1e25]}, "w1: .*too large to square"),
    "a weight that is not a number": ({"params": changed(w2=NAN[:SIZE])}, "w2: wanted finite weights"),
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
        "w1: wanted stacked=0 or 1",
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
        monkeypatch.setattr(layerwise, "_ROWS", rows)
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
