"""What is known of the variables of a function while its equations are run again."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lcq.tracing import joined, positions
from lcq.tracing.equation import Content, Equation
from lcq.tracing.param_site import ParamSite, Step


@dataclasses.dataclass(eq=False)
class Value:
    """What is known of a variable while the equations are run again.

    Attributes:
        array: The value's tracer, or a constant.
        data: Whether it follows from the batch.
        param: Whether it follows from a parameter.
        site: Where a parameter is, while the value is nothing but that, moved.
        result: Which product's result it is, while it is nothing but that, moved.
        mask: Which of its positions count, see `lcq.tracing.positions`; None for all.
        lost: The equation behind which that is not known, so that all of them count; "" if it is known.
        pieces: What was concatenated, while the value is nothing but that, moved, and a parameter or a product's result
            is among it.
        axis: The axis along which these are joined.
        reads: The equations that use it.
    """

    array: Content
    data: bool = False
    param: bool = False
    site: ParamSite | None = None
    result: "Result | None" = None
    mask: Content = None
    lost: str = ""
    pieces: "tuple[Value, ...]" = ()
    axis: int = 0
    reads: int = 0

    @property
    def examples(self) -> Content:
        """Its mask along the first axis, if it depends on no other; else None."""
        if self.mask is None or not self.mask.ndim or positions.varies(self.mask, range(1, self.mask.ndim)):
            return None
        return self.mask.reshape(-1)

    @property
    def has_site(self) -> bool:
        """Whether it is a parameter, or joined of some."""
        return self.site is not None or any(piece.has_site for piece in self.pieces)

    @property
    def has_result(self) -> bool:
        """Whether it is the result of a product, or joined of some."""
        return self.result is not None or any(piece.has_result for piece in self.pieces)

    @property
    def joint(self) -> joined.Joint:
        """How its pieces make it."""
        return joined.Joint(self.axis, tuple(np.shape(piece.array)[self.axis] for piece in self.pieces))


class Result(NamedTuple):
    """The result of product `number` after steps, and the values before each of them."""

    number: int
    steps: tuple[Step, ...]
    before: tuple[Value, ...]


def count(eqn: Equation, ins: Sequence[Value], results: list[Value], source: str) -> list[Value]:
    """Results of an equation, with their masks, or with the equation behind which there is none."""
    if all(value.mask is None and not value.lost for value in ins):
        return results
    lost = next((value.lost for value in ins if value.lost), "")
    arrays, masks, data = zip(*((value.array, value.mask, value.data) for value in ins), strict=True)
    found = None if lost else positions.follow(eqn, arrays, masks, data)
    for i, result in enumerate(results):
        if found is None:
            result.lost = lost or " at ".join(filter(None, (eqn.primitive.name, source)))
        else:
            result.mask = found[i]
    return results


def carried(value: Value, examples: Content) -> Value:
    """The state of a scan over positions, of which these examples count; others as they are."""
    shape = np.shape(value.array)
    if value.site is not None or value.pieces or value.lost or not shape or shape[0] != len(examples):
        return value
    value.reads += 1
    return Value(value.array, value.data, value.param, mask=positions.leading(examples, shape))


def unstack(value: Value) -> list[Value]:
    """Its slices along the first axis."""
    arrays = jnp.unstack(value.array)
    masks: Sequence[Content] = [None] * len(arrays)
    if value.mask is not None:
        masks = jnp.unstack(jnp.broadcast_to(value.mask, (len(arrays), *value.mask.shape[1:])))
    return [Value(a, value.data, value.param, mask=m, lost=value.lost) for a, m in zip(arrays, masks, strict=True)]


def stack(values: Sequence[Value]) -> Value:
    """Along a new first axis."""
    data, param = any(v.data for v in values), any(v.param for v in values)
    mask, lost = None, next((v.lost for v in values if v.lost), "")
    if not lost and any(v.mask is not None for v in values):
        masks = [jnp.ones((1,) * np.ndim(v.array), bool) if v.mask is None else v.mask for v in values]
        shape = np.broadcast_shapes(*(m.shape for m in masks))
        mask = jnp.stack([jnp.broadcast_to(m, shape) for m in masks])
    return Value(jnp.stack([v.array for v in values]), data, param, mask=mask, lost=lost)
