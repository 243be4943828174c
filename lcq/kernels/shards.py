"""How forms lie on meshes with explicit axes: that of a form says that of its dense array, and the reverse."""

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import Array, PyTree

from lcq.forms.base import Form, is_form
from lcq.forms.meshes import explicit_mesh, placed_on, spec_of, struct_varied
from lcq.forms.prepacked import Prepacked, column_axes


def sharding_of(form: Form) -> NamedSharding | None:
    """How the dense array of a form lies; None where no mesh has explicit axes.

    As the form's arrays of the leaf's shape do; along what the columns of a matrix are as its columns; of a stored form
    on all devices alike.
    """
    mesh = explicit_mesh(form)
    return None if mesh is None else placed_on(mesh, form.spec(mesh))


def struct_of(form: Form) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the dense array, and along which axes of a mesh it varies inside of `shard_map`."""
    return struct_varied(jax.ShapeDtypeStruct(tuple(form.shape), form.dtype, sharding=sharding_of(form)), form)


def shardings_of(ready: Form, form: Form, axes: tuple[int, ...]) -> list[NamedSharding]:
    """How each array of a form lies once it is prepacked: on the devices that have its columns; others as they do.

    Args:
        ready: shapes of the result.
        form: what it is made of, on a mesh with explicit axes.
        axes: the order of the leaf's axes, behind stacked ones, in which it is the matrix.
    """
    mesh = explicit_mesh(form)
    if isinstance(ready, Prepacked) and not isinstance(form, Prepacked):
        return _columns_on(mesh, ready, form, axes)
    parts: list[PyTree]
    structure: jax.tree_util.PyTreeDef
    parts, structure = jax.tree.flatten(form, is_leaf=lambda node: node is not form and is_form(node))
    found = zip(parts, structure.flatten_up_to(ready), strict=True)
    each = [
        shardings_of(made, part, axes) if is_form(part) else [placed_on(mesh, spec_of(part))] for part, made in found
    ]
    return [sharding for part in each for sharding in part]


def _columns_on(mesh: AbstractMesh | None, ready: Prepacked, form: Form, axes: tuple[int, ...]) -> list[NamedSharding]:
    spec, lead = form.spec(mesh), len(ready.stacked)
    across = column_axes(tuple(form.shape[lead:]), axes, ready.columns)
    named = [spec[lead + axis] for axis in across]
    name = named[0] if named and not any(named[1:]) else None

    def each(a: Array | jax.ShapeDtypeStruct, field_axis: int) -> NamedSharding:
        own = [None] * len(a.shape)
        own[:lead] = spec[:lead]
        if a.shape[field_axis] == ready.columns:
            own[field_axis] = name
        return placed_on(mesh, own)

    return [each(a, axis) for key, axis in ready.column_axes.items() if (a := getattr(ready, key)) is not None]
