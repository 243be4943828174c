"""Forms under changes of layout: the form of a moved, cut or picked leaf, made without its dense array.

What moves is the leaf's arrays of codes, masks or values; tables of one entry per block follow their blocks. Factors
stay factors while each matrix of the result is a block of rows and columns of theirs, or its transpose. A form laid out
for products can only become the matrix it was laid out as. Whatever cannot be said is None, and the caller's to make
dense.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from lcq.forms import Cast, Codes, Factors, Sparse, Sum, bitpack
from lcq.forms.base import Form
from lcq.forms.dtypes import own_promotion
from lcq.forms.factors import matrix_shape
from lcq.kernels.base import Laid
from lcq.tracing import jaxpr

_TABLES = ("levels", "scale", "zero")
_IN_ORDER = {"reshape", "squeeze", "expand_dims"}


@dataclasses.dataclass(frozen=True)
class _Move:
    """A function that moves or drops elements of an array of `shape`."""

    shape: tuple[int, ...]
    function: Callable[[Any], Any]

    @functools.cached_property
    def result(self) -> tuple[int, ...]:
        return tuple(jax.eval_shape(self.function, jax.ShapeDtypeStruct(self.shape, jnp.int32)).shape)

    @functools.cached_property
    def in_order(self) -> bool:
        """Whether no element changes its place in row-major order."""
        closed = jax.make_jaxpr(self.function)(jax.ShapeDtypeStruct(self.shape, jnp.int32))
        return all(eqn.primitive.name in _IN_ORDER or _idle(eqn) for eqn in closed.eqns)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """For each element of the result its place in the array, in row-major order."""
        numbers = np.arange(math.prod(self.shape), dtype=np.int32)
        if self.in_order:
            return numbers.reshape(self.result)
        with jax.ensure_compile_time_eval():
            return np.asarray(self.function(jnp.asarray(numbers.reshape(self.shape))))

    def tables(self, form: Form) -> dict[str, Any] | None:
        """The tables of a form, for the blocks of the result; None if their equal blocks are as small as elements.

        Where one of the form's blocks fills several of the result, as the channels of a kernel [inputs, heads, units]
        do once its heads and units are the columns of a matrix, its entry is there several times.
        """
        rank, given = len(self.shape), _tables(form)
        counts = next((a.shape[:rank] for a in given.values()), ())
        if math.prod(counts) == 1:
            return {name: a.reshape((1,) * len(self.result) + a.shape[rank:]) for name, a in given.items()}
        index = _blocks(_spread(counts, self.shape).reshape(-1)[self.places])
        if index is None:
            return None
        return {name: a.reshape(-1, *a.shape[rank:])[index] for name, a in given.items()}


def _idle(eqn: Any) -> bool:
    """Whether an equation is a transpose of nothing but axes of length 1."""
    if eqn.primitive.name != "transpose":
        return False
    long = [axis for axis in eqn.params["permutation"] if eqn.invars[0].aval.shape[axis] > 1]
    return long == sorted(long)


def _tables(form: Any) -> dict[str, Array]:
    form = form.with_zeros() if isinstance(form, Codes) else form
    return {name: jnp.asarray(a) for name in _TABLES if (a := getattr(form, name, None)) is not None}


def _spread(counts: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """The number of its block for each element."""
    numbers = np.arange(math.prod(counts), dtype=np.int32).reshape(counts)
    for axis, (count, length) in enumerate(zip(counts, shape, strict=True)):
        numbers = numbers.repeat(length // count, axis)
    return numbers


def _blocks(numbers: np.ndarray) -> np.ndarray | None:
    """One number for each block, the largest equal blocks within which numbers are equal.

    None if so many entries are no shorter than the elements, unless it is one for each column, which never is long.
    """
    size = numbers.size
    for axis, length in enumerate(numbers.shape):
        lines = np.moveaxis(numbers, axis, 0)
        changes = (lines[1:] != lines[:-1]).reshape(length - 1, -1).any(1)
        numbers = numbers.take(range(0, length, np.gcd.reduce([*np.flatnonzero(changes) + 1, length])), axis)
    columns = math.prod(numbers.shape[:-1]) == 1
    return numbers if columns or 2 * numbers.size <= size or len(np.unique(numbers)) == numbers.size else None


@own_promotion()
def move(form: Form, function: Callable[[Any], Any]) -> Form | None:
    """The form of function(form.dense()), for a function that only moves or drops elements.

    Args:
        form: of a leaf, in either layout; stays in the stored one where no element changes its place.
        function: array -> array, of any dtype; at least one element is left.

    Returns:
        None if this kind of form cannot say it.

    Example:
        >>> import lcq
        >>> form = lcq.LowRank(1).project(jnp.ones((4, 3)))
        >>> turned = move(form, jnp.transpose)
        >>> turned.left.shape, turned.right.shape
        ((3, 1), (1, 4))
    """
    if not jaxpr.is_known(form.shape):  # as of rows that are looked up for a symbolic batch
        return None
    return _move(form, _Move(tuple(form.shape), function))


def _move(form: Form, moved: _Move) -> Form | None:
    if isinstance(form, Laid):
        return _move_laid(form, moved)
    if moved.in_order and moved.result == moved.shape:
        return form
    if isinstance(form, Factors):
        return _move_factors(form, moved)
    if isinstance(form, Cast):
        return dataclasses.replace(form, values=moved.function(jnp.asarray(form.values)))
    if isinstance(form, Sum):
        return _each(form, lambda part: _move(part, moved))
    tables = moved.tables(form) if isinstance(form, Codes | Sparse) else None
    if tables is None:
        return None
    assert isinstance(form, Codes | Sparse)
    if form.packed is not None and moved.in_order and not (isinstance(form, Sparse) and form.group):
        return _replace(form, packed=moved.result, **tables)
    return _change(form.unpack(), moved.function, tables)


def _replace(form: Any, **changes: Any) -> Form:
    return dataclasses.replace(form, **changes)


def _change(form: Any, function: Callable[[Any], Any], tables: dict[str, Any]) -> Form:
    """A working form of codes or chosen values with its leaf-shaped arrays changed."""
    if isinstance(form, Codes):
        return dataclasses.replace(form, codes=function(form.codes), **tables)
    return dataclasses.replace(form, mask=function(form.mask), values=function(form.values), group=(), **tables)


def _each(form: Sum, change: Callable[[Form], Form | None]) -> Form | None:
    parts = [part for part in map(change, form.parts) if part is not None]
    return dataclasses.replace(form, parts=tuple(parts)) if len(parts) == len(form.parts) else None


def _move_factors(form: Factors, moved: _Move) -> Form | None:
    """Each matrix of the result as rows r, r+1, ... and columns c, c+1, ... of one of the form's, or its transpose."""
    if form.right is None:
        whole = Cast(form.dense(), dtype=form.dtype)
        return _move(whole, moved)
    if len(moved.result) not in (2, 3):
        return None
    rows, columns = matrix_shape(form.tail, form.separable)
    places = moved.places
    if form.separable:
        kh, kw, cin, cout = form.tail
        order = np.arange(math.prod(form.shape)).reshape(-1, kh, kw, cin, cout).swapaxes(2, 3)
        places = np.argsort(order.reshape(-1))[places]
    for turned in (False, True):
        cut = places.swapaxes(-1, -2) if turned else places
        lead, (k, n) = cut.shape[:-2], cut.shape[-2:]
        first = cut.reshape(-1, k, n)[:, :1, :1]
        matrix, rest = np.divmod(first.reshape(-1), rows * columns)
        row, column = np.divmod(rest, columns)
        grid = first + np.arange(k)[:, None] * columns + np.arange(n)
        if (row + k > rows).any() or (column + n > columns).any() or (grid.reshape(cut.shape) != cut).any():
            continue
        left = _taken(form.left, matrix, row, k, -2).reshape(*lead, k, -1)
        right = _taken(form.right, matrix, column, n, -1).reshape(*lead, -1, n)
        if turned:
            left, right = jnp.swapaxes(right, -1, -2), jnp.swapaxes(left, -1, -2)
        return dataclasses.replace(form, left=left, right=right, rank=None, tail=moved.result[-2:], separable=False)
    return None


