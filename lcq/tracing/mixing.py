"""Which channels of a function an orthogonal matrix may mix, folded into its parameters, with the function as it is.

Every element of every variable has a coordinate: the results of a product have new ones, sums make them equal, and a
product with a parameter ends them. A matrix may mix coordinates that are never told apart: each equation notes which
it treats differently (other heads, other parts of a split), and fixes those that it does not treat linearly. The sum of
squares over all coordinates that may be mixed does not notice, which is why streams with RMSNorm can be turned.

    y = f(x W1) W2 = f(x W1 R) R' W2    where f(x R) = f(x) R,    R R' = 1
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lcq.tracing import compact, mixing_rules
from lcq.tracing.abstract_walk import AbstractWalk, distinct, jaxpr_of
from lcq.tracing.equation import Content, Equation
from lcq.tracing.factors import Use, constant, fixed, parameter
from lcq.tracing.mixed import Mixed, Mixing
from lcq.tracing.symbols import ONE
from lcq.tree.aliases import Batch, Function, Params
from lcq.tree.paths import check_numbers, flatten


class Cell(NamedTuple):
    """Coordinates that may be mixed.

    Attributes:
        coordinates: Their numbers, in order.
        uses: The parameters that have them.
        reason: Why they may not be mixed after all; "" if they may.
    """

    coordinates: np.ndarray
    uses: tuple[Use, ...]
    reason: str


@dataclasses.dataclass(frozen=True, eq=False)
class Mixtures:
    """What may be mixed in a function.

    Attributes:
        cells: In the order of the function.
        uses: Of all parameters.
        mixing: The coordinates.
    """

    cells: tuple[Cell, ...]
    uses: tuple[Use, ...]
    mixing: Mixing

    def blocks(self, cell: Cell) -> list[tuple[Use, np.ndarray]]:
        """What a matrix mixes: for the parameters of a cell flat places [rest, coordinates], each once.

        Raises:
            ValueError: two uses of a leaf have its elements in other blocks; names the leaf.
        """
        done: dict[tuple[str, int], np.ndarray] = {}
        found = []
        for use in cell.uses:
            for places in self._places(use, cell):
                for apart in np.unique(places[:, 1] - places[:, 0]).tolist():  # rows and columns of one leaf
                    lines = places[places[:, 1] - places[:, 0] == apart]
                    lines = lines[np.unique(lines[:, 0], return_index=True)[1]]
                    before = done.get((use.path, apart), np.zeros(0, places.dtype))
                    known = np.isin(lines, before)
                    if (known.any(1) != known.all(1)).any():
                        raise ValueError(
                            f"{use.path}: expected uses that have the same channels side by side, got others at "
                            f"{use.source}; give that use a leaf of its own"
                        )
                    if not known.all():
                        lines = lines[~known.any(1)]
                        done[use.path, apart] = np.concatenate([before, lines.reshape(-1)])
                        found.append((use, lines))
        return found

    def _places(self, use: Use, cell: Cell) -> list[np.ndarray]:
        found = []
        for numbers in (use.above, use.below):
            ids = self.mixing.symbols.find(numbers)
            if not np.isin(ids, cell.coordinates).any():
                continue
            axes = [axis for axis, length in enumerate(ids.shape) if length > 1]
            rest = [axis for axis in range(ids.ndim) if axis not in axes]
            places = use.places.transpose([*rest, *axes])
            places = places.reshape(math.prod(places.shape[: len(rest)]), -1)
            columns = [np.flatnonzero(ids.reshape(-1) == number) for number in cell.coordinates]
            found += [places[:, list(each)] for each in zip(*columns, strict=True)]
        return found


def mixtures(
    fn: Function,
    params: Params,
    *batches: Batch,
    unchanged: Collection[str] = (),
    stay: Mapping[str, str] | None = None,
    uniform: Collection[str] = (),
) -> Mixtures:
    """Follows the coordinates of all results through a function.

    Args:
        fn: (params, batch) -> anything; traced, never run.
        params: a tree of arrays or shape structs.
        batches: trees of arrays or shape structs; every shape is traced, and what is found holds for all.
        unchanged: paths of leaves that have to stay as they are.
        stay: likewise, with the reason that is told.
        uniform: paths of leaves whose elements are all equal, and stay so.

    Example:
        >>> params = {"v": jnp.zeros((4, 8)), "o": jnp.zeros((8, 2))}
        >>> found = mixtures(lambda p, x: jax.nn.softmax(x @ x.T) @ (x @ p["v"]) @ p["o"], params, jnp.zeros((5, 4)))
        >>> [(len(cell.coordinates), [use.path for use in cell.uses], cell.reason) for cell in found.cells]
        [(8, ['v', 'o'], ''), (2, ['o'], 'the output of the function')]
    """
    leaves, structure = flatten(params)
    check_numbers(leaves)
    walk = _Walk()
    args = []
    for path, leaf in leaves.items():
        value = parameter(path, np.shape(leaf), jnp.result_type(leaf))
        places = None if path in unchanged or path in uniform else value.places
        depends = tuple(path not in uniform and n > 1 for n in value.shape)
        args.append(Mixed(value.shape, value.factors, path, places, depends=depends))
    for batch in distinct(batches):
        given = [
            Mixed(np.shape(leaf), np.full((1,) * np.ndim(leaf), ONE), data=True, depends=(True,) * np.ndim(leaf))
            for leaf in jax.tree.leaves(batch)
        ]
        for result in walk.run(jaxpr_of(fn, leaves, structure, batch), [*args, *given]):
            walk.mixing.pin(result, lambda: "the output of the function")
    walk.mixing.reconcile({path: math.prod(np.shape(leaf)) for path, leaf in leaves.items()}, stay or {})
    uses = tuple(walk.mixing.uses)
    return Mixtures(tuple(_cells(walk.mixing, uses)), uses, walk.mixing)


class _Walk(AbstractWalk[Mixed]):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = Mixing()

    def constant(self, content: Content) -> Mixed:
        value = constant(content)
        depends = tuple(n > 1 for n in value.shape)
        factors = fixed(value.rank) if value.infinite else value.factors  # turned infinities are others
        return Mixed(value.shape, factors, known=value.known, depends=depends)

    def known(self, value: Mixed) -> np.ndarray | None:
        return value.known

    def follows(self, value: Mixed) -> bool:
        return self.mixing.is_open(value)

    def sliced(self, value: Mixed, i: int) -> Mixed:
        part = value.sliced(i)
        assert isinstance(part, Mixed)
        part.depends = value.depends[1:]
        if value.factors.shape[0] > 1:
            self.mixing.part(part.factors)
        return part

    def stacked(self, values: list[Mixed], eqn: Equation) -> Mixed:
        for value in values:
            self.mixing.end(value, lambda: self.told(eqn))
        made = compact.stacked([value.factors for value in values], values[0].shape, 0)
        data = any(value.data for value in values)
        return Mixed((len(values), *values[0].shape), made, data=data, depends=(True,) * (1 + values[0].rank))

    def rule(self, eqn: Equation, ins: list[Mixed]) -> list[Mixed]:
        why = functools.partial(self.told, eqn)
        outs = mixing_rules.results(self.mixing, eqn, ins, why)
        if outs is None:
            for value in ins:
                self.mixing.pin(value, why)
            outs = [mixing_rules.plain(eqn, ins, i) for i in range(len(eqn.outvars))]
        for out in outs:
            out.data = any(value.data for value in ins)
        return outs


def _cells(mixing: Mixing, uses: tuple[Use, ...]) -> list[Cell]:
    """Coordinates that are in the same notes, with the same marks."""
    signatures, twice = mixing.signatures()
    mixing.symbols.pin(twice, lambda: "it is told apart from itself")
    users: dict[int, list[int]] = {}
    for number, use in enumerate(uses):
        for numbers in (use.above, use.below):
            for root in np.unique(mixing.symbols.find(numbers)).tolist():
                if root > ONE and number not in users.setdefault(root, []):
                    users[root].append(number)
    cells: dict[tuple[int, str, tuple[int, ...]], list[int]] = {}
    roots = sorted(users)
    for root, reason in zip(roots, mixing.symbols.reasons(roots), strict=True):
        key = (0 if reason else int(signatures[root]), reason, tuple(users[root]))
        cells.setdefault(key, []).append(root)
    made = []
    for (_, reason, of), roots in cells.items():
        cell = Cell(np.asarray(roots), tuple(uses[i] for i in of), reason)
        if not reason:
            reason = "one channel" if len(roots) == 1 else _uneven(mixing, cell)
        made.append(cell._replace(reason=reason))
    return made


def _uneven(mixing: Mixing, cell: Cell) -> str:
    """The leaf that has some of the coordinates more often than others, of which no blocks can be made."""
    for use in cell.uses:
        for numbers in (use.above, use.below):
            ids = mixing.symbols.find(numbers)
            found, often = np.unique(ids[np.isin(ids, cell.coordinates)], return_counts=True)
            if len(found) not in (0, len(cell.coordinates)) or len(set(often.tolist())) > 1:
                return f"{use.path} has some of these channels more often than others"
    return ""
