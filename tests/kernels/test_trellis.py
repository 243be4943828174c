"""Products with weights on a trellis equal those with the dense array, and jaxprs keep none of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Trellis
from lcq.forms.state_values import table_of
from lcq.kernels.api import matmul

RNG = np.random.default_rng(0)


def form_of(shape, length, width, memory, code="computed", scales=(1, 1)):
    steps = jnp.asarray(RNG.integers(0, 1 << width, shape), jnp.uint8)
    scale = jnp.asarray(RNG.normal(size=(*(1,) * (len(shape) - 2), *scales)), jnp.float32)
    table = jnp.asarray(table_of(memory, code)) if code == "learned" else None
    return Trellis(steps, scale, table, width=width, memory=memory, code=code, along=(-2,), length=length)


CASES = {
    "one piece": form_of((70, 130), 70, 2, 12),
    "pieces and channels": form_of((64, 130), 32, 2, 12, scales=(1, 130)),
    "groups": form_of((64, 6), 64, 2, 9, scales=(4, 6)),
    "groups of pieces": form_of((96, 6), 16, 1, 9, scales=(3, 1)),
    "groups that words do not hold": form_of((60, 6), 60, 2, 9, scales=(5, 6)),
    "3 bits": form_of((50, 6), 50, 3, 12, "gaussian"),
    "learned": form_of((33, 6), 33, 4, 8, "learned"),
}


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_dense_array(name, rows):
    form = CASES[name]
    x = RNG.normal(size=(rows, form.shape[0])).astype(np.float32)
    dense = np.asarray(form.dense(), np.float64)
    y = jax.jit(matmul)(jnp.asarray(x), form.prepack())
    size = np.abs(x).sum(1, keepdims=True) * np.abs(dense).max()
    assert (np.abs(np.asarray(y, np.float64) - x @ dense) <= 64 * 2.0**-24 * size).all()


def test_packed_functions_and_stacked_layers():
    params = {"w": jnp.asarray(RNG.normal(size=(2, 32, 32)), jnp.float32)}
    forms = lcq.compress(params, [lcq.Rule("w", lcq.Trellis(2, memory=6, per="channel"), stacked=1)])

    def run(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    x = jnp.asarray(RNG.normal(size=(1, 32)), jnp.float32)
    wanted = run(lcq.decompress(forms), x)
    packed = lcq.packed(run)
    np.testing.assert_allclose(jax.jit(packed)(forms, x), wanted, rtol=1e-4, atol=1e-5)
    ready = packed.prepack(forms, x)
    assert isinstance(ready["w"], lcq.forms.TrellisColumns)
    np.testing.assert_allclose(jax.jit(packed)(ready, x), wanted, rtol=1e-4, atol=1e-5)


def test_layers_that_share_scales():
    steps, scale = RNG.integers(0, 4, (4, 32, 6)), RNG.normal(size=(2, 1, 6))
    how = {"width": 2, "memory": 6, "along": (-2,), "length": 32}
    form = lcq.forms.Trellis(jnp.asarray(steps, jnp.uint8), scale=jnp.asarray(scale, jnp.float32), **how)
    np.testing.assert_array_equal(form.prepack().dense(), form.dense())


def test_gradients_and_more_rows_by_vmap():
    form = CASES["pieces and channels"].prepack()
    x, dense = jnp.asarray(RNG.normal(size=(3, 64)), jnp.float32), form.dense()
    np.testing.assert_allclose(jax.vmap(lambda x: matmul(x, form))(x), x @ dense, rtol=1e-4, atol=1e-3)
    for rows in (1, 3):
        slope = jax.grad(lambda x: matmul(x, form).sum())(x[:rows])
        np.testing.assert_allclose(slope, jnp.broadcast_to(dense.sum(1), (rows, 64)), rtol=1e-4, atol=1e-3)


def test_what_is_on_no_trellis_is_refused():
    with pytest.raises(
        ValueError, match="the kernel 'trellis' multiplies weights on a trellis, prepacked, got Columns"
    ):
        matmul(jnp.ones((1, 4)), lcq.KMeans(2).project(jnp.ones((4, 2))), kernel="trellis")
