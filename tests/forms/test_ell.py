"""Lists of few weights for each column: the same matrix and products, in any dtype, and what is no list."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Sparse
from lcq.kernels.api import matmul
from tests.kernels.products import form_of, near, product

RNG = np.random.default_rng(0)
FEW = [
    lcq.Prune(fraction=0.1),
    lcq.Prune(fraction=0.15, values=lcq.KMeans(4)),
    lcq.Prune(count=0),
    lcq.PruneGroups(2, fraction=0.1),
]


@pytest.mark.parametrize("scheme", FEW, ids=repr)
@pytest.mark.parametrize("lead", [(), (3,)])
def test_lists_of_few_weights(scheme, lead):
    """Prepacked from either layout they are the same matrix, and so are their products, of few rows and of many."""
    form = form_of(scheme, (*lead, 70, 131 - len(lead) - (scheme.group == 2)))
    dense = np.asarray(form.dense())
    for each in (form, jax.tree.map(jnp.asarray, form.pack()) if not lead else form):
        ready = each.prepack()
        assert ready.shape == dense.shape and ready.places.shape[-2] == (dense != 0).sum(-2).max()
        np.testing.assert_array_equal(ready.dense(), dense)
    for rows in (1, 2, 40):
        x, g = (jnp.asarray(RNG.normal(size=(*lead, rows, n)), jnp.float32) for n in (70, dense.shape[-1]))
        y, pull = jax.vjp(lambda x: product(x, ready), x)
        near(y, x, dense)
        near(pull(g)[0], g, np.swapaxes(dense, -1, -2))


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_list_hides_no_activation_that_is_not_finite(rows, odd):
    """Row 5 is in no list; the dense product meets it in a zero."""
    ready = Sparse(jnp.arange(18).reshape(9, 2) < 2, jnp.ones((9, 2))).prepack()
    y = np.asarray(jax.jit(matmul)(jnp.ones((rows, 9)).at[0, 5].set(odd), ready))
    assert np.isnan(y[0]).all() and (y[1:] == 1).all()


def test_lists_of_bfloat16():
    form = lcq.Prune(fraction=0.1).project(jnp.asarray(RNG.normal(size=(70, 131)), jnp.bfloat16))
    ready = form.prepack()
    assert ready.dtype == ready.values.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ready.dense(), form.dense())
    x = jnp.asarray(RNG.normal(size=(3, 70)), jnp.bfloat16)
    y = matmul(x, ready)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64) @ np.asarray(form.dense(), np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), wide, rtol=2**-8, atol=1e-5)


def test_long_lists_and_traced_forms_are_not_prepacked():
    form = form_of(lcq.Prune(fraction=0.1))
    long = form_of(lcq.Prune(fraction=0.6))
    assert long.prepack() is long
    assert jax.jit(lambda form: form.prepack() is form)(form)
    with pytest.raises(ValueError, match="multiplies codes, got Ell"):
        matmul(jnp.ones((1, 70)), form.prepack(), kernel="words")
    with pytest.raises(ValueError, match="a leaf prepacked for products; save the forms"):
        form.prepack().pack()