def _taken(a: Any, matrix: np.ndarray, start: np.ndarray, length: int, axis: int) -> Array:
    """[G, ...]: of matrix[g] the `length` rows or columns from start[g]."""
    a = jnp.asarray(a)
    a = a.reshape(-1, *a.shape[-2:])
    if len(a) != len(matrix) or (matrix != np.arange(len(a))).any():
        a = a[matrix]
    if length == a.shape[axis]:
        return a
    index = start[:, None] + np.arange(length)
    return jnp.take_along_axis(a, jnp.asarray(index[:, :, None] if axis == -2 else index[:, None]), axis)


def _move_laid(form: Laid, moved: _Move) -> Form | None:
    stacked, matrix = form.stacked, (*form.stacked, form.rows, form.columns)
    if moved.result not in (matrix, matrix[-2:], (1, *matrix[-2:])):
        return None
    if not moved.in_order or form.axes != tuple(range(len(form.tail))):
        order = np.arange(math.prod(moved.shape), dtype=np.int32).reshape(-1, *form.tail)
        order = order.transpose(0, *(axis + 1 for axis in form.axes))
        if not np.array_equal(order.reshape(-1), moved.places.reshape(-1)):
            return None
    reshaped = dataclasses.replace(form, tail=matrix[-2:], axes=(0, 1))
    return jax.tree.map(lambda a: a.reshape(*moved.result[:-2], *a.shape[len(stacked) :]), reshaped)


def order_of(function: Callable[[Any], Any], shape: tuple[int, ...], lead: int) -> tuple[int, ...] | None:
    """The order of a leaf's axes behind the first `lead` in which a function only reshapes it; None if there is none.

    Example:
        >>> order_of(lambda w: w.transpose(2, 0, 1).reshape(4, 6), (2, 3, 4), 0)
        (2, 0, 1)
    """
    moved, rest = _Move(shape, function), tuple(range(len(shape) - lead))
    if moved.in_order:
        return rest
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    for axes in itertools.permutations(rest):
        order = numbers.transpose(*range(lead), *(lead + axis for axis in axes))
        if np.array_equal(order.reshape(-1), moved.places.reshape(-1)):
            return axes
    return None


