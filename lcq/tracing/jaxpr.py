"""Reading jaxprs and running their equations again, one by one: what following and running parameters have in common.

With `trace` the only file that uses jax's internal names.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
from jax.extend import core, source_info_util  # noqa: TID251
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array

from lcq.tracing.equation import Body, Content, Equation, Primitive

CALLS = {
    *("jit", "pjit", "closed_call", "call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call"),
    *("custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call", "composite", "eval_jaxpr", "xla_metadata_call"),
}
"""Primitives that only run the one jaxpr in their parameters."""

REMAT = {"remat", "remat2", "checkpoint"}
"""Calls that say what a gradient may keep."""

CUSTOM_GRADIENT = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
"""Calls with a gradient rule of their own."""

DATA_MOVEMENT = {
    *("convert_element_type", "transpose", "reshape", "rev", "slice", "squeeze", "split", "unstack", "expand_dims"),
    *("stop_gradient", "name", "sharding_constraint", "copy", "copy_p", "optimization_barrier", "dynamic_slice"),
    *("broadcast_in_dim", "reduce_precision", "pvary"),
}
"""Primitives that move the elements of their first operand."""

IN_PLACE = {"convert_element_type", "stop_gradient", "name", "copy", "copy_p", "reduce_precision", "pvary"}
"""Changes of layout that leave every element where it is; they commute with taking a slice."""

PRODUCTS = {"dot_general", "conv_general_dilated"}
RAGGED = "ragged_dot_general"
OPAQUE = {"while", "cond", "shard_map", "pallas_call", "scan"}


def primitive(
    name: str,
    compute: Callable[..., Array],
    shape: Callable[..., tuple[Sequence[int], DTypeLike]],
    slopes: Sequence[Callable[..., Array] | None],
    mapped: Callable[..., tuple[Array, int]],
    exported: Callable[..., Array] | None = None,
) -> Primitive:
    """A function of arrays as a primitive of its own, whose rules hold wherever it gets to.

    Those of jax.custom_jvp do not: JAX forgets them once it has differentiated a function in a scan, and then looks for
    the derivative of what is inside, which a Pallas kernel has none of.

    Args:
        name: of the primitive.
        compute: (*arrays, **static) -> an array.
        shape: (*arrays) -> its shape and dtype. Inside of `jax.shard_map` it varies as the first array does.
        slopes: for each array (tangent, *arrays, **static) -> the change of the result; None for one without.
        mapped: (arrays, their mapped axes or None, **static) -> the result and its mapped axis.
        exported: what takes the place of `compute` in exported programs.

    Returns:
        What `bind(*arrays, **static)` runs.
    """
    made = core.Primitive(name)
    made.def_impl(lambda *arrays, **static: _compiled(compute, tuple(static.items()))(*arrays))

    @made.def_abstract_eval
    def aval(*arrays: Any, **_: Any) -> jax.core.ShapedArray:
        size, dtype = shape(*arrays)
        sharding = arrays[0].sharding.update(spec=PartitionSpec(*(None,) * len(size)))
        return jax.core.ShapedArray(size, dtype, sharding=sharding, manual_axis_type=arrays[0].manual_axis_type)

    def lower(context: Any, *arrays: Any, **static: Any) -> Any:
        portable = exported if context.module_context.lowering_parameters.for_export else None
        return mlir.lower_fun(portable or compute, multiple_results=False)(context, *arrays, **static)

    mlir.register_lowering(made, lower)
    ad.defjvp(made, *slopes)
    batching.primitive_batchers[made] = mapped
    return made


@functools.cache
def _compiled(compute: Callable[..., Array], static: tuple[tuple[str, Hashable], ...]) -> Callable[..., Array]:
    return jax.jit(functools.partial(compute, **dict(static)))


def opened(closed: Body) -> tuple[Body, Sequence[Content]]:
    """(jaxpr, constants) of a jaxpr that is closed or has none."""
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def inner(eqn: Equation) -> Body:
    """The one jaxpr among an equation's parameters, or None."""
    found = [value for value in eqn.params.values() if hasattr(value, "eqns")]
    return found[0] if len(found) == 1 else None


