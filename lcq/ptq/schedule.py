"""In which order the products of traces are visited, so that all uses of a weight come together where they can.

The weights that are rounded together (a unit) depend on those whose results its inputs follow from. Units are taken in
an order in which each comes after those it depends on, else as the function has them: branches that share weights are
walked side by side. Where units depend on each other or on themselves (the steps of a recurrent cell, a block that is
applied again) no such order exists; they are one group, as few as possible.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from lcq.tracing.program import Program


@dataclasses.dataclass(frozen=True)
class Group:
    """Products that are visited together.

    Attributes:
        units: The numbers of the units, by their first use; none for a product of weights that are rounded before.
        products: The numbers of the products of each program, as the function has them.
        again: Whether some depend on others of the group, so that it is run once for each unit.
    """

    units: tuple[int, ...]
    products: tuple[tuple[int, ...], ...]
    again: bool


def schedule(programs: Sequence[Program], together: bool = True) -> list[Group]:
    """The groups of programs that are traces of one function on batches of different shapes.

    Args:
        programs: one for each kind of batch.
        together: whether uses of the same weights are one group; else every product is one, in the function's order.

    Raises:
        ValueError: they do not have the same weights in their products.
    """
    if not together:
        return [
            Group((), tuple((product.number,) if other is program else () for other in programs), False)
            for program in programs
            for product in program.products
        ]
    _check(programs)
    units = range(len(programs[0].units))
    of: list[dict[int, int]] = [{n: u for u in units for n in program.units[u].uses} for program in programs]
    count = len(units)
    before: list[tuple[int, ...]] = []
    for number, program in zip(of, programs, strict=True):
        for product in sorted({n for unit in program.units for n in unit.others}):
            number[product] = count
            before.append(tuple(u for u in units if product in program.units[u].others))
            count += 1
    reach = [0] * len(units) + [sum(1 << u for u in which) for which in before]
    first: list[Any] = [None] * count
    for number, program in zip(of, programs, strict=True):
        for n, behind in _behind(program, number).items():
            node = number[n]
            reach[node] |= behind
            first[node] = n if first[node] is None else first[node]
    for k in range(count):
        for node in range(count):
            if reach[node] >> k & 1:
                reach[node] |= reach[k]
    cycles = [
        [m for m in range(count) if m == node or (reach[node] >> m & 1 and reach[m] >> node & 1)]
        for node in range(count)
    ]
    groups, done = [], 0
    waiting = sorted(range(count), key=lambda node: first[node])
    while waiting:
        node = next(n for n in waiting if not reach[n] & ~done & ~sum(1 << m for m in cycles[n]))
        nodes = cycles[node]
        done |= sum(1 << m for m in nodes)
        waiting = [n for n in waiting if n not in nodes]
        inside = sorted((m for m in nodes if m in units), key=lambda m: first[m])
        products = tuple(tuple(sorted(n for n, m in number.items() if m in nodes)) for number in of)
        groups.append(Group(tuple(inside), products, bool(reach[node] >> node & 1)))
    return groups


def _behind(program: Program, number: dict[int, int]) -> dict[int, int]:
    """For every product the nodes that its inputs follow from, a bit for each."""
    behind: dict[Any, int] = {}
    found = {}
    for eqn in program.jaxpr.eqns:
        of = 0
        product = program.product_of(eqn)
        for var in eqn.invars:
            if not hasattr(var, "val"):
                of |= behind.get(var, 0)
        if product is not None:
            found[product] = of
            of |= 1 << number[product]
        if of:
            behind.update(dict.fromkeys(eqn.outvars, of))
    return found


def _check(programs: Sequence[Program]) -> None:
    first = programs[0]
    for other in programs[1:]:
        paths = [[unit.path for unit in program.units] for program in (first, other)]
        if paths[0] == paths[1] and all(
            a.has_same_places(b.product) for a, b in zip(first.units, other.units, strict=True)
        ):
            continue
        missing = sorted(set(paths[0]) ^ set(paths[1])) or sorted(set(paths[0]))
        raise ValueError(
            f"{missing[0]}: expected products of the same weights in the same order whatever the shapes of a batch, "
            f"got {len(paths[0])} and {len(paths[1])} for two batches; pass batches of one shape, or pad them and say "
            "with mask= what counts"
        )
