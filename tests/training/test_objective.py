"""What optimizers inside of a wrapper are told of the function that is minimised, against definitions in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.training.augmented_lagrangian import theta

RNG = np.random.default_rng(0)
A = RNG.normal(size=(6, 8))
PARAMS = {"w": jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32), "b": jnp.ones(3)}
OTHER = {"w": jnp.asarray(RNG.normal(size=(2, 4)), jnp.float32), "b": jnp.zeros(3)}
RULES = [lcq.Rule("w", lcq.KMeans(2))]


def loss(params, scale=1.0):
    a = jnp.asarray(A, jnp.float32)
    return scale * (jnp.sum((a @ params["w"].reshape(-1)) ** 2) + jnp.sum(params["b"] ** 3))


def numpy_loss(params):
    w, b = (np.asarray(params[name], np.float64) for name in ("w", "b"))
    slopes = {"w": (2 * A.T @ (A @ w.ravel())).reshape(2, 4), "b": 3 * b**2}
    return np.sum((A @ w.ravel()) ** 2) + np.sum(b**3), slopes


def probe(keep=()):
    """An optimizer that stays where it is, and whose state is what it was told."""

    def init(params):
        return {}

    def update(grads, state, params=None, *, value, grad, value_fn, obj_fn, grad_fn, **extra):
        told = {"grads": grads, "value": value, "grad": grad, "extra": dict(extra)}
        told |= {"value_fn": value_fn(OTHER, scale=1.0), "value_slope": jax.grad(value_fn)(OTHER)}
        told |= {"obj_fn": obj_fn(OTHER), "grad_fn": grad_fn(OTHER, 0)}
        return jax.tree.map(jnp.zeros_like, params), told

    return optax.GradientTransformationExtraArgs(init, update)


def told_of(value_fn=loss):
    value, grad = jax.value_and_grad(loss)(PARAMS)
    grad_fn = jax.grad(lambda w, i: loss(w))
    return grad, {"value": value, "grad": grad, "value_fn": value_fn, "obj_fn": loss, "grad_fn": grad_fn, "more": 5}


def honest(state, params):
    """Value and slopes of L + mu/2 ||w - Delta - lambda/mu||^2 in float64."""
    lagrangian = state.lagrangian
    value, slopes = numpy_loss(params)
    mu = float(lcq.metrics(state)["penalty_weight"])
    w, delta = np.asarray(params["w"], np.float64), np.asarray(theta(lagrangian)[0][0].dense(), np.float64)
    multiplier = lagrangian.multipliers["w"]
    multiplier = 0 if isinstance(multiplier, optax.MaskedNode) else np.asarray(multiplier, np.float64)
    away = w - delta - multiplier / mu
    return value + mu / 2 * np.sum(away**2), slopes | {"w": slopes["w"] + mu * away}


def close(found, wanted):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), found, wanted)


@pytest.mark.parametrize("multipliers", [True, False])
def test_everything_told_is_of_the_sum(multipliers):
    tx = lcq.lc(probe(), RULES, mu=lcq.geometric(3.0, 2.0, steps=4), every=None, multipliers=multipliers)
    state = tx.init(PARAMS)
    state = lcq.training.c_step(lcq.training.c_step(state, OTHER), OTHER)
    grads, extra = told_of()
    _, after = tx.update(grads, state, PARAMS, **extra)
    told = after.inner
    value, slopes = honest(state, PARAMS)
    assert abs(value - numpy_loss(PARAMS)[0]) > 0.1
    close((told["value"], told["grad"], told["grads"]), (value, slopes, slopes))
    value, slopes = honest(state, OTHER)
    close((told["value_fn"], told["obj_fn"]), (value, value))
    close((told["value_slope"], told["grad_fn"]), (slopes, slopes))
    assert told["extra"] == {"more": 5}


@pytest.mark.parametrize(
    "value_fn", [functools.partial(loss, scale=1.0), jax.jit(loss), lambda params, scale=1.0: loss(params, scale)]
)
def test_functions_keep_the_signatures_that_optax_reads(value_fn):
    """optax passes to value_fn those extra arguments that its signature names."""
    inner = optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(8))
    tx = lcq.lc(inner, RULES, mu=1.0, every=None)
    value, grad = jax.value_and_grad(loss)(PARAMS)
    updates, _ = tx.update(grad, tx.init(PARAMS), PARAMS, value=value, grad=grad, value_fn=value_fn, scale=1.0)
    assert np.isfinite(updates["w"]).all()
    with pytest.raises(TypeError, match="not consumed"):
        tx.update(grad, tx.init(PARAMS), PARAMS, value=value, grad=grad, value_fn=value_fn, other=1.0)


def test_a_line_search_keeps_the_value_and_slope_of_the_loss():
    inner = optax.chain(optax.sgd(0.05), optax.scale_by_backtracking_linesearch(20, store_grad=True))
    tx = lcq.lc(inner, RULES, mu=2.0, every=2)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
        close((value, grad), numpy_loss(params))
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = optax.apply_updates(params, updates)
    assert np.isfinite(optax.tree.get(state, "value"))


def test_after_a_projection_a_line_search_has_nothing_to_reuse():
    inner = optax.chain(optax.sgd(0.05), optax.scale_by_backtracking_linesearch(20, store_grad=True))
    tx = lcq.training.iterated_direct(inner, RULES, every=2)
    params, state = PARAMS, tx.init(PARAMS)
    for step in range(4):
        value, grad = optax.value_and_grad_from_state(loss)(params, state=state)
        close((value, grad), numpy_loss(params))
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        params = optax.apply_updates(params, updates)
        assert np.isfinite(optax.tree.get(state, "value")) == (step % 2 == 0)


def test_straight_through_training_tells_of_compressed_weights():
    tx = lcq.training.straight_through_training(probe(), RULES)
    grads, extra = told_of()
    _, after = tx.update(grads, tx.init(PARAMS), PARAMS, **extra)
    told, there = after.inner, lcq.decompress(lcq.compress(OTHER, RULES))
    value, slopes = numpy_loss(there)
    close((told["value_fn"], told["obj_fn"], told["value_slope"], told["grad_fn"]), (value, value, slopes, slopes))
    close((told["value"], told["grad"]), numpy_loss(PARAMS))


REFUSING = {
    "hemp": lambda inner: lcq.hemp(inner, RULES, order=1, small=0),
    "hemp of lc": lambda inner: lcq.hemp(lcq.lc(inner, RULES, mu=1.0, every=2), RULES, order=1, small=0),
    "proximal": lambda inner: lcq.lc(
        lambda eta: inner, RULES, mu=1.0, every=2, learning_rate=0.1, coupling=lambda state, eta: eta
    ),
}
USES = {
    "value": optax.polyak_sgd(0.1),
    "value_fn": optax.chain(optax.sgd(0.1), optax.scale_by_backtracking_linesearch(5)),
    "grad": optax.GradientTransformationExtraArgs(lambda p: None, lambda g, s, p=None, *, grad, **_: (grad, s)),
    "obj_fn": optax.contrib.sophia(0.1),
    "grad_fn": optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.05), opaque_mode=True),
}


@pytest.mark.parametrize("outer", REFUSING)
@pytest.mark.parametrize("key", USES)
def test_what_cannot_be_told_honestly_is_refused_by_name_where_it_is_used(outer, key):
    grads, extra = told_of()
    del extra["more"]
    tx = REFUSING[outer](USES[key])
    wanted = {"grad_fn": ["grad_fn"], "value_fn": ["value", "grad", "value_fn"]}.get(key, list(extra))
    given = {name: extra[name] for name in wanted}
    used = "(value|grad|value_fn)" if key == "value_fn" else key
    with pytest.raises(ValueError, match=rf"no {used}=, got one that uses it: .*(optax.adam|coupling='gradient')"):
        jax.eval_shape(lambda: tx.update(grads, tx.init(PARAMS), PARAMS, **given))


@pytest.mark.parametrize("outer", REFUSING)
def test_what_is_not_used_may_pass(outer):
    """Every member of a chain is given all extra arguments: one behind may want them."""
    grads, extra = told_of()
    inner = optax.chain(optax.identity(), optax.trace(0.5))
    tx = optax.chain(REFUSING[outer](inner), optax.contrib.reduce_on_plateau())
    jax.eval_shape(lambda: tx.update(grads, tx.init(PARAMS), PARAMS, **extra))


def test_a_proximal_coupling_of_an_optimizer_that_wants_values_is_refused_at_construction():
    for inner in (optax.polyak_sgd, lambda eta: optax.chain(optax.sgd(eta), optax.contrib.reduce_on_plateau())):
        with pytest.raises(ValueError, match="linear in the gradient"):
            lcq.lc(inner, RULES, mu=1.0, every=2, learning_rate=0.1, coupling="proximal")


def test_values_of_other_dtypes_and_numbers():
    tx = lcq.lc(optax.polyak_sgd(0.1), RULES, mu=1.0, every=None)
    for value in (2, 2.5, np.float32(2.5), jnp.bfloat16(2.5)):
        updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, value=value)
        assert updates["w"].dtype == jnp.float32 and np.isfinite(updates["w"]).all()
