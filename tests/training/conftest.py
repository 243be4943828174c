"""A small real net, and a plain training loop that the integrations are compared with."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lcq
from lcq.examples.data import digits
from lcq.examples.models import MLP


class Problem(NamedTuple):
    """A 64-12-10 net on 256 digits: its function, its start, its data, and what is compressed how."""

    model: Any
    params: Any
    x: Any
    y: Any
    rules: Any

    def loss(self, params):
        logits = self.model.apply({"params": params}, self.x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, self.y).mean()

    def settings(self, **changes):
        """Arguments of `lcq.lc` after the optimizer: C steps at updates 3, 5, 7, ..."""
        return {"rules": self.rules, "mu": lcq.geometric(1e-2, 1.5, steps=20), "every": (3, 2)} | changes

    def tx(self, inner=None, **changes):
        return lcq.lc(inner or optax.sgd(0.1, momentum=0.9), **self.settings(**changes))

    def train(self, tx, params=None, steps=10, donate=False, state=None, gradient=None):
        """The plain loop; fails if it is compiled twice."""
        params = self.params if params is None else params
        step = _training_step(self, tx, donate, gradient)
        fresh = step._cache_size() == 0
        state = tx.init(params) if state is None else state
        for i in range(steps):
            params, state = step(params, state, jnp.int32(i))
        assert not fresh or step._cache_size() == 1
        return params, state

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@functools.lru_cache
def _training_step(problem, tx, donate, gradient):
    def step(params, state, i):
        grads = jax.grad(problem.loss)(params)
        updates, state = tx.update(gradient(grads, i) if gradient else grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1) if donate else ())


@pytest.fixture(scope="session")
def problem():
    split = digits()
    model = MLP((12, 10))
    x, y = jnp.asarray(split.x_train[:256]), jnp.asarray(split.y_train[:256])
    params = model.init(jax.random.key(0), x)["params"]
    rules = [lcq.Rule("dense0/kernel", lcq.Levels((-0.2, 0.0, 0.2))), lcq.Rule("(.*/)?kernel", lcq.Binary())]
    return Problem(model, params, x, y, rules)


@pytest.fixture(scope="session")
def tx(problem):
    """The optimizer of the plain loop."""
    return problem.tx()


@pytest.fixture(scope="session")
def plain(problem, tx):
    """Parameters and state of the plain loop."""
    return problem.train(tx)


def forms_of(opt_state, params):
    """The stored forms by path, their arrays as numpy: what a run ends with."""
    chex.assert_tree_all_finite(params)
    forms = lcq.extract(opt_state, params)
    return {jax.tree_util.keystr(keys): np.asarray(leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(forms)}


@pytest.fixture
def same_theta(plain):
    """Asserts that a run ends with the Theta of the plain loop, bit for bit or to rounding."""

    def check(opt_state, params, exact=True, like=None):
        expected, got = forms_of(*reversed(like or plain)), forms_of(opt_state, params)
        assert list(expected) == list(got)
        for name in expected:
            if exact or expected[name].dtype == np.uint32:
                np.testing.assert_array_equal(got[name], expected[name], err_msg=name)
            else:
                np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6, err_msg=name)

    return check
