"""One product: its codebook, its scale by the exact residual, and how far its statistics are believed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from tests.ptq.small_net import SIZE, UNIFORM, bare, draw, net, problem, quantize, standard


def test_search_finds_a_better_scale_and_gpfq_is_better_than_nearest():
    found = {method: quantize(method=bare(method, search=True)).records for method in ("gpfq", "rtn")}
    fixed = standard().records
    assert all(record.factor != 1 for record in found["gpfq"]) and all(record.factor == 1 for record in fixed)
    assert found["gpfq"][0].error < fixed[0].error and found["gpfq"][1].error < fixed[1].error
    params = {"w1": draw(24, 24, seed=1) / 2, "b1": draw(24), "w2": draw(24, 24, seed=2)}
    batches = [(draw(60, 4, seed=i) @ draw(4, 24, seed=3) + 0.3 * draw(60, 24, seed=i)) / 5 for i in (4, 5)]
    found = {m: quantize(net, params, batches, method=bare(m, search=True)).records for m in ("gpfq", "rtn")}
    assert found["gpfq"][1].error < 0.7 * found["rtn"][1].error, found


def test_fixed_tables_are_not_searched():
    done = quantize(rules=[lcq.Rule("w.", lcq.Levels((-1.0, 0.0, 1.0)))], method=bare("rtn", search=True))
    np.testing.assert_array_equal(done.forms["w1"].dense(), np.clip(np.round(problem()[0]["w1"]), -1, 1))
    assert [(record.factor, record.scale) for record in done.records] == [(1, 1)] * 2


@pytest.mark.parametrize(("per", "blocks"), [(None, (1, 1)), ("channel", (6, 1)), (4, (6, 2))])
def test_alphabets_are_the_products(per, blocks):
    """Of a weight on the left: a row is a neuron."""
    scheme, w = lcq.Uniform(3, per=per), draw(6, 8)
    done = quantize(lambda p, x: p["w"] @ x.T, {"w": w}, [draw(5, 8)], [lcq.Rule("w", scheme)], bare("rtn"))
    np.testing.assert_array_equal(done.forms["w"].dense(), scheme.project(jnp.asarray(w.T)).dense().T)
    assert done.forms["w"].scale.shape == blocks


@pytest.mark.parametrize(
    ("per", "stacked", "blocks"), [(None, 0, (1, 1, 1)), (None, 1, (3, 1, 1)), ("channel", 0, (3, 1, 4))]
)
def test_alphabets_of_experts(per, stacked, blocks):
    """One product of three experts: one codebook for all, one each, one for each neuron."""
    w, scheme = draw(3, 8, 4), lcq.Uniform(3, per=per)
    rule = lcq.Rule("w", scheme, stacked=stacked)
    done = quantize(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), {"w": w}, [draw(3, 5, 8)], [rule], bare("rtn"))
    assert done.forms["w"].scale.shape == blocks
    alone = lcq.compress({"w": w}, [lcq.Rule("w", scheme, stacked=1 if per else stacked)])["w"]
    np.testing.assert_allclose(done.forms["w"].dense(), alone.dense(), rtol=1e-6)


def test_the_search_tries_the_scale_of_the_scheme_too():
    params, rules = {"w": jnp.ones((1, 1))}, [lcq.Rule("w", lcq.Binary())]
    done = lcq.quantize(lambda p, x: x @ p["w"], params, [jnp.ones((4, 1))], rules)
    assert done.forms["w"].dense() == 1.0 and done.records[0].factor == 1.0
    rng = np.random.default_rng(6)
    params = {"w": jnp.asarray(rng.normal(size=(12, 5)), jnp.float32)}
    x = jnp.asarray(rng.normal(size=(60, 12)) @ rng.normal(size=(12, 12)), jnp.float32)
    rules = [lcq.Rule("w", lcq.Ternary(per="channel"))]
    errors = [
        lcq.quantize(lambda p, x: x @ p["w"], params, [x], rules, lcq.Descent(search=search)).records[0].error
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
    done = lcq.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, [x], [lcq.Rule("w", scheme)], "rtn")
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
        done = lcq.quantize(lambda p, x: x @ p["w"] + p["b"], params, [x], [lcq.Rule("w", UNIFORM)], "rtn")
        np.testing.assert_allclose(done.forms["w"].scale, UNIFORM.project(jnp.asarray(w)).scale, rtol=1e-6)
        assert done.records[0].silent == (0,) and done.records[0].factor == 1
    x, scheme = draw(40, SIZE), lcq.Uniform(3, per=4)
    x[:, 4:] = 0
    done = lcq.quantize(lambda p, x: x @ p["w"], {"w": w}, [x], [lcq.Rule("w", scheme)], "descent")
    given, found = scheme.project(jnp.asarray(w)).scale, done.forms["w"].scale
    np.testing.assert_allclose(found[1], given[1], rtol=1e-6)
    assert (np.asarray(found[0]) != np.asarray(given[0])).any() and done.records[0].silent == ()


def test_a_dead_channel_of_a_depthwise_convolution_keeps_its_scale():
    w, x = draw(9, 1, 4), draw(5, 12, 4).cumsum(1)
    x[..., 2] = 0

    def conv(p, x):
        numbers = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers, feature_group_count=4)

    done = lcq.quantize(conv, {"w": w}, [x], [lcq.Rule("w", UNIFORM)], lcq.ptq.RTN(shrink=0.0))
    given, found = (np.abs(np.asarray(form.scale)).ravel() for form in (UNIFORM.project(w), done.forms["w"]))
    np.testing.assert_allclose(found[2], given[2], rtol=1e-6)
    assert not np.allclose(found, given) and done.records[0].silent == (2,)


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

    for method in (bare("gptq", damping=1e-8), bare("qronos", damping=1e-8)):
        done = lcq.quantize(fn, params, [x], rule, method)
        assert done.records[0].error < 0.01 and 1e-6 < done.records[0].damping < 1e-2, done.records[0]
    with pytest.raises(ValueError, match=r"w: expected H \+ delta I with a root at .*test_layer.*raise damping="):
        lcq.quantize(fn, params, [x], rule, bare("gptq", damping=1e-8, max_damping=1e-8))


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

    plain, done = held(lcq.compress(params, rule)), lcq.quantize(fn, params, [x], rule, bare(method, shrink=None))
    record = done.records[0]
    assert held(done.forms) < 1.15 * plain and record.held_out > 0.5 * plain, (held(done.forms), plain, record)
    assert record.shrink > 0.5
    plainly = lcq.quantize(fn, params, [x], rule, bare(method))
    assert held(plainly.forms) > 1.3 * plain and plainly.records[0].held_out is None


def test_following_inputs_chooses_the_same_shrinkage():
    """With a bias, and rows of two batches that do not make equal folds."""
    batches = [batch[:many] for batch, many in zip(problem()[1], (13, 9), strict=True)]
    one, two = (quantize(batches=batches, method=bare(shrink=None, recursion=r)) for r in ("blocked", "follow"))
    for name in ("w1", "w2"):
        np.testing.assert_array_equal(one.forms[name].codes, two.forms[name].codes)
    np.testing.assert_allclose(one.forms["b1"], two.forms["b1"], atol=1e-5)
    for a, b in zip(one.records, two.records, strict=True):
        np.testing.assert_allclose([a.shrink, a.held_out], [b.shrink, b.held_out], rtol=1e-3)
    with pytest.raises(ValueError, match="shrink between 0 and 1"):
        bare(shrink=1.5)
