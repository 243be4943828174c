"""Running a function on forms in place of its parameters, without hooks: its equations are run one by one.

A form that reaches a dot or a convolution as its weight, moved or not, goes to the door of the kernels, and no dense
array of it is made; nor of one that is concatenated with others. A lookup decodes the rows it looks up. Anything else
makes its own dense array where it is used.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lcq import jaxprs, joined
from lcq.base import is_form
from lcq.dtypes import native_tree
from lcq.forms import check_restored
from lcq.jaxprs import CALLS, CUSTOM_GRADIENT, LAYOUT, PRODUCTS, REMAT
from lcq.kernels.shards import struct_of
from lcq.laying import View, laid_out_as
from lcq.leaf import Leaf, Pieces, Way, laid_out, pieces_laid_out
from lcq.loops import CONTROL
from lcq.rules import flatten, is_number
from lcq.uses import USES, Use


class Packed:
    """A function that takes a tree with forms in place of its parameters; see `packed`."""

    def __init__(self, fn: Callable[..., Any], held: int) -> None:
        self.fn, self.held = fn, held

    def __call__(self, forms: Any, /, *args: Any, **kwargs: Any) -> Any:
        _check(forms, args, kwargs)
        return self._run(_Runner(self.held), forms, args, kwargs)

    def report(self, forms: Any, /, *args: Any, **kwargs: Any) -> list[Use]:
        """What is done with every form, in the order of the uses; nothing is computed.

        What a scan does in each of its rounds is listed once. Shape structs do in place of arrays.
        """
        _check(forms, args, kwargs)
        runner = _Runner(self.held)
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
            >>> import lcq, jax.numpy as jnp
            >>> forms = {"w": lcq.Binary().project(jnp.ones((64, 8)))}
            >>> net = packed(lambda params, x: x @ params["w"])
            >>> ready = net.lay_out(forms, jnp.ones((2, 64)))
            >>> type(ready["w"]).__name__, ready["w"].words.shape
            ('Columns', (1, 2, 8))
        """
        _check(forms, args, kwargs)
        runner = _Runner(self.held)
        jax.eval_shape(functools.partial(self._run, runner), forms, args, kwargs)
        leaves, structure = flatten(forms)
        for path, leaf in leaves.items():
            views = {view for use, view in runner.views.items() if runner.uses[use].path == path}
            others = {use.how for use in runner.uses.values() if use.path == path} - {"product"}
            if is_form(leaf) and len(views) == 1 and (view := views.pop()) is not None and others <= view.allows:
                leaves[path] = laid_out_as(leaf, view)
        return jax.tree.unflatten(structure, leaves.values())

    def _run(self, runner: "_Runner", forms: Any, args: Any, kwargs: Any) -> Any:
        leaves, structure = flatten(forms)
        args, kwargs = native_tree((args, kwargs))
        shapes = [struct_of(leaf) if is_form(leaf) else leaf for leaf in leaves.values()]
        whole = jax.make_jaxpr(self.fn, return_shape=True)
        closed, out = whole(jax.tree.unflatten(structure, shapes), *args, **kwargs)
        values = [Leaf(leaf, Way(path)) if is_form(leaf) else _array(leaf) for path, leaf in leaves.items()]
        results = runner.run(closed, [*values, *map(_array, jax.tree.leaves((args, kwargs)))])
        return jax.tree.unflatten(jax.tree.structure(out), results)


