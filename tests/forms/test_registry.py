"""The registry of names: what it takes, what it refuses, and what it says."""

import pytest

from lcq.forms.registry import Registry


def filled():
    registry = Registry("shapes", "draw it first")

    @registry.register("square")
    class Square:
        pass

    registry.register("circle")(max)
    return registry, Square


def test_names_in_order_of_registration():
    registry, square = filled()
    assert list(registry) == ["square", "circle"] and len(registry) == 2
    assert registry["square"] is square and registry["circle"] is max
    assert registry.name_of(square) == "square" and registry.name_of(min) is None
    assert "circle" in registry and "oval" not in registry and ["circle"] not in registry
    assert repr(registry) == "Registry(shapes: square, circle)"


def test_an_unknown_name_lists_the_known_ones():
    registry, _ = filled()
    for name in ("oval", 3, None):
        with pytest.raises(ValueError, match=f"expected one of the shapes square, circle, got '{name}'; draw it first"):
            registry[name]


def test_a_name_stands_for_one_thing():
    registry, _ = filled()
    with pytest.raises(ValueError, match=r"free among the shapes, got 'square', which is .*Square; choose another"):
        registry.register("square")(min)
    with pytest.raises(ValueError, match="expected a name for one of the shapes, got ''"):
        registry.register("")
    assert registry.name_of(min) is None


def test_the_same_definition_again_counts():
    registry, first = filled()
    second = type("Square", (), {"__module__": first.__module__, "__qualname__": first.__qualname__})
    registry.register("square")(second)
    assert registry["square"] is second and list(registry) == ["square", "circle"]


def test_a_name_can_be_freed():
    registry, _ = filled()
    registry.unregister("square")
    registry.register("square")(min)
    assert registry["square"] is min
    with pytest.raises(ValueError, match="expected one of the shapes circle, square, got 'oval'"):
        registry.unregister("oval")
