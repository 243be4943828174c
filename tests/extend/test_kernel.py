"""A kernel of another package: by its name, and taken by `matmul` and `packed` for the forms that it suits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms import Factors
from lcq.kernels import KERNELS, Kernel, matmul

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(3, 8, 6)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(3, 5, 8)), jnp.float32)
SEEN: list = []


class Whole(Kernel):
    """Factors multiplied with each other first."""

    def suits(self, form):
        return isinstance(form, Factors)

    def check(self, form):
        if not isinstance(form, Factors):
            raise ValueError(f"expected factors, got {type(form).__name__}; leave kernel= out")

    def product(self, x, form):
        SEEN.append(x.shape)
        return x @ form.dense()


@pytest.fixture(autouse=True)
def known():
    KERNELS.register("whole")(Whole)
    SEEN.clear()
    yield
    KERNELS.unregister("whole")


def test_by_name():
    form = lcq.LowRank(2).project(W[0])
    np.testing.assert_allclose(matmul(X[0], form, kernel="whole"), X[0] @ form.dense(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expected factors, got Columns"):
        matmul(X[0], lcq.KMeans(2).project(W[0]), kernel="whole")
    with pytest.raises(ValueError, match=r"expected one of the kernels .*whole, got 'half'; leave kernel= out"):
        matmul(X[0], form, kernel="half")


def test_packed_takes_it_for_what_it_suits():
    """Also of stacked forms, of none but those, and no longer once it is gone."""
    forms = lcq.compress({"w": W[0], "v": W[1]}, [lcq.Rule("w", lcq.LowRank(2)), lcq.Rule("v", lcq.KMeans(2))])
    run = lcq.packed(lambda p, x: (x @ p["w"], x @ p["v"]))
    dense = lcq.decompress(forms)
    for got, name in zip(jax.jit(run)(forms, X[0]), "wv", strict=True):
        np.testing.assert_allclose(got, X[0] @ dense[name], rtol=1e-4, atol=1e-5)
    assert SEEN == [(5, 8)]
    stacked = jax.vmap(lcq.LowRank(2).project)(W)
    np.testing.assert_allclose(matmul(X, stacked), X @ stacked.dense(), rtol=1e-4, atol=1e-5)
    assert len(SEEN) == 2
    KERNELS.unregister("whole")
    matmul(X, stacked)
    assert len(SEEN) == 2
    KERNELS.register("whole")(Whole)
