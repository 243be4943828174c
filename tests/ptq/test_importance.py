"""diag(H) against inputs that numpy squares, and what schemes make of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def test_dense_layers_and_batches():
    def net(params, x):
        return jax.nn.relu(x @ params["a"]) @ params["b"]

    params, batches = {"a": normal(3, 4), "b": normal(4, 2)}, [normal(5, 3), normal(5, 3)]
    found = lcq.ptq.curvature(net, params, batches, [lcq.Rule("a|b", lcq.KMeans(2))])
    x = np.concatenate(batches).astype(np.float64)
    hidden = np.maximum(x @ np.asarray(params["a"], np.float64), 0)
    np.testing.assert_allclose(found["a"], np.broadcast_to((x**2).mean(0)[:, None], (3, 4)), rtol=1e-5)
    np.testing.assert_allclose(found["b"], np.broadcast_to((hidden**2).mean(0)[:, None], (4, 2)), rtol=1e-5)


def test_a_stack_and_a_transposed_leaf():
    def net(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"])
        return jnp.einsum("bi,oi->bo", x, params["out"])

    params, x = {"stack": normal(2, 3, 3), "out": normal(4, 3)}, normal(6, 3)
    found = lcq.ptq.curvature(net, params, [x], [lcq.Rule(".*", lcq.Binary())])
    value = np.asarray(x, np.float64)
    for i in range(2):
        np.testing.assert_allclose(found["stack"][i], np.tile((value**2).mean(0)[:, None], 3), rtol=1e-5)
        value = np.tanh(value @ np.asarray(params["stack"][i], np.float64))
    np.testing.assert_allclose(found["out"], np.tile((value**2).mean(0), (4, 1)), rtol=1e-5)


def test_leaves_in_two_products_get_the_sum():
    def net(params, x):
        return (x @ params["w"]) @ params["w"]

    w, x = normal(3, 3), normal(7, 3)
    found = lcq.ptq.curvature(net, {"w": w}, [x], [lcq.Rule("w", lcq.Binary())])["w"]
    value = np.asarray(x, np.float64)
    after = value @ np.asarray(w, np.float64)
    np.testing.assert_allclose(found, np.tile(((value**2).mean(0) + (after**2).mean(0))[:, None], 3), rtol=1e-5)


def test_weighted_compression_makes_less_error_at_the_output():
    x = normal(200, 6) * jnp.array([5.0, 4.0, 1.0, 0.3, 0.1, 0.1])
    params, rules = {"w": normal(6, 8)}, [lcq.Rule("w", lcq.KMeans(3))]

    def net(params, x):
        return x @ params["w"]

    importance = lcq.ptq.curvature(net, params, [x], rules)
    plain, weighted = (lcq.decompress(lcq.compress(params, rules, importance=h)) for h in (None, importance))
    errors = [float(((net(params, x) - net(p, x)) ** 2).sum()) for p in (plain, weighted)]
    assert errors[1] < 0.9 * errors[0]


def test_bad_input_is_named():
    def net(params, x):
        return x @ params["w"]

    params, rules = {"w": normal(3, 2), "b": normal(2)}, [lcq.Rule("w", lcq.Binary())]
    with pytest.raises(ValueError, match="at least one batch"):
        lcq.ptq.curvature(net, params, [], rules)
    with pytest.raises(ValueError, match="b: expected importances of leaves that a rule compresses"):
        lcq.compress(params, rules, importance={"b": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"w: .*broadcast"):
        lcq.compress(params, rules, importance={"w": jnp.ones((4, 2))})


def test_joint_leaves_may_have_an_importance_for_some():
    params = {"a": jnp.array([0.0, 1.0]), "b": jnp.array([1.0, 4.0])}
    rules = [lcq.Rule("a|b", lcq.KMeans(1), joint=True)]
    level = lcq.compress(params, rules, importance={"b": jnp.array([0.0, 2.0])})["a"].levels
    np.testing.assert_allclose(np.ravel(level), [(0 + 1 + 2 * 4) / 4], rtol=1e-6)
