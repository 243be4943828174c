"""How products hand factors on: a parameter takes up any change between what goes in and what comes out."""

from collections.abc import Callable, Sequence

import numpy as np

from lcq.tracing.equation import Equation
from lcq.tracing.factors import Factors, Value, fixed, spread
from lcq.tracing.symbols import ANY

Why = Callable[[], str]


def dot(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    """A product, perhaps a ragged one; experts share the factors of their rows.

    out[b, m, n] = sum_k x[b, m, k] w[b, k, n]:   above[b, n] / below[b, k]   for a parameter w
    """
    dims = Dims(eqn, ins)
    side = next((s for s in (1, 0) if ins[s].places is not None), None)
    if side is None:
        side, above = _of_values(factors, dims, ins, why)
    else:
        value, other = ins[side], ins[1 - side]
        if other.places is not None:
            return None
        assert value.places is not None
        shared = {*dims.contract[side], *dims.experts[side]}
        above = factors.symbols.fresh(tuple(1 if i in shared else n for i, n in enumerate(value.places.shape)))
        into = factors.level(other, dims.free[1 - side], why)
        order = [*dims.batch[1 - side], *dims.contract[1 - side]]
        into = into.transpose([*order, *dims.free[1 - side]]).reshape([into.shape[i] for i in order])
        below = spread(into, (*dims.batch[side], *dims.contract[side]), value.rank)
        factors.use(value, "product", above, below, why)
    many = len(dims.batch[0])
    start = many + (len(dims.free[0]) if side else 0)
    kept = [*dims.batch[side], *dims.free[side]]
    rest = [i for i in range(ins[side].rank) if i not in kept]
    above = above.transpose([*kept, *rest]).reshape([above.shape[i] for i in kept])
    onto = (*range(many), *range(start, start + len(dims.free[side])))
    return [Value(tuple(eqn.outvars[0].aval.shape), spread(above, onto, len(eqn.outvars[0].aval.shape)))]


class Dims:
    """The axes of both operands."""

    def __init__(self, eqn: Equation, ins: Sequence[Value]) -> None:
        numbers = eqn.params.get("dimension_numbers")
        self.experts: tuple[tuple[int, ...], tuple[int, ...]] = (), ()
        if numbers is None:
            ragged = eqn.params["ragged_dot_dimension_numbers"]
            numbers, self.experts = ragged.dot_dimension_numbers, ((), tuple(ragged.rhs_group_dimensions))
        self.contract, self.batch = ([tuple(map(int, each)) for each in pair] for pair in numbers)
        self.free = [
            [i for i in range(ins[s].rank) if i not in (*self.contract[s], *self.batch[s], *self.experts[s])]
            for s in (0, 1)
        ]


def _of_values(factors: Factors, dims: Dims, ins: list[Value], why: Why) -> tuple[int, np.ndarray]:
    """Of two that are no parameters one can be scaled, in axes that are not contracted: which, and its factors."""
    open_ = [factors.is_open(value) for value in ins[:2]]
    if all(open_):
        for value in ins[:2]:
            factors.pin(value, lambda: f"{why()}, of two that could be scaled")
    side = 1 if open_[1] else 0
    above = factors.level(ins[side], (*dims.contract[side], *dims.experts[side]), why)
    return side, fixed(ins[side].rank, ANY) if (ins[1 - side].factors == ANY).all() else above


def convolution(factors: Factors, eqn: Equation, ins: list[Value], why: Why) -> list[Value] | None:
    """A convolution with a parameter, grouped and depthwise ones too; zeros that are padded have any factor."""
    x, w = ins
    params, spec = eqn.params, eqn.params["dimension_numbers"]
    if w.places is None or x.places is not None or params["batch_group_count"] > 1:
        return None
    channel, out, inside = spec.lhs_spec[1], spec.rhs_spec[0], spec.rhs_spec[1]
    into = factors.level(x, [i for i in range(x.rank) if i != channel], why)
    groups = params["feature_group_count"]
    into = np.broadcast_to(into.reshape(-1), x.shape[channel]).reshape(groups, -1)
    below = spread(into.repeat(w.shape[out] // groups, 0), (out, inside), w.rank)
    above = factors.symbols.fresh(tuple(n if i == out else 1 for i, n in enumerate(w.places.shape)))
    factors.use(w, "product", above, below, why)
    return [Value(tuple(eqn.outvars[0].aval.shape), spread(above.reshape(-1), (spec.out_spec[1],), x.rank))]
