"""TracedForm: a form on its way through the equations of a function, until something uses it.

What can be None is what the form cannot say; then the leaf is made dense where it is used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from lcq.forms.base import Form
from lcq.forms.dtypes import wider
from lcq.forms.meshes import by_compiler, varied, varying
from lcq.kernels.shards import sharding_of
from lcq.runtime.form_views import relayout, take_rows, unstack
from lcq.tracing.equation import Content, Equation
from lcq.tracing.jaxpr import DATA_MOVEMENT, IN_PLACE, bind
from lcq.tracing.joined import JOINS, Joint, moved
from lcq.tracing.param_site import Step

_STILL = {"name", "copy", "copy_p", "sharding_constraint", "convert_element_type", "stop_gradient"}
"""Changes of layout that are nothing to a form, but for its dtype or its gradient."""

_MOVES = DATA_MOVEMENT - _STILL - {"reduce_precision", "optimization_barrier", "dynamic_slice"}


@dataclasses.dataclass(frozen=True, eq=False)
class Provenance:
    """How a form got where it is: its path, and changes of layout since that it has not made."""

    path: str
    steps: tuple[Step | Callable[[Content], Content], ...] = ()

    def __call__(self, a: Content) -> Content:
        return functools.reduce(lambda a, step: step(a), self.steps, a)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class TracedForm:
    """A value that is a form, moved.

    Attributes:
        form: The form as it was before the steps of `provenance`.
        provenance: The steps by which it got here.
        wide: The value's dtype if it is not the form's own; never narrower than that, so nothing is rounded twice.
    """

    form: Form
    provenance: Provenance = dataclasses.field(metadata={"static": True})
    wide: Any = dataclasses.field(default=None, metadata={"static": True})

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        start = jax.ShapeDtypeStruct(tuple(self.form.shape), jnp.int32)
        return tuple(jax.eval_shape(self.provenance, start).shape) if self.provenance.steps else tuple(self.form.shape)

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.wide or self.form.dtype)

    def dense(self, after: Content = None) -> Array:
        """The dense array, not made before `after` is there: else all of them would be, and wait for their turns."""
        form = self.form
        if after is not None and not varying(after):  # else the form would vary as that does
            form, _ = jax.lax.optimization_barrier((form, jax.lax.stop_gradient(after)))
        made = by_compiler(lambda form: form.dense(), sharding_of(form), form)
        return self.provenance(made).astype(self.dtype)

    def settled(self) -> Form | None:
        """The form of this value's own shape, if there is one."""
        return relayout(self.form, self.provenance) if self.provenance.steps else self.form

    def stacked(self) -> "TracedForm | None":
        """What a scan takes apart into slices."""
        form = self.settled()
        slices = None if form is None else unstack(form)
        return None if slices is None else TracedForm(slices, Provenance(self.provenance.path), self.wide)

    def rows(self, numbers: Int[Array, " R"]) -> "TracedForm | None":
        """Rows that exist."""
        form = self.settled()
        taken = None if form is None else take_rows(form, numbers)
        return None if taken is None else TracedForm(taken, Provenance(self.provenance.path), self.wide)

    def cast(self, dtype: DTypeLike) -> "TracedForm | None":
        """In another floating-point format: narrower than all before, or at least as wide as the narrowest."""
        if not jnp.issubdtype(dtype, jnp.floating):
            return None
        narrowest = jnp.dtype(self.form.dtype)
        if wider(dtype, narrowest) == dtype:
            return dataclasses.replace(self, wide=str(dtype))
        if wider(dtype, narrowest) == narrowest:
            return TracedForm(dataclasses.replace(self.form, dtype=str(dtype)), self.provenance)
        return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """A concatenation of values, forms among them.

    Attributes:
        parts: The forms and arrays that are joined.
        joint: How they are joined.
    """

    parts: tuple[Any, ...]
    joint: Joint = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(eqn: Equation, values: Sequence[Content]) -> "Pieces":
        """The output of a concatenation, or of a stack of values."""
        axis = eqn.params[JOINS[eqn.primitive.name]]
        if eqn.primitive.name == "stack":
            values = [_stepped(value, functools.partial(jnp.expand_dims, axis=axis)) for value in values]
        return Pieces(tuple(values), Joint(axis, tuple(value.shape[axis] for value in values)))

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.joint.axis] = sum(self.joint.lengths)
        return tuple(shape)

    @property
    def dtype(self) -> Any:
        return self.parts[0].dtype

    def dense(self, after: Content = None) -> Array:
        made = [part.dense(after) if isinstance(part, TracedForm) else part for part in self.parts]
        return jnp.concatenate(made, self.joint.axis)


def _stepped(value: Content, step: Step | Callable[[Content], Content]) -> Content:
    if not isinstance(value, TracedForm):
        return step(value)
    return dataclasses.replace(value, provenance=Provenance(value.provenance.path, (*value.provenance.steps, step)))


def pieces_relaid(eqn: Equation, whole: Pieces) -> list[Content] | None:
    """A concatenation after a change of layout; None if it is none of its pieces."""
    if eqn.primitive.name in IN_PLACE:
        moves = [relaid(eqn, part) if isinstance(part, TracedForm) else bind(eqn, [part]) for part in whole.parts]
        return None if None in moves else [Pieces(tuple(move[0] for move in moves if move), whole.joint)]
    found = moved(eqn, whole.joint, whole.shape)
    if found is None:
        return None
    outs = []
    for out in found:
        parts = [_stepped(whole.parts[i], step) for i, step in out.pieces]
        lengths = tuple(part.shape[out.axis] for part in parts) if len(parts) > 1 else ()
        outs.append(parts[0] if len(parts) == 1 else Pieces(tuple(parts), Joint(out.axis, lengths)))
    return outs


def relaid(eqn: Equation, leaf: TracedForm) -> list[Content] | None:
    """A form after a change of layout; None if it copies or rounds."""
    name = eqn.primitive.name
    if name == "convert_element_type":
        cast = leaf.cast(eqn.params["new_dtype"])
        return None if cast is None else [cast]
    if name == "pvary":
        return [varied(leaf, axes=eqn.params["axes"])]
    if name == "stop_gradient":
        return [jax.tree.map(jax.lax.stop_gradient, leaf)]
    if name in _STILL:
        return [leaf]
    size = sum(math.prod(var.aval.shape) for var in eqn.outvars)
    if name not in _MOVES or size > math.prod(eqn.invars[0].aval.shape):
        return None
    params = eqn.primitive.get_bind_params(eqn.params)
    steps = [Step(eqn.primitive, params, (), i) for i in range(len(eqn.outvars))]
    return [_stepped(leaf, step) for step in steps]
