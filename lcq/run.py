"""Running a function on forms in place of its parameters, without hooks: its equations are run one by one.

A form that reaches a dot or a convolution as its weight, moved or not, goes to the door of the kernels, and no dense
array of it is made. A lookup decodes the rows it looks up. Anything else makes its own dense array where it is used.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lcq import jaxprs
from lcq.base import Form, is_form
from lcq.dtypes import native_tree, wider
from lcq.forms import Codes, Sparse, Sum, check_restored
from lcq.jaxprs import CALLS, CUSTOM_GRADIENT, LAYOUT, PRODUCTS, REMAT
from lcq.kernels.columns import columns
from lcq.kernels.laid import Laid
from lcq.kernels.lists import lists
from lcq.kernels.matmul import matmul
from lcq.leaf import Leaf, Way, laid_out
from lcq.moving import move, order_of
from lcq.products import Placed, Product
from lcq.rules import flatten, is_number

_PLACES = 2
"""At more places a convolution's kernel is decoded for it: patches of its images cost more than words save."""


class Use(NamedTuple):
    """One use of a form.

    Attributes:
        path: of the form.
        how: "product" through the door of the kernels; "decoded", the kernel of a convolution; "rows" of a lookup,
            decoded; "dense".
        shape: (G, M, K, n) of a product, see `lcq.unfold`; of the array that is made.
        source: file and line.
    """

    path: str
    how: str
    shape: tuple[int, ...]
    source: str


class Packed:
    """A function that takes a tree with forms in place of its parameters; see `packed`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, forms: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check(forms, args, kwargs)
        return self._run(_Runner(), forms, args, kwargs)

    def report(self, forms: Any, /, *args: Any, **kwargs: Any) -> list[Use]:
        """What is done with every form, in the order of the uses; nothing is computed.

        What a scan does in each of its rounds is listed once. Shape structs do in place of arrays.
        """
        _check(forms, args, kwargs)
        runner = _Runner()
        jax.eval_shape(functools.partial(self._run, runner), forms, args, kwargs)
        return list(runner.uses.values())

    def lay_out(self, forms: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The tree with its forms laid out for the products they are used in; once, when a net is loaded.

        Without, every call has to bring codes into that layout first, which takes as long as reading the dense weights,
        and makes the dense array of a form of few weights. Forms that are used in several ways, or not in a product,
        stay as they are, as do factors and lists of weights that are not few; under jit all but codes do.

        Raises:
            ValueError: a leaf that is no array, form or number.

        Example:
            >>> import lcq
            >>> forms = {"w": lcq.Binary().project(jnp.ones((64, 8)))}
            >>> net = packed(lambda params, x: x @ params["w"])
            >>> ready = net.lay_out(forms, jnp.ones((2, 64)))
            >>> type(ready["w"]).__name__, ready["w"].words.shape
            ('Columns', (1, 2, 8))
        """
        _check(forms, args, kwargs)
        runner = _Runner()
        jax.eval_shape(functools.partial(self._run, runner), forms, args, kwargs)
        leaves, structure = flatten(forms)
        for path, leaf in leaves.items():
            views = {view for use, view in runner.views.items() if runner.uses[use].path == path}
            others = {use.how for use in runner.uses.values() if use.path == path} - {"product"}
            if is_form(leaf) and len(views) == 1 and (view := views.pop()) is not None and others <= view.allows:
                leaves[path] = _laid_out(leaf, view)
        return jax.tree.unflatten(structure, leaves.values())

    def _run(self, runner: "_Runner", forms: Any, args: Any, kwargs: Any) -> Any:
        leaves, structure = flatten(forms)
        args, kwargs = native_tree((args, kwargs))
        shapes = [_shape(leaf) if is_form(leaf) else leaf for leaf in leaves.values()]
        whole = jax.make_jaxpr(self.fn, return_shape=True)
        closed, out = whole(jax.tree.unflatten(structure, shapes), *args, **kwargs)
        values = [Leaf(leaf, Way(path)) if is_form(leaf) else _array(leaf) for path, leaf in leaves.items()]
        results = runner.run(closed, [*values, *map(_array, jax.tree.leaves((args, kwargs)))])
        return jax.tree.unflatten(jax.tree.structure(out), results)


