"""One pass over a net with two values per variable: in the original net, and in the one whose weights are replaced.

The flat equations of a traced function are cut at its products into pieces, each a compiled function of what lives
across it; equal pieces (the blocks of a deep net) share one compilation. At each product the walk stops, hands over
the inputs of both nets, takes new weights, and goes on. So a net of L layers costs two forward passes, not L.

Weights with several uses are handed over once, with the inputs of all uses. Branches that share weights are walked side
by side. Where a use depends on an earlier one of the same weights (a recurrent cell), or on weights that are used both
before and after (a block that is applied again), these weights are one group, see `lcq.ptq.schedule`: for each of
them, by their first uses, the group is walked from its start to the last use, in the other net with the weights that
are replaced so far; those of this turn, and of turns to come, are still the original ones. Then the group is walked
once more with all of them replaced, for the errors and for what follows.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.forms.dtypes import own_promotion, wider
from lcq.ptq.pieces import Structure, cut
from lcq.ptq.schedule import Group, schedule
from lcq.tracing.contraction import Operand, Product, Unit
from lcq.tracing.equation import Content
from lcq.tracing.program import Program
from lcq.tree.lazy import is_lazy, whole


class Use(NamedTuple):
    """A product that the walk has reached.

    Attributes:
        product: The product that the walk has reached.
        batches: The numbers of the batches whose shapes have this product.
        inputs: What each of them multiplies, in the original net and in the other; the same object while equal.
    """

    product: Product
    batches: tuple[int, ...]
    inputs: list[tuple[Operand, Operand]]


class Outcome:
    """What came of new weights.

    Attributes:
        error: ||Y - Y'||^2 / ||Y||^2 over all batches and uses, Y' the result in the other net; None until it is known.
    """

    error: float | None = None


class Visit:
    """Weights that the walk has reached.

    Attributes:
        unit: The weights that are rounded together; None for a product whose weights have been replaced before, or may
            not be.
        uses: The products of the weights; the first of them has their layout.
        results: The results of each use for each batch, in both nets; None before `finish`, and for a group.
        is_followed: whether the next visit may have the same inputs.
    """

    def __init__(self, walk: "_Walk", unit: Unit | None, uses: list[Use], alone: bool) -> None:
        self.unit, self.uses, self._walk, self._alone = unit, uses, walk, alone
        self.outcome, self.finished = Outcome(), False
        self.shift: Array | None = None
        self.results: list[list[Any]] | None = None
        self.is_followed = False

    @property
    def product(self) -> Product:
        """The first use."""
        return self.uses[0].product

    @property
    def inputs(self) -> list[tuple[Any, Any]]:
        """The data operands of the first use, for every batch in the original net and in the other."""
        return [(one.x, two.x) for one, two in self.uses[0].inputs]

    @own_promotion()
    def finish(self, shift: Array | None = None) -> Outcome:
        """Makes the products in both nets, with `shift` [G, n] added in the other, and goes on from there.

        Returns:
            The error, which a group knows when it has been walked for the last time.
        """
        self.shift, self.finished = shift, True
        if self._alone:
            made = [self._walk.multiply(use, shift) for use in self.uses]
            self.results = [results for results, _ in made]
            self.outcome.error = _relative([sums for _, sums in made])
        return self.outcome


def walk(
    programs: Program | Sequence[Program],
    original: dict[str, Any],
    other: dict[str, Any],
    batches: Sequence[Any],
    *,
    together: bool = True,
    offload: bool = True,
) -> Iterator[Visit]:
    """Yields all weights in the order of their first uses; the caller may replace `other[path]` and must call `finish`
    before the next.

    Args:
        programs: a traced function; or for each batch its trace on shapes like this batch's, the same object for equal
            ones.
        original: its parameters by path.
        other: the other net's, changed by the caller as the walk goes on.
        batches: of the shapes that were traced: (batch, counts), if the trace has any.
        together: whether weights with several uses are handed over once; else product by product.
        offload: whether what lives between pieces is kept in the host's memory instead of the accelerator's: for each
            batch two sets of activations, never more than one piece's on the device. What is spread over several
            devices stays there.
    """
    each = [programs] * len(batches) if isinstance(programs, Program) else list(programs)
    yield from _Walk(each, original, other, batches, together, offload).run()


class _Part:
    """One program and the batches of its shapes."""

    def __init__(
        self, program: Program, index: int, groups: list[Group], walk: "_Walk", batches: dict[int, Any]
    ) -> None:
        self.program, self.batches, self.walk = program, tuple(batches), walk
        shared, self.pieces = cut(program, index, groups)
        params = len(program.paths)
        variables = program.jaxpr.invars[:params]
        envs: list[dict[Any, Any]] = []
        for values in (walk.original, walk.other):
            env = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
            env.update(zip(variables, (values[path] for path in program.paths), strict=True))
            ins = [env[var] for var in shared.ins]
            if not envs or any(a is not envs[0][var] for a, var in zip(ins, shared.ins, strict=True)):
                made = shared.function(*map(whole, ins))
            env.update(zip(shared.outs, made, strict=True))
            envs.append(env)
        inputs = program.jaxpr.invars[params:]
        data = [dict(zip(inputs, jax.tree.leaves(batch), strict=True)) for batch in batches.values()]
        self.streams = [tuple(env | batch for env in envs) for batch in data]

    def advance(self, number: int) -> Use:
        """Runs what comes before a product."""
        piece = self.pieces[number]
        read: dict[int, Any] = {}  # once for all batches
        for stream in self.streams:
            ins = [[env[var] for var in piece.ins] for env in stream]
            lazy = {id(a): a for a in (*ins[0], *ins[1]) if is_lazy(a)}
            read.update({key: jnp.asarray(whole(a)) for key, a in lazy.items() if key not in read})
            given = [[read.get(id(a), a) for a in values] for values in ins]
            first = self.walk.keep(piece.function(*given[0]))
            same = all(a is b for a, b in zip(*ins, strict=True))
            second = first if same else self.walk.keep(piece.function(*given[1]))
            for env, made in zip(stream, (first, second), strict=True):
                env.update(zip(piece.outs, made, strict=True))
                for var in piece.spent:
                    del env[var]
        pairs = []
        for stream in self.streams:
            one, two = (Operand(**{name: env[var] for name, var in piece.operands.items()}) for env in stream)
            pairs.append((one, one if all(a is b for a, b in zip(one, two, strict=True)) else two))
        return Use(self.program.products[number], self.batches, pairs)

    def settle(self, number: int, results: Sequence[Any]) -> None:
        """Goes on with the results of a product."""
        piece = self.pieces[number]
        for stream, made in zip(self.streams, results, strict=True):
            for env, result in zip(stream, made, strict=True):
                env[piece.result] = result
                for var in piece.dead:
                    del env[var]

    def saved(self) -> list[tuple[dict[Any, Any], ...]]:
        return [tuple(map(dict, stream)) for stream in self.streams]


class _Walk:
    def __init__(
        self,
        programs: Sequence[Program],
        original: dict[str, Any],
        other: dict[str, Any],
        batches: Sequence[Any],
        together: bool,
        offload: bool,
    ) -> None:
        self.original, self.other = original, other
        self.offload = offload and jax.default_backend() != "cpu"
        different = list(dict.fromkeys(programs))
        self.units = different[0].units
        self.groups = schedule(different, together)
        self.parts = [
            _Part(program, i, self.groups, self, {k: b for k, b in enumerate(batches) if programs[k] is program})
            for i, program in enumerate(different)
        ]

    def run(self) -> Iterator[Visit]:
        for group, after in itertools.zip_longest(self.groups, self.groups[1:]):
            yield from self._again(group) if group.again else self._once(group, after)

    def _inputs(self, group: Group | None) -> list[list[Any]]:
        """The variables that the products of a group multiply."""
        each = () if group is None else zip(self.parts, group.products, strict=True)
        return [[part.pieces[n].operands["x"] for n in numbers] for part, numbers in each]

    def _once(self, group: Group, after: Group | None) -> Iterator[Visit]:
        """A unit whose uses do not depend on each other, or a product of other weights."""
        numbers = [(part, n) for part, each in zip(self.parts, group.products, strict=True) for n in each]
        uses = [part.advance(number) for part, number in numbers]
        visit = Visit(self, self.units[group.units[0]] if group.units else None, uses, True)
        visit.is_followed = self._inputs(group) == self._inputs(after)
        yield from _handed(visit)
        results = visit.results
        del visit, uses
        for (part, number), made in zip(numbers, results or (), strict=True):
            part.settle(number, made)

    def _again(self, group: Group) -> Iterator[Visit]:
        """A group is walked once for each of its units, and once more."""
        start = [part.saved() for part in self.parts]
        visits: dict[int, Visit] = {}
        shifts: dict[tuple[int, int], Any] = {}
        for u in group.units:
            uses = []
            for i, (part, numbers) in enumerate(zip(self.parts, group.products, strict=True)):
                part.streams = [tuple(map(dict, stream)) for stream in start[i]]
                wanted = part.program.units[u].uses
                for number in numbers[: numbers.index(wanted[-1]) + 1]:
                    use = part.advance(number)
                    if number in wanted:
                        uses.append(use)
                    if number != wanted[-1]:
                        part.settle(number, self.multiply(use, shifts.get((i, number)))[0])
            visits[u] = visit = Visit(self, self.units[u], uses, False)
            del uses
            yield from _handed(visit)
            visit.uses = []
            for i, part in enumerate(self.parts):
                shifts.update({(i, number): visit.shift for number in part.program.units[u].uses})
        sums: dict[int, list[Any]] = {u: [] for u in group.units}
        for i, (part, numbers) in enumerate(zip(self.parts, group.products, strict=True)):
            part.streams = start[i]
            for number in numbers:
                results, squares = self.multiply(part.advance(number), shifts.get((i, number)))
                part.settle(number, results)
                for u in group.units:
                    if number in part.program.units[u].uses:
                        sums[u].append(squares)
        for u in group.units:
            visits[u].outcome.error = _relative(sums[u])

    @own_promotion()
    def multiply(self, use: Use, shift: Array | None = None) -> tuple[list[Content], list[Content]]:
        product = use.product
        function = _multiplier(Structure(product.structure, product))
        equal = self.original[product.path] is self.other[product.path] and shift is None
        w, v = (product.weight.of(values[product.path]) for values in (self.original, self.other))
        results, sums = [], []
        for x, y in use.inputs:
            same = equal and x is y
            *made, squares = function(x, None if same else y, w, v, shift)
            made = self.keep(made)
            results.append((made[0], made[0]) if same else made)
            sums.append(squares)
        return results, jax.device_get(sums)

    def keep(self, values: Sequence[Content]) -> Sequence[Any]:
        """The values, in the host's memory if they are offloaded; what is spread over a mesh stays there."""
        return [jax.device_get(a) if self.offload and not _is_spread(a) else a for a in values]


