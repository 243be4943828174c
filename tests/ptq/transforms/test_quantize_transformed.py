"""`quantize(transforms=)`: transforms come before the walk, in their order, and leave their records."""

import jax
import jax.numpy as jnp
import numpy as np

import lcq
from lcq.ptq import transforms
from tests.ptq.small_net import BARE, RULES, SIZE, draw


def net(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + jnp.tanh(p["table"])[0]


def problem():
    params = {"w1": draw(SIZE, SIZE, seed=1), "b1": draw(SIZE), "w2": draw(SIZE, SIZE, seed=2), "table": draw(1, SIZE)}
    params["w1"][:, 3] *= 50
    return params, [draw(30, SIZE, seed=4), draw(30, SIZE, seed=5)]


def test_what_is_rounded_is_what_the_transforms_give():
    params, batches = problem()
    done = lcq.quantize(net, params, batches, RULES, BARE, transforms=[transforms.equalize])
    before = transforms.equalize(net, params, batches, RULES)
    wanted = lcq.quantize(net, before.params, batches, RULES, BARE)
    assert done.transforms == before.records and wanted.transforms == ()
    for one, two in zip(jax.tree.leaves(done.forms), jax.tree.leaves(wanted.forms), strict=True):
        np.testing.assert_array_equal(one, two)


def test_order_rules_and_mask():
    seen = []

    def told(fn, params, calibration, rules, mask):
        seen.append((fn, len(calibration), [(rule.pattern, rule.scheme) for rule in rules], mask))
        return transforms.Transformed(
            {**params, "b1": params["b1"] + 0}, (transforms.TransformRecord("told", (), (), len(seen)),)
        )

    params, batches = problem()
    rtn, mask = [lcq.Rule("table", lcq.Uniform(4))], lambda x: np.ones(len(x))
    done = lcq.quantize(net, params, batches, RULES, BARE, rtn=rtn, transforms=[told, told], mask=mask)
    assert [record.size for record in done.transforms] == [1, 2]
    assert seen[0] == (net, 2, [("table", None), *((rule.pattern, rule.scheme) for rule in RULES)], mask)