@own_promotion()
def pick(form: Form, rows: Int[Array, " R"]) -> Form | None:
    """The form of form.dense()[rows], for rows that exist; of packed codes whole words are picked.

    Returns:
        None if this kind of form cannot say it.

    Example:
        >>> import lcq
        >>> form = lcq.Binary().project(jnp.arange(-4., 4.).reshape(4, 2))
        >>> pick(form, jnp.array([3, 0])).dense().tolist()
        [[2.0, 2.0], [-2.0, -2.0]]
    """
    length, *rest = form.shape
    if isinstance(form, Cast):
        return dataclasses.replace(form, values=jnp.asarray(form.values)[rows])
    if isinstance(form, Sum):
        return _each(form, lambda part: pick(part, rows))
    if isinstance(form, Factors):
        return _pick_factors(form, rows)
    if isinstance(form, Laid):
        return _pick_laid(form, rows)
    if not isinstance(form, Codes | Sparse):
        return None
    tables = {name: a if a.shape[0] == 1 else a[rows // (length // a.shape[0])] for name, a in _tables(form).items()}
    words, count = _words(form), rows.shape[0]
    if words is None:
        return _change(form.unpack(), lambda a: a[rows], tables)
    assert isinstance(form, Codes)
    if not jaxpr.is_known((count,)):  # words of a number of rows that is not known are nobody's to unpack
        width = bitpack.width(form.size_of_table)
        each = jax.vmap(lambda row: bitpack.unpack(row, width, tuple(rest)))(words[rows])
        return _replace(form, codes=each, packed=None, **tables)
    return _replace(form, codes=words[rows].reshape(-1), packed=(count, *rest), **tables)


def _words(form: Form) -> Array | None:
    """Packed codes, the words of each row of the leaf apart, if no word holds codes of two rows."""
    if not isinstance(form, Codes) or form.packed is None:
        return None
    words = jnp.asarray(form.codes)
    bits = (form.size_of_table - 1).bit_length() * math.prod(form.packed[1:])
    return words.reshape(form.packed[0], -1) if bits and bits % 32 == 0 else None


def _pick_factors(form: Factors, rows: Array) -> Form | None:
    left, length = jnp.asarray(form.left), form.shape[0]
    stacked = left.ndim > 2
    if stacked:
        rank = None if form.rank is None else form.rank[rows]
        right = None if form.right is None else jnp.asarray(form.right)[rows]
        return dataclasses.replace(form, left=left[rows], right=right, rank=rank)
    if form.separable:
        return None
    picked = left.reshape(length, -1, left.shape[-1])[rows].reshape(-1, left.shape[-1])
    return dataclasses.replace(form, left=picked, rank=None, tail=(rows.shape[0], *form.tail[1:]))


def _pick_laid(form: Laid, rows: Array) -> Form | None:
    if form.stacked:
        return jax.tree.map(lambda a: a[rows], form)
    if form.axes[-1] != 0 or form.tail[0] != form.columns:
        return None
    return dataclasses.replace(form.take(rows), tail=(rows.shape[0], *form.tail[1:]), axes=form.axes)


@own_promotion()
def stack(form: Form) -> Form | None:
    """The forms of all rows of a leaf, their arrays stacked, as scan and vmap take them apart.

    Of packed codes the words are taken apart, if no word holds codes of two rows; else codes are unpacked.

    Returns:
        None if this kind of form cannot say it.

    Example:
        >>> import lcq
        >>> form = lcq.Binary().project(jnp.arange(-4., 4.).reshape(4, 2))
        >>> jax.vmap(lambda row: row.dense().sum())(stack(form)).tolist()
        [-4.0, -4.0, 4.0, 4.0]
    """
    length, *rest = form.shape
    if isinstance(form, Cast):
        return form
    if isinstance(form, Sum):
        return _each(form, stack)
    if isinstance(form, Factors):
        return _stack_factors(form)
    if isinstance(form, Laid):
        return form if form.stacked else None
    if not isinstance(form, Codes | Sparse):
        return None
    tables = {name: jnp.repeat(a, length // a.shape[0], 0) for name, a in _tables(form).items()}
    if (words := _words(form)) is not None:
        return _replace(form, codes=words, packed=tuple(rest), **tables)
    return _change(form.unpack(), lambda a: a, tables)


def _stack_factors(form: Factors) -> Form | None:
    left, length = jnp.asarray(form.left), form.shape[0]
    if left.ndim > 2:
        return form
    if form.separable or len(form.tail) < 3:
        return None
    left = left.reshape(length, -1, left.shape[-1])
    right = form.right
    if right is not None:
        right = jnp.broadcast_to(jnp.asarray(right), (length, *right.shape))
    return dataclasses.replace(form, left=left, right=right, rank=None, tail=form.tail[1:])
