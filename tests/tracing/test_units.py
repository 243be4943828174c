"""Which products share weights, and in which layout."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcq.tracing.contraction import region
from lcq.tracing.param_flow import trace

X = np.ones((5, 4), np.float32)
W = {"w": np.ones((4, 4), np.float32)}

USES = {  # fn, for every unit its uses and its others
    "twice": (lambda w, x: x @ w @ w, [((0, 1), ())]),
    "a transpose": (lambda w, x: x @ w @ w.T @ w, [((0, 2), (1,))]),
    "neurons in another order": (lambda w, x: x @ w + x @ w[:, ::-1], [((0, 1), ())]),
    "inputs in another order": (lambda w, x: x @ w + x @ w[::-1], [((0,), (1,))]),
    "heads": (lambda w, x: (x @ w).sum() + jnp.einsum("bi,ihd->bhd", x, w.reshape(4, 2, 2)).sum(), [((0, 1), ())]),
    "a part of them": (lambda w, x: x @ w @ w[:, :2], [((0,), (1,))]),
    "slices, then together": (
        lambda w, x: (x @ w[:, :1]).sum() + (x @ w[:, 1:]).sum() + x @ w,
        [((0,), (2,)), ((1,), (2,))],
    ),
}


@pytest.mark.parametrize("case", USES)
def test_uses(case):
    fn, wanted = USES[case]
    program = trace(lambda p, x: fn(p["w"], x), W, X, ["w"])
    assert [(unit.uses, unit.others) for unit in program.units] == wanted
    assert program.first == {uses[0] for uses, _ in wanted}


PLACES = np.arange(60).reshape(3, 4, 5)

REGIONS = {
    "": (PLACES, 0),
    "[1]": (PLACES[1], 1),
    "[1][2]": (PLACES[1, 2], 2),
    "[:, 2]": (PLACES[:, 2], 0),
    "[1][:, 2]": (PLACES[1, :, 2], 1),
    "[:, :, 1:3]": (PLACES[..., 1:3][::-1], 0),
    "[:, :, 0:5:2]": (PLACES[..., ::2], 0),
    "[:, (0, 1, 3)]": (PLACES[:, [0, 1, 3]], 0),
    "[0 .. 6]": (np.array([0, 6]), 0),
}


@pytest.mark.parametrize("name", REGIONS)
def test_names_of_parts(name):
    places, lead = REGIONS[name]
    assert region(places, PLACES.shape, lead) == name
