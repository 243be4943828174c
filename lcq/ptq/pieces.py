"""The equations of a traced function between its products, compiled; equal pieces share one compilation."""

import functools
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np

from lcq.ptq.schedule import Group
from lcq.tracing.equation import Content, Equation, Variable
from lcq.tracing.program import Program


class Piece(NamedTuple):
    """Equations between two products.

    Attributes:
        function: The equations as a compiled function of `ins`.
        ins: The variables that it needs.
        outs: Those it makes that something later needs.
        operands: The operands of the product after it, by their names in `Operand`.
        result: The result of that product.
        spent: The variables, of those there are, that neither that product nor anything later needs.
        dead: Those that nothing needs after that product.
    """

    function: Callable[..., list[Content]]
    ins: list[Variable]
    outs: list[Variable]
    operands: Mapping[str, Variable] = MappingProxyType({})
    result: Variable | None = None
    spent: tuple[Variable, ...] = ()
    dead: tuple[Variable, ...] = ()


def cut(program: Program, index: int, groups: Sequence[Group]) -> tuple[Piece, dict[int, Piece]]:
    """The equations without data behind them, and for every product those before it; only what a product depends on.

    An equation stays before the product that it precedes in the function, if what it needs is there by then.

    Args:
        program: a trace.
        index: its number among the programs of the groups.
        groups: in which order its products are made.
    """
    eqns = program.jaxpr.eqns
    order = [number for group in groups for number in group.products[index]]
    place = {number: i for i, number in enumerate(order)}
    after = {}
    for group in groups:
        for n in group.products[index]:
            after[n] = 1 + place[n if group.again else group.products[index][-1]]
    numbers = [program.product_of(eqn) for eqn in eqns]
    preceded, latest = _latest(eqns, numbers, place)
    batch = program.jaxpr.invars[len(program.paths) :]
    ready: dict[Variable, int] = dict.fromkeys(batch, 0)  # when a variable with data behind it is there
    shared: list[Equation] = []
    parts: list[list[Equation]] = [[] for _ in order]
    products = {}
    for eqn, number, original, last_place in zip(eqns, numbers, preceded, latest, strict=True):
        needs = [ready[var] for var in _variables(eqn) if var in ready]
        if number is not None:
            products[number] = eqn
            ready[eqn.outvars[0]] = after[number]
        elif last_place is not None and not needs:
            shared.append(eqn)
        elif last_place is not None and max(needs) <= last_place:
            here = min(max(original, *needs), last_place)
            parts[here].append(eqn)
            ready.update(dict.fromkeys(eqn.outvars, here))
        elif needs:
            ready.update(dict.fromkeys(eqn.outvars, max(needs)))
    last: dict[Variable, float] = {}
    for k, (part, number) in enumerate(zip(parts, order, strict=True)):
        last.update({var: k for eqn in part for var in _variables(eqn)})
        last.update(dict.fromkeys(_operands(products[number]), k + 0.5))
    there = set(batch)
    pieces = {}
    for k, (part, number) in enumerate(zip(parts, order, strict=True)):
        piece = _piece(part, {var for var, where in last.items() if where > k})
        there.update(piece.outs)
        spent = tuple(var for var in there if last.get(var, -1) <= k)
        there.difference_update(spent)
        result = products[number].outvars[0]
        there.add(result)
        dead = tuple(var for var in there if last.get(var, -1) < k + 1)
        there.difference_update(dead)
        names = ("x", *products[number].params["extras"])
        operands = dict(zip(names, _operands(products[number]), strict=True))
        pieces[number] = piece._replace(operands=operands, result=result, spent=spent, dead=dead)
    return _piece(shared, last), pieces


def _latest(
    eqns: Sequence[Equation], numbers: Sequence[int | None], place: dict[int, int]
) -> tuple[list[int], list[int | None]]:
    """For every equation the place of the product that it precedes, and the first place that needs it, None if none."""
    end = len(place)
    needed: dict[Variable, int] = {}
    preceded = [0] * len(eqns)
    latest: list[int | None] = [None] * len(eqns)
    at = end
    for i in reversed(range(len(eqns))):
        if (number := numbers[i]) is not None:
            at = wanted = place[number]
            uses = _operands(eqns[i])
        else:
            wanted = min((needed.get(var, end) for var in eqns[i].outvars), default=end)
            if wanted == end and eqns[i].effects and at < end:
                wanted = end - 1
            uses = _variables(eqns[i])
        preceded[i] = at
        if wanted < end:
            latest[i] = wanted
            needed.update({var: min(needed.get(var, end), wanted) for var in uses})
    return preceded, latest


def _operands(eqn: Equation) -> list[Variable]:
    """What a product needs besides its weight."""
    return [eqn.invars[0], *eqn.invars[2:]]


def _piece(eqns: Sequence[Equation], wanted: Collection[Variable]) -> Piece:
    """Compiles equations to a function of what they do not make themselves."""
    made = [var for eqn in eqns for var in eqn.outvars]
    inside = set(made)
    ins = list(dict.fromkeys(var for eqn in eqns for var in _variables(eqn) if var not in inside))
    outs = [var for var in made if var in wanted]
    number = {var: i for i, var in enumerate([*ins, *made])}
    structure = [
        (
            eqn.primitive,
            eqn.params,
            [var.val if hasattr(var, "val") else number[var] for var in eqn.invars],
            [number[var] for var in eqn.outvars],
        )
        for eqn in eqns
    ]
    key = Structure((structure, [var.aval for var in ins], [number[var] for var in outs]), (eqns, ins, outs))
    return Piece(_compiled(key), ins, outs)


@functools.lru_cache(maxsize=1024)
def _compiled(key: "Structure") -> Callable[..., list[Content]]:
    eqns, ins, outs = key.thing

    @jax.jit
    def piece(*values: Content) -> list[Content]:
        env = dict(zip(ins, values, strict=True))
        for eqn in eqns:
            with eqn.ctx.manager:
                made = eqn.primitive.bind(
                    *(var.val if hasattr(var, "val") else env[var] for var in eqn.invars),
                    **eqn.primitive.get_bind_params(eqn.params),
                )
            env.update(zip(eqn.outvars, made if eqn.primitive.multiple_results else [made], strict=True))
        return [env[var] for var in outs]

    return piece


def _variables(eqn: Equation) -> list[Variable]:
    """The operands that are not literals."""
    return [var for var in eqn.invars if not hasattr(var, "val")]


class Structure:
    """Equal for things of equal structure, so that a cache compiles them once; holds one of them."""

    def __init__(self, structure: object, thing: Content) -> None:
        self.structure, self.thing = _describe(structure), thing

    def __hash__(self) -> int:
        return hash(self.structure)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self.structure == other.structure


def _describe(value: object) -> Hashable:
    """A hashable description, equal for what computes the same."""
    if isinstance(value, dict):
        return tuple((key, _describe(value[key])) for key in sorted(value))
    if isinstance(value, tuple | list) and type(value) in (tuple, list):
        return (type(value).__name__, *map(_describe, value))
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        a = np.asarray(value)
        return (a.shape, str(a.dtype), a.tobytes())
    if hasattr(value, "eqns"):  # a jaxpr; its constants live as long as the cache holds them
        return (str(value), *map(id, getattr(value, "consts", ())))
    return value if _hashable(value) else repr(value)


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
