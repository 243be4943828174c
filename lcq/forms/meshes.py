"""Meshes with explicit axes, where JAX wants to know how each result lies: left to the compiler, but for the ends.

A kernel moves, pads and cuts arrays in ways that JAX names no sharding for. So it runs with the axes left to the
compiler, and its results lie as those of the dense function do.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree


def explicit_mesh(*trees: PyTree) -> jax.sharding.AbstractMesh | None:
    """The mesh with explicit axes that arrays lie on, or that of the context; None if there is none."""
    here = jax.sharding.get_abstract_mesh()
    if here.explicit_axes:
        return here
    if not here.empty:
        return None  # the compiler's, or one device's part
    kinds = (jax.typeof(leaf) for leaf in jax.tree.leaves(trees) if hasattr(leaf, "shape"))
    meshes = (kind.sharding.mesh for kind in kinds if getattr(kind, "sharding", None) is not None)
    return next((mesh for mesh in meshes if mesh.explicit_axes), None)


def shared_mesh(*trees: PyTree) -> jax.sharding.AbstractMesh | None:
    """The mesh of several devices among which the compiler shares out what is done with arrays: that of the context, or
    that they lie on; None where one device does it, or each its own part."""
    here = jax.sharding.get_abstract_mesh()
    kinds = (jax.typeof(leaf) for leaf in jax.tree.leaves(trees) if here.empty and hasattr(leaf, "shape"))
    meshes = (kind.sharding.mesh for kind in kinds if getattr(kind, "sharding", None) is not None)
    return next((mesh for mesh in (here, *meshes) if mesh.size > 1 and not mesh.are_all_axes_manual), None)


def is_shared(*trees: PyTree) -> bool:
    """Whether several devices run this, and the compiler shares out the work: it cannot cut a Pallas kernel."""
    return shared_mesh(*trees) is not None


def most_parts(length: int, mesh: Any) -> int:
    """Into how many parts an axis is cut so that each lies on one device, however the axis lies on a mesh."""
    sizes = [mesh.shape[name] for name in (*mesh.auto_axes, *mesh.explicit_axes)]
    products = {math.prod(some) for n in range(len(sizes) + 1) for some in itertools.combinations(sizes, n)}
    return math.lcm(*(n for n in products if length % n == 0))


def spec_of(array: Any) -> tuple[Any, ...]:
    """The names of the mesh's axes along each axis of an array."""
    return tuple(jax.typeof(array).sharding.spec)


def placed_like(x: Array, w: Array | np.ndarray) -> Array:
    """An array that lies where another of its shape does. What is made of nothing, such as zeros, a compiler would put
    whole on every device: here each number depends on that of the other, and is the same whatever it is. On explicit
    axes, and where an array is at hand, `jnp.zeros_like` has done it."""
    if not isinstance(w, jax.core.Tracer) or any(jax.typeof(w).sharding.spec):
        return x
    return jnp.where(w != w, jax.lax.optimization_barrier(x), x)


def divides(name: Any, length: int, mesh: Any) -> bool:
    """Whether an axis of a length can be cut along one of the mesh's, or several."""
    names = name if isinstance(name, tuple) else (name,)
    return length % math.prod(mesh.shape[n] for n in names if n is not None) == 0


def placed_on(mesh: Any, spec: Any) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(*spec))


def varying(*trees: PyTree) -> tuple[str, ...]:
    """The axes of a mesh along which some array differs from device to device, inside of `jax.shard_map`."""
    kinds = (jax.typeof(leaf) for leaf in jax.tree.leaves(trees) if hasattr(leaf, "shape"))
    return tuple(sorted({axis for kind in kinds for axis in kind.manual_axis_type.varying}))


def varied(tree: PyTree, *like: PyTree, axes: Sequence[str] = ()) -> Any:
    """A tree whose arrays vary along some axes, and along those that the arrays of other trees do. JAX wants it of what
    a loop carries, and of all operands of a primitive: it sums gradients over devices by it."""
    axes = (*axes, *varying(like))

    def each(a: Any) -> Any:
        missing = tuple(axis for axis in axes if axis not in varying(a))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(each, tree)


def struct_varied(struct: jax.ShapeDtypeStruct, *like: PyTree) -> jax.ShapeDtypeStruct:
    """The struct of an array that varies as those of trees do, all of them together."""
    if not varying(like):
        return struct
    kind = jax.typeof(jax.tree.leaves(varied(like, like))[0])
    return struct.update(sharding=kind.sharding.update(spec=PartitionSpec()), manual_axis_type=kind.manual_axis_type)


def by_compiler(function: Callable[..., Any], onto: Any, *args: Any) -> Any:
    """function(*args), its inside sharded by the compiler.

    Args:
        function: of trees of arrays, to a tree of arrays, or None for what it cannot do.
        onto: how the results lie, a tree of `NamedSharding`, or one for all; None where no mesh has explicit axes.
        args: trees of arrays.
    """
    if onto is None:
        return function(*args)
    mesh = jax.tree.leaves(onto)[0].mesh
    axes = mesh.explicit_axes
    inside = mesh.abstract_mesh.update_axis_types(dict.fromkeys(axes, AxisType.Auto))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=placed_on(inside, ())), args)
    with jax.sharding.use_abstract_mesh(inside):
        made = jax.eval_shape(function, *shapes)
    if made is None:
        return None
    results = jax.tree.leaves(made)
    each = (onto,) * len(results) if isinstance(onto, NamedSharding) else tuple(jax.tree.leaves(onto))
    flat = jax.sharding.auto_axes(lambda *args: tuple(jax.tree.leaves(function(*args))), axes=axes, out_sharding=each)
    return jax.tree.unflatten(jax.tree.structure(made), flat(*args))


def bare(tree: PyTree) -> Any:
    """Shapes and dtypes, that lie nowhere."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)
