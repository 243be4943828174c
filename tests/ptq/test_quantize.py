"""`lcq.quantize` against its parts: statistics of the nets' own activations in float64 numpy, rounded by the method."""

import copy
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
from lcq.ptq.rounding import ROUNDING_METHODS
from lcq.tracing.param_flow import trace
from lcq.tree.paths import flatten
from tests.ptq.small_net import RULES, SIZE, UNIFORM, bare, dense, draw, net, problem, quantize, standard, statistics


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("method", ["gpfq", "qronos"])
def test_codes_are_those_of_the_method_on_plain_statistics(method, centred):
    """Both layers; the inputs of the second are those of each net. The bias takes up what its mean has moved."""
    params, batches = problem()
    done = standard() if (method, centred) == ("gpfq", True) else quantize(method=bare(method), bias_correction=centred)
    x = y = np.concatenate(batches)
    for name in ("w1", "w2"):
        takes = centred and name == "w1"
        form = UNIFORM.project(jnp.asarray(params[name]))
        wanted = ROUNDING_METHODS[method]().codes(jnp.asarray(params[name]), statistics(x, y, takes), form)
        got = done.forms[name]
        np.testing.assert_array_equal(got.codes, wanted.codes)
        np.testing.assert_array_equal(got.dense(), wanted.dense())
        bias = params["b1"] + (x.mean(0) @ params[name] - y.mean(0) @ got.dense() if takes else 0)
        if name == "w1":
            np.testing.assert_allclose(done.forms["b1"], bias, atol=1e-5)
            x, y = np.tanh(x @ params[name] + params["b1"]), np.tanh(y @ got.dense() + bias)
    assert [record.bias_correction for record in done.records] == [centred, False]


def test_following_the_inputs_gives_the_same_codes():
    blocked, followed = standard(), quantize(method=bare(recursion="follow"))
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(followed.forms[name].codes, blocked.forms[name].codes)
    np.testing.assert_allclose(followed.forms["b1"], blocked.forms["b1"], atol=1e-5)
    assert [record.recursion for record in (*blocked.records, *followed.records)] == ["blocked"] * 2 + ["follow"] * 2


def test_methods_that_draw_need_a_seed():
    one, two, other = (quantize(method=bare("spfq", seed=seed)).forms for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["w2"].codes, two["w2"].codes)
    assert (one["w2"].codes != other["w2"].codes).any() and (one["w1"].codes != other["w1"].codes).any()
    with pytest.raises(ValueError, match="key"):
        quantize(method=bare("spfq"))


# What comes out


def test_records():
    """Of a net with an input that is always zero."""
    params, batches = problem()
    for batch in batches:
        batch[:, 3] = 0
    done = quantize(batches=batches)
    first, second = done.records
    assert (first.path, first.shape, second.path) == ("w1", (1, 30, SIZE, SIZE), "w2")
    assert (first.method, first.recursion, first.dead, second.dead) == (str(bare()), "blocked", 1, 0)
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
    assert done.forms["b1"] is forms["b1"] and not any(record.bias_correction for record in done.records)


def test_tied_embedding():
    """A lookup cannot be followed; it is rounded to nearest before, or left out, or is an error."""

    def fn(p, tokens):
        return jnp.tanh(p["embed"][tokens] @ p["w"]) @ p["embed"].T

    params = {"embed": draw(6, SIZE), "w": draw(SIZE, SIZE, seed=1)}
    batches = [np.random.default_rng(i).integers(6, size=40) for i in range(2)]
    rows, w = lcq.Rule("embed", lcq.Uniform(4, per=(1, 0))), lcq.Rule("w", UNIFORM)
    with pytest.raises(ValueError, match=r"embed: .* -> gather at .*nearest"):
        quantize(fn, params, batches, [w, lcq.Rule("embed", UNIFORM)])
    done = quantize(fn, params, batches, [w], rtn=[rows])
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


def test_biases_of_concatenated_kernels():
    """They take up what the mean of their own kernel's part has moved, b + mean(h) (W - Q); codes are those of kernels
    that are not concatenated."""
    x, h = draw(50, 5), draw(50, 8, seed=1) + 0.5
    carry = (jnp.zeros((50, 8)), jnp.asarray(h))
    cells = nn.OptimizedLSTMCell(8), nn.LSTMCell(8)
    params = jax.tree.map(np.array, cells[0].init(jax.random.key(0), carry, jnp.asarray(x)))
    rules = [lcq.Rule("(.*/)?kernel", lcq.Uniform(2, per="channel"))]
    done, apart = (quantize(lambda p, b, cell=cell: cell.apply(p, *b), params, [(carry, x)], rules) for cell in cells)
    for one, other in zip(jax.tree.leaves(done.forms), jax.tree.leaves(apart.forms), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    for gate in "ifgo":
        old, new = (tree["params"][f"h{gate}"] for tree in (params, lcq.decompress(done.forms)))
        change = h.mean(0, dtype=np.float64) @ (old["kernel"].astype(np.float64) - np.asarray(new["kernel"]))
        np.testing.assert_allclose(new["bias"], old["bias"] + change, atol=1e-6)
        assert np.abs(change).max() > 0.01
    assert {record.path[7:9]: record.bias_correction for record in done.records} == {
        f"{side}{gate}": side == "h" for side in "hi" for gate in "ifgo"
    }


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

    expected = quantize(fn, params, [batch], rules, bare("rtn"))
    mesh = jax.make_mesh((4, 2), ("model", "data"), axis_types=(AxisType.Explicit,) * 2)
    params = {"w1": jax.device_put(params["w1"], NamedSharding(mesh, P("model", None, None)))}
    done = quantize(fn, params, [jax.device_put(batch, NamedSharding(mesh, P("model", "data")))], rules, bare("rtn"))
    np.testing.assert_array_equal(done.forms["w1"].codes, expected.forms["w1"].codes)
    np.testing.assert_allclose(done.forms["w1"].scale, expected.forms["w1"].scale, rtol=1e-5)


# Errors


def changed(**leaves):
    return {**problem()[0], **leaves}


NAN = np.full((30, SIZE), np.nan, np.float32)


ERRORS = {  # settings, what the message says
    "no batch": ({"batches": []}, "at least one batch"),
    "batches of different structure": (
        {"batches": [(draw(4, SIZE),), draw(4, SIZE)]},
        "batch 1: .*structure, got .*; drop",
    ),
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
        r"w1: .*in the original net, batch 1, at .*small_net\.py.*look at",
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

    done, rule = [], lcq.Rule("a|c", lcq.Uniform(3, per="channel"))
    for rows in (1 << 30, 100):
        monkeypatch.setattr(gathering, "_ROWS", rows)
        done.append(lcq.quantize(net, params, batches, [rule], lcq.Qronos(shrink=0.0)))  # folds are cut in parts
    for one, two in zip(*(jax.tree.leaves(d.forms) for d in done), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
    products = trace(net, params, batches[0], ["a", "c"]).products
    assert [p.parts(100) for p in products] == [4, 1]  # 12 x 49 rows; 12 x 9
    assert products[0].cut(batches[0], 4).shape == (4, 3, 7, 7, 2)


def square(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(((a - b) ** 2).sum() / (b**2).sum())


def test_the_default_is_descent():
    params, batches = problem()
    done = lcq.quantize(net, params, batches, RULES)
    assert done.records[0].method == "Descent()"