def packed(fn: Callable[..., Any]) -> Packed:
    """Makes fn(params, ...) take forms in place of parameters.

        packed(fn)(forms, x) = fn(decompress(forms), x)

    up to rounding: a product of x [M, K] with a form of W [K, n] is `matmul(x, form)` of the kernels, which reads the
    codes and makes no dense W; so is a convolution by a window of one pixel. Of a wider one the kernel is decoded where
    it is used. Weights may be transposed, reshaped, sliced, reversed and cast on their way. A lookup of rows, as of an
    embedding, decodes these rows. Any other use makes the dense array where it is used. `packed(fn).report(forms, x)`
    tells which is which.

    The equations of fn are run one by one: compile the result with jax.jit, as any function. It can be mapped,
    differentiated with respect to its inputs, and scanned; forms under a scan over stacked layers are taken apart
    slice by slice. A function with a gradient rule of its own keeps it; if a form enters it, its gradient is taken on
    the dense array, by its own rule.

    Pass forms as arguments: XLA may unfold what is closed over when it compiles. Weights that have to be dense are made
    one at a time where XLA keeps the order it is given (on CPUs jax 0.10 does not), and under a scan anyway.

    Args:
        fn: (params, *args, **kwargs) -> a tree of arrays; linen's apply, an nnx or equinox module's call on its leaves,
            a plain function.

    Returns:
        A function of the same arguments, whose first may hold forms of either layout among plain arrays. Arguments are
        arrays and numbers, as under jax.jit. A form that fn returns comes back dense.

    Raises:
        ValueError: when called with a leaf that is no array, form or number, or a dict that was a form.

    Example:
        >>> import lcq
        >>> forms = {"w": lcq.Binary().project(jnp.array([[-1., -3.], [1., 3.]]))}
        >>> net = packed(lambda params, x: jax.nn.relu(x @ params["w"]))
        >>> jax.jit(net)(forms, jnp.array([[2., 5.]])).tolist()
        [[6.0, 6.0]]
        >>> [use[:3] for use in net.report(forms, jnp.array([[2., 5.]]))]
        [('w', 'product', (1, 1, 2, 2))]

    Source: Han, Mao & Dally, arXiv 1510.00149, section 5, for running on codes; qwix intercepts products likewise.
    """
    return Packed(fn)


def _check(forms: Any, args: Any, kwargs: Any) -> None:
    check_restored(forms)
    pairs, _ = jax.tree_util.tree_flatten_with_path({"params": forms, "args": args, "kwargs": kwargs})
    for keys, leaf in pairs:
        if not is_number(leaf):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(
                f"{path}: wanted an array, a form or a number; got {type(leaf).__name__} {str(leaf)[:60]!r}; close "
                "over it: packed(lambda params, x: fn(params, x, ...))"
            )


class _View(NamedTuple):
    """How a leaf is seen as matrices [K, n]: the last of its axes, in this order, are their rows and columns."""

    axes: tuple[int, ...]
    columns: int

    @property
    def allows(self) -> set[str]:
        """Other uses than products for which it can stay so: rows that are whole columns of the matrix."""
        return {"rows"} if self.axes[-1] == 0 else set()


def _laid_out(form: Form, view: _View) -> Form:
    """Codes as `Columns` and few weights as `Lists`, those in a sum too."""
    if isinstance(form, Sum):
        return dataclasses.replace(form, parts=tuple(_laid_out(part, view) for part in form.parts))
    if not isinstance(form, Codes | Sparse):
        return form
    lead = len(form.shape) - len(view.axes)
    order = (*range(lead), *(lead + axis for axis in view.axes))
    matrix = move(form, lambda w: w.transpose(order).reshape(*w.shape[:lead], -1, view.columns))
    laid = columns(matrix) if isinstance(matrix, Codes) else lists(matrix) if isinstance(matrix, Sparse) else None
    return form if laid is None else dataclasses.replace(laid, tail=tuple(form.shape[lead:]), axes=view.axes)


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


def _shape(form: Form) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(form.shape), jnp.dtype(form.dtype))


