"""Prepacking forms for the products they are used in, on meshes too."""

import jax
from jax.sharding import NamedSharding

from lcq.forms.base import Form
from lcq.forms.meshes import bare, by_compiler, explicit_mesh, placed_on
from lcq.forms.relayout import MatrixView
from lcq.kernels.shards import shardings_of


def prepacked_as(form: Form, view: MatrixView) -> Form:
    """`form.prepack(view)`; on a mesh with explicit axes its columns lie where the leaf's do."""
    if explicit_mesh(form) is None:
        return form.prepack(view)

    def traced(form: Form) -> Form:
        return form.prepack(view, traced=True)

    shapes = jax.eval_shape(traced, bare(form))
    ready = by_compiler(traced, shardings_of(shapes, form, view.axes), form)
    whole = ready.prepack(view)  # what is made on the host, of what is no tracer
    arrays, structure = jax.tree.flatten(whole)
    if whole is ready:
        return ready
    mesh = next(a.sharding.mesh for a in jax.tree.leaves(form) if isinstance(a.sharding, NamedSharding))
    onto = shardings_of(whole, form, view.axes)
    there = [jax.device_put(a, placed_on(mesh, to.spec)) for a, to in zip(arrays, onto, strict=True)]
    return jax.tree.unflatten(structure, there)
