"""Rounding on a mesh: neurons are independent, so each device rounds some of them, with the sums of all rows.

What is rounded lies on the same devices with the axes left to the compiler, whatever the mesh says: none of its
programs names how its results lie.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from lcq.forms.meshes import divides
from lcq.ptq.rounding.coded import Coded, codes_of, tables, with_codes
from lcq.ptq.sums import Sums


def mesh_of(*trees: PyTree) -> Mesh | None:
    """The mesh of several devices that arrays lie on, its axes left to the compiler; None if there is none."""
    for leaf in jax.tree.leaves(trees):
        sharding = leaf.sharding if isinstance(leaf, jax.Array) else None
        if isinstance(sharding, NamedSharding) and len(sharding.device_set) > 1:
            mesh = sharding.mesh
            assert isinstance(mesh, Mesh)
            return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return None


def apart(problem: Sums, form: Coded, mesh: Mesh) -> tuple[Sums, Coded]:
    """The problem with its neurons over the devices, as far as the mesh's axes divide them, and its sums on each.

    Args:
        problem: not settled yet.
        form: of its weights, [G, N, n].
        mesh: as `mesh_of` gives it.
    """
    neurons = problem.w.shape[2]
    names: list[str] = []
    for name in mesh.axis_names:
        if divides((*names, name), neurons, mesh):
            names.append(name)

    def put(a: Any, axis: int) -> Any:
        """Split along the axis of neurons, if it has all of them."""
        if a is None:
            return None
        spec = [None] * axis + [tuple(names) if a.shape[axis] == neurons else None]
        return jax.device_put(a, NamedSharding(mesh, P(*spec)))

    folds = problem.folds
    moments = jax.device_put(folds.moments, NamedSharding(mesh, P()))
    folds = folds._replace(moments=moments, differences=put(folds.differences, 2))
    beside = {name: put(array, 2) for name, array in tables(form).items()}
    form = dataclasses.replace(with_codes(form, put(codes_of(form), 2)), **beside)
    return problem._replace(w=put(problem.w, 2), folds=folds), form


@contextlib.contextmanager
def on(mesh: Mesh | None) -> Iterator[None]:
    """Programs inside are of this mesh, and of no other one that the user has set."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield
