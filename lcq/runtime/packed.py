"""`packed`: a function that takes forms in place of its parameters."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from lcq.forms.base import is_form
from lcq.forms.dtypes import native_tree
from lcq.forms.restored import check_restored
from lcq.kernels.api import way
from lcq.kernels.shards import struct_of
from lcq.runtime.interpreter import Runner, value_of
from lcq.runtime.prepacking import prepacked_as
from lcq.runtime.traced_form import Provenance, TracedForm
from lcq.runtime.uses import Use
from lcq.tree.aliases import Forms
from lcq.tree.paths import flatten, is_number


class Packed:
    """A function that takes a tree with forms in place of its parameters; see `packed`."""

    def __init__(self, fn: Callable[..., PyTree], held: int) -> None:
        self.fn, self.held = fn, held

    def __call__(self, forms: Forms, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        _check(forms, args, kwargs)
        return self._run(Runner(self.held), forms, args, kwargs)

    def report(self, forms: Forms, /, *args: PyTree, **kwargs: PyTree) -> list[Use]:
        """What is done with every form, in the order of the uses; nothing is computed.

        What a scan does in each of its rounds is listed once. Shape structs do in place of arrays.
        """
        _check(forms, args, kwargs)
        runner = self._seen(forms, args, kwargs)
        for here, (form, rows) in runner.multiplied.items():
            runner.uses[here] = runner.uses[here]._replace(kernel=way(form, rows))
        return list(runner.uses.values())

    def prepack(self, forms: Forms, /, *args: PyTree, **kwargs: PyTree) -> PyTree:
        """The tree with its forms prepacked for the products they are used in; once, when a net is loaded.

        Without, every call has to bring codes into that layout first, which takes as long as reading the dense weights,
        and makes the dense array of a form of few weights. Forms that are used in several ways, or not in a product,
        stay as they are, as do factors and lists of weights that are not few; under jit all but codes do. The kernel of
        a convolution is prepacked so that decoding it is one pass. Arrays of numpy go to the device.

        Raises:
            ValueError: a leaf that is no array, form or number.

        Example:
            >>> import lcq, jax.numpy as jnp
            >>> forms = {"w": lcq.Binary().project(jnp.ones((64, 8)))}
            >>> net = packed(lambda params, x: x @ params["w"])
            >>> ready = net.prepack(forms, jnp.ones((2, 64)))
            >>> type(ready["w"]).__name__, ready["w"].words.shape
            ('Columns', (1, 2, 8))
        """
        _check(forms, args, kwargs)
        runner = self._seen(forms, args, kwargs)
        leaves, structure = flatten(forms)
        for path, leaf in leaves.items():
            uses = {here: use.how for here, use in runner.uses.items() if use.path == path}
            views = {runner.views[here] for here in uses if here in runner.views}
            others = {how for here, how in uses.items() if here not in runner.views}
            if is_form(leaf) and len(views) == 1 and (view := views.pop()) is not None and others <= view.allows:
                leaves[path] = prepacked_as(leaf, view)
            if any(isinstance(a, np.ndarray) for a in jax.tree.leaves(leaves[path])):
                leaves[path] = jax.tree.map(jnp.asarray, leaves[path])
        return jax.tree.unflatten(structure, leaves.values())

    def _seen(self, forms: Forms, args: PyTree, kwargs: PyTree) -> Runner:
        """What has run the function on shapes."""
        runner, (leaves, structure) = Runner(self.held), flatten(forms)
        native_forms = jax.tree.unflatten(structure, leaves.values())
        jax.eval_shape(functools.partial(self._run, runner), native_forms, *native_tree((args, kwargs)))
        return runner

    def _run(self, runner: "Runner", forms: Forms, args: PyTree, kwargs: PyTree) -> PyTree:
        leaves, structure = flatten(forms)
        args, kwargs = native_tree((args, kwargs))
        shapes = [struct_of(leaf) if is_form(leaf) else leaf for leaf in leaves.values()]
        whole = jax.make_jaxpr(self.fn, return_shape=True)
        closed, out = whole(jax.tree.unflatten(structure, shapes), *args, **kwargs)
        values = [
            TracedForm(leaf, Provenance(path)) if is_form(leaf) else value_of(leaf) for path, leaf in leaves.items()
        ]
        results = runner.run(closed, [*values, *map(value_of, jax.tree.leaves((args, kwargs)))])
        return jax.tree.unflatten(jax.tree.structure(out), results)


def packed(fn: Callable[..., PyTree], *, held: int = 64 << 20) -> Packed:
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
        ValueError: fn is no function, or held no number of bytes; when called with a leaf that is no array, form or
            number, or a dict that was a form.

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
    if not callable(fn):
        raise ValueError(
            f"expected a function of (params, ...), got {type(fn).__name__}; forms are an argument of what comes back: "
            "packed(fn)(forms, x)"
        )
    if not isinstance(held, int | float) or held < 0:
        raise ValueError(f"expected held= a number of bytes, 0 or more, got {held!r}; 64 MiB are 64 << 20")
    return Packed(fn, held)


def _check(forms: Forms, args: PyTree, kwargs: PyTree) -> None:
    check_restored(forms)
    pairs, _ = jax.tree_util.tree_flatten_with_path({"params": forms, "args": args, "kwargs": kwargs})
    for keys, leaf in pairs:
        if not is_number(leaf):
            path = jax.tree_util.keystr(keys, simple=True, separator="/")
            raise ValueError(
                f"{path}: expected an array, a form or a number, got {type(leaf).__name__} {str(leaf)[:60]!r}; close "
                "over it: packed(lambda params, x: fn(params, x, ...))"
            )
