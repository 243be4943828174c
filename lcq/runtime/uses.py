"""What is done with a form at an equation that uses it, so that no dense array of it is made.

A product goes to the door of the kernels; a product with a concatenation is one with each piece; a lookup decodes the
rows that it looks up; rows from one that is computed stay a form. Each function takes the runner (see
`lcq.runtime.interpreter`), the equation, its inputs and the calls around it, and gives the outputs; None if the form
has to be dense.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from lcq.forms.base import Form
from lcq.forms.codes import Codes
from lcq.forms.dtypes import wider
from lcq.forms.meshes import bare, by_compiler, explicit_mesh, placed_on, spec_of, struct_varied
from lcq.forms.prepacked import Prepacked
from lcq.forms.relayout import MatrixView
from lcq.kernels.api import matmul
from lcq.kernels.ragged import ROWS, ragged_product
from lcq.runtime.form_views import order_of, relayout
from lcq.runtime.traced_form import Pieces, TracedForm
from lcq.tracing import jaxpr, joined
from lcq.tracing.contraction import Product
from lcq.tracing.equation import Content, Equation, Frame
from lcq.tracing.jaxpr import PRODUCTS, RAGGED
from lcq.tracing.param_site import ParamSite

_PLACES = 2
"""At more places a convolution's kernel is decoded for it: patches of its images cost more than words save."""


class Use(NamedTuple):
    """One use of a form.

    Attributes:
        path: The path of the form.
        how: What became of it: "product" through the door of the kernels; "decoded", the kernel of a convolution, or of
            a product in a loop, before that; "rows" of a lookup, decoded; "dense".
        shape: The shape (G, M, K, n) of a product, see `lcq.tracing.im2col`, or that of the array that is made.
        source: The file and line of the use.
        kind: The kind of a product: "dot", "conv", or "ragged dot", one for each of G experts with the rows that are
            its own, M in all.
        kernel: The name of a product's kernel, in a report; "" of a form that multiplies itself, such as factors.
    """

    path: str
    how: str
    shape: tuple[int, ...]
    source: str
    kind: str = ""
    kernel: str = ""


