"""Which products a function makes with its parameters: the function is traced once, and its equations are followed.

`trace` inlines every call, unrolls the scans that a followed parameter enters, and follows each parameter through
changes of layout to the dots and convolutions that use it. In the flat list of equations that results each such product
is one equation, whose meaning (gather statistics, use other weights) is the caller's.

With `jaxprs` the only file that uses jax's internal names.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lcq import joined
from lcq.jaxprs import CALLS, LAYOUT, OPAQUE, PRODUCTS, bind, evaluate, inner, opened, scan_of, struct, weighs, where
from lcq.obstacles import cannot_follow, not_whole, shared_in_part
from lcq.products import Placed, Product, Shift, Step, per_neuron, uses_of_each
from lcq.rules import check_numbers, flatten


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A traced function: flat equations over numbered variables.

    Attributes:
        jaxpr: one list of equations; inputs are the parameters' leaves, then the leaves of the batch.
        consts: values of its constants.
        paths: of the parameters, in order.
        products: those with a followed parameter, in order of their equations.
        first: numbers of the products that are the first to use their weights.
        shifts: by product, the bias or mean that can take a constant added to its result.
    """

    jaxpr: Any
    consts: Sequence[Any]
    paths: tuple[str, ...]
    products: tuple[Product, ...]
    first: frozenset[int]
    shifts: dict[int, Shift]

    @staticmethod
    def product_of(eqn: Any) -> int | None:
        """The number of the product that an equation stands for."""
        return eqn.params["number"] if eqn.primitive is _product_p else None


_product_p = core.Primitive("lcq_product")
_product_p.def_abstract_eval(lambda x, w, *, number, aval: aval)


def trace(
    fn: Callable[[Any, Any], Any], params: Any, batch: Any, selected: Collection[str], *, strict: bool = True
) -> Program:
    """Follows parameters of fn to the products that use them.

    Args:
        fn: (params, batch) -> anything; traced, never run.
        params: a tree of arrays or shape structs.
        batch: a tree of arrays or shape structs.
        selected: paths of the leaves to follow.
        strict: whether selected leaves must reach products, whole, and nothing else.

    Raises:
        ValueError: names the leaf, the way it went, the equation it cannot be followed through, and the remedy.
    """
    leaves, structure = flatten(params)
    check_numbers(leaves)

    def flat(values: Sequence[Any], batch: Any) -> Any:
        return fn(jax.tree.unflatten(structure, values), batch)

    values = list(leaves.values())
    closed = jax.make_jaxpr(flat)(values, batch)
    follower = _Follower(leaves, frozenset(selected), strict)
    whole = jax.make_jaxpr(functools.partial(follower.run_whole, closed))(values, jax.tree.leaves(batch))
    if strict:
        follower.check_coverage()
    jaxpr, consts = opened(whole)
    return Program(
        jaxpr,
        tuple(consts),
        tuple(leaves),
        tuple(follower.products),
        frozenset(follower.fresh),
        follower.shifts(),
    )


@dataclasses.dataclass(eq=False)
class _Value:
    """What is known of a variable while the equations are run again.

    Attributes:
        array: its tracer, or a constant.
        data: whether it follows from the batch.
        param: whether it follows from a parameter.
        placed: set while it is nothing but a parameter, moved.
        result: set while it is nothing but a product's result, moved.
        pieces: set while it is a concatenation, moved, of values of which some are followed.
        axis: along which these are joined.
        reads: equations that use it.
    """

    array: Any
    data: bool = False
    param: bool = False
    placed: Placed | None = None
    result: "_Result | None" = None
    pieces: "tuple[_Value, ...]" = ()
    axis: int = 0
    reads: int = 0

    @property
    def joint(self) -> joined.Joint:
        """How its pieces make it."""
        return joined.Joint(self.axis, tuple(np.shape(piece.array)[self.axis] for piece in self.pieces))


class _Result(NamedTuple):
    number: int
    steps: tuple[Step, ...]
    before: tuple[_Value, ...]


class _Use(NamedTuple):
    """Where a followed leaf ends that is not selected; `added` says to which result."""

    placed: Placed
    added: tuple[_Value, int, tuple[int, ...]] | None


