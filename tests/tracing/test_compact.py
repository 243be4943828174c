"""Compact arrays through changes of layout, against the arrays themselves through the same equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.tracing import compact

MOVES = {
    "transpose": lambda a: a.transpose(2, 0, 1),
    "merged": lambda a: a.reshape(2, 24),
    "split": lambda a: a.reshape(2, 4, 2, 3),
    "another order of blocks": lambda a: a.reshape(4, 2, 6),
    "one axis more": lambda a: a[:, None],
    "broadcast": lambda a: lax.broadcast_in_dim(a, (2, 5, 4, 6), (0, 2, 3)),
    "squeezed": lambda a: lax.squeeze(a[:1], (0,)),
    "reversed": lambda a: a[:, ::-1],
    "sliced": lambda a: a[:, 1:4:2, 2:],
    "parts": lambda a: jnp.split(a, [1, 3], axis=1),
    "dynamic": lambda a: lax.dynamic_slice(a, (0, 9, 1), (2, 3, 4)),
    "stopped": lax.stop_gradient,
}
DEPENDS = [(2, 4, 6), (1, 4, 6), (2, 1, 1), (1, 1, 6), (1, 1, 1)]


@pytest.mark.parametrize("shape", DEPENDS)
@pytest.mark.parametrize("move", MOVES)
def test_moves(move, shape):
    a = np.random.default_rng(0).integers(0, 99, shape)
    function, current = MOVES[move], (2, 4, 6)
    array = jnp.asarray(np.broadcast_to(a, current))
    wanted = function(array)
    closed = jax.make_jaxpr(function)(array)
    made = [a]
    for eqn in closed.jaxpr.eqns:  # one after another, each on the one before
        rest = [getattr(var, "val", None) for var in eqn.invars[1:]]
        if eqn.primitive.name in ("jit", "pjit"):
            pytest.skip("a call")
        made = compact.moved(eqn, made[0], tuple(eqn.invars[0].aval.shape), rest)
    for one, full in zip(made, wanted if isinstance(wanted, list) else [wanted], strict=True):
        np.testing.assert_array_equal(np.broadcast_to(one, full.shape), full)


@pytest.mark.parametrize("config", [((0, 0, 0), (1, 2, 0)), ((1, 0, 1), (0, -1, 0)), ((-1, 1, 2), (0, 0, 0))])
def test_padded(config):
    a = np.arange(1, 16).reshape(3, 5)
    eqn = jax.make_jaxpr(lambda a: lax.pad(a, 0, config))(jnp.asarray(a)).jaxpr.eqns[0]
    np.testing.assert_array_equal(compact.padded(eqn, a, (3, 5), 0), lax.pad(jnp.asarray(a), 0, config))
    thin = np.arange(1, 6).reshape(1, 5)
    whole = np.broadcast_to(thin, (3, 5))
    padded = np.broadcast_to(compact.padded(eqn, thin, (3, 5), 0), eqn.outvars[0].aval.shape)
    np.testing.assert_array_equal(padded, lax.pad(jnp.asarray(whole), 0, config))


def test_joined_and_shrunk():
    parts = [np.array([[1, 2, 3]]), np.array([[7]])]
    made = compact.joined(parts, [(4, 3), (4, 2)], 1)
    assert made.tolist() == [[1, 2, 3, 7, 7]]
    assert compact.stacked([np.array([[1]]), np.array([[2]])], (4, 3), 0).shape == (2, 1, 1)
    assert compact.shrunk(np.array([[1, 2], [1, 2]])).tolist() == [[1, 2]]
    assert compact.shrunk(np.full((2, 2), 3)).shape == (1, 1)


@pytest.mark.parametrize(("before", "after"), [((0, 3), (3, 0)), ((2, 0), (0,)), ((0,), (5, 0)), ((4, 0), (0, 8, 3))])
def test_reshapes_of_nothing(before, after):
    eqn = jax.make_jaxpr(lambda a: lax.reshape(a, after))(jnp.zeros(before)).jaxpr.eqns[0]
    for shape in (before, tuple(min(n, 1) for n in before)):
        (made,) = compact.moved(eqn, np.zeros(shape), before, [])
        assert np.broadcast_to(made, after).shape == after
