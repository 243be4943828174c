"""Running a function on forms in place of its parameters, without hooks: its equations are run one by one.

A form that reaches a dot or a convolution as its weight, moved or not, goes to the door of the kernels, and no dense
array of it is made; nor of one that is concatenated with others. A lookup decodes the rows it looks up. Anything else
makes its own dense array where it is used.
"""

import functools
import math
from collections.abc import Hashable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lcq.forms.base import Form
from lcq.forms.relayout import MatrixView
from lcq.runtime.loops import CONTROL
from lcq.runtime.traced_form import Pieces, TracedForm, pieces_relaid, relaid
from lcq.runtime.uses import USES, Use
from lcq.tracing import jaxpr, joined
from lcq.tracing.equation import Body, Content, Equation, Frame
from lcq.tracing.jaxpr import CALLS, CUSTOM_GRADIENT, DATA_MOVEMENT, PRODUCTS, REMAT


def value_of(leaf: Content) -> Content:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


class Runner:
    """Runs equations on arrays and forms, and notes what it does with forms."""

    def __init__(self, held: int) -> None:
        self.held = held
        self.uses: dict[Hashable, Use] = {}
        self.views: dict[Hashable, MatrixView | None] = {}
        self.multiplied: dict[Hashable, tuple[Form, int]] = {}
        """Forms in products, as shapes, and their rows."""
        self.latest: Content = None
        self.room = held
        self.looping = False
        self.split: dict[Hashable, Content] = {}
        """Products with concatenations, as those with their pieces."""
        self.done: dict[Hashable, list[Content]] = {}
        """What equations in loops give, done before them."""
        self.decoded: dict[Hashable, Content] = {}
        """Operands of equations in loops, dense since before them."""

    def run(self, closed: Body, ins: Sequence[Content], frame: Frame = ()) -> list[Content]:
        """Dense outputs; `frame` is the calls around these equations, which tell apart uses by the same one."""
        outer, self.latest = self.latest, None  # what is computed in here must not be used out there, or the reverse
        outs = self.dense_all(self.inline(closed, ins, frame), frame)
        self.latest = outer
        return outs

    def inline(self, closed: Body, ins: Sequence[Content], frame: Frame) -> list[Content]:
        return jaxpr.evaluate(closed, ins, functools.partial(self.equation, frame))

    def dense_all(self, values: Sequence[Content], frame: Frame) -> list[Content]:
        """Values with every form made dense, once."""
        made = {id(value): self.dense(value, (*frame, i)) for i, value in enumerate(values)}
        return [made[id(value)] for value in values]

    def dense(self, value: Content, frame: Frame) -> Content:
        if not isinstance(value, TracedForm | Pieces):
            return value
        if frame in self.decoded:
            return self.decoded[frame]
        array = value.dense(self.latest)
        self.note(frame, value, "dense", array.shape)
        return array

    def decode(self, value: Content, frame: Frame, how: str) -> None:
        """Makes an operand of an equation in a loop dense before the loop, if there is room for it."""
        size = math.prod(value.shape) * jnp.dtype(value.dtype).itemsize
        if size <= self.room and frame not in self.decoded:
            self.room -= size
            self.decoded[frame] = value.dense(self.latest)
            self.note(frame, value, how, value.shape)

    def note(self, frame: Frame, leaf: Content, how: str, shape: tuple[int, ...], kind: str = "") -> None:
        if isinstance(leaf, Pieces):
            for i, part in enumerate(leaf.parts):
                if isinstance(part, TracedForm):
                    self.note((*frame, i), part, how, part.shape)
            return
        lines = [jaxpr.where(part) for part in frame[::-1] if hasattr(part, "primitive")]
        self.uses[frame] = Use(leaf.provenance.path, how, tuple(shape), next(filter(None, lines), "output"), kind)

    def equation(self, frame: Frame, eqn: Equation, ins: list[Content]) -> list[Content]:
        name, frame = eqn.primitive.name, (*frame, eqn)
        if frame in self.done:
            return self.done[frame]
        outs = self.on_forms(eqn, ins, frame) if any(isinstance(value, TracedForm | Pieces) for value in ins) else None
        outs = jaxpr.bind(eqn, self.dense_all(ins, frame)) if outs is None else outs
        if name in PRODUCTS:
            self.latest = outs[0]
        return outs

    def on_forms(self, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
        """An equation with forms among its inputs; None if they have to be dense."""
        name = eqn.primitive.name
        if name in CALLS and (closed := jaxpr.inner(eqn)) is not None:
            return self._call(eqn, closed, ins, frame)
        if name in CONTROL:
            return CONTROL[name](self, eqn, ins, frame)
        if name in joined.JOINS:
            return [Pieces.of(eqn, ins)] if all(not isinstance(value, Pieces) for value in ins) else None
        if name in DATA_MOVEMENT and len(ins) == 1:
            return (relaid if isinstance(ins[0], TracedForm) else pieces_relaid)(eqn, ins[0])
        return USES[name](self, eqn, ins, frame) if name in USES else None

    def _call(self, eqn: Equation, closed: Body, ins: list[Content], frame: Frame) -> list[Content]:
        name = eqn.primitive.name
        if name in REMAT:
            run = functools.partial(self.run, closed, frame=frame)
            return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(ins)
        if name not in CUSTOM_GRADIENT:
            return self.inline(closed, ins, frame)

        @jax.custom_jvp
        def call(*ins: Content) -> list[Content]:
            return self.run(closed, ins, frame)

        @call.defjvp
        def rule(ins: Sequence[Content], tangents: Sequence[Content]) -> PyTree:
            later = Runner(self.held)  # when this one has gone on
            return jax.jvp(lambda *ins: jaxpr.bind(eqn, later.dense_all(ins, frame)), ins, tangents)

        return call(*ins)