def _product(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """Y[g] = X[g] W[g], by the door of the kernels."""
    if any(isinstance(value, Pieces) for value in ins):
        return _product_of_pieces(runner, eqn, ins, frame)
    sides = [side for side in (1, 0) if isinstance(ins[side], TracedForm) and jaxpr.weighs(eqn, side)]
    if not sides or isinstance(eqn.params["precision"], jax.lax.DotAlgorithm):
        return None  # of an algorithm that is spelled out nothing is known here
    side, leaf, dtype = sides[0], ins[sides[0]], eqn.outvars[0].aval.dtype
    if (*frame, side) in runner.decoded:
        return None
    product = _product_of(eqn, side, leaf.provenance.path)
    g, m, k, n = product.shape
    lead, here = (g,) if g > 1 else (), (*frame, side)
    if product.window > 1 and not jaxpr.at_most(m, _PLACES):
        runner.note(here, leaf, "decoded", product.w.shape)
        if isinstance(leaf.form, Codes):
            shape = leaf.form.shape
            runner.views[here] = MatrixView(tuple(range(len(shape))), shape[-1])
        return jaxpr.bind(eqn, [runner.dense(ins[0], (*frame, 0)), leaf.dense(runner.latest)])

    def matrix(w: Array) -> Array:
        return product.weights(leaf.provenance(w)).reshape(*lead, k, n)

    def multiply(x: Content, form: Form) -> list[Content] | None:
        moved, x = relayout(form, matrix), product.inputs(x)
        if moved is None:
            return None
        if wider(x.dtype, moved.dtype) != dtype:
            x = x.astype(dtype)  # an accumulator wider than the operands
        runner.multiplied[here] = _shapes(moved), m
        with _precision(eqn.params["precision"]):
            y = matmul(x.reshape(*lead, m, k), moved)
        back = jax.linear_transpose(product.outputs, struct_varied(product.y, y))  # of a permutation it is the inverse
        return list(back(y.astype(dtype).reshape(g, m, n)))

    runner.note(here, leaf, "product", product.shape, product.kind)
    x = runner.dense(ins[1 - side], (*frame, 1 - side))
    y = by_compiler(multiply, _onto(eqn, x, leaf.form), x, leaf.form)
    if y is None:
        del runner.uses[here]
        return None
    axes = None if isinstance(leaf.form, Prepacked) else order_of(matrix, leaf.form.shape, len(lead))
    runner.views[here] = None if axes is None else MatrixView(axes, n)
    return y


def _product_of_pieces(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """A product with each piece of a concatenation."""
    sides = [side for side in (1, 0) if isinstance(ins[side], Pieces) and jaxpr.weighs(eqn, side)]
    if not sides or (*frame, sides[0]) in runner.decoded or explicit_mesh(ins) is not None:
        return None
    side = sides[0]
    w, x = ins[side], runner.dense(ins[1 - side], (*frame, 1 - side))
    if frame not in runner.split:
        whole = joined.product(eqn, side, w.joint)
        shapes = [jax.ShapeDtypeStruct(part.shape, part.dtype) for part in (x, *w.parts)]
        runner.split[frame] = None if whole is None else jaxpr.seen_at(jax.make_jaxpr(whole)(*shapes), eqn)
    closed = runner.split[frame]
    return None if closed is None else runner.inline(closed, [x, *w.parts], frame)


def _ragged(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """A product for each expert, of its rows with its codes."""
    x, leaf, sizes = ins
    here, precision, dtype = (*frame, 1), eqn.params["precision"], eqn.outvars[0].aval.dtype
    if not isinstance(leaf, TracedForm) or not jaxpr.is_experts(eqn) or isinstance(precision, jax.lax.DotAlgorithm):
        return None
    if here in runner.decoded:
        return None

    def multiply(x: Content, form: Form) -> Array:
        if wider(x.dtype, form.dtype) != dtype:
            x = x.astype(dtype)
        with _precision(precision):
            return matmul(x, form).astype(dtype)

    def product(x: Content, leaf: TracedForm, sizes: Content) -> list[Content] | None:
        experts = leaf.stacked()
        if experts is None:
            return None
        runner.multiplied[here] = _shapes(experts.form), min(m, ROWS) if jaxpr.is_known(x.shape) else m
        return [ragged_product(x, experts.form, sizes, multiply)]

    (m, k), (g, _, n) = x.shape, leaf.shape
    runner.note(here, leaf, "product", (g, m, k, n), "ragged dot")
    x, sizes = runner.dense(x, (*frame, 0)), runner.dense(sizes, (*frame, 2))
    y = by_compiler(product, _onto(eqn, x, leaf, sizes), x, leaf, sizes)
    if y is None:
        del runner.uses[here]
        return None
    axes = None if isinstance(leaf.form, Prepacked) else order_of(leaf.provenance, leaf.form.shape, 1)
    runner.views[here] = None if axes is None else MatrixView(axes, n)
    return y


def _lengths_fit(places: Content) -> Array:
    """Places as int32 if their own type is smaller: beside them jax takes a length modulo 256."""
    return jnp.asarray(places) if places.dtype.itemsize >= 4 else jnp.asarray(places, jnp.int32)


def _gather(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """A lookup of whole rows decodes these; rows that do not exist are filled as the lookup would."""
    table, indices = ins
    if not isinstance(table, TracedForm):
        return None
    numbers, aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
    length, *rest = eqn.invars[0].aval.shape
    whole = numbers.collapsed_slice_dims == numbers.start_index_map == (0,) and not numbers.operand_batching_dims
    last = tuple(range(len(aval.shape) - len(rest), len(aval.shape)))
    if not whole or tuple(eqn.params["slice_sizes"]) != (1, *rest) or tuple(numbers.offset_dims) != last:
        return None

    def look_up(table: TracedForm, places: Content) -> list[Content] | None:
        found = table.rows(jnp.clip(places, 0, length - 1).reshape(-1))
        if found is None:
            return None
        rows = found.dense().reshape(aval.shape)
        if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
            fill = eqn.params["fill_value"]
            there = ((places >= 0) & (places < length)).reshape(*places.shape, *(1 for _ in rest))
            rows = jnp.where(there, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))
        return [rows]

    places = _lengths_fit(indices[..., 0])
    rows = by_compiler(look_up, _onto(eqn, table, places), table, places)
    if rows is not None:
        runner.note(frame, table, "rows", aval.shape)
    return rows


def _slice(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """Rows from one that is computed, such as the layer of a round: the form of these rows."""
    table, start, *_ = ins
    if not isinstance(table, TracedForm):
        return None
    length, *rest = eqn.invars[0].aval.shape
    size, *sizes = eqn.params["slice_sizes"]
    if sizes != rest:
        return None

    def some(table: TracedForm, start: Content) -> TracedForm | None:
        return table.rows(jnp.clip(start, 0, length - size) + jnp.arange(size))

    start = _lengths_fit(start)
    rows = by_compiler(some, _rows_onto(some, table, start), table, start)
    return None if rows is None else [rows]


def _lies(runner: Any, eqn: Equation, ins: list[Content], frame: Frame) -> list[Content] | None:
    """To other devices, or to a mesh whose axes are the compiler's: what is stored goes, not the dense array."""
    (leaf,), into = ins, eqn.outvars[0].aval.sharding
    if not isinstance(leaf, TracedForm):
        return None
    if not any(into.spec):
        return [jax.tree.map(lambda a: jax.sharding.reshard(a, into.update(spec=PartitionSpec())), leaf)]
    with jax.sharding.use_abstract_mesh(eqn.invars[0].aval.sharding.mesh):
        array = runner.dense(leaf, (*frame, 0))
    return jaxpr.bind(eqn, [array])


def _product_of(eqn: Equation, side: int, path: str) -> Product:
    """An equation as the product of X and a weight, which is on one of its sides."""
    y, x, w = (jaxpr.struct(v.aval) for v in (eqn.outvars[0], eqn.invars[1 - side], eqn.invars[side]))
    params = eqn.primitive.get_bind_params(eqn.params)
    return Product(0, ParamSite(path), eqn.primitive, params, side, x, w, y, jaxpr.where(eqn))


def _onto(eqn: Equation, *trees: PyTree) -> Content:
    """How the one output of an equation lies, where a mesh has explicit axes."""
    mesh = explicit_mesh(*trees)
    return None if mesh is None else placed_on(mesh, eqn.outvars[0].aval.sharding.spec)


def _rows_onto(some: Callable[..., Content], table: TracedForm, start: Content) -> Content:
    """How rows of a form lie: each array as before, where it has the same axes but for the first."""
    mesh = explicit_mesh(table, start)
    shapes = None if mesh is None else jax.eval_shape(some, *bare((table, start)))
    if shapes is None:
        return None
    old, (new, structure) = jax.tree.leaves(table), jax.tree.flatten(shapes)
    specs = [
        (None, *spec_of(a)[1:]) if a.shape[1:] == b.shape[1:] else (None,) * len(b.shape)
        for a, b in zip(old, new, strict=True)
    ]
    return jax.tree.unflatten(structure, [placed_on(mesh, spec) for spec in specs])


def _shapes(form: Form) -> Form:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), form)


def _precision(chosen: Any) -> contextlib.AbstractContextManager[Any]:
    """The function's own precision of a product, as the default inside."""
    if chosen is None:
        return contextlib.nullcontext()
    one = max(chosen, key=lambda precision: precision.value) if isinstance(chosen, tuple) else chosen
    return jax.default_matmul_precision(one.name.lower() if isinstance(one, jax.lax.Precision) else one.name)


USES: dict[str, Callable[[Any, Equation, list[Content], Frame], list[Content] | None]] = {
    **dict.fromkeys(PRODUCTS, _product),
    RAGGED: _ragged,
    "gather": _gather,
    "dynamic_slice": _slice,
    "reshard": _lies,
    "mesh_cast": _lies,
}
"""By primitive: (runner, equation, inputs, frame) -> outputs, None if forms have to be dense for it."""
