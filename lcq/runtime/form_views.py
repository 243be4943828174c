"""Forms under changes of layout: the form of a moved or cut leaf, or of some rows of it, made without its dense array.

What a form can say itself are its methods `relayout`, `take_rows` and `unstack`; whatever cannot be said is None, and
the caller's to make dense.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Int

from lcq.forms.base import Form
from lcq.forms.dtypes import own_promotion
from lcq.forms.relayout import Relayout
from lcq.tracing import jaxpr


@own_promotion()
def relayout(form: Form, function: Callable[[Array], Array]) -> Form | None:
    """The form of function(form.dense()), for a function that only moves or drops elements.

    Args:
        form: of a leaf, in either layout; stays in the stored one where no element changes its place.
        function: array -> array, of any dtype; at least one element is left.

    Returns:
        None if this kind of form cannot say it.

    Example:
        >>> import lcq, jax.numpy as jnp
        >>> form = lcq.LowRank(1).project(jnp.ones((4, 3)))
        >>> turned = relayout(form, jnp.transpose)
        >>> turned.left.shape, turned.right.shape
        ((3, 1), (1, 4))
    """
    if not jaxpr.is_known(form.shape):  # as of rows that are looked up for a symbolic batch
        return None
    return form.relayout(Relayout(tuple(form.shape), function))


@own_promotion()
def take_rows(form: Form, rows: Int[Array, " R"]) -> Form | None:
    """The form of form.dense()[rows], for rows that exist; of packed codes whole words are taken.

    Returns:
        None if this kind of form cannot say it.

    Example:
        >>> import lcq, jax.numpy as jnp
        >>> form = lcq.Binary().project(jnp.arange(-4., 4.).reshape(4, 2))
        >>> take_rows(form, jnp.array([3, 0])).dense().tolist()
        [[2.0, 2.0], [-2.0, -2.0]]
    """
    return form.take_rows(rows)


@own_promotion()
def unstack(form: Form) -> Form | None:
    """The forms of all rows of a leaf, their arrays stacked, as scan and vmap take them apart.

    Of packed codes the words are taken apart, if no word holds codes of two rows; else codes are unpacked.

    Returns:
        None if this kind of form cannot say it.

    Example:
        >>> import jax, lcq, jax.numpy as jnp
        >>> form = lcq.Binary().project(jnp.arange(-4., 4.).reshape(4, 2))
        >>> jax.vmap(lambda row: row.dense().sum())(unstack(form)).tolist()
        [-4.0, -4.0, 4.0, 4.0]
    """
    return form.unstack()


def order_of(function: Callable[[Array], Array], shape: tuple[int, ...], lead: int) -> tuple[int, ...] | None:
    """The order of a leaf's axes behind the first `lead` in which a function only reshapes it; None if there is none.

    Example:
        >>> order_of(lambda w: w.transpose(2, 0, 1).reshape(4, 6), (2, 3, 4), 0)
        (2, 0, 1)
    """
    change, rest = Relayout(shape, function), tuple(range(len(shape) - lead))
    if change.in_order:
        return rest
    numbers = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    for axes in itertools.permutations(rest):
        order = numbers.transpose(*range(lead), *(lead + axis for axis in axes))
        if np.array_equal(order.reshape(-1), change.places.reshape(-1)):
            return axes
    return None
