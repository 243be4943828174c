"""A rounding method of another package, by its name and as a value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lcq
from lcq.ptq import ROUNDING_METHODS, Rounding

RNG = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(RNG.normal(size=(8, 6)), jnp.float32)}
BATCH = jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)
RULES = [lcq.Rule("w", lcq.Uniform(4, per="channel", symmetric=True))]


@dataclasses.dataclass(frozen=True)
class Lowest(Rounding):
    """Every weight to the level below it."""

    lower: int = 0

    def prepare(self, w, statistics):
        return w

    def solve(self, prepared, form, key=None):
        codes = jnp.floor(prepared / jnp.abs(form.scale)) - self.lower - form.values[0]
        return dataclasses.replace(form, codes=jnp.clip(codes, 0, 14).astype(form.codes.dtype))


@pytest.fixture(autouse=True)
def known():
    ROUNDING_METHODS.register("lowest")(Lowest)
    yield
    ROUNDING_METHODS.unregister("lowest")


def net(params, x):
    return jax.nn.relu(x @ params["w"])


def test_by_name_and_as_a_value():
    by_name = lcq.quantize(net, PARAMS, [BATCH], RULES, "lowest")
    assert by_name.records[0].method == "Lowest()"
    as_value = lcq.quantize(net, PARAMS, [BATCH], RULES, Lowest(search=False, shrink=0.0))
    assert as_value.records[0].method == "Lowest(search=False, shrink=0.0)"
    form = as_value.forms["w"]
    assert ((form.dense() <= PARAMS["w"] + 1e-6) | (form.codes == 0)).all()
    lower = lcq.quantize(net, PARAMS, [BATCH], RULES, Lowest(1, search=False, shrink=0.0)).forms["w"]
    assert (lower.codes <= form.codes).all() and (lower.codes < form.codes).any()


def test_an_unknown_name_lists_it():
    with pytest.raises(ValueError, match=r"expected one of the rounding methods .*lowest, got 'highest'; or pass one"):
        lcq.quantize(net, PARAMS, [BATCH], RULES, "highest")
