"""By which factors the parameters of a function may be scaled so that the function stays as it is.

The function is traced once, and its equations are followed with a factor for every element of every variable, each an
unknown: a product's weight, a gain, a bias and a row of an embedding take up any factor of what goes in and what comes
out; sums, max(x, 0), moves and poolings hand factors on, and want equal ones; everything else wants 1.

    y_j = sum_i x_i W_ij:   x_i -> a_i x_i,  y_j -> b_j y_j   if   W_ij -> W_ij b_j / a_i
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcq.tracing import compact, factor_rules
from lcq.tracing.abstract_walk import AbstractWalk, distinct, jaxpr_of
from lcq.tracing.equation import Content, Equation
from lcq.tracing.factors import Factors, Use, Value, constant, data, fixed, parameter
from lcq.tracing.symbols import ONE, Symbols
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.paths import check_numbers, flatten


class Group(NamedTuple):
    """Factors that the same uses have.

    Attributes:
        symbols: The unknowns, one for each channel.
        producers: Uses whose elements are multiplied by them.
        consumers: Uses whose elements are divided by them.
        reason: Why all of them have to be 1; "" if they may be anything.
        signed: Whether they may not be negative.
    """

    symbols: np.ndarray
    producers: tuple[Use, ...]
    consumers: tuple[Use, ...]
    reason: str
    signed: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """The factors of a function's parameters.

    Attributes:
        symbols: The unknowns.
        uses: Of all parameters, in the order of the equations.
        groups: Of unknowns that the same uses have.
    """

    symbols: Symbols
    uses: tuple[Use, ...]
    groups: tuple[Group, ...]

    def factors(self, path: str, size: int, values: dict[int, float]) -> np.ndarray:
        """What every element of a leaf is multiplied by.

        Args:
            path: of the leaf.
            size: its number of elements.
            values: of unknowns, positive; 1 for those that are left out.
        """
        found = np.ones(size)
        for use in self.uses:
            if use.path == path:
                found[use.places] = self._of(use.above, values) / self._of(use.below, values)
        return found

    def _of(self, numbers: np.ndarray, values: dict[int, float]) -> np.ndarray:
        unknown, inverse = np.unique(self.symbols.roots(numbers), return_inverse=True)
        return np.array([values.get(each, 1.0) for each in unknown.tolist()])[inverse.reshape(numbers.shape)]


def scaling(
    fn: Function,
    params: Params,
    *batches: Batch,
    unchanged: Collection[str] = (),
    stay: Mapping[str, str] | None = None,
) -> Scaling:
    """Follows the factors of all parameters through a function.

    Args:
        fn: (params, batch) -> anything; traced, never run.
        params: a tree of arrays or shape structs.
        batches: trees of arrays or shape structs; every shape is traced, and what is found holds for all.
        unchanged: paths of leaves that have to stay as they are.
        stay: likewise, with the reason that is told.

    Example:
        >>> params = {"w1": jnp.zeros((4, 8)), "w2": jnp.zeros((8, 2))}
        >>> found = scaling(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], params, jnp.zeros((5, 4)))
        >>> [(len(g.symbols), [use.path for use in g.consumers], g.reason) for g in found.groups]
        [(8, ['w2'], ''), (2, [], 'the output of the function')]
    """
    leaves, structure = flatten(params)
    check_numbers(leaves)
    walk = _Walk()
    args = [parameter(path, np.shape(leaf), jnp.result_type(leaf)) for path, leaf in leaves.items()]
    for arg, path in zip(args, leaves, strict=True):
        arg.places = None if path in unchanged else arg.places
    for batch in distinct(batches):
        closed = jaxpr_of(fn, leaves, structure, batch)
        for result in walk.run(closed, [*args, *(data(np.shape(leaf)) for leaf in jax.tree.leaves(batch))]):
            walk.factors.pin(result, lambda: "the output of the function")
    walk.factors.reconcile({path: math.prod(np.shape(leaf)) for path, leaf in leaves.items()}, stay or {})
    symbols, uses = walk.factors.symbols, walk.factors.uses
    return Scaling(symbols, tuple(uses), tuple(_groups(symbols, uses)))


class _Walk(AbstractWalk[Value]):
    def __init__(self) -> None:
        super().__init__()
        self.factors = Factors()

    def constant(self, content: Content) -> Value:
        return constant(content)

    def known(self, value: Value) -> np.ndarray | None:
        return value.known

    def follows(self, value: Value) -> bool:
        return self.factors.is_open(value)

    def sliced(self, value: Value, i: int) -> Value:
        return value.sliced(i)

    def stacked(self, values: list[Value], eqn: Equation) -> Value:
        values = [self.factors.opened(value, lambda: self.told(eqn)) for value in values]
        made = compact.stacked([value.factors for value in values], values[0].shape, 0)
        data, infinite = (any(each) for each in zip(*((value.data, value.infinite) for value in values), strict=True))
        return Value((len(values), *values[0].shape), made, data=data, infinite=infinite)

    def rule(self, eqn: Equation, ins: list[Value]) -> list[Value]:
        why = functools.partial(self.told, eqn)
        outs = factor_rules.results(self.factors, eqn, ins, why)
        if outs is None:
            for value in ins:
                self.factors.pin(value, why)
            outs = [Value(tuple(var.aval.shape), fixed(len(var.aval.shape))) for var in eqn.outvars]
        for out in outs:
            out.data = any(value.data for value in ins)
        return outs


def _groups(symbols: Symbols, uses: Sequence[Use]) -> list[Group]:
    """The unknowns by the uses that have them."""
    seen: dict[int, tuple[list[int], list[int]]] = {}
    for number, use in enumerate(uses):
        for side, factors in enumerate((use.above, use.below)):
            for root in np.unique(symbols.find(factors)).tolist():
                if root > ONE:
                    seen.setdefault(root, ([], []))[side].append(number)
    kinds: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[int]] = {}
    for (root, (above, below)), reason in zip(seen.items(), symbols.reasons(list(seen)), strict=True):
        kinds.setdefault((tuple(above), tuple(below), reason), []).append(root)
    return [
        Group(
            np.asarray(roots),
            tuple(uses[i] for i in above),
            tuple(uses[i] for i in below),
            reason,
            symbols.signed(np.asarray(roots)),
        )
        for (above, below, reason), roots in kinds.items()
    ]
