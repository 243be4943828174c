"""A kernel of another package that JAX cannot look into: its rules are lcq's, and an entry point is how it is found."""

import importlib.metadata

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.forms.registry import Registry
from lcq.kernels import KERNELS, CompiledKernel, matmul

RNG = np.random.default_rng(0)
FORM = lcq.KMeans(4).project(jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)).prepack()
X = jnp.asarray(RNG.normal(size=(3, 5, 8)), jnp.float32)


class Foreign(CompiledKernel):
    """By numpy, on the host."""

    def suits(self, form):
        return form is not None and form.shape == (8, 6)

    def compute(self, x, form):
        result = jax.ShapeDtypeStruct((x.shape[0], 6), jnp.float32)
        return jax.pure_callback(lambda x, w: np.asarray(x) @ np.asarray(w), result, x, form.matrix())


class ElsewhereOnly(Foreign):
    """The same, for another platform."""

    platform = "tpu"


@pytest.fixture(params=[Foreign, ElsewhereOnly])
def kernel(request):
    KERNELS.register("foreign")(request.param)
    yield request.param
    KERNELS.unregister("foreign")


def test_its_rules_are_those_of_all_kernels_of_codes(kernel):
    dense = FORM.matrix()
    product = jax.jit(jax.vmap(lambda x: matmul(x, FORM)))
    np.testing.assert_allclose(product(X), X @ dense, rtol=1e-4, atol=1e-5)
    assert ("callback" in product.lower(X).as_text()) == (kernel is Foreign)
    slope = jax.grad(lambda x: (matmul(x, FORM) ** 2).sum())(X[0])
    np.testing.assert_allclose(slope, 2 * X[0] @ dense @ dense.T, rtol=1e-4, atol=1e-4)
    uses = lcq.packed(lambda p, x: x @ p["w"]).report({"w": FORM}, X[0])
    assert [use.kernel for use in uses] == ["foreign" if kernel is Foreign else "tiles"]


def test_exported_programs_do_without(kernel):
    exported = jax.export.export(jax.jit(lambda x: matmul(x, FORM)))(X[0])
    assert "callback" not in exported.mlir_module()
    np.testing.assert_allclose(exported.call(X[0]), X[0] @ FORM.matrix(), rtol=1e-4, atol=1e-5)


def test_entry_points_are_loaded_when_first_a_name_is_looked_for(monkeypatch):
    things, loaded = Registry("things", group="lcq.things"), []

    class Point:
        def load(self):
            loaded.append(self)
            assert "two" not in things  # may look for names itself
            things.register("two")(2)

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [Point()] if group == "lcq.things" else [])
    things.register("one")(1)
    assert not loaded
    assert list(things) == ["one", "two"] and things["two"] == 2 and len(things) == 2 and len(loaded) == 1