class _Runner:
    """Runs equations on arrays and forms, and notes what it does with forms."""

    def __init__(self) -> None:
        self.uses: dict[Any, Use] = {}
        self.views: dict[Any, _View | None] = {}
        self.latest: Any = None

    def run(self, closed: Any, ins: Sequence[Any], frame: tuple[Any, ...] = ()) -> list[Any]:
        """Dense outputs; `frame` is the calls around these equations, which tell apart uses by the same one."""
        outer, self.latest = self.latest, None  # what is computed in here must not be used out there, or the reverse
        outs = self.dense_all(self._inline(closed, ins, frame), frame)
        self.latest = outer
        return outs

    def _inline(self, closed: Any, ins: Sequence[Any], frame: tuple[Any, ...]) -> list[Any]:
        return jaxprs.evaluate(closed, ins, functools.partial(self._equation, frame))

    def dense_all(self, values: Sequence[Any], frame: tuple[Any, ...]) -> list[Any]:
        """Values with every form made dense, once."""
        made = {id(value): self._dense(value, (*frame, i)) for i, value in enumerate(values)}
        return [made[id(value)] for value in values]

    def _dense(self, value: Any, frame: tuple[Any, ...]) -> Any:
        if not isinstance(value, Leaf):
            return value
        array = value.dense(self.latest)
        self._note(frame, value, "dense", array.shape)
        return array

    def _note(self, frame: tuple[Any, ...], leaf: Leaf, how: str, shape: tuple[int, ...]) -> None:
        lines = [jaxprs.where(part) for part in frame[::-1] if hasattr(part, "primitive")]
        self.uses[frame] = Use(leaf.way.path, how, tuple(shape), next(filter(None, lines), "output"))

    def _equation(self, frame: tuple[Any, ...], eqn: Any, ins: list[Any]) -> list[Any]:
        name, frame = eqn.primitive.name, (*frame, eqn)
        outs = self._on_forms(eqn, ins, frame) if any(isinstance(value, Leaf) for value in ins) else None
        outs = jaxprs.bind(eqn, self.dense_all(ins, frame)) if outs is None else outs
        if name in PRODUCTS:
            self.latest = outs[0]
        return outs

    def _on_forms(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any] | None:
        """An equation with forms among its inputs; None if they have to be dense."""
        name = eqn.primitive.name
        if name in CALLS and (closed := jaxprs.inner(eqn)) is not None:
            return self._call(eqn, closed, ins, frame)
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, ins, frame)
        if name in PRODUCTS:
            return self._product(eqn, ins, frame)
        if name in ("gather", "dynamic_slice") and isinstance(ins[0], Leaf):
            return (self._gather if name == "gather" else self._slice)(eqn, ins, frame)
        if name in LAYOUT and len(ins) == 1:
            return laid_out(eqn, ins[0])
        return None

    def _call(self, eqn: Any, closed: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any]:
        name = eqn.primitive.name
        if name in REMAT:
            run = functools.partial(self.run, closed, frame=frame)
            return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(ins)
        if name not in CUSTOM_GRADIENT:
            return self._inline(closed, ins, frame)

        @jax.custom_jvp
        def call(*ins: Any) -> list[Any]:
            return self.run(closed, ins, frame)

        @call.defjvp
        def rule(ins: Any, tangents: Any) -> Any:
            later = _Runner()  # when this one has gone on
            return jax.jvp(lambda *ins: jaxprs.bind(eqn, later.dense_all(ins, frame)), ins, tangents)

        return call(*ins)

    def _product(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any] | None:
        """Y[g] = X[g] W[g], by the door of the kernels."""
        sides = [side for side in (1, 0) if isinstance(ins[side], Leaf) and jaxprs.weighs(eqn, side)]
        if not sides or isinstance(eqn.params["precision"], jax.lax.DotAlgorithm):
            return None  # of an algorithm that is spelled out nothing is known here
        side, leaf, dtype = sides[0], ins[sides[0]], eqn.outvars[0].aval.dtype
        product = _product_of(eqn, side, leaf.way.path)
        g, m, k, n = product.shape
        lead = (g,) if g > 1 else ()
        if m > _PLACES and product.window > 1:
            self._note((*frame, side), leaf, "decoded", product.w.shape)
            return jaxprs.bind(eqn, [self._dense(ins[0], (*frame, 0)), leaf.dense(self.latest)])

        def matrix(w: Any) -> Any:
            return product.weights(leaf.way(w)).reshape(*lead, k, n)

        form = move(leaf.form, matrix)
        if form is None:
            return None
        self._note((*frame, side), leaf, "product", product.shape)
        axes = None if isinstance(leaf.form, Laid) else order_of(matrix, leaf.form.shape, len(lead))
        self.views[(*frame, side)] = None if axes is None else _View(axes, n)
        x = product.inputs(self._dense(ins[1 - side], (*frame, 1 - side)))
        if wider(x.dtype, form.dtype) != dtype:
            x = x.astype(dtype)  # an accumulator wider than the operands
        with _precision(eqn.params["precision"]):
            y = matmul(x.reshape(*lead, m, k), form)
        back = jax.linear_transpose(product.outputs, product.y)  # of a permutation it is the inverse
        return list(back(y.astype(dtype).reshape(g, m, n)))

    def _gather(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any] | None:
        """A lookup of whole rows decodes these; rows that do not exist are filled as the lookup would."""
        table, indices = ins
        numbers, aval = eqn.params["dimension_numbers"], eqn.outvars[0].aval
        length, *rest = eqn.invars[0].aval.shape
        whole = numbers.collapsed_slice_dims == numbers.start_index_map == (0,) and not numbers.operand_batching_dims
        last = tuple(range(len(aval.shape) - len(rest), len(aval.shape)))
        if not whole or tuple(eqn.params["slice_sizes"]) != (1, *rest) or tuple(numbers.offset_dims) != last:
            return None
        places = indices[..., 0]
        found = table.rows(jnp.clip(places, 0, length - 1).reshape(-1))
        if found is None:
            return None
        self._note(frame, table, "rows", aval.shape)
        rows = found.dense().reshape(aval.shape)
        if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
            fill = eqn.params["fill_value"]
            there = ((places >= 0) & (places < length)).reshape(*places.shape, *(1 for _ in rest))
            rows = jnp.where(there, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))
        return [rows]

    def _slice(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any] | None:
        """Rows from one that is computed, such as the layer of a round: the form of these rows."""
        table, start, *_ = ins
        length, *rest = eqn.invars[0].aval.shape
        size, *sizes = eqn.params["slice_sizes"]
        if sizes != rest:
            return None
        found = table.rows(jnp.clip(start, 0, length - size) + jnp.arange(size))
        return None if found is None else [found]

    def _scan(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any]:
        """The scan again, its body on forms: those under it are taken apart, others are constants to it."""
        closed, fixed, carries = jaxprs.scan_of(eqn)
        ends = (*frame, "in")
        carry = self.dense_all(ins[fixed : fixed + carries], ends)
        xs = [self._apart(value, (*ends, "xs", i)) for i, value in enumerate(ins[fixed + carries :])]

        def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
            outs = self.run(closed, [*ins[:fixed], *carry, *xs], frame)
            return outs[:carries], outs[carries:]

        how = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
        carry, ys = jax.lax.scan(body, carry, xs, **how)
        return [*carry, *ys]

    def _apart(self, value: Any, frame: tuple[Any, ...]) -> Any:
        """What a scan takes apart: an array, or the stacked forms of a form's slices."""
        slices = value.stacked() if isinstance(value, Leaf) else None
        return self._dense(value, frame) if slices is None else slices

    def _while(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any] | None:
        """The loop again, forms being constants to it; one that was mapped over its condition is left as it is."""
        first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
        if jaxprs.opened(condition)[0].outvars[0].aval.shape:
            return None

        def go_on(carry: list[Any]) -> Any:
            return self.run(condition, [*ins[:first], *carry], (*frame, "cond"))[0]

        def step(carry: list[Any]) -> list[Any]:
            return self.run(body, [*ins[first : first + second], *carry], (*frame, "body"))

        return jax.lax.while_loop(go_on, step, self.dense_all(ins[first + second :], (*frame, "in")))

    def _cond(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any]:
        index, *operands = ins
        branches = [
            functools.partial(lambda i, closed, *ins: self.run(closed, ins, (*frame, i)), i, closed)
            for i, closed in enumerate(eqn.params["branches"])
        ]
        return jax.lax.switch(index.astype(jnp.int32), branches, *operands)


_CONTROL = {"scan": _Runner._scan, "while": _Runner._while, "cond": _Runner._cond}


def _product_of(eqn: Any, side: int, path: str) -> Product:
    """An equation as the product of X and a weight, which is on one of its sides."""
    y, x, w = (jaxprs.struct(v.aval) for v in (eqn.outvars[0], eqn.invars[1 - side], eqn.invars[side]))
    params = eqn.primitive.get_bind_params(eqn.params)
    return Product(0, Placed(path), eqn.primitive, params, side, x, w, y, jaxprs.where(eqn))


def _precision(chosen: Any) -> contextlib.AbstractContextManager[Any]:
    """The function's own precision of a product, as the default inside."""
    if chosen is None:
        return contextlib.nullcontext()
    one = max(chosen, key=lambda precision: precision.value) if isinstance(chosen, tuple) else chosen
    return jax.default_matmul_precision(one.name.lower() if isinstance(one, jax.lax.Precision) else one.name)
