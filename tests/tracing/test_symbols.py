"""Unknown factors that are equal or 1, against a search through the graph of what was said."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lcq.tracing.symbols import ANY, ONE, Symbols

STEPS = st.lists(st.tuples(st.integers(-1, 12), st.integers(-1, 12)), max_size=20)


def reached(start, pairs):
    """All numbers that a chain of pairs leads to; chains do not go on at 1 or at any."""
    found, new = {start}, [start]
    while new:
        at = new.pop()
        for a, b in pairs:
            for one, other in ((a, b), (b, a)):
                if one == at and ANY not in (a, b) and other not in found:
                    found.add(other)
                    new += [other] if other != ONE else []
    return found


@given(STEPS)
def test_equal_and_one(pairs):
    symbols = Symbols()
    symbols.fresh((12,))
    for number, (a, b) in enumerate(pairs):
        symbols.equal(np.array([a]), np.array([b]), lambda number=number: f"step {number}")
    for number in range(1, 13):
        mine, root = reached(number, pairs), symbols.roots(np.array([number]))[0]
        assert (root == ONE) == (ONE in mine)
        assert bool(symbols.reason(number)) == (ONE in mine)
        for other in range(1, 13):
            same = symbols.find(np.array([number]))[0] == symbols.find(np.array([other]))[0]
            assert same == (other in mine)


def test_any_says_nothing():
    symbols = Symbols()
    a = symbols.fresh((3,))
    symbols.equal(np.array([ANY, a[1], ANY]), a, lambda: "sum")
    assert symbols.roots(a).tolist() == a.tolist()
    assert symbols.level(np.array([[ANY, 2, ANY]]), (1,), lambda: "sum").tolist() == [[2]]


def test_what_meets_one_number_along_an_axis_is_all_of_it():
    symbols = Symbols()
    rows, columns = symbols.fresh((3, 1)), symbols.fresh((1, 4))
    symbols.equal(rows, columns, lambda: "sum")
    assert set(symbols.find(np.arange(1, 8)).tolist()) == {1}


def test_many():
    symbols = Symbols()
    symbols.fresh((3,))
    a = symbols.fresh((5000,))
    symbols.pin(a[1:2], lambda: "exp")
    symbols.equal(a[:-1], a[1:], lambda: "sum")
    assert (symbols.roots(a) == ONE).all() and symbols.reason(int(a[77])) == "exp"
    assert (symbols.roots(np.arange(1, 4)) == np.arange(1, 4)).all()