def evaluate(
    closed: Body,
    args: Sequence[Content],
    equation: Callable[[Equation, list[Content]], Sequence[Content]],
    constant: Callable[[Content], Content] = lambda value: value,
) -> list[Content]:
    """Runs a jaxpr; a value is dropped after its last use.

    Args:
        closed: a jaxpr.
        args: its inputs, anything that `equation` understands.
        equation: (equation, inputs) -> outputs.
        constant: makes an input of a constant or a literal.
    """
    jaxpr, consts = opened(closed)
    env: dict[Hashable, Content] = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(var: Any) -> Content:
        return constant(var.val) if isinstance(var, core.Literal) else env[var]

    uses = [[var for var in eqn.invars if not isinstance(var, core.Literal)] for eqn in jaxpr.eqns]
    last = {var: i for i, used in enumerate(uses) for var in used}
    last.update({var: len(uses) for var in jaxpr.outvars if not isinstance(var, core.Literal)})
    for i, (eqn, used) in enumerate(zip(jaxpr.eqns, uses, strict=True)):
        with eqn.ctx.manager:
            results = equation(eqn, [read(var) for var in eqn.invars])
        env.update(zip(eqn.outvars, results, strict=True))
        for var in {var for var in used if last[var] == i}:
            del env[var]
    return [read(var) for var in jaxpr.outvars]


def bind(eqn: Equation, arrays: Sequence[Content]) -> list[Content]:
    """The equation's outputs for these inputs."""
    outs = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
    return list(outs) if eqn.primitive.multiple_results else [outs]


class Scan(NamedTuple):
    """The parts of a scan: its inputs are constants, carries, and what is taken slice by slice.

    Attributes:
        body: The jaxpr of one step.
        fixed: The number of constants.
        carries: The number of carries.
    """

    body: Body
    fixed: int
    carries: int


def scan_of(eqn: Equation) -> Scan:
    """Read off the ranks: carries have the rank of the body's, what is sliced or stacked one axis more."""
    body = inner(eqn)
    jaxpr, _ = opened(body)
    sliced = [len(v.aval.shape) > len(b.aval.shape) for v, b in zip(eqn.invars, jaxpr.invars, strict=True)]
    stacked = [len(v.aval.shape) > len(b.aval.shape) for v, b in zip(eqn.outvars, jaxpr.outvars, strict=True)]
    carries = stacked.count(False)
    return Scan(body, sliced.count(False) - carries, carries)


def weighs(eqn: Equation, side: int) -> bool:
    """Whether operand `side` of a product is contracted like a weight: not without contraction, and no image."""
    if eqn.primitive.name == "dot_general":
        return len(eqn.params["dimension_numbers"][0][0]) > 0
    if eqn.primitive.name == RAGGED:
        return side == 1 and _has_experts(eqn)
    return side == 1 and eqn.params["batch_group_count"] == 1


def _has_experts(eqn: Equation) -> bool:
    """Whether a ragged product multiplies the first rows with the first slice of its weight, and so on."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (contract, _), (batch, _) = numbers.dot_dimension_numbers
    x, _, sizes = (var.aval for var in eqn.invars)
    free = [axis for axis in range(len(x.shape)) if axis not in (*contract, *batch)]
    return (
        len(contract) > 0
        and len(numbers.rhs_group_dimensions) == 1
        and tuple(numbers.lhs_ragged_dimensions) == tuple(free[:1])
        and len(sizes.shape) in (1, 1 + len(batch))
        and eqn.params["group_offset"] is None
    )


def seen_at(closed: Body, eqn: Equation) -> Body:
    """A jaxpr whose equations come from where another equation does."""
    jaxpr, _ = opened(closed)
    placed = jaxpr.replace(eqns=[each.replace(source_info=eqn.source_info) for each in jaxpr.eqns])
    return closed.replace(jaxpr=placed) if hasattr(closed, "jaxpr") else placed


def is_experts(eqn: Equation) -> bool:
    """Whether a ragged product is of rows [M, K] with experts [E, K, n]."""
    params = eqn.params.get("ragged_dot_dimension_numbers")
    if params is None:
        return False
    dims = tuple(tuple(map(tuple, pair)) for pair in params.dot_dimension_numbers)
    named = tuple(params.lhs_ragged_dimensions), tuple(params.rhs_group_dimensions)
    return dims == (((1,), (1,)), ((), ())) and named == ((0,), (0,)) and eqn.params.get("group_offset") is None


def struct(aval: jax.core.ShapedArray) -> jax.ShapeDtypeStruct:
    """Shape and dtype."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def at_most(size: Any, limit: int) -> bool:
    """Whether a size is known to be no larger; of a dimension of `jax.export.symbolic_shape` that is not known.

    Example:
        >>> import jax.export
        >>> [at_most(size, 2) for size in (1, 3, *jax.export.symbolic_shape("b"))]
        [True, False, False]
    """
    return not jax.export.is_symbolic_dim(size) and size <= limit


def is_known(shape: Sequence[Any]) -> bool:
    """Whether no dimension of a shape is symbolic."""
    return not any(map(jax.export.is_symbolic_dim, shape))


def where(eqn: Equation) -> str:
    """File and line an equation comes from."""
    return source_info_util.summarize(eqn.source_info)
