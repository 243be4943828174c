"""`jax.shard_map` as a function of whole arrays: what each device does to its part, mapped over all parts at once.

    shard_map(f, in_specs, out_specs) = joined . vmap(f, axis_name=...) . split

So parameters can be followed into it: to vmap, collectives are sums and copies along a mapped axis.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

from lcq.tracing.equation import Body, Content, Equation
from lcq.tracing.jaxpr import CALLS, OPAQUE, bind, inner, opened, scan_of

_IDLE = {"pvary", "pbroadcast", "pcast"}
"""What only says over which axes a value varies, which vmap knows itself."""


def whole(eqn: Equation) -> Callable[..., Sequence[Content]] | None:
    """A shard_map as a function of its arrays.

    None on a mesh with explicit axes, whose arrays cannot be cut freely, and where there is control flow other than
    scans inside, or what computes device by device.
    """
    params = eqn.params
    mesh, manual = params["mesh"], params.get("newly_manual_axes", params.get("manual_axes"))
    if manual is None or any(kind.name == "Explicit" for kind in mesh.axis_types) or not _plain(inner(eqn)):
        return None
    names = [name for name in mesh.axis_names if name in manual]
    sizes = {name: mesh.shape[name] for name in names}

    def function(*arrays: Content) -> list[Content]:
        inside = functools.partial(_run, inner(eqn))
        ins = [_used(spec, names) for spec in params["in_specs"]]
        for name in reversed(names):
            axes = tuple(0 if name in used else None for used in ins)
            inside = jax.vmap(inside, axes, 0, axis_name=name, axis_size=sizes[name])
        parts = [_split(a, spec, names, sizes) for a, spec in zip(arrays, params["in_specs"], strict=True)]
        results = inside(*parts)
        return [_joined(a, spec, names) for a, spec in zip(results, params["out_specs"], strict=True)]

    return function


def _axes_of(entry: str | Sequence[str] | None) -> tuple[str, ...]:
    """The mesh axes of one entry of a partition spec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _used(spec: PartitionSpec, names: Sequence[str]) -> list[str]:
    """The mesh axes over which an array is split, in the order of `names`."""
    used = {name for entry in spec for name in _axes_of(entry)}
    return [name for name in names if name in used]


def _split(array: Content, spec: PartitionSpec, names: Sequence[str], sizes: dict[str, int]) -> Array:
    """The parts of an array, an axis in front for each mesh axis over which it is split."""
    shape: list[int] = []
    places: dict[str, int] = {}
    for i, length in enumerate(array.shape):
        split = _axes_of(spec[i]) if i < len(spec) else ()
        for name in split:
            places[name] = len(shape)
            shape.append(sizes[name])
        shape.append(length // math.prod(sizes[name] for name in split))
    front = [places[name] for name in _used(spec, names)]
    return array.reshape(shape).transpose(*front, *(i for i in range(len(shape)) if i not in front))


def _joined(array: Content, spec: PartitionSpec, names: Sequence[str]) -> Array:
    """The array of parts that have an axis in front for every mesh axis; those that are all the same count once."""
    used = _used(spec, names)
    for i in reversed(range(len(names))):
        if names[i] not in used:
            array = jax.lax.index_in_dim(array, 0, i, keepdims=False)
    rank, order, shape = array.ndim - len(used), [], []
    for i in range(rank):
        split = [used.index(name) for name in (_axes_of(spec[i]) if i < len(spec) else ())]
        order += [*split, len(used) + i]
        shape.append(math.prod(array.shape[axis] for axis in (*split, len(used) + i)))
    return array.transpose(order).reshape(shape)


def _run(closed: Body, *arrays: Content) -> list[Content]:
    """The equations of a device, without the mesh around them."""
    jaxpr, consts = opened(closed)
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arrays], strict=True))

    def read(var: Any) -> Content:
        return var.val if hasattr(var, "val") else env[var]

    for eqn in jaxpr.eqns:
        ins = [read(var) for var in eqn.invars]
        env.update(zip(eqn.outvars, _equation(eqn, ins), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(eqn: Equation, ins: list[Content]) -> list[Content]:
    name = eqn.primitive.name
    if name in _IDLE:
        return ins
    if name.startswith("psum"):
        return [jax.lax.psum(a, eqn.params["axes"]) for a in ins]
    if name in CALLS and (closed := inner(eqn)) is not None:
        return _run(closed, *ins)
    if name == "scan":
        return _scan(eqn, ins)
    return bind(eqn, ins)


def _scan(eqn: Equation, ins: list[Content]) -> list[Content]:
    body, fixed, carries = scan_of(eqn)

    def step(carry: list[Content], x: list[Content]) -> tuple[list[Content], list[Content]]:
        results = _run(body, *ins[:fixed], *carry, *x)
        return results[:carries], results[carries:]

    params = eqn.params
    start, xs = ins[fixed : fixed + carries], ins[fixed + carries :]
    carry, ys = jax.lax.scan(step, start, xs, length=params["length"], reverse=params["reverse"])
    return [*carry, *ys]


def _plain(closed: Body) -> bool:
    """Whether vmap can map all equations, collectives among them."""
    jaxpr, _ = opened(closed)
    bodies = [inner(eqn) for eqn in jaxpr.eqns if inner(eqn) is not None]
    return not any(eqn.primitive.name in OPAQUE - {"scan"} for eqn in jaxpr.eqns) and all(map(_plain, bodies))
