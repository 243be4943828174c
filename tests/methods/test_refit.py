"""Batch-norm statistics, re-estimated through flax linen and nnx, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import lcq

BATCHES = [np.random.default_rng(i).normal(2.0, 3.0, size=(64, 5)).astype(np.float32) for i in range(4)]
MEAN = np.mean([b.astype(np.float64).mean(0) for b in BATCHES], 0)
VAR = np.mean([b.astype(np.float64).var(0) for b in BATCHES], 0)


@pytest.mark.parametrize("momentum", [0.99, 0.5, 0.0])
def test_linen(momentum):
    model = nn.BatchNorm(use_running_average=False, momentum=momentum)
    variables = model.init(jax.random.key(0), BATCHES[0])

    @jax.jit
    def step(statistics, x):
        new = model.apply({**variables, "batch_stats": statistics}, x, mutable=["batch_stats"])[1]
        return new["batch_stats"]

    statistics = lcq.recalibrate(step, variables["batch_stats"], BATCHES)
    np.testing.assert_allclose(statistics["mean"], MEAN, rtol=1e-4)
    np.testing.assert_allclose(statistics["var"], VAR, rtol=1e-4)


def test_nnx():
    graph, statistics, rest = nnx.split(nnx.BatchNorm(5, rngs=nnx.Rngs(0)), nnx.BatchStat, ...)

    @jax.jit
    def step(statistics, x):
        model = nnx.merge(graph, statistics, rest, copy=True)
        model(x, use_running_average=False)
        return nnx.state(model, nnx.BatchStat)

    statistics = lcq.recalibrate(step, statistics, BATCHES)
    np.testing.assert_allclose(statistics["mean"][...], MEAN, rtol=1e-4)
    np.testing.assert_allclose(statistics["var"][...], VAR, rtol=1e-4)


def test_no_batch_and_no_training_mode_are_errors():
    with pytest.raises(ValueError, match="at least one batch"):
        lcq.recalibrate(lambda s, x: s, {"mean": jnp.zeros(2)}, [])
    with pytest.raises(ValueError, match=r"'mean'.*training mode"):
        lcq.recalibrate(lambda s, x: s, {"mean": jnp.zeros(2)}, [1])