def _is_spread(a: Content) -> bool:
    return isinstance(a, jax.Array) and len(a.sharding.device_set) > 1


def _handed(visit: Visit) -> Iterator[Visit]:
    yield visit
    if not visit.finished:
        raise RuntimeError(f"{visit.product.path}: expected Visit.finish before the next product")


def _relative(sums: Sequence[Sequence[Any]]) -> float:
    """The error of uses and batches together."""
    error, norm, size = np.asarray([each for use in sums for each in use], np.float64).T
    whole = (norm * size**2).sum()
    return float((error * size**2).sum() / whole) if whole > 0 else 0.0


@functools.lru_cache(maxsize=256)
def _multiplier(key: Structure) -> Any:
    """The product in both nets and ||Y - Y'||^2/s^2, ||Y||^2/s^2, s = max |Y|, compiled once for its kind; over the
    rows that count."""
    product: Product = key.thing

    @jax.jit
    def multiply(x: Operand, y: Operand | None, w: Any, v: Any, shift: Any) -> Any:
        first = product(x.x, w, x.sizes)
        second = first if y is None else product(y.x, v, y.sizes)
        if shift is not None:
            second = second + product.spread(shift).astype(second.dtype)
        wide = first.astype(wider(first.dtype, jnp.float32))
        if y is not None and product.kind == "ragged":
            wide = jnp.where(_paired(product, x, y), wide, product(y.x, w, y.sizes).astype(wide.dtype))
        away = wide - second.astype(wide.dtype)
        for counts in (each.counts for each in (x, y) if each is not None and each.counts is not None):
            wide, away = (jnp.where(counts, a, jnp.zeros((), a.dtype)) for a in (wide, away))
        size = jnp.maximum(jnp.abs(wide).max(), jnp.finfo(wide.dtype).tiny)  # or squares could overflow
        return first, second, jnp.stack([((away / size) ** 2).sum(), ((wide / size) ** 2).sum(), size])

    return multiply


def _paired(product: Product, x: Operand, y: Operand) -> Array:
    """Which rows of a ragged product's result are those of an expert with the same rows in both nets; the error of the
    others is that of the quantized net's own inputs. Broadcasts against the result."""
    members = product.members(y)
    same = members & (members == product.members(x)).all(1, keepdims=True)
    shape = jax.eval_shape(product.__call__, y.x, product.w, y.sizes).shape
    batch = len(product.params["ragged_dot_dimension_numbers"].dot_dimension_numbers[1][0])
    rows = len(product.x.shape) - batch - len(product.contracted)
    groups = math.prod(shape[:batch])
    paired = same.reshape(groups, -1, members.shape[1]).any(1)
    return paired.reshape(*shape[: batch + rows], *(1 for _ in shape[batch + rows :]))
