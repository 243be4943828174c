"""Where the weights of a product lie in the tree of parameters, and how they get from there to the product."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lcq.tracing.equation import Content, Primitive
from lcq.tracing.jaxpr import IN_PLACE


class Step(NamedTuple):
    """One change of layout: output `out` of a primitive applied to an array and to constants."""

    primitive: Primitive
    params: dict[str, Content]
    rest: tuple[Content, ...]
    out: int

    def __call__(self, a: Content) -> Content:
        result = self.primitive.bind(a, *self.rest, **self.params)
        return result[self.out] if self.primitive.multiple_results else result

    def on_host(self, a: np.ndarray) -> np.ndarray:
        """The same without a compilation, for what numpy has too."""
        of = self.params
        match self.primitive.name:
            case "reshape" if of["dimensions"] is None:
                return a.reshape(of["new_sizes"])
            case "transpose":
                return a.transpose(of["permutation"])
            case "squeeze":
                return a.squeeze(tuple(of["dimensions"]))
            case "rev":
                return np.flip(a, of["dimensions"])
            case "slice":
                strides = of["strides"] or (1,) * a.ndim
                return a[tuple(map(slice, of["start_indices"], of["limit_indices"], strides))]
            case "broadcast_in_dim" if not self.rest:
                sizes = dict(zip(of["broadcast_dimensions"], a.shape, strict=True))
                return np.broadcast_to(a.reshape([sizes.get(i, 1) for i in range(len(of["shape"]))]), of["shape"])
        with jax.ensure_compile_time_eval():
            return np.asarray(self(jax.device_put(a)))


@dataclasses.dataclass(frozen=True)
class ParamSite:
    """A parameter on its way to a product: leaf[index], then steps.

    Attributes:
        path: Path of the leaf in the tree.
        index: Leading indices, taken by scans over stacked layers.
        steps: Changes of layout since the leaf entered the function.
    """

    path: str
    index: tuple[int, ...] = ()
    steps: tuple[Step, ...] = ()

    def of(self, leaf: Content) -> Content:
        """The array that reaches the product, of the leaf's array or of another in its place."""
        return functools.reduce(lambda a, step: step(a), self.steps, slice_of(leaf, self.index))

    def moved(self, leaf: Content) -> Content:
        """The elements that reach the product in the leaf's own dtype, before any cast."""
        moves = (step for step in self.steps if step.primitive.name not in IN_PLACE)
        return dataclasses.replace(self, steps=tuple(moves)).of(leaf)

    def moved_on_host(self, leaf: Content) -> np.ndarray:
        """`moved` of a leaf that the host can read, without a compilation."""
        part = np.asarray(np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf[self.index])
        part = part[self.index] if isinstance(leaf, jax.Array) else part
        moves = (step for step in self.steps if step.primitive.name not in IN_PLACE)
        return functools.reduce(lambda a, step: step.on_host(a), moves, part)

    def elements(self, shape: tuple[int, ...]) -> np.ndarray:
        """For each element that reaches the product, its flat place in a leaf of this shape."""
        return placed(self.inside(shape), self.start(shape))

    def start(self, shape: tuple[int, ...], depth: int = 0) -> int:
        """Where leaf[index] begins in leaf[index[:depth]], of a leaf of this shape."""
        lead = shape[depth : len(self.index)]
        return int(np.ravel_multi_index(self.index[depth:], lead)) * math.prod(shape[len(self.index) :]) if lead else 0

    def inside(self, shape: tuple[int, ...]) -> np.ndarray:
        """Flat places in leaf[index], which 32 bits can count."""
        rest = shape[len(self.index) :]
        whole = dataclasses.replace(self, index=())
        return whole.moved_on_host(np.arange(math.prod(rest), dtype=np.int32).reshape(rest))

    def then(self, step: Step) -> "ParamSite":
        return dataclasses.replace(self, steps=(*self.steps, step))

    def at(self, i: int, shape: tuple[int, ...]) -> "ParamSite":
        """Slice i along the first axis, of this shape: as an index, if no step is in its way."""
        if all(step.primitive.name in IN_PLACE for step in self.steps):
            return dataclasses.replace(self, index=(*self.index, i))
        params = {"start_indices": (i, *(0,) * len(shape)), "limit_indices": (i + 1, *shape), "strides": None}
        cut = Step(jax.lax.slice_p, params, (), 0)
        return self.then(cut).then(Step(jax.lax.squeeze_p, {"dimensions": (0,)}, (), 0))

    def chain(self) -> str:
        where = self.path + "".join(f"[{i}]" for i in self.index)
        return " -> ".join([where, *(step.primitive.name for step in self.steps)])


def slice_of(leaf: Content, index: tuple[int, ...]) -> Array:
    """leaf[index]; of an array on the host, or of one that is read when it is asked, no other part is touched."""
    if not isinstance(leaf, jax.Array):
        return jnp.asarray(leaf[index])
    for i in index:
        leaf = jax.lax.dynamic_index_in_dim(leaf, i, 0, keepdims=False)
    return leaf


def placed(places: np.ndarray, start: int) -> np.ndarray:
    """Places counted from the start of something larger."""
    small = start + int(places.max(initial=0)) < 2**31
    return np.asarray(places + (start if small else np.int64(start)))  # of no axes it would be a number
