"""Laying forms out for the products they are used in."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lcq.forms import Codes, Sparse, Sum
from lcq.forms.base import Form
from lcq.kernels.columns import columns
from lcq.kernels.ell import Lists, lists
from lcq.kernels.meshes import bare, by_compiler, laid_on
from lcq.kernels.shards import shardings_of_columns
from lcq.runtime.form_views import move


class View(NamedTuple):
    """How a leaf is seen as matrices [K, n]: the last of its axes, in this order, are their rows and columns."""

    axes: tuple[int, ...]
    columns: int

    @property
    def allows(self) -> set[str]:
        """Other uses than products for which it can stay so: rows that are whole columns of the matrix."""
        return {"rows"} if self.axes[-1] == 0 else set()


def laid_out_as(form: Form, view: View) -> Form:
    """A form laid out for products: codes as `Columns` and few weights as `Lists`, those in a sum too."""
    if isinstance(form, Sum):
        return dataclasses.replace(form, parts=tuple(laid_out_as(part, view) for part in form.parts))
    if not isinstance(form, Codes | Sparse):
        return form
    lead = len(form.shape) - len(view.axes)
    order = (*range(lead), *(lead + axis for axis in view.axes))

    def matrix(form: Form) -> Any:
        return move(form, lambda w: w.transpose(order).reshape(*w.shape[:lead], -1, view.columns))

    if isinstance(form, Codes):
        shapes = jax.eval_shape(lambda form: columns(matrix(form)), bare(form))
        onto = shardings_of_columns(shapes, form, view.axes)
        laid = by_compiler(lambda form: columns(matrix(form)), onto, form)
    else:
        laid = _lists_of(form, matrix)
        onto = None if laid is None else shardings_of_columns(laid, form, view.axes)
        if onto is not None and isinstance(lies := getattr(form.mask, "sharding", None), NamedSharding):
            arrays, structure = jax.tree.flatten(laid)
            there = [jax.device_put(a, laid_on(lies.mesh, to.spec)) for a, to in zip(arrays, onto, strict=True)]
            laid = jax.tree.unflatten(structure, there)
    return form if laid is None else dataclasses.replace(laid, tail=tuple(form.shape[lead:]), axes=view.axes)


def _lists_of(form: Sparse, matrix: Callable[[Form], Any]) -> Lists | None:
    """Made on the host, from a copy that is on no mesh."""
    if any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(form)):
        return None
    return lists(matrix(jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), form)))
