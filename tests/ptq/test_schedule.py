"""In which order weights are visited: those of their first uses, side by side where branches share them."""

import jax.numpy as jnp
import numpy as np
import pytest

from lcq.ptq.schedule import schedule
from lcq.tracing.param_flow import trace

PARAMS = {name: np.ones((3, 3), np.float32) for name in "abc"}
X = np.ones((4, 3), np.float32)


def layer(p, name, x):
    return jnp.tanh(x @ p[name])


def chain(names):
    def fn(p, x):
        for name in names:
            x = layer(p, name, x)
        return x

    return fn


def branches(p, x):
    """a, b and c on x, then on another input; then both."""
    one, two = (chain("abc")(p, part) for part in (x, x[::-1]))
    return (one * two) @ p["a"].T


def late(p, x):
    """b depends on a; the second branch of a comes after, and uses c between."""
    one = layer(p, "b", layer(p, "a", x))
    return one + layer(p, "a", layer(p, "c", x))


CASES = {  # fn, groups: leaves in the order of their turns, products, whether they are run again
    "a chain": (chain("abc"), [("a", (0,), False), ("b", (1,), False), ("c", (2,), False)]),
    "branches": (
        branches,
        [("a", (0, 3), False), ("b", (1, 4), False), ("c", (2, 5), False), ("", (6,), False)],
    ),
    "a block again": (chain("abab"), [("ab", (0, 1, 2, 3), True)]),
    "between others": (chain("abbc"), [("a", (0,), False), ("b", (1, 2), True), ("c", (3,), False)]),
    "others in between": (chain("abac"), [("ab", (0, 1, 2), True), ("c", (3,), False)]),
    "what has to come before": (late, [("c", (2,), False), ("a", (0, 3), False), ("b", (1,), False)]),
}


@pytest.mark.parametrize("case", CASES)
def test_groups(case):
    fn, wanted = CASES[case]
    program = trace(fn, PARAMS, X, [name for name in "abc" if case == "branches" or any(name in w[0] for w in wanted)])
    found = [
        ("".join(program.units[u].path for u in group.units), group.products[0], group.again)
        for group in schedule([program])
    ]
    assert found == wanted


def test_product_by_product():
    program = trace(branches, PARAMS, X, "abc")
    groups = schedule([program], together=False)
    assert [group.products for group in groups] == [((i,),) for i in range(7)]
    assert not any(group.units or group.again for group in groups)


def test_shapes_with_other_numbers_of_uses():
    """Weights that depend on each other for one of the shapes are one group for all."""

    def fn(p, x):
        for _ in range(len(x) - 3):
            x = layer(p, "b", layer(p, "a", x))
        return x @ p["c"]

    programs = [trace(fn, PARAMS, X[:1].repeat(rows, 0), "abc") for rows in (4, 5)]
    found = [(group.units, group.products, group.again) for group in schedule(programs)]
    assert found == [((0, 1), ((0, 1), (0, 1, 2, 3)), True), ((2,), ((2,), (4,)), False)]


def test_shapes_with_other_weights():
    def fn(p, x):
        return x @ p["a"] @ p["b"] if len(x) > 4 else x @ p["b"] @ p["a"]

    programs = [trace(fn, PARAMS, X[:1].repeat(rows, 0), "ab") for rows in (4, 5)]
    with pytest.raises(ValueError, match="a: expected products of the same weights in the same order"):
        schedule(programs)
