"""Signatures that `help` prints are short words, not unions of every number there is."""

import inspect

import pytest

import lcq

FUNCTIONS = [name for name in lcq.__all__ if inspect.isfunction(getattr(lcq, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_can_be_read(name):
    text = str(inspect.signature(getattr(lcq, name)))
    assert "Union[" not in text and "jaxlib" not in text.replace("jax.jaxlib._jax.Array", "Array"), text
    assert len(text) < 800


def test_aliases_are_named_in_them():
    assert "(inner: OptimizerOrFactory, rules: Rules" in str(inspect.signature(lcq.lc))
    assert str(inspect.signature(lcq.compress)).startswith("(params: Params, rules: Rules")
    assert "entropy_weight: Schedule = 1.0" in str(inspect.signature(lcq.hemp))
    assert lcq.tree.Params.__name__ == "Params"