def packed(fn: Callable[..., Any], *, held: int = 64 << 20) -> Packed:
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

    What the rounds of a loop would decode again and again is decoded before it, up to `held` bytes of dense arrays in
    the order of use: memory for time. A step of a recurrent cell takes its dense time so. Few rows by large codes stay
    on codes, which are read faster; so does what does not fit, and what a scan takes slice by slice.

    Args:
        fn: (params, *args, **kwargs) -> a tree of arrays; linen's apply, an nnx or equinox module's call on its leaves,
            a plain function.
        held: bytes of dense arrays that a loop may hold; 0 keeps all products in loops on codes.

    Returns:
        A function of the same arguments, whose first may hold forms of either layout among plain arrays. Arguments are
        arrays and numbers, as under jax.jit. A form that fn returns comes back dense.

    Raises:
        ValueError: when called with a leaf that is no array, form or number, or a dict that was a form.

    Example:
        >>> import lcq, jax, jax.numpy as jnp
        >>> forms = {"w": lcq.Binary().project(jnp.array([[-1., -3.], [1., 3.]]))}
        >>> net = packed(lambda params, x: jax.nn.relu(x @ params["w"]))
        >>> jax.jit(net)(forms, jnp.array([[2., 5.]])).tolist()
        [[6.0, 6.0]]
        >>> [use[:3] for use in net.report(forms, jnp.array([[2., 5.]]))]
        [('w', 'product', (1, 1, 2, 2))]

    Source: Han, Mao & Dally, arXiv 1510.00149, section 5, for running on codes; qwix intercepts products likewise.
    """
    return Packed(fn, held)


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


def _array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf)


class _Runner:
    """Runs equations on arrays and forms, and notes what it does with forms."""

    def __init__(self, held: int) -> None:
        self.held = held
        self.uses: dict[Any, Use] = {}
        self.views: dict[Any, View | None] = {}
        self.latest: Any = None
        self.room = held
        self.looping = False
        self.split: dict[Any, Any] = {}
        """Products with concatenations, as those with their pieces."""
        self.done: dict[Any, list[Any]] = {}
        """What equations in loops give, done before them."""
        self.decoded: dict[Any, Any] = {}
        """Operands of equations in loops, dense since before them."""

    def run(self, closed: Any, ins: Sequence[Any], frame: tuple[Any, ...] = ()) -> list[Any]:
        """Dense outputs; `frame` is the calls around these equations, which tell apart uses by the same one."""
        outer, self.latest = self.latest, None  # what is computed in here must not be used out there, or the reverse
        outs = self.dense_all(self.inline(closed, ins, frame), frame)
        self.latest = outer
        return outs

    def inline(self, closed: Any, ins: Sequence[Any], frame: tuple[Any, ...]) -> list[Any]:
        return jaxprs.evaluate(closed, ins, functools.partial(self.equation, frame))

    def dense_all(self, values: Sequence[Any], frame: tuple[Any, ...]) -> list[Any]:
        """Values with every form made dense, once."""
        made = {id(value): self.dense(value, (*frame, i)) for i, value in enumerate(values)}
        return [made[id(value)] for value in values]

    def dense(self, value: Any, frame: tuple[Any, ...]) -> Any:
        if not isinstance(value, Leaf | Pieces):
            return value
        if frame in self.decoded:
            return self.decoded[frame]
        array = value.dense(self.latest)
        self.note(frame, value, "dense", array.shape)
        return array

    def decode(self, value: Any, frame: tuple[Any, ...], how: str) -> None:
        """Makes an operand of an equation in a loop dense before the loop, if there is room for it."""
        size = math.prod(value.shape) * jnp.dtype(value.dtype).itemsize
        if size <= self.room and frame not in self.decoded:
            self.room -= size
            self.decoded[frame] = value.dense(self.latest)
            self.note(frame, value, how, value.shape)

    def note(self, frame: tuple[Any, ...], leaf: Any, how: str, shape: tuple[int, ...], kind: str = "") -> None:
        if isinstance(leaf, Pieces):
            for i, part in enumerate(leaf.parts):
                if isinstance(part, Leaf):
                    self.note((*frame, i), part, how, part.shape)
            return
        lines = [jaxprs.where(part) for part in frame[::-1] if hasattr(part, "primitive")]
        self.uses[frame] = Use(leaf.way.path, how, tuple(shape), next(filter(None, lines), "output"), kind)

    def equation(self, frame: tuple[Any, ...], eqn: Any, ins: list[Any]) -> list[Any]:
        name, frame = eqn.primitive.name, (*frame, eqn)
        if frame in self.done:
            return self.done[frame]
        outs = self.on_forms(eqn, ins, frame) if any(isinstance(value, Leaf | Pieces) for value in ins) else None
        outs = jaxprs.bind(eqn, self.dense_all(ins, frame)) if outs is None else outs
        if name in PRODUCTS:
            self.latest = outs[0]
        return outs

    def on_forms(self, eqn: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any] | None:
        """An equation with forms among its inputs; None if they have to be dense."""
        name = eqn.primitive.name
        if name in CALLS and (closed := jaxprs.inner(eqn)) is not None:
            return self._call(eqn, closed, ins, frame)
        if name in CONTROL:
            return CONTROL[name](self, eqn, ins, frame)
        if name in joined.JOINS:
            return [Pieces.of(eqn, ins)] if all(not isinstance(value, Pieces) for value in ins) else None
        if name in LAYOUT and len(ins) == 1:
            return (laid_out if isinstance(ins[0], Leaf) else pieces_laid_out)(eqn, ins[0])
        return USES[name](self, eqn, ins, frame) if name in USES else None

    def _call(self, eqn: Any, closed: Any, ins: list[Any], frame: tuple[Any, ...]) -> list[Any]:
        name = eqn.primitive.name
        if name in REMAT:
            run = functools.partial(self.run, closed, frame=frame)
            return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(ins)
        if name not in CUSTOM_GRADIENT:
            return self.inline(closed, ins, frame)

        @jax.custom_jvp
        def call(*ins: Any) -> list[Any]:
            return self.run(closed, ins, frame)

        @call.defjvp
        def rule(ins: Any, tangents: Any) -> Any:
            later = _Runner(self.held)  # when this one has gone on
            return jax.jvp(lambda *ins: jaxprs.bind(eqn, later.dense_all(ins, frame)), ins, tangents)

        return call(*ins)
