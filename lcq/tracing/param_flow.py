"""Which products a function makes with its parameters: the function is traced once, and its equations are followed.

`trace` inlines every call, unrolls the scans that a followed parameter enters, and follows each parameter through
changes of layout to the dots and convolutions that use it. In the flat list of equations that results each such product
is one equation, whose meaning (gather statistics, use other weights) is the caller's.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms.dtypes import native_tree
from lcq.tracing import joined, positions, shards
from lcq.tracing.biases import Added, BiasSite, Ending, bias_sites
from lcq.tracing.contraction import Product
from lcq.tracing.equation import Body, Content, Equation
from lcq.tracing.jaxpr import (
    CALLS,
    DATA_MOVEMENT,
    OPAQUE,
    PRODUCTS,
    RAGGED,
    bind,
    evaluate,
    inner,
    opened,
    scan_of,
    struct,
    weighs,
    where,
)
from lcq.tracing.obstacles import cannot_follow
from lcq.tracing.param_site import ParamSite, Step
from lcq.tracing.program import Program, product_p
from lcq.tracing.units import Units
from lcq.tracing.values import Result, Value, carried, count, stack, unstack
from lcq.tree.aliases import Batch, Function, Leaves, Params
from lcq.tree.lazy import shape_of
from lcq.tree.paths import check_numbers, flatten


def trace(
    fn: Function,
    params: Params,
    batch: Batch,
    selected: Collection[str],
    *,
    strict: bool = True,
    counts: Sequence[Content] | None = None,
) -> Program:
    """Follows parameters of fn to the products that use them.

    Args:
        fn: (params, batch) -> anything; traced, never run.
        params: a tree of arrays or shape structs.
        batch: a tree of arrays or shape structs.
        selected: paths of the leaves to follow.
        strict: whether selected leaves must reach products, whole, and nothing else.
        counts: for every leaf of the batch a boolean array of its leading axes, which positions count, or None; those
            that are not None become inputs of the trace, after the batch's.

    Raises:
        ValueError: names the leaf, the way it went, the equation it cannot be followed through, and the remedy.
    """
    leaves, structure = flatten(params)
    check_numbers(leaves)
    batch = native_tree(batch)

    def flat(values: Sequence[Content], batch: Batch) -> PyTree:
        return fn(jax.tree.unflatten(structure, values), batch)

    values = list(map(shape_of, leaves.values()))
    closed = jax.make_jaxpr(flat)(values, batch)
    follower = _Follower(leaves, frozenset(selected), strict)
    given = jax.tree.leaves(batch)
    masks = [None] * len(given) if counts is None else counts
    whole = jax.make_jaxpr(functools.partial(follower.run_whole, closed))(values, given, masks)
    if strict:
        follower.units.check()
    jaxpr, consts = opened(whole)
    return Program(
        jaxpr,
        tuple(consts),
        tuple(leaves),
        tuple(follower.products),
        tuple(follower.units.units),
        follower.biases(),
    )


_ADDITIONS = {"add", "add_any", "sub"}


class _Follower:
    """Runs equations again, under a trace, so that calls disappear and products stand out."""

    def __init__(self, leaves: Leaves, selected: frozenset[str], strict: bool) -> None:
        self.leaves, self.selected, self.strict = leaves, selected, strict
        self.products: list[Product] = []
        self.uses: dict[str, list[Ending]] = {path: [] for path in leaves}
        self.units = Units({path: leaf for path, leaf in leaves.items() if path in selected})
        self.source: str | None = None

    def run_whole(
        self, closed: Body, values: Sequence[Content], batch: Sequence[Content], masks: Sequence[Content]
    ) -> list[Content]:
        params = [
            Value(value, param=True, site=ParamSite(path) if jnp.issubdtype(value.dtype, jnp.floating) else None)
            for path, value in zip(self.leaves, values, strict=True)
        ]
        args = [*params]
        for leaf, mask in zip(batch, masks, strict=True):
            args.append(Value(leaf, data=True, mask=None if mask is None else positions.leading(mask, leaf.shape)))
        results = self.run(closed, args)
        for result in results:
            self._end(result, None)
        return [result.array for result in results]

    def run(self, closed: Body, args: Sequence[Value]) -> list[Value]:
        """Evaluates equations, all calls inlined."""
        return evaluate(closed, args, self._equation, Value)

    def _equation(self, eqn: Equation, ins: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name in CALLS and (closed := inner(eqn)) is not None:
            return self.run(closed, ins)
        if name == "scan" and any(self._followed(value) or value.mask is not None for value in ins):
            return self._unroll(eqn, ins)
        if name == "shard_map" and any(self._followed(value) for value in ins) and (function := shards.whole(eqn)):
            return self._within(eqn, function, *ins)
        if name in joined.JOINS and self._are_joined(ins):
            return self._join(eqn, ins)
        if name in _ADDITIONS and (sums := self._sums(eqn, ins)) is not None:
            return sums
        if any(value.pieces for value in ins) and (apart := self._apart(eqn, ins)) is not None:
            return apart
        if (name in PRODUCTS or name == RAGGED) and (side := self._side(eqn, ins)) is not None:
            return [self._product(eqn, ins, side)]
        if name in DATA_MOVEMENT and all(not isinstance(value.array, jax.core.Tracer) for value in ins[1:]):
            if (moved := self._move(eqn, ins)) is not None:
                return moved
        return self._plain(eqn, ins)

    def _followed(self, value: Value) -> bool:
        if value.pieces:
            return any(map(self._followed, value.pieces))
        return value.site is not None and value.site.path in self.selected

    def _are_joined(self, ins: list[Value]) -> bool:
        """Whether a concatenation is to be followed: of what is rounded, of results of products, or of biases."""
        return any(self._followed(v) or v.has_result for v in ins) or all(v.has_site for v in ins)

    def _join(self, eqn: Equation, ins: list[Value]) -> list[Value]:
        """A concatenation of parameters, or of results of products, and perhaps of other things."""
        axis = eqn.params[joined.JOINS[eqn.primitive.name]]
        (array,) = bind(eqn, [value.array for value in ins])
        pieces: list[Value] = []
        for value in ins:
            if not (value.has_site or value.has_result):
                self._end(value, eqn)
                value = Value(value.array, value.data, value.param, mask=value.mask, lost=value.lost)
            if eqn.primitive.name == "stack":
                (value,) = self._within(eqn, lambda a: jnp.expand_dims(a, axis), value)
            pieces += value.pieces if value.pieces and value.axis == axis else [value]
        data = any(value.data for value in ins)
        return self._counted(eqn, ins, [Value(array, data, True, pieces=tuple(pieces), axis=axis)])

    def _sums(self, eqn: Equation, ins: list[Value]) -> list[Value] | None:
        """[Y1 Y2] + [b1 b2] = [Y1 + b1, Y2 + b2] for results of products and parameters that are none of their own."""
        side = next((i for i, value in enumerate(ins) if value.pieces and value.has_result), None)
        if side is None or self._followed(other := ins[1 - side]) or not other.has_site:
            return None
        shape, axis = np.shape(ins[side].array), ins[side].axis
        if np.ndim(other.array) != len(shape) or np.shape(other.array)[axis] != shape[axis]:
            return None
        return self._within(eqn, joined.added(eqn, side, ins[side].joint), other, *ins[side].pieces)

    def _apart(self, eqn: Equation, ins: list[Value]) -> list[Value] | None:
        """An equation on a concatenation, as equations on its pieces; None if it is none on each of them."""
        if eqn.primitive.name in PRODUCTS:
            side = next((i for i, value in enumerate(ins[:2]) if value.pieces and self._followed(value)), None)
            if side is None:
                return None
            value = ins[side]
            product = joined.product(eqn, side, value.joint)
            return None if product is None else self._within(eqn, product, ins[1 - side], *value.pieces)
        side = next(i for i, value in enumerate(ins) if value.pieces)
        value = ins[side]
        arrays = [value.array for value in ins]
        if any(isinstance(array, jax.core.Tracer) for array in arrays[1:]):
            return None
        moved = joined.moved(eqn, value.joint, np.shape(value.array), arrays[1:])
        if moved is None:
            return None
        arrays = bind(eqn, arrays)
        parts = [self._part(eqn, value, out, array) for out, array in zip(moved, arrays, strict=True)]
        return self._counted(eqn, ins, parts)

    def _part(self, eqn: Equation, value: Value, part: joined.Moved, array: Content) -> Value:
        """A moved concatenation, or the one piece that is left of it."""
        pieces = [made for i, move in part.pieces for made in self._within(eqn, move, value.pieces[i])]
        if len(pieces) == 1:
            return pieces[0]
        return Value(array, value.data, value.param, pieces=tuple(pieces), axis=part.axis)

    def _within(self, eqn: Equation, function: Callable[..., PyTree], *values: Value) -> list[Value]:
        """The equations of a function, run in the place of another equation."""
        outer, self.source = self.source, self.source or where(eqn)
        results = self.run(jax.make_jaxpr(function)(*(value.array for value in values)), values)
        self.source = outer
        return results

    def _counted(self, eqn: Equation, ins: list[Value], results: list[Value]) -> list[Value]:
        return count(eqn, ins, results, self.source or where(eqn))

    def _plain(self, eqn: Equation, ins: list[Value]) -> list[Value]:
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
        return self._counted(eqn, ins, [Value(out, data, param) for out in outs])

    def _end(self, value: Value, eqn: Equation | None, added: Added | None = None, *, within: str = "") -> None:
        """A value is used by an equation, or returned (None): if it is a parameter, its way ends."""
        value.reads += 1
        for piece, part in zip(value.pieces, added.pieces(value) if added else [None] * len(value.pieces), strict=True):
            self._end(piece, eqn, part, within=" -> concatenate")
        if value.site is None:
            return
        opaque = eqn is not None and eqn.primitive.name in OPAQUE
        if self._followed(value) and (self.strict or opaque):
            raise ValueError(cannot_follow(value.site.path, value.site.chain() + within, eqn, self.source))
        self.uses[value.site.path].append(Ending(value.site, added))

    def _addition(self, eqn: Equation, ins: list[Value], i: int) -> Added | None:
        """Of operand i, if it is a parameter added to the result of a product, in that order or not."""
        if eqn.primitive.name not in _ADDITIONS or not ins[i].has_site:
            return None
        other = ins[1 - i]
        if other.result is None or (eqn.primitive.name == "sub" and i == 0):
            return None
        return Added(other, -1 if eqn.primitive.name == "sub" else 1, tuple(eqn.outvars[0].aval.shape))

    def _move(self, eqn: Equation, ins: list[Value]) -> list[Value] | None:
        """A change of layout of a parameter or of a product's result; None if it is neither, or copies elements."""
        value = ins[0]
        size = sum(math.prod(var.aval.shape) for var in eqn.outvars)
        grows = size > math.prod(np.shape(value.array))
        if (value.site is None and value.result is None) or (len(ins) > 1 and eqn.primitive.name != "dynamic_slice"):
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
            if value.site is not None:
                moved.append(Value(out, param=True, site=value.site.then(step)))
            elif value.result is not None:
                number, steps, before = value.result
                result = Result(number, (*steps, step), (*before, value))
                moved.append(Value(out, value.data, value.param, result=result))
        if value.result is not None:
            value.reads += 1
        return self._counted(eqn, ins, moved)

    def _side(self, eqn: Equation, ins: list[Value]) -> int | None:
        """Which operand of a product is a parameter to follow; None if the product is left as it is."""
        sides = [i for i, value in enumerate(ins[:2]) if self._followed(value) and not value.pieces]
        if not sides:
            return None
        other = ins[1 - sides[0]]
        return sides[0] if (other.data or not other.param) and weighs(eqn, sides[0]) else None

    def _product(self, eqn: Equation, ins: list[Value], side: int) -> Value:
        x, w = ins[1 - side], ins[side]
        extras = {"sizes": ins[2].array} if eqn.primitive.name == RAGGED else {}
        (value,) = self._counted(eqn, ins, [Value(None, data=True, param=True)])
        if value.mask is not None:
            extras["counts"] = value.mask
        assert w.site is not None
        aval = eqn.outvars[0].aval
        number = len(self.products)
        product = Product(
            number,
            w.site,
            eqn.primitive,
            eqn.primitive.get_bind_params(eqn.params),
            side,
            struct(jax.typeof(x.array)),
            struct(jax.typeof(w.array)),
            struct(aval),
            self.source or where(eqn),
        )
        mixed = positions.varies(x.mask, product.contracted)
        product = dataclasses.replace(
            product, lost=f"{product.primitive.name} at {product.source}" if mixed else value.lost
        )
        self.products.append(product)
        if self.strict:
            self.units.add(product)
        self._end(x, eqn)
        y = product_p.bind(x.array, w.array, *extras.values(), number=number, aval=aval, extras=tuple(extras))
        value.array = y
        if product.kind != "ragged":  # a bias would differ from row to row
            value.result = Result(number, (), ())
        return value

    def _unroll(self, eqn: Equation, ins: list[Value]) -> list[Value]:
        """A scan, round by round."""
        body, fixed, carries = scan_of(eqn)
        length = eqn.params["length"]
        ins = [self._settled(value, eqn) for value in ins]
        constants, carry = ins[:fixed], ins[fixed : fixed + carries]
        slices = [self._rounds(value, eqn) for value in ins[fixed + carries :]]
        order = range(length - 1, -1, -1) if eqn.params["reverse"] else range(length)
        ys: list[list[Value]] = [[Value(None)] * length for _ in eqn.outvars[carries:]]
        seen = None
        for i in order:
            here = next((each[i].examples for each in slices if each[i].examples is not None), None)
            if here is not None:  # a sequence: in this step the state counts where what it takes in does
                carry, seen = [carried(value, here) for value in carry], here if seen is None else seen | here
            results = self.run(body, [*constants, *carry, *(each[i] for each in slices)])
            carry = results[:carries]
            for column, value in zip(ys, results[carries:], strict=True):
                self._end(value, eqn)
                column[i] = value
        if seen is not None:
            carry = [carried(value, seen) for value in carry]
        return [*carry, *map(stack, ys)]

    def _settled(self, value: Value, eqn: Equation) -> Value:
        """What a scan takes of results of products: they are used there."""
        if not value.has_result:
            return value
        self._end(value, eqn)
        return Value(value.array, value.data, value.param, mask=value.mask, lost=value.lost)

    def _rounds(self, value: Value, eqn: Equation) -> list[Value]:
        """What each round of a scan gets of one of its inputs."""
        length = eqn.params["length"]
        if value.pieces:
            joint, shape = value.joint, np.shape(value.array)
            parts = [joined.taken(joint, shape, i) for i in range(length)]
            return [self._part(eqn, value, *each) for each in zip(parts, jnp.unstack(value.array), strict=True)]
        if value.site is None:
            return unstack(value)
        rounds = []
        for i in range(length):
            array = jax.lax.dynamic_index_in_dim(value.array, i, 0, keepdims=False)
            rounds.append(Value(array, param=True, site=value.site.at(i, jax.typeof(array).shape)))
        return rounds

    def biases(self) -> dict[int, BiasSite]:
        """What can take a constant added to each neuron of a product, by the product's number."""
        others = {path: uses for path, uses in self.uses.items() if path not in self.selected}
        return bias_sites(others, {path: np.shape(leaf) for path, leaf in self.leaves.items()}, self.products)
