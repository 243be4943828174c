"""Masks through equations, against what each position is made of: worked out by numpy on the mask alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lcq.ptq.two_stream import walk
from lcq.tracing.param_flow import trace

X = np.random.default_rng(0).normal(size=(3, 8, 4)).astype(np.float32)
M = np.array([[1] * 8, [1] * 5 + [0] * 3, [0, 1, 1, 0, 0, 0, 0, 0]], bool)
"""Of the first two axes."""

ORDER = np.random.default_rng(1).permutation(24)


def counted(fn, x=X, mask=M):
    """(which rows of fn(x) [..., d] count when a parameter multiplies them, where the mask was lost)."""
    d = jax.eval_shape(fn, x).shape[-1]
    params = {"w": jnp.ones((d, 2))}

    def net(p, x):
        return jnp.einsum("...d,de->...e", fn(x), p["w"])

    program = trace(net, params, x, ["w"], counts=[jnp.asarray(mask)])
    for visit in walk(program, params, dict(params), [(jnp.asarray(x), [jnp.asarray(mask)])]):
        counts = visit.uses[0].inputs[0][0].counts
        visit.finish()
    rows = None if counts is None else np.broadcast_to(counts, program.products[0].y.shape)[..., 0]
    return rows, program.products[0].lost


def attention(x):
    a = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x))
    return jnp.einsum("bts,bsd->btd", a, x)


def convolved(x, kernel=3, **settings):
    settings = {"window_strides": (1,), "padding": "SAME", "dimension_numbers": ("NWC", "WIO", "NWC")} | settings
    return lax.conv_general_dilated(x, jnp.ones((kernel, 4, 4)), **settings)


def experts(x):
    """Rows sorted by a number of theirs, and put back."""
    rows = x.reshape(-1, 4)
    order = jnp.argsort(rows[:, 0])
    return jnp.zeros_like(rows).at[order].set(jnp.tanh(rows[order])).reshape(x.shape)


def by_number(x):
    rows = x.reshape(-1, 4)
    return rows[jnp.argsort(rows[:, 0])]


def any_of(mask, *axes):
    return mask.any(axes)


def every(mask, fill):
    return np.concatenate([np.full((3, 1), fill), mask], 1)


CASES = {  # fn, what counts
    "elementwise": (lambda x: jax.nn.gelu(x) * 2 + 1, M),
    "normalised": (lambda x: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True)), M),
    "transposed": (lambda x: x.transpose(1, 0, 2), M.T),
    "merged": (lambda x: x.reshape(-1, 4), M.reshape(-1)),
    "split again": (lambda x: x.reshape(24, 4).reshape(3, 2, 4, 4), M.reshape(3, 2, 4)),
    "heads": (lambda x: x.reshape(3, 8, 2, 2).transpose(0, 2, 1, 3), np.stack([M, M], 1)),
    "patches": (lambda x: x.reshape(3, 4, 8), None),
    "sliced": (lambda x: x[1:, 1::2], M[1:, 1::2]),
    "one position": (lambda x: x[:, 0], M[:, 0]),
    "reversed": (lambda x: x[:, ::-1], M[:, ::-1]),
    "half of the features, turned": (lambda x: jnp.concatenate([-x[..., 2:], x[..., :2]], -1), M),
    "split features": (lambda x: jnp.split(x, 2, -1)[1], M),
    "a class token": (lambda x: jnp.concatenate([jnp.ones((3, 1, 4)), x], 1), every(M, True)),
    "shifted": (lambda x: jnp.pad(x, ((0, 0), (1, 0), (0, 0))), every(M, False)),
    "rolled": (lambda x: jnp.roll(x, 2, 1), np.roll(M, 2, 1)),
    "padded features": (lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 3))), M),
    "summed over positions": (lambda x: x.sum(1), any_of(M, 1)),
    "greatest of examples": (lambda x: x.max(0), any_of(M, 0)),
    "running sum": (lambda x: jnp.cumsum(x, 1), M),
    "masked": (lambda x: jnp.where(x.sum(-1, keepdims=True) > 0, x, 0), M),
    "broadcast": (lambda x: jnp.broadcast_to(x[:, :, None], (3, 8, 5, 4)), np.repeat(M[:, :, None], 5, 2)),
    "attention": (attention, M),
    "scores": (lambda x: jnp.einsum("btd,bsd->bts", x, x)[..., None], M[:, :, None] & M[:, None]),
    "a lookup": (lambda x: jnp.ones((9, 6))[(x[..., 0] > 0).astype(int)], M),
    "rows picked": (lambda x: x.reshape(24, 4)[ORDER], M.reshape(-1)[ORDER]),
    "rows along an axis": (
        lambda x: jnp.take_along_axis(x, jnp.asarray(ORDER[:15].reshape(3, 5, 1) % 8), 1),
        np.take_along_axis(M, ORDER[:15].reshape(3, 5) % 8, 1),
    ),
    "sorted by a number of theirs": (by_number, M.reshape(-1)[np.argsort(X.reshape(-1, 4)[:, 0])]),
    "sorted and put back": (experts, M),
    "sums of segments": (
        lambda x: jax.ops.segment_sum(x.reshape(24, 4), jnp.arange(24) // 4, 6),
        any_of(M.reshape(6, 4), 1),
    ),
    "from a place that is computed": (
        lambda x: lax.dynamic_slice(x, (0, jnp.argmax(x[0, :1, 0]) + 3, 0), (3, 4, 4)),
        M[:, 3:7],
    ),
    "written into a buffer": (
        lambda x: lax.dynamic_update_slice(jnp.zeros((3, 10, 4)), x, (0, 1, 0)),
        np.pad(M, ((0, 0), (1, 1))),
    ),
    "the largest features": (lambda x: lax.top_k(x, 2)[0], M),
    "convolved": (convolved, M),
    "causal": (lambda x: convolved(x, padding=[(4, 0)], kernel=5), M),
    "inner windows": (lambda x: convolved(x, padding="VALID"), M[:, 1:-1]),
    "every second": (lambda x: convolved(x, window_strides=(2,)), M[:, ::2]),
    "windows side by side": (
        lambda x: convolved(x, 2, window_strides=(2,)),
        any_of(M.reshape(3, 4, 2), 2),
    ),
    "dilated": (lambda x: convolved(x, rhs_dilation=(2,)), M),
    "stretched": (lambda x: convolved(x, 2, lhs_dilation=(2,), padding=[(1, 1)]), np.repeat(M, 2, 1)),
    "features first": (
        lambda x: convolved(x.swapaxes(1, 2), dimension_numbers=("NCW", "WIO", "NCW")).swapaxes(1, 2),
        M,
    ),
    "pooled": (
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 1), (1, 2, 1), "VALID"),
        any_of(M.reshape(3, 4, 2), 2),
    ),
    "in calls": (jax.jit(jax.checkpoint(lambda x: jax.nn.relu(x.swapaxes(0, 1)))), M.T),
    "step by step": (
        lambda x: lax.scan(lambda c, x: (c, jnp.tanh(x)), x[:, 0], x.swapaxes(0, 1))[1],
        M.T,
    ),
    "carried": (lambda x: lax.scan(lambda c, x: (jnp.tanh(c + x), None), x[:, 0], x.swapaxes(0, 1))[0], M.any(1)),
    "carried from the end": (
        lambda x: lax.scan(lambda c, x: (jnp.tanh(c + x), c + x), x[:, 0] * 0, x.swapaxes(0, 1), reverse=True)[1],
        M.T,
    ),
    "carried past the padding": (
        lambda x: lax.scan(
            lambda c, x: (jnp.where(x[:, :1] > 0, jnp.tanh(c + x), c), None), jnp.zeros((3, 4)), x.swapaxes(0, 1)
        )[0],
        M.any(1),
    ),
    "ragged": (lambda x: lax.ragged_dot(x.reshape(24, 4), jnp.ones((2, 4, 3)), jnp.array([10, 14])), M.reshape(-1)),
    "stacked": (lambda x: jnp.stack([x, jnp.ones_like(x)]), np.stack([M, M])),
    "unstacked": (lambda x: jnp.unstack(x, axis=1)[3], M[:, 3]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_counts(case):
    fn, wanted = CASES[case]
    rows, lost = counted(fn)
    if case == "patches":
        np.testing.assert_array_equal(rows, any_of(M.reshape(3, 4, 2), 2))
        assert "dot_general at" in lost  # an input that does not count is beside one that does
    else:
        assert rows.shape == wanted.shape and lost == ""
        np.testing.assert_array_equal(rows, wanted)


LOST = {
    "in a while": (lambda x: lax.while_loop(lambda x: x.sum() < 0, lambda x: x + 1, x), "while at"),
    "in a cond": (lambda x: lax.cond(x.sum() < 0, lambda x: x + 1, lambda x: x, x), "cond at"),
    "transformed": (lambda x: jnp.fft.fft(x, axis=1).real, "fft"),
    "mixed over positions": (lambda x: x.swapaxes(1, 2), "dot_general at"),
}


@pytest.mark.parametrize("case", LOST)
def test_where_it_is_lost(case):
    fn, where = LOST[case]
    _, lost = counted(fn)
    assert lost.startswith(where) and (".py:" in lost or " at" not in where)


def test_nothing_is_traced_without_a_mask():
    def net(p, x):
        return attention(x) @ p["w"]

    program = trace(net, {"w": jnp.ones((4, 2))}, X, ["w"])
    masked = trace(net, {"w": jnp.ones((4, 2))}, X, ["w"], counts=[jnp.asarray(M)])
    assert len(program.jaxpr.eqns) < len(masked.jaxpr.eqns)
    assert len(program.jaxpr.invars) + 1 == len(masked.jaxpr.invars)
    assert not any(var.aval.dtype == bool for eqn in program.jaxpr.eqns for var in eqn.outvars)