class _Follower:
    """Runs equations again, under a trace, so that calls disappear and products stand out."""

    def __init__(self, leaves: dict[str, Any], selected: frozenset[str], strict: bool) -> None:
        self.leaves, self.selected, self.strict = leaves, selected, strict
        self.products: list[Product] = []
        self.uses: dict[str, list[_Use]] = {path: [] for path in leaves}
        self.reached = {path: np.zeros(math.prod(np.shape(leaf)), bool) for path, leaf in self._chosen()}
        self.fresh: set[int] = set()
        self.source: str | None = None

    def _chosen(self) -> Iterator[tuple[str, Any]]:
        return ((path, leaf) for path, leaf in self.leaves.items() if path in self.selected)

    def run_whole(self, closed: Any, values: Sequence[Any], batch: Sequence[Any]) -> list[Any]:
        params = [
            _Value(value, param=True, placed=Placed(path) if jnp.issubdtype(value.dtype, jnp.floating) else None)
            for path, value in zip(self.leaves, values, strict=True)
        ]
        args = [*params, *(_Value(leaf, data=True) for leaf in batch)]
        results = self.run(closed, args)
        for result in results:
            self._end(result, None)
        return [result.array for result in results]

    def run(self, closed: Any, args: Sequence[_Value]) -> list[_Value]:
        """Evaluates equations, all calls inlined."""
        return evaluate(closed, args, self._equation, _Value)

    def _equation(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name in CALLS and (closed := inner(eqn)) is not None:
            return self.run(closed, ins)
        if name == "scan" and any(self._followed(value) for value in ins):
            return self._unroll(eqn, ins)
        if name in joined.JOINS and any(self._followed(value) for value in ins):
            return [self._join(eqn, ins)]
        if any(value.pieces for value in ins) and (apart := self._apart(eqn, ins)) is not None:
            return apart
        if name in PRODUCTS and (side := self._side(eqn, ins)) is not None:
            return [self._product(eqn, ins, side)]
        if name in LAYOUT and all(not isinstance(value.array, jax.core.Tracer) for value in ins[1:]):
            if (moved := self._move(eqn, ins)) is not None:
                return moved
        return self._plain(eqn, ins)

    def _followed(self, value: _Value) -> bool:
        if value.pieces:
            return any(map(self._followed, value.pieces))
        return value.placed is not None and value.placed.path in self.selected

    def _join(self, eqn: Any, ins: list[_Value]) -> _Value:
        """A concatenation of followed parameters, and perhaps of other things."""
        axis = eqn.params[joined.JOINS[eqn.primitive.name]]
        (array,) = bind(eqn, [value.array for value in ins])
        pieces = []
        for value in ins:
            if not self._followed(value):
                self._end(value, eqn)
                value = _Value(value.array, value.data, value.param)
            if eqn.primitive.name == "stack":
                (value,) = self._within(eqn, lambda a: jnp.expand_dims(a, axis), value)
            pieces.append(value)
        return _Value(array, any(value.data for value in ins), True, pieces=tuple(pieces), axis=axis)

    def _apart(self, eqn: Any, ins: list[_Value]) -> list[_Value] | None:
        """An equation on a concatenation, as equations on its pieces; None if it is none on each of them."""
        side = next(i for i, value in enumerate(ins) if value.pieces)
        value = ins[side]
        if eqn.primitive.name in PRODUCTS:
            product = joined.product(eqn, side, value.joint)
            return None if product is None else self._within(eqn, product, ins[1 - side], *value.pieces)
        arrays = [value.array for value in ins]
        if any(isinstance(array, jax.core.Tracer) for array in arrays[1:]):
            return None
        moved = joined.moved(eqn, value.joint, np.shape(value.array), arrays[1:])
        if moved is None:
            return None
        arrays = bind(eqn, arrays)
        return [self._part(eqn, value, out, array) for out, array in zip(moved, arrays, strict=True)]

    def _part(self, eqn: Any, value: _Value, part: joined.Moved, array: Any) -> _Value:
        """A moved concatenation, or the one piece that is left of it."""
        pieces = [made for i, move in part.pieces for made in self._within(eqn, move, value.pieces[i])]
        if len(pieces) == 1:
            return pieces[0]
        return _Value(array, value.data, value.param, pieces=tuple(pieces), axis=part.axis)

    def _within(self, eqn: Any, function: Callable[..., Any], *values: _Value) -> list[_Value]:
        """The equations of a function, run in the place of another equation."""
        outer, self.source = self.source, self.source or where(eqn)
        results = self.run(jax.make_jaxpr(function)(*(value.array for value in values)), values)
        self.source = outer
        return results

    def _plain(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        """An equation that is left as it is; parameters end here."""
        for i, value in enumerate(ins):
            self._end(value, eqn, self._addition(eqn, ins, i))
        arrays = [value.array for value in ins]
        fold = not any(isinstance(a, jax.core.Tracer) for a in arrays) and all(
            math.prod(var.aval.shape) == 1 and not jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars
        )
        if fold and not eqn.effects:
            with jax.ensure_compile_time_eval():
                outs = bind(eqn, arrays)
        else:
            outs = bind(eqn, arrays)
        data, param = any(v.data for v in ins), any(v.param for v in ins)
        return [_Value(out, data, param) for out in outs]

    def _end(self, value: _Value, eqn: Any, added: Any = None, *, within: str = "") -> None:
        """A value is used by an equation, or returned (None): if it is a parameter, its way ends."""
        value.reads += 1
        for piece in value.pieces:
            self._end(piece, eqn, within=" -> concatenate")
        if value.placed is None:
            return
        opaque = eqn is not None and eqn.primitive.name in OPAQUE
        if self._followed(value) and (self.strict or opaque):
            raise ValueError(cannot_follow(value.placed.path, value.placed.chain() + within, eqn, self.source))
        self.uses[value.placed.path].append(_Use(value.placed, added))

    def _addition(self, eqn: Any, ins: list[_Value], i: int) -> Any:
        """(result, sign, shape) if operand i is a parameter added to the result of a product, in that order or not."""
        if eqn.primitive.name not in ("add", "add_any", "sub") or ins[i].placed is None:
            return None
        other = ins[1 - i]
        if other.result is None or (eqn.primitive.name == "sub" and i == 0):
            return None
        return other, -1 if eqn.primitive.name == "sub" else 1, tuple(eqn.outvars[0].aval.shape)

    def _move(self, eqn: Any, ins: list[_Value]) -> list[_Value] | None:
        """A change of layout of a parameter or of a product's result; None if it is neither, or copies elements."""
        value = ins[0]
        size = sum(math.prod(var.aval.shape) for var in eqn.outvars)
        grows = size > math.prod(np.shape(value.array))
        if (value.placed is None and value.result is None) or (len(ins) > 1 and eqn.primitive.name != "dynamic_slice"):
            return None
        if grows and (value.result is not None or self._followed(value)):
            return None
        if value.result is not None and (len(eqn.outvars) > 1 or size < math.prod(np.shape(value.array))):
            return None
        params = eqn.primitive.get_bind_params(eqn.params)
        rest = tuple(np.asarray(other.array) for other in ins[1:])
        outs = bind(eqn, [other.array for other in ins])
        moved = []
        for i, out in enumerate(outs):
            step = Step(eqn.primitive, params, rest, i)
            if value.placed is not None:
                moved.append(_Value(out, param=True, placed=value.placed.then(step)))
            elif value.result is not None:
                number, steps, before = value.result
                result = _Result(number, (*steps, step), (*before, value))
                moved.append(_Value(out, value.data, value.param, result=result))
        if value.result is not None:
            value.reads += 1
        return moved

    def _side(self, eqn: Any, ins: list[_Value]) -> int | None:
        """Which operand of a product is a parameter to follow; None if the product is left as it is."""
        sides = [i for i, value in enumerate(ins) if self._followed(value) and not value.pieces]
        if not sides:
            return None
        other = ins[1 - sides[0]]
        return sides[0] if (other.data or not other.param) and weighs(eqn, sides[0]) else None

    def _product(self, eqn: Any, ins: list[_Value], side: int) -> _Value:
        x, w = ins[1 - side], ins[side]
        assert w.placed is not None
        aval = eqn.outvars[0].aval
        number = len(self.products)
        product = Product(
            number,
            w.placed,
            eqn.primitive,
            eqn.primitive.get_bind_params(eqn.params),
            side,
            struct(jax.typeof(x.array)),
            struct(jax.typeof(w.array)),
            struct(aval),
            self.source or where(eqn),
        )
        self.products.append(product)
        if self.strict:
            self._reach(product)
        x.reads += 1
        y = _product_p.bind(x.array, w.array, number=number, aval=aval)
        value = _Value(y, data=True, param=True)
        value.result = _Result(number, (), ())
        return value

    def _reach(self, product: Product) -> None:
        """Notes which elements of the leaf this product uses: all new, or all seen before."""
        reached = self.reached[product.path]
        places = product.weight.elements(self.leaves[product.path].shape).reshape(-1)
        seen = reached[places]
        if seen.any() and not seen.all():
            way, name, used = product.weight.chain(), product.primitive.name, int(seen.sum())
            raise ValueError(shared_in_part(product.path, way, name, product.source, used, len(seen)))
        if not seen.any():
            self.fresh.add(product.number)
        reached[places] = True

    def check_coverage(self) -> None:
        """Raises unless every element of every selected leaf has reached a product."""
        for path, reached in self.reached.items():
            if not reached.all():
                raise ValueError(not_whole(path, int(reached.sum()), reached.size))

    def _unroll(self, eqn: Any, ins: list[_Value]) -> list[_Value]:
        """A scan, round by round."""
        body, fixed, carries = scan_of(eqn)
        length = eqn.params["length"]
        constants, carry = ins[:fixed], ins[fixed : fixed + carries]
        slices = [self._rounds(value, eqn) for value in ins[fixed + carries :]]
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        ys: list[list[_Value]] = [[_Value(None)] * length for _ in eqn.outvars[carries:]]
        for i in order:
            results = self.run(body, [*constants, *carry, *(each[i] for each in slices)])
            carry = results[:carries]
            for column, value in zip(ys, results[carries:], strict=True):
                self._end(value, eqn)
                column[i] = value
        return [*carry, *map(_stack, ys)]

    def _rounds(self, value: _Value, eqn: Any) -> list[_Value]:
        """What each round of a scan gets of one of its inputs."""
        length = eqn.params["length"]
        if value.pieces:
            joint, shape = value.joint, np.shape(value.array)
            parts = [joined.taken(joint, shape, i) for i in range(length)]
            return [self._part(eqn, value, *each) for each in zip(parts, jnp.unstack(value.array), strict=True)]
        if value.placed is None:
            return [_Value(a, value.data, value.param) for a in jnp.unstack(value.array)]
        rounds = []
        for i in range(length):
            array = jax.lax.dynamic_index_in_dim(value.array, i, 0, keepdims=False)
            rounds.append(_Value(array, param=True, placed=value.placed.at(i, jax.typeof(array).shape)))
        return rounds

    def shifts(self) -> dict[int, Shift]:
        """The parameters that can take a constant added to each neuron of a product, by the product's number."""
        found = {}
        for path, uses in self.uses.items():
            if path in self.selected or all(use.added is None for use in uses):
                continue
            shape = np.shape(self.leaves[path])
            places = [use.placed.elements(shape) for use in uses]
            often = uses_of_each(places, math.prod(shape))
            for use, each in zip(uses, places, strict=True):
                if use.added is None or (often[each] > 1).any():
                    continue
                value, sign, onto = use.added
                assert value.result is not None
                if all(v.reads == 1 for v in (value, *value.result.before)):
                    elements = per_neuron(self.products[value.result.number], value.result.steps, each, onto)
                    if elements is not None:
                        found[value.result.number] = Shift(path, sign, elements)
        return found


def _stack(values: list[_Value]) -> _Value:
    data, param = any(v.data for v in values), any(v.param for v in values)
    return _Value(jnp.stack([v.array for v in values]), data, param)
