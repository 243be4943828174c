"""The equations of a function gone through with what is known of each variable in place of its value."""

import abc
import math
from collections.abc import Hashable, Sequence
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lcq.tracing.equation import Body, Content, Equation
from lcq.tracing.jaxpr import CALLS, bind, evaluate, inner, scan_of, where
from lcq.tree.aliases import Batch, Function, Leaves
from lcq.tree.lazy import shape_of

_FOLDED = 4096
"""Whole numbers that are computed on the way, at most so many in an array."""

V = TypeVar("V")


class AbstractWalk(abc.ABC, Generic[V]):
    """Goes through a jaxpr: calls are inlined, scans of what is followed are gone through round by round."""

    def __init__(self) -> None:
        self._calls: list[Equation] = []

    @abc.abstractmethod
    def constant(self, content: Content) -> V:
        """What is known of a constant."""

    @abc.abstractmethod
    def rule(self, eqn: Equation, ins: list[V]) -> list[V]:
        """What is known of the results of an equation."""

    @abc.abstractmethod
    def known(self, value: V) -> np.ndarray | None:
        """The value itself, of a constant of whole numbers."""

    @abc.abstractmethod
    def follows(self, value: V) -> bool:
        """Whether a scan is to be gone through for it."""

    @abc.abstractmethod
    def sliced(self, value: V, i: int) -> V:
        """What is known of slice i along the first axis."""

    @abc.abstractmethod
    def stacked(self, values: list[V], eqn: Equation) -> V:
        """What is known of a new first axis of these."""

    def run(self, closed: Body, args: Sequence[V]) -> list[V]:
        """What is known of the results of a jaxpr."""
        return evaluate(closed, args, self._equation, self.constant)

    def told(self, eqn: Equation) -> str:
        """The primitive, and the line of the user's that it comes from."""
        places = filter(None, map(where, [eqn, *reversed(self._calls)]))
        return f"{eqn.primitive.name} at {next(places, 'a line that is not known')}"

    def _equation(self, eqn: Equation, ins: list[V]) -> list[V]:
        name = eqn.primitive.name
        if name in CALLS and (closed := inner(eqn)) is not None:
            self._calls.append(eqn)
            results = self.run(closed, ins)
            self._calls.pop()
            return results
        if name == "scan" and eqn.params["length"] and any(map(self.follows, ins)):
            return self._unroll(eqn, ins)
        return self._folded(eqn, ins) or self.rule(eqn, ins)

    def _unroll(self, eqn: Equation, ins: list[V]) -> list[V]:
        body, fixed, carries = scan_of(eqn)
        constants, carry, slices = ins[:fixed], ins[fixed : fixed + carries], ins[fixed + carries :]
        rounds = []
        for i in range(eqn.params["length"])[:: -1 if eqn.params["reverse"] else 1]:
            results = self.run(body, [*constants, *carry, *(self.sliced(value, i) for value in slices)])
            carry = results[:carries]
            rounds.append(results[carries:])
        if eqn.params["reverse"]:
            rounds.reverse()
        return [*carry, *(self.stacked(list(column), eqn) for column in zip(*rounds, strict=True))]

    def _folded(self, eqn: Equation, ins: list[V]) -> list[V] | None:
        """Results of whole numbers that are known."""
        outs: list[Any] = [var.aval for var in eqn.outvars]
        if not outs or eqn.effects or any(math.prod(aval.shape) > _FOLDED for aval in outs):
            return None
        if not all(_is_whole(aval.dtype) for aval in outs):
            return None
        arrays = [self.known(value) for value in ins]
        if any(array is None for array in arrays):
            return None
        with jax.ensure_compile_time_eval():
            return [self.constant(np.asarray(out)) for out in bind(eqn, arrays)]


def distinct(batches: Sequence[Batch]) -> list[Batch]:
    """The first batch of every shape."""
    found: dict[Hashable, Batch] = {}
    for batch in batches:
        kind = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(batch))
        found.setdefault(kind, batch)
    return list(found.values())


def jaxpr_of(fn: Function, leaves: Leaves, structure: Any, batch: Batch) -> Body:
    """A function of (params, batch) traced, with the leaves of both as inputs."""

    def flat(values: Sequence[Any], batch: Batch) -> Any:
        return fn(jax.tree.unflatten(structure, values), batch)

    return jax.make_jaxpr(flat)(list(map(shape_of, leaves.values())), batch)


def whole_numbers(content: Content) -> np.ndarray | None:
    """A constant of few whole numbers; None of any other."""
    few = math.prod(np.shape(content)) <= _FOLDED
    return np.asarray(content) if few and _is_whole(jnp.result_type(content)) else None


def _is_whole(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)
