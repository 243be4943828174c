"""How forms lie on meshes with explicit axes: that of a form says that of its dense array, and the reverse."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from lcq.forms import Cast, Codes, Factors, Sparse, Sum
from lcq.forms.base import Form
from lcq.kernels.columns import Columns
from lcq.kernels.ell import Lists
from lcq.kernels.meshes import explicit_mesh, laid_on, spec_of

_FIELDS = {"words": -1, "first": -1, "step": -1, "levels": -2, "zero": -1}
"""The axis of columns in each array of `Columns`."""


def sharding_of(form: Form) -> NamedSharding | None:
    """How the dense array of a form lies; None where no mesh has explicit axes.

    As the form's arrays of the leaf's shape do; along what the columns of a matrix are as its columns; of a stored form
    on all devices alike.
    """
    mesh = explicit_mesh(form)
    return None if mesh is None else laid_on(mesh, _spec(form, mesh))


def struct_of(form: Form) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of the dense array."""
    return jax.ShapeDtypeStruct(tuple(form.shape), form.dtype, sharding=sharding_of(form))


def shardings_of_columns(laid: Columns | Lists, form: Codes | Sparse, axes: tuple[int, ...]) -> Any:
    """How a form lies once it is laid out: on the devices that have their columns; for each array of `laid`; or None.

    Args:
        laid: shapes of the result.
        form: what it is made of.
        axes: the order of the leaf's axes, behind stacked ones, in which it is the matrix.
    """
    mesh = explicit_mesh(form)
    if mesh is None:
        return None
    spec, lead = _spec(form, mesh), len(laid.stacked)
    across = _columns_axes(tuple(form.shape[lead:]), axes, laid.columns)
    named = [spec[lead + axis] for axis in across]
    name = named[0] if named and not any(named[1:]) else None

    def each(a: Any, field_axis: int) -> NamedSharding:
        own = [None] * len(a.shape)
        own[:lead] = spec[:lead]
        if a.shape[field_axis] == laid.columns:
            own[field_axis] = name
        return laid_on(mesh, own)

    fields = {"places": -1, "values": -1} if isinstance(laid, Lists) else _FIELDS
    return [each(a, axis) for key, axis in fields.items() if (a := getattr(laid, key)) is not None]


def _spec(form: Form, mesh: Any) -> tuple[Any, ...]:
    whole = (None,) * len(form.shape)
    match form:
        case Sum():
            return _spec(form.parts[0], mesh)
        case Codes(packed=None):
            return spec_of(form.codes)
        case Sparse(packed=None):
            return spec_of(form.mask)
        case Cast():
            return spec_of(form.values)
        case Factors(separable=False):
            *stacked, rows = spec_of(form.left)[:-1]
            columns = spec_of(form.left if form.right is None else form.right)[-1]
            inside = [None] * (len(form.tail) - 2)
            rows = rows if _divides(rows, form.tail[0], mesh) else None
            return (*stacked, rows, *inside, columns)
        case Columns() | Lists():
            array = form.words if isinstance(form, Columns) else form.places
            spec, lead = spec_of(array), len(form.stacked)
            tail: list[Any] = [None] * len(form.tail)
            across = _columns_axes(form.tail, form.axes, form.columns)
            if across and _divides(spec[-1], form.tail[across[0]], mesh):
                tail[across[0]] = spec[-1]
            return (*spec[:lead], *tail)
    return whole


def _columns_axes(tail: tuple[int, ...], axes: tuple[int, ...], columns: int) -> tuple[int, ...]:
    """The axes of a leaf that are the columns of its matrix, in the matrix's order."""
    for count in range(1, len(axes) + 1):
        if math.prod(tail[axis] for axis in axes[-count:]) == columns:
            return axes[-count:]
    return ()


def _divides(name: Any, length: int, mesh: Any) -> bool:
    names = name if isinstance(name, tuple) else (name,)
    return length % math.prod(mesh.shape[n] for n in names if n is not None) == 0
